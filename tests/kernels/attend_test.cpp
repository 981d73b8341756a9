#include "base/threads.h"
#include "kernels/attention_case.h"
#include "kernels/bounds.h"
#include "kernels/checks.h"

namespace heed::test {
namespace {

double unit_of(const AttentionCase& c) {
  const Dtype q = c.q.view.values.type, k = c.k.view.values.type, v = c.v.view.values.type;
  return std::max(unit(q, k, c.terms), unit(v, c.terms));
}

/// Sums of σ below the smallest number of f32 may be 0.
void forget_underflow(const Poisoned& expected, Poisoned& got) {
  each(expected.view(), [&](auto index) {
    const double lse = number(expected.view(), index);
    if (lse < -87 && number(got.view(), index) < -87) set(got, index, lse);
  });
}

void equals_reference(const Kernels& run, Random random, const Ask& ask) {
  for (int i = 0; i < cases(60) && !testing::Test::HasFailure(); ++i) {
    const AttentionCase c(random, ask);
    SCOPED_TRACE("case " + std::to_string(i) + ": " + c.text());
    Queue queue;
    Poisoned out = c.out(), lse = c.lse(), got_out = c.out(), got_lse = c.lse(), alone = c.out();
    reference_kernels().attend(queue, c.q, c.k, c.v, c.plan.plan, c.mods, out, lse);
    run.attend(queue, c.q, c.k, c.v, c.plan.plan, c.mods, got_out, got_lse);
    const double gain = c.mods.gain ? 1.2 : 1, weights = c.mods.weight == WeightFunction::Sigmoid ? c.terms : 1;
    const double rounded = rounded_query(c.q.view.values.type, c.k.view.values.type, c.logit, double(c.d));
    expect_close("out", out, got_out,
                 attend_out(unit_of(c), c.logit, gain * weights * std::max(1.0, largest(c.v.values)), rounded));
    if (c.mods.weight == WeightFunction::Sigmoid) forget_underflow(lse, got_lse);
    expect_close("lse", lse, got_lse, attend_lse(unit_of(c), c.logit, rounded));
    run.attend(queue, c.q, c.k, c.v, c.plan.plan, c.mods, alone, {});
    expect_close("out without lse", got_out, alone, 0);
  }
}

void attend_equals_reference(const Kernels& run, Random random) { equals_reference(run, random, {}); }

void attend_many_equals_reference(const Kernels& run, Random random) {
  Ask ask;
  ask.many = true;
  equals_reference(run, random, ask);
}

/// What plans of one kind are drawn from.
struct Kind {
  Plan::Form form;
  std::vector<int> q_tile, k_tile;
  std::vector<int64_t> rows;
  std::vector<Dtype> keys;
};

void plans_equal_reference(const Kernels& run, Random random, const Kind& kind) {
  const auto one = [&](const auto& of) { return of[size_t(random.below(int64_t(of.size())))]; };
  for (int i = 0; i < cases(40) && !testing::Test::HasFailure(); ++i) {
    const int64_t g = 1 + random.below(2), h = g * pick<int64_t>(random, {1, 2, 3}),
                  d = pick<int64_t>(random, {64, 128}), sequences = 1 + random.below(2);
    const bool long_text = i == 0 && run.name == "cuda";  // more keys than what a block of threads has bits for
    std::vector<int64_t> q_lengths, k_lengths, k_heads;
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t n = long_text ? 70 : one(kind.rows),
                    m = long_text ? 66000 : n + pick<int64_t>(random, {0, 0, 1, 100, 700});
      q_lengths.insert(q_lengths.end(), size_t(h), n);
      for (int64_t kv = 0; kv < g; ++kv) k_lengths.push_back(chance(random, 0.2) ? random.below(m + 1) : m);
    }
    for (int64_t head = 0; head < h; ++head) k_heads.push_back(head * g / h);
    const Dtype type = chance(random, 0.5) ? Dtype::F32 : Dtype::BF16, key_type = one(kind.keys);
    const Layout layout{chance(random, 0.4), 0, 0};
    const RaggedData q = normal_ragged(random, type, q_lengths, h, d, layout),
                     k = normal_ragged(random, key_type, k_lengths, g, d, layout),
                     v = normal_ragged(random, key_type, k_lengths, g, d, layout);
    PlanData plan = random_plan(random, kind.form,
                                pick(random, {Plan::Scope::QueryHead, Plan::Scope::KvHead, Plan::Scope::Layer}),
                                one(kind.q_tile), one(kind.k_tile), 1, q, k, k_heads);
    plan.plan.mask = plan.plan.bits = {};
    Mods mods;
    if (chance(random, 0.2)) mods.window = 1 + random.below(200);
    const Poisoned sinks = filled(Dtype::F32, {h}, [&] { return random.normal(); });
    if (chance(random, 0.2)) mods.sink_logits = sinks;
    SCOPED_TRACE("case " + std::to_string(i) + ": " + std::to_string(sequences) + " sequences of " +
                 std::to_string(q_lengths[0]) + " rows, heads " + std::to_string(h) + "/" + std::to_string(g) + ", d " +
                 std::to_string(d) + ", keys of " + info(key_type).name + ", tiles of " +
                 std::to_string(plan.plan.q_tile) + " and " + std::to_string(plan.plan.k_tile));
    const int64_t rows = q.view.values.size[0];
    const Poisoned out(Dtype::F32, {rows, d}), lse(Dtype::F32, {rows}), got_out = out.twin(), got_lse = lse.twin();
    Queue queue;
    reference_kernels().attend(queue, q, k, v, plan.plan, mods, out, lse);
    run.attend(queue, q, k, v, plan.plan, mods, got_out, got_lse);
    const double logit = longest_row(q.values) * longest_row(k.values) / std::sqrt(double(d)),
                 rounded = rounded_query(type, key_type, logit, double(d)),
                 unit = key_type == Dtype::F32 ? 0x1p-24 : 0x1p-7;
    expect_close("out", out, got_out, attend_out(unit, logit, std::max(1.0, largest(v.values)), rounded));
    expect_close("lse", lse, got_lse, attend_lse(unit, logit, rounded));
  }
}

/// Key ranges of tiles of 64 rows and more over bf16: what a GPU reads in blocks.
void attend_ranges_equals_reference(const Kernels& run, Random random) {
  plans_equal_reference(run, random,
                        {Plan::Form::Interval, {64, 128, 256}, {1}, {1, 64, 100, 128, 200, 300}, {Dtype::BF16}});
}

/// Blocks that few queries share: those that read one are gathered.
void attend_gathers_equals_reference(const Kernels& run, Random random) {
  plans_equal_reference(
      run, random,
      {Plan::Form::Blocks, {1, 2, 5}, {32, 64, 72, 256}, {32, 33, 64, 200, 600}, {Dtype::F32, Dtype::BF16, Dtype::F16}});
}

/// Tiles are cut for the threads at hand; no bit of a result may show it.
void attend_ignores_threads(const Kernels& run, Random random) {
  Ask ask;
  ask.many = true;
  const int before = threads();
  for (int i = 0; i < cases(20) && !testing::Test::HasFailure(); ++i) {
    const AttentionCase c(random, ask);
    SCOPED_TRACE("case " + std::to_string(i) + ": " + c.text());
    Queue queue;
    Poisoned out = c.out(), lse = c.lse(), one_out = c.out(), one_lse = c.lse();
    set_threads(1);
    run.attend(queue, c.q, c.k, c.v, c.plan.plan, c.mods, one_out, one_lse);
    set_threads(3);
    run.attend(queue, c.q, c.k, c.v, c.plan.plan, c.mods, out, lse);
    set_threads(before);
    expect_close("out", one_out, out, 0);
    expect_close("lse", one_lse, lse, 0);
  }
}

/// Deleting the keys that nobody sees any more changes nothing: what `until` means.
void until_equals_deletion(const Kernels& run, Random random) {
  for (int i = 0; i < cases(10); ++i) {
    const int64_t g = 2, h = g * pick<int64_t>(random, {1, 3}), d = pick<int64_t>(random, {64, 80}),
                  n = 1 + random.below(20);
    const int64_t m = n + random.below(150), first_query = m - n;
    SCOPED_TRACE(std::to_string(n) + " queries, " + std::to_string(m) + " keys, d " + std::to_string(d));
    const RaggedData q = normal_ragged(random, Dtype::F32, std::vector<int64_t>(size_t(h), n), h, d, {});
    const RaggedData k = normal_ragged(random, Dtype::F32, std::vector<int64_t>(size_t(g), m), g, d, {});
    const RaggedData v = normal_ragged(random, Dtype::F32, std::vector<int64_t>(size_t(g), m), g, d, {});
    // Each head loses its own share of the keys before the first query.
    std::vector<std::vector<int64_t>> kept(static_cast<size_t>(g));
    Poisoned until(Dtype::I32, {g * m});
    for (int64_t kv = 0; kv < g; ++kv)
      for (int64_t j = 0; j < m; ++j) {
        const bool gone = j < first_query && chance(random, 0.5);
        until->at<int32_t>(kv * m + j) = gone ? int32_t(j + random.below(first_query - j)) : 1 << 30;
        if (!gone) kept[size_t(kv)].push_back(j);
      }
    RaggedData small_k = ragged(random, Dtype::F32, {int64_t(kept[0].size()), int64_t(kept[1].size())}, g, d, {});
    RaggedData small_v = ragged(random, Dtype::F32, {int64_t(kept[0].size()), int64_t(kept[1].size())}, g, d, {});
    Poisoned k_pos(Dtype::I32, {small_k.view.values.size[0]}), q_pos(Dtype::I32, {h * n});
    for (int64_t kv = 0; kv < g; ++kv)
      for (size_t j = 0; j < kept[size_t(kv)].size(); ++j) {
        const int64_t to = small_k.view.begin(kv) + int64_t(j), from = kv * m + kept[size_t(kv)][j];
        copy(k.view.values.select(0, from), small_k.view.values.select(0, to));
        copy(v.view.values.select(0, from), small_v.view.values.select(0, to));
        k_pos->at<int32_t>(to) = int32_t(kept[size_t(kv)][j]);
      }
    for (int64_t r = 0; r < h * n; ++r) q_pos->at<int32_t>(r) = int32_t(first_query + r % n);

    Queue queue;
    Mods masked, deleted;
    masked.window = deleted.window = chance(random, 0.5) ? m / 2 + 1 : 0;
    masked.until = until;
    deleted.k_pos = k_pos;
    deleted.q_pos = q_pos;
    Poisoned a(Dtype::F32, {h * n, d}), b = a.twin(), a_lse(Dtype::F32, {h * n}), b_lse = a_lse.twin();
    run.attend(queue, q, k, v, {}, masked, a, a_lse);
    run.attend(queue, q, small_k, small_v, {}, deleted, b, b_lse);
    expect_close("out", a, b, 0x1p-18 * std::sqrt(double(m)) * largest(v.values));
    expect_close("lse", a_lse, b_lse, 0x1p-18 * std::sqrt(double(m)));
  }
}

void merge_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(30); ++i) {
    const int64_t parts = 1 + random.below(5), rows = random.below(40), d = pick<int64_t>(random, {1, 7, 64, 80, 128, 256});
    const int64_t shift = random.below(2), pad = random.below(2) * 3;
    SCOPED_TRACE(std::to_string(parts) + " parts of " + std::to_string(rows) + " rows, d " + std::to_string(d));
    Poisoned outs = filled(Dtype::F32, {parts, rows, d}, [&] { return random.normal(); }, shift, pad);
    // A part of weight −∞ may hold anything.
    Poisoned weights = filled(
        Dtype::F32, {parts, rows},
        [&] { return chance(random, 0.3) ? -INFINITY : (chance(random, 0.1) ? 1e4 : 5) * random.normal(); }, shift);
    for (int64_t p = 0; p < parts; ++p)
      for (int64_t r = 0; r < rows; ++r)
        if (weights->at<float>(p, r) == -INFINITY && chance(random, 0.5)) outs->at<float>(p, r, random.below(d)) = NAN;
    Queue queue;
    Poisoned out(Dtype::F32, {rows, d}, shift, pad), lse(Dtype::F32, {rows}, shift),
        got = out.twin(), got_lse = lse.twin(), alone = out.twin();
    reference_kernels().merge(queue, outs, weights, out, lse);
    run.merge(queue, outs, weights, got, got_lse);
    run.merge(queue, outs, weights, alone, {});
    expect_close("out", out, got, 0x1p-18 * std::max(1.0, largest(outs)));
    expect_close("out without lse", got, alone, 0);
    expect_close("lse", lse, got_lse, 0x1p-18 * std::max(1.0, largest(weights)));
  }
}

