// The oracle's oracle: attention as explicit matrices, straight from the formulas, and gradients as finite differences.
#include "kernels/attention_case.h"

namespace heed::test {
namespace {

double at(const Tensor& t, int64_t i) { return number(t, std::span<const int64_t>(&i, 1)); }
double at(const Tensor& t, int64_t i, int64_t j) {
  const int64_t index[] = {i, j};
  return number(t, index);
}

/// One head of one sequence: logits [n][m], −∞ where hidden, and the part that names each pair.
struct Head {
  int64_t n, m, q_row, k_row, v_row;
  std::vector<std::vector<double>> logits;
  std::vector<std::vector<int>> part;

  Head(const AttentionCase& c, int64_t s, int64_t head) {
    const int64_t qs = s * c.h + head, ks = s * c.g + c.k_head[size_t(head)];
    n = c.q.view.length(qs);
    m = c.k.view.length(ks);
    q_row = c.q.view.begin(qs);
    k_row = c.k.view.begin(ks);
    v_row = c.v.view.begin(s * c.g_v + c.v_head[size_t(head)]);
    logits.assign(size_t(n), std::vector<double>(size_t(m), -INFINITY));
    part.assign(size_t(n), std::vector<int>(size_t(m), -1));
    const Mods& mods = c.mods;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const double qp = mods.q_pos ? at(mods.q_pos, q_row + i) : double(m - n + i),
                     kp = mods.k_pos ? at(mods.k_pos, k_row + j) : double(j);
        part[size_t(i)][size_t(j)] = c.plan.part_of[size_t(q_row + i)][size_t(j)];
        if (part[size_t(i)][size_t(j)] < 0) continue;
        if (c.plan.plan.causal && !(j - i <= m - n)) continue;
        if (mods.window && !(qp - kp < double(mods.window))) continue;
        if (mods.until && !(qp <= at(mods.until, k_row + j))) continue;
        double x = 0;
        for (int64_t e = 0; e < c.d; ++e) x += at(c.q.values, q_row + i, e) * at(c.k.values, k_row + j, e);
        x *= mods.scale != 0 ? double(mods.scale) : std::pow(double(c.d), -0.5);
        if (mods.temperature) x *= at(mods.temperature, q_row + i);
        if (mods.softcap > 0) x = double(mods.softcap) * std::tanh(x / double(mods.softcap));
        if (mods.key_bias) x += at(mods.key_bias, k_row + j);
        for (int64_t e = 0; mods.row_factor && e < mods.row_factor.size[1]; ++e)
          x += at(mods.row_factor, q_row + i, e) * at(mods.key_factor, k_row + j, e);
        logits[size_t(i)][size_t(j)] = x;
      }
  }
};

/// Weights of row i among the pairs of one part (−1: of all), the sink's share left out; their log total in `lse`.
std::vector<double> weights(const AttentionCase& c, const Head& head, int64_t query_head, int64_t i, int part, double& lse) {
  std::vector<double> p(size_t(head.m), 0.0);
  const bool sigmoid = c.mods.weight == WeightFunction::Sigmoid;
  double total = c.mods.sink_logits && part <= 0 ? std::exp(at(c.mods.sink_logits, query_head)) : 0;
  for (size_t j = 0; j < p.size(); ++j) {
    const double x = head.logits[size_t(i)][j];
    if (x == -INFINITY || (part >= 0 && head.part[size_t(i)][j] != part)) continue;
    p[j] = sigmoid ? 1 / (1 + std::exp(-x)) : std::exp(x);
    total += p[j];
  }
  lse = std::log(total);
  if (!sigmoid && total > 0)
    for (double& x : p) x /= total;
  return p;
}

Ask tiny() {
  Ask ask;
  ask.small = true;
  ask.extreme = false;
  return ask;
}

template <class Body>
void each_case(int count, const Ask& ask, uint64_t seed, Body&& body) {
  Random random(seed);
  for (int i = 0; i < cases(count) && !testing::Test::HasFailure(); ++i) {
    const AttentionCase c(random, ask);
    SCOPED_TRACE("case " + std::to_string(i) + ": " + c.text());
    body(c, random);
  }
}

template <class Body>
void each_head(const AttentionCase& c, Body&& body) {
  for (int64_t s = 0; s < c.sequences; ++s)
    for (int64_t head = 0; head < c.h; ++head) body(s, head, Head(c, s, head));
}

TEST(Reference, AttendEqualsMatrices) {
  each_case(300, tiny(), 1, [](const AttentionCase& c, Random&) {
    Queue queue;
    Poisoned out = c.out(), lse = c.lse(), expected = c.out(), expected_lse = c.lse();
    reference_kernels().attend(queue, c.q, c.k, c.v, c.plan.plan, c.mods, out, lse);
    each_head(c, [&](int64_t, int64_t query_head, const Head& head) {
      for (int64_t i = 0; i < head.n; ++i)
        for (int part = 0; part < c.plan.plan.parts; ++part) {
          const int64_t r = head.q_row + i;
          const bool split = c.plan.plan.parts > 1;
          const double gain = c.mods.gain ? at(c.mods.gain, r) : 1;
          double log_total;
          const std::vector<double> p = weights(c, head, query_head, i, part, log_total);
          (split ? expected_lse->at<float>(part, r) : expected_lse->at<float>(r)) = gain == 0 ? -INFINITY : float(log_total);
          for (int64_t e = 0; e < c.d_v; ++e) {
            double sum = 0;
            for (int64_t j = 0; j < head.m; ++j)
              if (p[size_t(j)] > 0) sum += gain * p[size_t(j)] * at(c.v.values, head.v_row + j, e);
            (split ? expected->at<float>(part, r, e) : expected->at<float>(r, e)) = float(sum);
          }
        }
    });
    expect_close("out", expected, out, 1e-5);
    expect_close("lse", expected_lse, lse, 1e-5);
  });
}

TEST(Reference, ObserveEqualsMatrices) {
  using Rows = Observe::Rows;
  using Heads = Observe::Heads;
  each_case(300, tiny(), 2, [](const AttentionCase& c, Random& random) {
    Observe how;
    how.rows = pick(random, {Rows::Sum, Rows::Mean, Rows::Seen, Rows::Max, Rows::Last, Rows::Decayed});
    how.heads = pick(random, {Heads::Each, Heads::GroupMean, Heads::GroupMax, Heads::GroupSum, Heads::LayerMean});
    if (c.mods.k_map && how.heads == Heads::Each) how.heads = Heads::GroupMean;
    how.decay = 0.9f;
    how.logits = chance(random, 0.3);
    const bool each = how.heads == Heads::Each, extreme = how.rows == Rows::Max || how.rows == Rows::Last;
    const int64_t group = c.h / c.g;
    std::vector<int64_t> lengths;
    for (int64_t s = 0; s < c.k.view.segments(); ++s) lengths.push_back(c.k.view.length(s));
    RaggedData columns = ragged(random, Dtype::F32, lengths, c.g, each ? group : 0, {true, 1, 0});
    Poisoned expected = columns.values.twin();

    // One column of numbers for each query head.
    std::vector<std::vector<double>> of_head;
    each_head(c, [&](int64_t, int64_t query_head, const Head& head) {
      std::vector<double> x(size_t(head.m), 0.0);
      for (int64_t j = 0; j < head.m; ++j) {
        double sum = 0, top = -INFINITY, seen = 0, last = -INFINITY;
        for (int64_t i = 0; i < head.n; ++i) {
          double lse;
          const double logit = head.logits[size_t(i)][size_t(j)], p = weights(c, head, query_head, i, -1, lse)[size_t(j)];
          const bool sees = logit != -INFINITY;
          const double value = how.logits ? (sees ? logit : 0) : p;
          sum += value * (how.rows == Rows::Decayed ? std::pow(0.9, double(head.n - 1 - i)) : 1);
          seen += sees;
          top = std::max(top, how.logits ? logit : p);
          if (i == head.n - 1) last = how.logits ? logit : p;
        }
        if (head.n == 0 && !how.logits) top = last = 0;
        x[size_t(j)] = how.rows == Rows::Mean   ? (head.n ? sum / double(head.n) : 0)
                       : how.rows == Rows::Seen ? (seen > 0 ? sum / seen : 0)
                       : how.rows == Rows::Max  ? top
                       : how.rows == Rows::Last ? last
                                                : sum;
      }
      of_head.push_back(std::move(x));
    });
    for (int64_t s = 0; s < c.sequences; ++s)
      for (int64_t kv = 0; kv < c.g; ++kv)
        for (int64_t j = 0; j < c.k.view.length(s * c.g + kv); ++j) {
          double sum = 0, top = -INFINITY, layer = 0;
          int readers = 0;
          for (int64_t head = 0; head < c.h; ++head) {
            const auto& x = of_head[size_t(s * c.h + head)];
            if (j < int64_t(x.size())) layer += x[size_t(j)];
            if (c.k_head[size_t(head)] != kv) continue;
            const int64_t row = columns.view.begin(s * c.g + kv) + j;
            if (each) expected->at<float>(row, readers) = float(x[size_t(j)]);
            sum += x[size_t(j)];
            top = std::max(top, x[size_t(j)]);
            ++readers;
          }
          if (each) continue;
          if (!readers) sum = top = how.logits && extreme ? -INFINITY : 0;
          expected->at<float>(columns.view.begin(s * c.g + kv) +
                              j) = float(how.heads == Heads::GroupMean  ? sum / std::max(1, readers)
                                         : how.heads == Heads::GroupMax ? top
                                         : how.heads == Heads::GroupSum ? sum
                                                                        : layer / double(c.h));
        }
    Queue queue;
    reference_kernels().observe(queue, c.q, {&c.k.view, nullptr, nullptr}, &c.plan.plan, c.mods, how, columns);
    expect_close("columns", expected, columns.values, 1e-5);
  });
}

TEST(Reference, RowStatisticsEqualMatrices) {
  each_case(200, tiny(), 3, [](const AttentionCase& c, Random&) {
    const int64_t rows = c.q.view.values.size[0];
    auto column = [&](Dtype type = Dtype::F32) { return Poisoned(type, {rows}); };
    Poisoned entropy = column(), distance = column(), argmax = column(Dtype::I32), peak = column(), lse = column(),
             span(Dtype::F32, {rows, 2});
    Poisoned want_entropy = column(), want_distance = column(), want_argmax = column(Dtype::I32), want_peak = column(),
             want_lse = column(), want_span = span.twin();
    const Buffer spans = Buffer::of<int32_t>({2, 2}, std::vector<int32_t>{0, 2, 1, 100});
    each_head(c, [&](int64_t, int64_t query_head, const Head& head) {
      for (int64_t i = 0; i < head.n; ++i) {
        const int64_t r = head.q_row + i;
        double log_total, h = 0, mean = 0, top = 0, first = 0, second = 0;
        int64_t best = -1;
        const std::vector<double> p = weights(c, head, query_head, i, -1, log_total);
        for (int64_t j = 0; j < head.m; ++j) {
          const double x = p[size_t(j)];
          const double qp = c.mods.q_pos ? at(c.mods.q_pos, r) : double(head.m - head.n + i),
                       kp = c.mods.k_pos ? at(c.mods.k_pos, head.k_row + j) : double(j);
          if (x > 0) h -= x * std::log(x);
          mean += x * (qp - kp);
          if (x > top) top = x, best = j;
          if (j < 2) first += x;
          if (j >= 1) second += x;
        }
        want_entropy->at<float>(r) = float(h);
        want_distance->at<float>(r) = float(mean);
        want_argmax->at<int32_t>(r) = int32_t(best);
        want_peak->at<float>(r) = float(top);
        want_lse->at<float>(r) = float(log_total);
        want_span->at<float>(r, 0) = float(first);
        want_span->at<float>(r, 1) = float(second);
      }
    });
    Queue queue;
    reference_kernels().observe_rows(queue, c.q, {&c.k.view, nullptr, nullptr}, &c.plan.plan, c.mods,
                                     {entropy, distance, argmax, peak, lse, span, spans});
    expect_close("entropy", want_entropy, entropy, 1e-5);
    expect_close("distance", want_distance, distance, 1e-4);
    expect_close("argmax", want_argmax, argmax, 0);
    expect_close("peak", want_peak, peak, 1e-6);
    expect_close("lse", want_lse, lse, 1e-5);
    expect_close("span", want_span, span, 1e-5);
  });
}

/// Σ out · d_out, which attend_backward differentiates.
double objective(const AttentionCase& c, const Tensor& d_out) {
  Queue queue;
  Poisoned out = c.out(), lse = c.lse();
  reference_kernels().attend(queue, c.q, c.k, c.v, c.plan.plan, c.mods, out, lse);
  double sum = 0;
  each(out, [&](auto index) {
    const double x = number(out, index);
    if (!std::isnan(x)) sum += x * number(d_out, index);
  });
  return sum;
}

TEST(Reference, GradientsOfAttendAreFiniteDifferences) {
  Ask ask = tiny();
  ask.low_types = ask.parts = false;
  each_case(60, ask, 4, [](const AttentionCase& c, Random& random) {
    Queue queue;
    const int64_t rows = c.q.view.values.size[0], keys = c.k.view.values.size[0];
    Poisoned out = c.out(), lse = c.lse(), d_q(Dtype::F32, {rows, c.d}), d_k(Dtype::F32, {keys, c.d}),
             d_v(Dtype::F32, {c.v.view.values.size[0], c.d_v}), d_bias(Dtype::F32, {keys}), d_gain(Dtype::F32, {rows});
    const Poisoned d_out = row_numbers(c.q, Dtype::F32, c.d_v, [&] { return random.normal(); });
    reference_kernels().attend(queue, c.q, c.k, c.v, c.plan.plan, c.mods, out, lse);
    reference_kernels().attend_backward(queue, c.q, c.k, c.v, c.plan.plan, c.mods, out, lse, d_out, d_q, d_k, d_v,
                                        d_bias, d_gain);
    auto compare = [&](const char* what, const Tensor& input, const Tensor& gradient) {
      for (int tries = 0; tries < 6 && input.numel() > 0; ++tries) {
        std::vector<int64_t> index;
        for (int axis = 0; axis < input.rank; ++axis) index.push_back(random.below(input.size[size_t(axis)]));
        const double x = number(input, index), step = 1e-2;
        if (std::isnan(number(gradient, index)) || (x == 0 && &gradient == &d_gain.view())) continue;
        set(input, index, x + step);
        const double up = objective(c, d_out), width = number(input, index) - x;
        set(input, index, x - step);
        const double down = objective(c, d_out);
        set(input, index, x);
        EXPECT_NEAR((up - down) / (2 * width), number(gradient, index), 4e-3 * std::max(1.0, std::abs(number(gradient, index))))
            << what;
      }
    };
    compare("q", c.q.values, d_q);
    compare("k", c.k.values, d_k);
    compare("v", c.v.values, d_v);
    if (c.mods.key_bias) compare("key_bias", c.mods.key_bias, d_bias);
    if (c.mods.gain) compare("gain", c.mods.gain, d_gain);
  });
}

TEST(Reference, AttentionArgumentsThatDoNotFitAreRefused) {
  Random random(5);
  Ask ask = tiny();
  ask.mods = ask.maps = ask.low_types = false;
  const AttentionCase c(random, ask);
  Queue queue;
  const Kernels& run = reference_kernels();
  auto attend = [&](const Mods& mods, const Plan& plan, const Tensor& out) {
    run.attend(queue, c.q, c.k, c.v, plan, mods, out, {});
  };
  const Poisoned out(Dtype::F32, {c.q.view.values.size[0], c.d_v}),
      narrow(Dtype::F32, {c.q.view.values.size[0], c.d_v + 1}), bias(Dtype::F32, {c.k.view.values.size[0] + 1}),
      sinks = filled(Dtype::F32, {c.h}, [] { return 0.0; });
  EXPECT_NO_THROW(attend({}, {}, out));
  EXPECT_THROW(attend({}, {}, narrow), Error);
  Mods mods;
  mods.key_bias = bias;
  EXPECT_THROW(attend(mods, {}, out), Error);
  mods = {};
  mods.sink_logits = sinks;
  mods.weight = WeightFunction::Sigmoid;
  EXPECT_THROW(attend(mods, {}, out), Error);
  Plan plan;
  plan.parts = 2;
  EXPECT_THROW(attend({}, plan, out), Error);
  plan = {};
  plan.form = Plan::Form::Tokens;
  EXPECT_THROW(attend({}, plan, out), Error);
}

}  // namespace
}  // namespace heed::test
