#include "kernels/bounds.h"
#include "kernels/checks.h"
#include "kernels/harness.h"

namespace heed::test {
namespace {

struct RecurProblem {
  int64_t sequences, h, d, d_v;
  RaggedData q, k, v;
  Poisoned g, beta, a, b, state, z;
  Recur how;
  RecurInputs in;
  double rows = 1;

  /// `lined`: what a GPU takes in chunks: bf16 at multiples of 16 bytes, at most one decay a row, no low-rank correction.
  RecurProblem(Random& random, const std::vector<int64_t>& lengths_of, bool low_types, bool normalise,
               bool small = false, bool lined = false) {
    sequences = int64_t(lengths_of.size());
    h = 1 + random.below(3);
    d = small ? 6 : lined ? pick<int64_t>(random, {64, 80, 128}) : pick<int64_t>(random, {16, 64, 80, 128});
    d_v = chance(random, 0.6) ? d
          : small             ? 5
          : lined             ? pick<int64_t>(random, {8, 64, 96})
                              : pick<int64_t>(random, {7, 64, 96});
    std::vector<int64_t> lengths;
    for (int64_t n : lengths_of) {
      lengths.insert(lengths.end(), size_t(h), n);
      rows = std::max(rows, double(n));
    }
    const Dtype type = lined       ? Dtype::BF16
                       : low_types ? pick(random, {Dtype::F32, Dtype::BF16, Dtype::F16})
                                   : Dtype::F32;
    Layout layout = Layout::any(random);
    if (lined) layout.shift = 0, layout.pad = chance(random, 0.3) ? 8 : 0;
    // Keys of about unit length, as every delta rule asks for: longer ones make the recurrence itself unstable.
    const double k_deviation = 1 / std::sqrt(double(d));
    q = normal_ragged(random, type, lengths, h, d, layout);
    k = beside_q(random, d, layout, k_deviation);
    v = beside_q(random, d_v, layout, 1);
    how.decay = lined ? pick(random, {Recur::Decay::None, Recur::Decay::Scalar})
                      : pick(random, {Recur::Decay::None, Recur::Decay::Scalar, Recur::Decay::Vector});
    how.correction = lined ? pick(random, {Recur::Correction::None, Recur::Correction::Delta})
                           : pick(random, {Recur::Correction::None, Recur::Correction::Delta, Recur::Correction::LowRank});
    how.normalise = normalise && how.correction == Recur::Correction::None && chance(random, 0.4);
    how.scale = chance(random, 0.3) ? 0.7f : 0;
    const double strength = pick(random, {0.01, 0.3, 8.0});
    auto decay = [&] { return -strength * random.uniform(); };
    if (how.decay == Recur::Decay::Scalar) g = row_numbers(q, Dtype::F32, 0, decay);
    if (how.decay == Recur::Decay::Vector) g = row_numbers(q, Dtype::F32, d, decay);
    if (how.correction == Recur::Correction::Delta)
      beta = row_numbers(q, Dtype::F32, 0, [&] { return chance(random, 0.05) ? 0 : random.uniform(); });
    if (how.correction == Recur::Correction::LowRank) {
      a = row_numbers(q, Dtype::F32, d, [&] { return 0.7 * k_deviation * random.normal(); });
      b = row_numbers(q, Dtype::F32, d, [&] { return 0.7 * k_deviation * random.normal(); });
    }
    if (how.normalise)  // a denominator away from zero
      for (const RaggedData* x : {&q, &k})
        for (int64_t s = 0; s < x->view.segments(); ++s)
          each(x->view.segment(s), [&](auto index) {
            set(x->view.segment(s), index, std::abs(heed::test::number(x->view.segment(s), index)));
          });
    if (chance(random, 0.6)) state = filled(Dtype::F32, {sequences * h, d, d_v}, [&] { return random.normal(); });
    if (how.normalise && chance(random, 0.6))
      z = filled(Dtype::F32, {sequences * h, d}, [&] { return random.uniform(); });
    in = {q, k, v, g, beta, a, b, state, z};
  }