/// However the keys are dealt to parts, merging the parts gives attention over all.
void merged_parts_equal_whole(const Kernels& run, Random random) {
  Ask ask;
  ask.low_types = ask.extreme = ask.sigmoid = ask.plans = false;
  for (int i = 0; i < cases(15) && !testing::Test::HasFailure(); ++i) {
    AttentionCase c(random, ask);
    const int parts = 2 + int(random.below(4));
    // Every key of every row, each dealt to a random part.
    PlanData dealt;
    std::vector<int64_t> rowptr{0};
    std::vector<int32_t> index, part;
    for (int64_t s = 0; s < c.q.view.segments(); ++s)
      for (int64_t r = 0; r < c.q.view.length(s); ++r) {
        const int64_t kv = s / c.h * c.g + c.k_head[size_t(s % c.h)];
        for (int64_t j = 0; j < c.k.view.length(kv); ++j) {
          index.push_back(int32_t(j));
          part.push_back(int32_t(random.below(parts)));
        }
        rowptr.push_back(int64_t(index.size()));
      }
    const Buffer ptr = Buffer::of<int64_t>({int64_t(rowptr.size())}, rowptr),
                 at = Buffer::of<int32_t>({int64_t(index.size())}, index),
                 of = Buffer::of<int32_t>({int64_t(part.size())}, part);
    Plan plan;
    plan.form = Plan::Form::Tokens;
    plan.causal = c.plan.plan.causal;
    plan.rowptr = ptr;
    plan.index = at;
    plan.part = of;
    plan.parts = parts;
    plan.nnz_bound = int64_t(index.size());
    SCOPED_TRACE("case " + std::to_string(i) + " in " + std::to_string(parts) + " parts: " + c.text());
    Queue queue;
    const int64_t rows = c.q.view.values.size[0];
    Poisoned whole = c.out(), whole_lse = c.lse(), outs(Dtype::F32, {parts, rows, c.d_v}), lses(Dtype::F32, {parts, rows});
    run.attend(queue, c.q, c.k, c.v, c.plan.plan, c.mods, whole, whole_lse);
    run.attend(queue, c.q, c.k, c.v, plan, c.mods, outs, lses);
    // Rows outside every segment: no part may have touched them, and merge need not be told.
    for (int64_t r = 0; r < rows; ++r)
      if (std::isnan(whole_lse->at<float>(r)))
        for (int p = 0; p < parts; ++p) {
          EXPECT_TRUE(std::isnan(lses->at<float>(p, r)));
          lses->at<float>(p, r) = -INFINITY;
        }
    Poisoned merged = c.out(), merged_lse = c.lse();
    run.merge(queue, outs, lses, merged, merged_lse);
    for (int64_t r = 0; r < rows; ++r)
      if (std::isnan(whole_lse->at<float>(r))) {
        whole_lse->at<float>(r) = -INFINITY;
        for (int64_t col = 0; col < c.d_v; ++col) whole->at<float>(r, col) = 0;
      }
    const double u = unit(Dtype::F32, c.terms);
    expect_close("out", whole, merged, 4 * attend_out(u, c.logit, 1.2 * std::max(1.0, largest(c.v.values))));
    expect_close("lse", whole_lse, merged_lse, 4 * attend_lse(u, c.logit));
  }
}

