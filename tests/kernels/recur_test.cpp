// The recurrence of every table: equal to the oracle's rows one by one, to itself however a prompt is cut, and its gradient
// to finite differences.
#include "base/threads.h"
#include "kernels/bounds.h"
#include "kernels/harness.h"
#include "kernels/on_device.h"

namespace heed::test {
namespace {

class Recurrent : public testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& run = *GetParam();
  const Kernels& oracle = reference_kernels();
  Queue queue;
};
INSTANTIATE_TEST_SUITE_P(Tables, Recurrent, testing::ValuesIn(tables()), [](const auto& table) {
  std::string name = table.param->name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

constexpr Recur::Decay kDecays[] = {Recur::Decay::None, Recur::Decay::Scalar, Recur::Decay::Vector};
constexpr Recur::Correction kCorrections[] = {Recur::Correction::None, Recur::Correction::Delta, Recur::Correction::LowRank};

/// Inputs whose state stays bounded: keys of length 1, β in (0, 1), a·b a contraction.
struct RecurCase {
  Recur how;
  int64_t d, d_v;
  RaggedData q, k, v;
  Poisoned g, beta, a, b, state, z;
  RecurInputs in;

  RecurCase(Random& random, Recur how, const std::vector<int64_t>& lengths, int64_t d, int64_t d_v, Dtype type,
            Layout layout, double strongest)
      : how(how), d(d), d_v(d_v) {
    const int64_t segments = int64_t(lengths.size());
    q = normal_ragged(random, type, lengths, 1, d, layout);
    k = normal_ragged(random, type, lengths, 1, d, layout, 1 / std::sqrt(double(d)));
    v = normal_ragged(random, type, lengths, 1, d_v, layout);
    // One number a row is indexed as q's rows are, so k and v lie as q does.
    for (RaggedData* other : {&k, &v}) {
      if (!layout.gaps) continue;
      RaggedData same;
      same.values = filled(type, {q.view.values.size[0], other == &k ? d : d_v},
                           [&] { return random.normal() / std::sqrt(other == &k ? double(d) : 1.0); });
      same.offsets = Buffer(Dtype::I64, {segments + 1});
      same.ends = Buffer(Dtype::I64, {segments});
      copy(q.offsets, same.offsets);
      copy(q.ends, same.ends);
      same.view = {same.values, same.offsets, same.ends, 1, q.view.bound};
      *other = std::move(same);
    }
    if (how.normalise)  // z · q must not vanish
      for (RaggedData* x : {&q, &k})
        for (int64_t s = 0; s < segments; ++s)
          each(x->view.segment(s),
               [&](auto at) { set(x->view.segment(s), at, std::abs(number(x->view.segment(s), at)) + 0.05); });
    const auto log_decay = [&] { return chance(random, 0.05) ? -strongest : -0.2 * std::abs(random.normal()); };
    const int64_t rows = q.view.values.size[0];
    if (how.decay == Recur::Decay::Scalar) g = row_numbers(q, Dtype::F32, 0, log_decay);
    if (how.decay == Recur::Decay::Vector) g = row_numbers(q, Dtype::F32, d, log_decay);
    if (how.correction == Recur::Correction::Delta)
      beta = row_numbers(q, Dtype::F32, 0, [&] { return random.uniform(); });
    if (how.correction == Recur::Correction::LowRank) {
      a = Poisoned(Dtype::F32, {rows, d});
      b = Poisoned(Dtype::F32, {rows, d});
      for (int64_t s = 0; s < segments; ++s)
        for (int64_t r = q.view.begin(s); r < q.view.end(s); ++r) {
          double length = 0;
          std::vector<double> x(static_cast<size_t>(d));
          for (double& c : x) {
            c = random.normal();
            length += c * c;
          }
          const double by = -random.uniform();
          for (int64_t c = 0; c < d; ++c) {
            const double unit = x[size_t(c)] / std::sqrt(length);
            a->at<float>(r, c) = float(unit);
            b->at<float>(r, c) = float(by * (unit + 0.1 * random.normal() / std::sqrt(double(d))));
          }
        }
    }
    if (chance(random, 0.7)) state = filled(Dtype::F32, {segments, d, d_v}, [&] { return random.normal(); });
    if (how.normalise && chance(random, 0.7))
      z = filled(Dtype::F32, {segments, d}, [&] { return random.uniform() + 0.1; });
    in = {q, k, v, g.view(), beta.view(), a.view(), b.view(), state.view(), z.view()};
  }

  std::string text() const {
    return "decay " + std::to_string(int(how.decay)) + " correction " + std::to_string(int(how.correction)) +
           (how.normalise ? " normalised" : "") + " d " + std::to_string(d) + " d_v " + std::to_string(d_v) + " " +
           info(q.view.values.type).name;
  }
  Poisoned out() const { return Poisoned(Dtype::F32, {q.view.values.size[0], d_v}, 0, 3); }
  Poisoned states() const { return Poisoned(Dtype::F32, {q.view.segments(), d, d_v}); }
  Poisoned norms() const { return Poisoned(Dtype::F32, {q.view.segments(), d}); }
};

TEST_P(Recurrent, ChunksEqualRows) {
  Random random(21);
  int at = 0;
  for (Recur::Decay decay : kDecays)
    for (Recur::Correction correction : kCorrections)
      for (bool normalise : {false, true})
        for (int i = 0; i < cases(3); ++i) {
          const int64_t d = pick<int64_t>(random, {1, 5, 16, 24, 64}), d_v = pick<int64_t>(random, {1, 7, 16, 33, 64, 100});
          std::vector<int64_t> lengths;
          for (int64_t s = 1 + random.below(3); s > 0; --s)
            lengths.push_back(pick<int64_t>(random, {0, 1, 2, 4, 5, 16, 63, 64, 65, 130, 200}));
          const Dtype type = pick(random, {Dtype::F32, Dtype::F32, Dtype::BF16, Dtype::F16});
          const RecurCase c(random, {decay, correction, normalise, chance(random, 0.5) ? 0.7f : 0}, lengths, d, d_v,
                            type, Layout::any(random), 300);
          SCOPED_TRACE("case " + std::to_string(at++) + ": " + c.text());
          Poisoned out = c.out(), state = c.states(), z = c.norms(), got = out.twin(), got_state = state.twin(),
                   got_z = z.twin(), alone = out.twin();
          const Tensor zs = normalise ? z.view() : Tensor(), got_zs = normalise ? got_z.view() : Tensor();
          oracle.recur(queue, c.in, c.how, out, state, zs);
          run.recur(queue, c.in, c.how, got, got_state, got_zs);
          run.recur(queue, c.in, c.how, alone, {}, {});
          expect_close("out", out, got, 1e-5 * std::max(1.0, largest(out)));
          expect_close("state", state, got_state, 1e-5 * std::max(1.0, largest(state)));
          if (normalise) expect_close("z", z, got_z, 1e-5 * std::max(1.0, largest(z)));
          expect_close("out without state", got, alone, 0);
        }
}

/// Lengths and widths for which a backend may have forms of their own: long sequences, which it may cut into four parts or
/// more, and a row or a few.
TEST_P(Recurrent, LongAndShortSequencesEqualRows) {
  Random random(25);
  for (Recur::Decay decay : kDecays)
    for (Recur::Correction correction : kCorrections)
      for (bool steps : {false, true}) {
        const std::vector<int64_t> lengths = steps ? std::vector<int64_t>{1, 0, 7, 15, 1}
                                                   : std::vector<int64_t>{std::max(140, cases(2090)), 0, cases(1033)};
        const int64_t d = pick<int64_t>(random, {64, 96, 128, 256}), d_v = pick<int64_t>(random, {64, 96, 128, 256});
        const Dtype type = pick(random, {Dtype::F32, Dtype::BF16});
        const RecurCase c(random, {decay, correction, steps && chance(random, 0.5), 0}, lengths, d, d_v, type,
                          Layout::any(random), 30);
        SCOPED_TRACE(c.text());
        Poisoned out = c.out(), state = c.states(), z = c.norms(), got = out.twin(), got_state = state.twin(),
                 got_z = z.twin();
        const bool normalise = c.how.normalise;
        oracle.recur(queue, c.in, c.how, out, state, normalise ? z.view() : Tensor());
        run.recur(queue, c.in, c.how, got, got_state, normalise ? got_z.view() : Tensor());
        const double u = unit(Dtype::F32, 1), rows = double(*std::max_element(lengths.begin(), lengths.end()));
        expect_close("out", out, got, recurrence(u, rows, largest(out)));
        expect_close("state", state, got_state, recurrence(u, rows, largest(state)));
        if (normalise) expect_close("z", z, got_z, recurrence(u, rows, largest(z)));
      }
}

/// A prompt may be cut anywhere: the state carries over, in place.
TEST_P(Recurrent, CutPromptEqualsWhole) {
  Random random(22);
  for (Recur::Decay decay : kDecays)
    for (Recur::Correction correction : kCorrections)
      for (bool normalise : {false, true}) {
        const int64_t n = 40 + random.below(160), d = pick<int64_t>(random, {8, 24}), d_v = pick<int64_t>(random, {7, 32});
        const RecurCase c(random, {decay, correction, normalise, 0}, {n, n, n}, d, d_v, Dtype::F32, {}, 300);
        SCOPED_TRACE(c.text() + " n " + std::to_string(n));
        Poisoned out = c.out(), state = c.states(), z = c.norms(), pieces = out.twin(), carried = state.twin(),
                 carried_z = z.twin();
        run.recur(queue, c.in, c.how, out, state, normalise ? z.view() : Tensor());
        std::vector<int64_t> cuts{0};
        while (cuts.back() < n) cuts.push_back(std::min(n, cuts.back() + pick<int64_t>(random, {1, 2, 17, 64, 100})));
        for (size_t p = 0; p + 1 < cuts.size(); ++p) {
          const Buffer offsets = Buffer::of<int64_t>(
              {4}, std::vector<int64_t>{cuts[p], n + cuts[p], 2 * n + cuts[p], 3 * n});
          const Buffer ends = Buffer::of<int64_t>(
              {3}, std::vector<int64_t>{cuts[p + 1], n + cuts[p + 1], 2 * n + cuts[p + 1]});
          RecurInputs in = c.in;
          for (Ragged* r : {&in.q, &in.k, &in.v}) {
            r->offsets = offsets;
            r->ends = ends;
          }
          if (p > 0) {
            in.state = carried;
            in.z = normalise ? carried_z.view() : Tensor();
          }
          run.recur(queue, in, c.how, pieces, carried, normalise ? carried_z.view() : Tensor());
        }
        expect_close("out", out, pieces, 1e-5 * std::max(1.0, largest(out)));
        expect_close("state", state, carried, 1e-5 * std::max(1.0, largest(state)));
        if (normalise) expect_close("z", z, carried_z, 1e-5 * std::max(1.0, largest(z)));
      }
}

/// A decay of e^−∞ forgets everything before it.
TEST_P(Recurrent, InfiniteDecayForgets) {
  Random random(23);
  for (Recur::Decay decay : {Recur::Decay::Scalar, Recur::Decay::Vector})
    for (int64_t at : {1, 15, 16, 63, 64, 70}) {
      RecurCase c(random, {decay, Recur::Correction::Delta, false, 0}, {100}, 16, 16, Dtype::F32, {}, 1);
      for (int64_t col = 0; col < (decay == Recur::Decay::Vector ? 16 : 1); ++col)
        c.in.g.as<float>()[at * (decay == Recur::Decay::Vector ? 16 : 1) + col] = -INFINITY;
      Poisoned out = c.out(), fresh = c.out();
      run.recur(queue, c.in, c.how, out, {}, {});
      const Buffer offsets = Buffer::of<int64_t>({2}, std::vector<int64_t>{at, 100});
      RecurInputs in = c.in;
      in.q.offsets = in.k.offsets = in.v.offsets = offsets;
      in.state = {};
      run.recur(queue, in, c.how, fresh, {}, {});
      for (int64_t r = at; r < 100; ++r)
        for (int64_t col = 0; col < 16; ++col)
          ASSERT_NEAR(out->at<float>(r, col), fresh->at<float>(r, col), 1e-5) << at << " " << r;
    }
}

TEST_P(Recurrent, ResultsDoNotDependOnThreads) {
  Random random(24);
  const RecurCase c(random, {Recur::Decay::Vector, Recur::Correction::LowRank, false, 0}, {150, 70}, 32, 100,
                    Dtype::F32, {}, 10);
  Poisoned one = c.out(), many = c.out(), state_one = c.states(), state_many = c.states();
  set_threads(1);
  run.recur(queue, c.in, c.how, one, state_one, {});
  set_threads(7);
  run.recur(queue, c.in, c.how, many, state_many, {});
  set_threads(0);
  expect_close("out", one, many, 0);
  expect_close("state", state_one, state_many, 0);
}

}  // namespace
}  // namespace heed::test