  /// Normal numbers in q's rows: one number a row is then the same row of q, k and v.
  RaggedData beside_q(Random& random, int64_t width, Layout layout, double deviation) const {
    RaggedData out;
    out.values = Poisoned(q.values->type, {q.values->size[0], width}, layout.shift, layout.pad);
    out.view = q.view;
    out.view.values = out.values;
    for (int64_t s = 0; s < out.view.segments(); ++s)
      each(out.view.segment(s), [&](auto index) { set(out.view.segment(s), index, deviation * random.normal()); });
    return out;
  }

  std::string text() const {
    std::string out = std::to_string(h) + " heads, d " + std::to_string(d) + ", d_v " + std::to_string(d_v) + " " +
                      info(q.values->type).name + ", decay " + std::to_string(int(how.decay)) + ", correction " +
                      std::to_string(int(how.correction)) + (how.normalise ? ", normalised" : "") +
                      (in.state ? ", from a state" : "") + "; n";
    for (int64_t s = 0; s < sequences; ++s) out.append(" ").append(std::to_string(q.view.length(s * h)));
    return out;
  }
  Poisoned out() const { return Poisoned(Dtype::F32, {q.values->size[0], d_v}, 1); }
  Poisoned state_out() const { return Poisoned(Dtype::F32, {sequences * h, d, d_v}); }
  Poisoned z_out() const { return Poisoned(Dtype::F32, {sequences * h, d}); }
};

std::vector<int64_t> some_rows(Random& random, int64_t longest) {
  std::vector<int64_t> out;
  for (int64_t s = 1 + random.below(2); s > 0; --s)
    out.push_back(chance(random, 0.2) ? random.below(2) : random.below(longest + 1));
  return out;
}

void recur_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(40) && !testing::Test::HasFailure(); ++i) {
    const RecurProblem c(random, some_rows(random, 200), true, true);
    SCOPED_TRACE("case " + std::to_string(i) + ": " + c.text());
    Queue queue;
    Poisoned out = c.out(), state = c.state_out(), z = c.z_out(), got = c.out(), got_state = c.state_out(),
             got_z = c.z_out(), bare = c.out();
    const Tensor z_to = c.how.normalise ? z.view() : Tensor(), got_z_to = c.how.normalise ? got_z.view() : Tensor();
    reference_kernels().recur(queue, c.in, c.how, out, state, z_to);
    run.recur(queue, c.in, c.how, got, got_state, got_z_to);
    run.recur(queue, c.in, c.how, bare, {}, {});
    const double u = unit(c.q.values->type, 1);
    expect_close("out", out, got, recurrence(u, c.rows, largest(out)));
    expect_close("state", state, got_state, recurrence(u, c.rows, largest(state)));
    if (c.how.normalise) expect_close("z", z, got_z, recurrence(u, c.rows, largest(z)));
    expect_close("out without states", got, bare, 0);
  }
}