void attend_backward_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(40) && !testing::Test::HasFailure(); ++i) {
    const AttentionCase c(random, {});
    SCOPED_TRACE("case " + std::to_string(i) + ": " + c.text());
    Queue queue;
    const int64_t rows = c.q.view.values.size[0], keys = c.k.view.values.size[0];
    Poisoned out = c.out(), lse = c.lse();
    reference_kernels().attend(queue, c.q, c.k, c.v, c.plan.plan, c.mods, out, lse);
    if (c.plan.plan.parts > 1) {
      Poisoned merged(Dtype::F32, {rows, c.d_v}), merged_lse(Dtype::F32, {rows});
      if (c.mods.weight == WeightFunction::Sigmoid) continue;  // its parts add, which merge does not do
      reference_kernels().merge(queue, out, lse, merged, merged_lse);
      out = std::move(merged);
      lse = std::move(merged_lse);
    }
    const Poisoned d_out = row_numbers(c.q, Dtype::F32, c.d_v, [&] { return random.normal(); });
    struct Gradients {
      Poisoned q, k, v, bias, gain;
    } want{Poisoned(Dtype::F32, {rows, c.d}), Poisoned(Dtype::F32, {keys, c.d}),
           Poisoned(Dtype::F32, {c.v.view.values.size[0], c.d_v}), Poisoned(Dtype::F32, {keys}),
           Poisoned(Dtype::F32, {rows})},
        got{want.q.twin(), want.k.twin(), want.v.twin(), want.bias.twin(), want.gain.twin()},
        bare{want.q.twin(), want.k.twin(), want.v.twin(), {}, {}};
    auto both = [&](const Kernels& table, Gradients& g) {
      table.attend_backward(queue, c.q, c.k, c.v, c.plan.plan, c.mods, out, lse, d_out, g.q, g.k, g.v, g.bias, g.gain);
    };
    both(reference_kernels(), want);
    both(run, got);
    both(run, bare);
    // Sums of signed terms: compare with the largest of the tensor, or a typical term where they cancel.
    const double u = unit_of(c), slope = c.mods.scale != 0 ? double(c.mods.scale) : 1 / std::sqrt(double(c.d));
    const double term = largest(d_out) * std::max(1.0, largest(c.v.values)) * std::sqrt(double(c.d_v)) / 4;
    auto bound = [&](const Poisoned& t, double typical) { return gradient(u, c.logit, std::max(largest(t), typical)); };
    const double q_typical = 0.1 * term * slope * largest(c.k.values), k_typical = 0.1 * term * slope * largest(c.q.values);
    expect_close("d_q", want.q, got.q, bound(want.q, q_typical));
    expect_close("d_k", want.k, got.k, bound(want.k, k_typical));
    expect_close("d_v", want.v, got.v, bound(want.v, 0.1 * largest(d_out)));
    expect_close("d_key_bias", want.bias, got.bias, bound(want.bias, 0.1 * term));
    expect_close(
        "d_gain", want.gain, got.gain,
        0x1p-18 * std::sqrt(double(c.d_v)) * std::max(1.0, 5 * largest(out) * largest(d_out) * std::sqrt(double(c.d_v))));
    // A GPU adds d_q in any order, and may have a faster kernel where no optional gradient is asked for.
    const double same = run.name == "cuda" ? 1 : 0;
    expect_close("d_q without optional gradients", got.q, bare.q, same * bound(want.q, q_typical));
    expect_close("d_k without optional gradients", got.k, bare.k, same * bound(want.k, k_typical));
    expect_close("d_v without optional gradients", got.v, bare.v, same * bound(want.v, 0.1 * largest(d_out)));
  }
}

}  // namespace

std::vector<Check> attention_checks() {
  using enum Check::Against;
  return {{Reference, "attend", attend_equals_reference},
          {Reference, "attend_many", attend_many_equals_reference},
          {Reference, "attend_ranges", attend_ranges_equals_reference},
          {Reference, "attend_gathers", attend_gathers_equals_reference},
          {Property, "attend_ignores_threads", attend_ignores_threads},
          {Property, "attend_until_is_deletion", until_equals_deletion},
          {Reference, "merge", merge_equals_reference},
          {Property, "merge_of_parts_is_attend", merged_parts_equal_whole},
          {Reference, "attend_backward", attend_backward_equals_reference}};
}

}  // namespace heed::test
