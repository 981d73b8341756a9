#include "kernels/attention_case.h"
#include "kernels/bounds.h"
#include "kernels/checks.h"
#include "kernels/store_case.h"

namespace heed::test {
namespace {

/// The keys of a case, as they are or written into a store (with true positions, and no key tensors but those).
struct KeySource {
  std::unique_ptr<StoreCase> store;
  Read read;
  Poisoned positions;
  Mods mods;
  Keys keys;
  double unit = 0;

  KeySource(Random& random, const AttentionCase& c, bool v_transposed) : mods(c.mods) {
    unit = heed::test::unit(c.q.view.values.type, c.k.view.values.type, c.terms);
    keys.panel = &c.k.view;
    const bool empty = c.k.view.segments() == 0;
    if (c.g != c.g_v || empty || chance(random, 0.5)) return;
    std::vector<int64_t> lengths;
    for (int64_t s = 0; s < c.k.view.segments(); ++s) lengths.push_back(c.k.view.length(s));
    if (*std::max_element(lengths.begin(), lengths.end()) == 0) return;
    store = std::make_unique<StoreCase>(random, lengths, c.g, c.d, c.d_v, Kinds::Any, v_transposed);
    positions = row_numbers(c.k, Dtype::I32, 0, [] { return 0.0; });
    for (int64_t s = 0; s < c.k.view.segments(); ++s)
      for (int64_t e = 0; e < lengths[size_t(s)]; ++e)
        positions->at<int32_t>(c.k.view.begin(s) + e) = int32_t(e + e / 3);
    const Poisoned first = filled(Dtype::I32, {int64_t(lengths.size())}, [] { return 0.0; });
    // Values are not observed: any of the right shape will do.
    const RaggedData v = normal_ragged(random, Dtype::F32, lengths, c.g, c.d_v, {});
    Queue queue;
    oracle().page_write(queue, store->pages, c.k, v, positions, first);
    store->set_lengths(lengths);
    store->randomise_bias(random);
    keys = {nullptr, &store->pages, &read};
    mods.key_bias = mods.k_pos = mods.until = mods.row_factor = mods.key_factor = {};
    unit = std::max(unit, 0x1p-7);
  }
  std::string text() const { return store ? "; pages of " + store->text() : "; a panel"; }
};

void observed_as_reference(const Kernels& run, Random random, const Ask& ask) {
  using Rows = Observe::Rows;
  using Heads = Observe::Heads;
  for (int i = 0; i < cases(60) && !testing::Test::HasFailure(); ++i) {
    const AttentionCase c(random, ask);
    const KeySource source(random, c, run.v_transposed);
    Observe how;
    how.rows = pick(random, {Rows::Sum, Rows::Mean, Rows::Seen, Rows::Max, Rows::Last, Rows::Decayed});
    how.heads = pick(random, {Heads::Each, Heads::GroupMean, Heads::GroupMax, Heads::GroupSum, Heads::LayerMean});
    if (c.mods.k_map && how.heads == Heads::Each) how.heads = Heads::GroupMean;
    how.decay = 0.95f;
    how.logits = chance(random, 0.25);
    std::vector<int64_t> lengths;
    for (int64_t s = 0; s < c.k.view.segments(); ++s) lengths.push_back(c.k.view.length(s));
    const RaggedData want = ragged(random, Dtype::F32, lengths, c.g, how.heads == Heads::Each ? c.h / c.g : 0,
                                   Layout::any(random));
    const Poisoned got = want.values.twin();
    Ragged to = want.view;
    to.values = got;
    const Plan* plan = chance(random, 0.5) ? &c.plan.plan : nullptr;
    SCOPED_TRACE("case " + std::to_string(i) + ": rows " + std::to_string(int(how.rows)) + ", heads " +
                 std::to_string(int(how.heads)) + (how.logits ? ", logits" : "") + (plan ? ", planned; " : "; ") +
                 c.text() + source.text());
    Queue queue;
    Poisoned lse(Dtype::F32, {c.q.view.values.size[0]});
    if (chance(random, 0.5)) {
      RowStats rows;
      rows.lse = lse;
      oracle().observe_rows(queue, c.q, source.keys, plan, source.mods, rows);
      how.lse = lse;
      if (chance(random, 0.5))  // rows that count for more, or less
        for (float& x : lse.view().span<float>()) x += float(random.uniform() * 4 - 2);
    }
    oracle().observe(queue, c.q, source.keys, plan, source.mods, how, want);
    run.observe(queue, c.q, source.keys, plan, source.mods, how, to);
    const double rounded = rounded_query(c.q.view.values.type, c.k.view.values.type, c.logit + 4, double(c.d));
    expect_close("columns", want.values, got, statistic(source.unit + 2 * rounded, c.logit + 4, largest(want.values)));
  }
}

void observe_equals_reference(const Kernels& run, Random random) { observed_as_reference(run, random, {}); }

void observe_many_equals_reference(const Kernels& run, Random random) {
  Ask ask;
  ask.many = true;
  observed_as_reference(run, random, ask);
}

void observe_rows_equals_reference(const Kernels& run, Random random) {
  Ask ask;
  ask.extreme = ask.sigmoid = false;
  for (int i = 0; i < cases(50) && !testing::Test::HasFailure(); ++i) {
    AttentionCase c(random, ask);
    c.mods.softcap = 0;  // a saturated cap makes ties that rounding decides
    const KeySource source(random, c, run.v_transposed);
    const int64_t rows = c.q.view.values.size[0];
    const Buffer spans = Buffer::of<int32_t>({3, 2}, std::vector<int32_t>{0, 4, 3, 70, 1000, 2000});
    struct Results {
      Poisoned entropy, distance, argmax, peak, lse, span;
      RowStats view(const Tensor& spans) const { return {entropy, distance, argmax, peak, lse, span, spans}; }
      explicit Results(int64_t rows)
          : entropy(Dtype::F32, {rows}), distance(Dtype::F32, {rows}), argmax(Dtype::I32, {rows}),
            peak(Dtype::F32, {rows}), lse(Dtype::F32, {rows}), span(Dtype::F32, {rows, 3}, 1) {}
    } want(rows), got(rows), alone(rows);
    const Plan* plan = chance(random, 0.5) ? &c.plan.plan : nullptr;
    SCOPED_TRACE("case " + std::to_string(i) + (plan ? ", planned; " : "; ") + c.text() + source.text());
    Queue queue;
    oracle().observe_rows(queue, c.q, source.keys, plan, source.mods, want.view(spans));
    run.observe_rows(queue, c.q, source.keys, plan, source.mods, got.view(spans));
    RowStats only;
    only.entropy = alone.entropy;
    run.observe_rows(queue, c.q, source.keys, plan, source.mods, only);
    const double logit = c.logit + 4, u = source.unit + 2 * logit_error(logit);
    expect_close("entropy", want.entropy, got.entropy, 8 * u);
    expect_close("distance", want.distance, got.distance, 8 * u * std::max(1.0, c.terms));
    expect_close("argmax", want.argmax, got.argmax, 0);
    expect_close("peak", want.peak, got.peak, u);
    expect_close("lse", want.lse, got.lse, attend_lse(source.unit, logit));
    expect_close("span", want.span, got.span, u);
    expect_close("entropy alone", got.entropy, alone.entropy, 0);
  }
}

/// With no mods a row's probabilities are one: the columns' sums add to the number of rows that see a key.
void observed_columns_sum_to_rows(const Kernels& run, Random random) {
  Ask ask;
  ask.low_types = ask.mods = ask.plans = ask.parts = ask.maps = false;
  for (int i = 0; i < cases(15); ++i) {
    const AttentionCase c(random, ask);
    SCOPED_TRACE("case " + std::to_string(i) + ": " + c.text());
    std::vector<int64_t> lengths;
    for (int64_t s = 0; s < c.k.view.segments(); ++s) lengths.push_back(c.k.view.length(s));
    const RaggedData columns = ragged(random, Dtype::F32, lengths, c.g, 0, {});
    Observe how;
    how.rows = Observe::Rows::Sum;
    how.heads = Observe::Heads::GroupSum;
    Queue queue;
    run.observe(queue, c.q, {&c.k.view, nullptr, nullptr}, nullptr, c.mods, how, columns);
    for (int64_t s = 0; s < columns.view.segments(); ++s) {
      double sum = 0;
      for (int64_t r = columns.view.begin(s); r < columns.view.end(s); ++r) sum += double(columns.values->at<float>(r));
      const int64_t n = c.q.view.length(s / c.g * c.h), seeing = std::min(n, columns.view.length(s));  // earlier rows see nothing
      EXPECT_NEAR(sum, double(seeing * (c.h / c.g)), 1e-3 * std::max(1.0, sum) * (1 + c.logit / 1000));
    }
  }
}

}  // namespace

std::vector<Check> observe_checks() {
  using enum Check::Against;
  return {{Reference, "observe", observe_equals_reference},
          {Reference, "observe_many", observe_many_equals_reference},
          {Reference, "observe_rows", observe_rows_equals_reference},
          {Property, "observed_columns_sum_to_rows", observed_columns_sum_to_rows}};
}

}  // namespace heed::test