/// A sequence in two pieces, the state handed over, equals the whole: chunk borders do not show.
void recur_split_is_whole(const Kernels& run, Random random) {
  for (int i = 0; i < cases(30) && !testing::Test::HasFailure(); ++i) {
    const int64_t n = 1 + random.below(170), cut = random.below(n + 1);
    const RecurProblem c(random, {n}, false, true);
    SCOPED_TRACE("case " + std::to_string(i) + " cut at " + std::to_string(cut) + ": " + c.text());
    Queue queue;
    const bool normalise = c.how.normalise;
    Poisoned whole = c.out(), state = c.state_out(), z = c.z_out(), pieces = c.out(), middle = c.state_out(),
             middle_z = c.z_out(), last = c.state_out(), last_z = c.z_out();
    run.recur(queue, c.in, c.how, whole, state, normalise ? z.view() : Tensor());
    const Buffer begin(Dtype::I64, {c.h + 1}), end(Dtype::I64, {c.h});
    auto piece = [&](int64_t from, int64_t to, RecurInputs in, const Tensor& out_state, const Tensor& out_z) {
      for (int64_t s = 0; s < c.h; ++s) {
        begin->at<int64_t>(s) = c.q.view.begin(s) + from;
        end->at<int64_t>(s) = c.q.view.begin(s) + to;
      }
      begin->at<int64_t>(c.h) = c.q.values->size[0];
      for (Ragged* x : {&in.q, &in.k, &in.v}) {
        x->offsets = begin;
        x->ends = end;
      }
      run.recur(queue, in, c.how, pieces, out_state, normalise ? out_z : Tensor());
    };
    piece(0, cut, c.in, middle, middle_z);
    RecurInputs rest = c.in;
    rest.state = middle;
    if (normalise) rest.z = middle_z;
    piece(cut, n, rest, last, last_z);
    const double u = unit(Dtype::F32, 1);
    expect_close("out", whole, pieces, recurrence(u, c.rows, largest(whole)));
    expect_close("state", state, last, recurrence(u, c.rows, largest(state)));
    if (normalise) expect_close("z", z, last_z, recurrence(u, c.rows, largest(z)));
  }
}

void recur_backward_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(20) && !testing::Test::HasFailure(); ++i) {
    const bool lined = i % 3 == 0;
    const RecurProblem c(random, some_rows(random, lined ? 300 : 140), true, false, false, lined);
    SCOPED_TRACE("case " + std::to_string(i) + ": " + c.text());
    Queue queue;
    const int64_t rows = c.q.values->size[0];
    const Poisoned d_out = row_numbers(c.q, Dtype::F32, c.d_v, [&] { return random.normal(); });
    const Poisoned d_state = filled(Dtype::F32, {c.sequences * c.h, c.d, c.d_v}, [&] { return 0.1 * random.normal(); });
    std::vector<std::pair<const char*, Poisoned>> want;
    auto gradient = [&](const char* name, bool there, std::vector<int64_t> sizes) {
      want.emplace_back(name, there ? Poisoned(Dtype::F32, std::move(sizes)) : Poisoned());
    };
    const bool low_rank = c.how.correction == Recur::Correction::LowRank;
    gradient("d_q", true, {rows, c.d});
    gradient("d_k", true, {rows, c.d});
    gradient("d_v", true, {rows, c.d_v});
    gradient("d_g", c.how.decay != Recur::Decay::None,
             c.how.decay == Recur::Decay::Vector ? std::vector<int64_t>{rows, c.d} : std::vector<int64_t>{rows});
    gradient("d_beta", c.how.correction == Recur::Correction::Delta, {rows});
    gradient("d_a", low_rank, {rows, c.d});
    gradient("d_b", low_rank, {rows, c.d});
    gradient("d_state", chance(random, 0.7), {c.sequences * c.h, c.d, c.d_v});
    std::vector<Poisoned> got;
    for (const auto& [name, t] : want) got.push_back(t.view() ? t.twin() : Poisoned());
    auto view = [](auto&& of) { return RecurGrads{of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)}; };
    const Tensor d_last = chance(random, 0.6) ? d_state.view() : Tensor();
    reference_kernels().recur_backward(queue, c.in, c.how, d_out, d_last,
                                       view([&](size_t j) { return want[j].second.view(); }));
    run.recur_backward(queue, c.in, c.how, d_out, d_last, view([&](size_t j) { return got[j].view(); }));
    for (size_t j = 0; j < want.size(); ++j)
      if (want[j].second.view())
        expect_close(want[j].first, want[j].second, got[j],
                     2 * recurrence(unit(c.q.values->type, 1), c.rows, largest(want[j].second)));
  }
}

TEST(Reference, RecurrenceEqualsItsClosedForm) {
  // Without correction: o_t = scale Σ_{j ≤ t} (q_t · e^{G_t − G_j} k_j) v_j.
  Random random(11);
  for (int i = 0; i < cases(20); ++i) {
    RecurProblem c(random, {1 + random.below(12)}, false, false);
    c.how.correction = Recur::Correction::None;
    c.in.state = {};
    Queue queue;
    Poisoned out = c.out(), expected = c.out();
    reference_kernels().recur(queue, c.in, c.how, out, {}, {});
    const double scale = c.how.scale != 0 ? double(c.how.scale) : std::pow(double(c.d), -0.5);
    for (int64_t s = 0; s < c.h; ++s)
      for (int64_t t = 0; t < c.q.view.length(s); ++t) {
        std::vector<double> sum(size_t(c.d_v), 0.0);
        for (int64_t j = 0; j <= t; ++j) {
          double dot = 0;
          for (int64_t channel = 0; channel < c.d; ++channel) {
            double log_decay = 0;
            for (int64_t l = j + 1; l <= t; ++l) {
              const int64_t r = c.q.view.begin(s) + l;
              if (c.how.decay == Recur::Decay::Scalar) log_decay += double(c.g->at<float>(r));
              if (c.how.decay == Recur::Decay::Vector) log_decay += double(c.g->at<float>(r, channel));
            }
            dot += double(c.q.view.segment(s).at<float>(t, channel)) * std::exp(log_decay) *
                   double(c.k.view.segment(s).at<float>(j, channel));
          }
          for (int64_t e = 0; e < c.d_v; ++e)
            sum[size_t(e)] += scale * dot * double(c.v.view.segment(s).at<float>(j, e));
        }
        for (int64_t e = 0; e < c.d_v; ++e) expected->at<float>(c.q.view.begin(s) + t, e) = float(sum[size_t(e)]);
      }
    expect_close("out", expected, out, 1e-5);
  }
}

TEST(Reference, NormalisedRecurrenceIsAMean) {
  // With equal values every normalised output is scale times that value, whatever q, k and the decay are.
  Random random(14);
  for (int i = 0; i < cases(10); ++i) {
    RecurProblem c(random, {1 + random.below(12)}, false, false);
    c.how.correction = Recur::Correction::None;
    c.how.normalise = true;
    c.how.scale = 1;
    c.in.state = c.in.z = {};
    for (int64_t s = 0; s < c.h; ++s)
      each(c.v.view.segment(s), [&](auto index) { set(c.v.view.segment(s), index, 3); });
    Queue queue;
    Poisoned out = c.out();
    reference_kernels().recur(queue, c.in, c.how, out, {}, {});
    for (int64_t s = 0; s < c.h; ++s)
      for (int64_t t = 0; t < c.q.view.length(s); ++t)
        for (int64_t e = 0; e < c.d_v; ++e) EXPECT_NEAR(out->at<float>(c.q.view.begin(s) + t, e), 3, 1e-5);
  }
}

TEST(Reference, DeltaRuleIsALowRankCorrection) {
  // Decay, then S += β k (v − S^T k)^T, is a = e^g ⊙ k, b = −β k and β k in the place of k (linear.md, S1).
  Random random(12);
  for (int i = 0; i < cases(20); ++i) {
    RecurProblem c(random, {1 + random.below(30)}, false, false);
    const int64_t rows = c.q.values->size[0];
    c.how.correction = Recur::Correction::Delta;
    const Poisoned beta = row_numbers(c.q, Dtype::F32, 0, [&] { return random.uniform(); });
    c.in.beta = beta;
    Poisoned a(Dtype::F32, {rows, c.d}), b = a.twin(), k = c.k.values.twin();
    each(a, [&](auto index) {
      const double x = number(c.k.values, index), strength = double(beta->at<float>(index[0]));
      const double g = c.how.decay == Recur::Decay::None     ? 0
                       : c.how.decay == Recur::Decay::Scalar ? double(c.g->at<float>(index[0]))
                                                             : number(c.g, index);
      set(a, index, std::exp(g) * x);
      set(b, index, -strength * x);
      set(k, index, strength * x);
    });
    RecurInputs low = c.in;
    low.a = a;
    low.b = b;
    low.k.values = k;
    Recur how = c.how;
    how.correction = Recur::Correction::LowRank;
    Queue queue;
    Poisoned delta = c.out(), low_rank = c.out(), delta_state = c.state_out(), low_state = c.state_out();
    reference_kernels().recur(queue, c.in, c.how, delta, delta_state, {});
    reference_kernels().recur(queue, low, how, low_rank, low_state, {});
    expect_close("out", delta, low_rank, 1e-4);
    expect_close("state", delta_state, low_state, 1e-4);
  }
}

TEST(Reference, GradientsOfRecurrenceAreFiniteDifferences) {
  Random random(13);
  for (int i = 0; i < cases(30) && !testing::Test::HasFailure(); ++i) {
    RecurProblem c(random, {1 + random.below(6)}, false, false, true);
    if (!c.in.state) {
      c.state = filled(Dtype::F32, {c.h, c.d, c.d_v}, [&] { return random.normal(); });
      c.in.state = c.state;
    }
    SCOPED_TRACE("case " + std::to_string(i) + ": " + c.text());
    Queue queue;
    const Poisoned d_out = row_numbers(c.q, Dtype::F32, c.d_v, [&] { return random.normal(); });
    const Poisoned d_state = filled(Dtype::F32, {c.h, c.d, c.d_v}, [&] { return random.normal(); });
    auto objective = [&] {
      Poisoned out = c.out(), state = c.state_out();
      reference_kernels().recur(queue, c.in, c.how, out, state, {});
      double sum = 0;
      each(out, [&](auto index) {
        if (!std::isnan(number(out, index))) sum += number(out, index) * number(d_out, index);
      });
      each(state, [&](auto index) { sum += number(state, index) * number(d_state, index); });
      return sum;
    };
    auto like = [](const Tensor& t) {
      return t ? Poisoned(Dtype::F32, std::vector<int64_t>(t.size.begin(), t.size.begin() + t.rank)) : Poisoned();
    };
    const Poisoned q = like(c.in.q.values), k = like(c.in.k.values), v = like(c.in.v.values), g = like(c.in.g),
                   beta = like(c.in.beta), a = like(c.in.a), b = like(c.in.b), state = like(c.in.state);
    reference_kernels().recur_backward(queue, c.in, c.how, d_out, d_state, {q, k, v, g, beta, a, b, state});
    auto compare = [&](const char* what, const Tensor& input, const Tensor& gradient) {
      for (int tries = 0; input && tries < 6; ++tries) {
        std::vector<int64_t> index;
        for (int axis = 0; axis < input.rank; ++axis) index.push_back(random.below(input.size[size_t(axis)]));
        const double x = number(input, index), slope = number(gradient, index), step = 1e-2;
        if (std::isnan(x)) continue;
        set(input, index, x + step);
        const double up = objective(), upper = number(input, index);
        set(input, index, x - step);
        const double down = objective(), lower = number(input, index);
        set(input, index, x);
        EXPECT_NEAR((up - down) / (upper - lower), slope, 2e-3 * std::max(1.0, std::abs(slope))) << what;
      }
    };
    compare("q", c.in.q.values, q);
    compare("k", c.in.k.values, k);
    compare("v", c.in.v.values, v);
    compare("g", c.in.g, g);
    compare("beta", c.in.beta, beta);
    compare("a", c.in.a, a);
    compare("b", c.in.b, b);
    compare("state", c.in.state, state);
  }
}

}  // namespace

std::vector<Check> recurrence_checks() {
  using enum Check::Against;
  return {{Reference, "recur", recur_equals_reference},
          {Property, "recur_split_is_whole", recur_split_is_whole},
          {Reference, "recur_backward", recur_backward_equals_reference}};
}

}  // namespace heed::test
