#include "kernels/attention_case.h"

namespace heed::test {
namespace {

/// Buffers of a plan, from plain vectors; `spare` garbage elements follow.
template <class T>
Tensor keep(PlanData& data, const std::vector<T>& values, std::initializer_list<int64_t> sizes) {
  Buffer buffer(DtypeOf<T>::value, sizes);
  std::copy(values.begin(), values.end(), buffer->as<T>());
  data.memory.push_back(std::move(buffer));
  return data.memory.back();
}

}  // namespace

PlanData random_plan(Random& random, Plan::Form form, Plan::Scope scope, int q_tile, int k_tile, int parts,
                     const Ragged& q, const Ragged& k, const std::vector<int64_t>& k_head_of) {
  PlanData out;
  Plan& plan = out.plan;
  plan.form = form;
  plan.scope = scope;
  plan.q_tile = q_tile;
  plan.k_tile = k_tile;
  plan.parts = form == Plan::Form::Dense ? 1 : parts;
  plan.causal = chance(random, 0.7);
  out.part_of.resize(size_t(q.values.size[0]));

  const int64_t h = q.heads, scope_count = scope_heads(scope, h, k.heads);
  const bool masks = form == Plan::Form::Blocks && chance(random, 0.5), counted = chance(random, 0.4);
  const int64_t words = (k_tile + 63) / 64;
  std::vector<int64_t> rowptr{0};
  std::vector<int32_t> count, index, mask, part;
  std::vector<uint64_t> bits;
  for (int64_t s = 0; s < q.sequences(); ++s) {
    const int64_t n = q.length(s * h);
    int64_t longest = 0;
    for (int64_t kv = 0; kv < k.heads; ++kv) longest = std::max(longest, k.length(s * k.heads + kv));
    for (int64_t sh = 0; sh < scope_count; ++sh)
      for (int64_t first = 0; first < n; first += q_tile) {
        const double density = pick(random, {0.0, 0.1, 0.5, 1.0});
        const int64_t tile_rows = std::min<int64_t>(q_tile, n - first);
        // named[i][j]: the part in which row first + i names key j.
        std::vector<std::vector<int>> named(size_t(tile_rows), std::vector<int>(size_t(longest), -1));
        auto name = [&](int64_t i, int64_t j, int p) {
          if (j < longest) named[size_t(i)][size_t(j)] = p;
        };
        int used = 0;
        auto entry = [&] {
          ++used;
          part.push_back(int32_t(random.below(plan.parts)));
          mask.push_back(-1);
          return part.back();
        };
        if (form == Plan::Form::Dense) {
          for (auto& row : named) std::fill(row.begin(), row.end(), 0);
        } else if (form == Plan::Form::Interval) {
          for (int64_t at = random.below(4); at < longest;) {
            const int64_t end = at + 1 + random.below(1 + longest / 3);
            if (chance(random, density)) {
              const int p = entry();
              index.insert(index.end(), {int32_t(at), int32_t(end)});
              for (int64_t i = 0; i < tile_rows; ++i)
                for (int64_t j = at; j < end; ++j) name(i, j, p);
            }
            at = end + random.below(5);
          }
        } else if (form == Plan::Form::Tokens) {
          for (int64_t j = 0; j < longest + 4; ++j)
            if (chance(random, density)) {
              const int p = entry();
              index.push_back(int32_t(j));
              for (int64_t i = 0; i < tile_rows; ++i) name(i, j, p);
            }
        } else {
          for (int64_t b = 0; b * k_tile < longest; ++b)
            if (chance(random, density)) {
              const int p = entry();
              index.push_back(int32_t(b));
              const bool masked = masks && chance(random, 0.6);
              if (masked) {
                mask.back() = int32_t(bits.size() / size_t(q_tile * words));
                for (int64_t w = 0; w < q_tile * words; ++w) bits.push_back(chance(random, 0.1) ? 0 : random.next());
              }
              for (int64_t i = 0; i < tile_rows; ++i)
                for (int64_t j = 0; j < k_tile; ++j) {
                  const size_t word = bits.size() - size_t((q_tile - i) * words) + size_t(j / 64);
                  if (!masked || (bits[word] >> (j % 64) & 1)) name(i, b * k_tile + j, p);
                }
            }
        }
        count.push_back(used);
        if (counted)  // entries past the count must not be looked at
          for (int64_t spare = random.below(3); spare > 0; --spare) {
            index.push_back(1 << 28);
            if (form == Plan::Form::Interval) index.push_back((1 << 28) + 3);
            part.push_back(0);
            mask.push_back(-1);
          }
        rowptr.push_back(int64_t(part.size()));
        for (int64_t head = 0; head < h; ++head) {
          if (head * scope_count / h != sh) continue;
          const int64_t m = k.length(s * k.heads + k_head_of[size_t(head)]);
          for (int64_t i = 0; i < tile_rows; ++i)
            out.part_of[size_t(q.begin(s * h + head) + first + i)].assign(named[size_t(i)].begin(),
                                                                          named[size_t(i)].begin() + m);
        }
      }
  }
  if (form == Plan::Form::Dense) return out;
  const int64_t nnz = int64_t(part.size());
  plan.nnz_bound = nnz;
  plan.rowptr = keep(out, rowptr, {int64_t(rowptr.size())});
  plan.index = form == Plan::Form::Interval ? keep(out, index, {nnz, 2}) : keep(out, index, {nnz});
  if (counted) plan.count = keep(out, count, {int64_t(count.size())});
  if (plan.parts > 1) plan.part = keep(out, part, {nnz});
  if (masks) {
    plan.mask = keep(out, mask, {nnz});
    plan.bits = keep(out, bits, {int64_t(bits.size()) / (q_tile * words), q_tile, words});
  }
  return out;
}

AttentionCase::AttentionCase(Random& random, const Ask& ask) {
  const int64_t group = pick<int64_t>(random, {1, 3, 8});
  g = ask.small ? 1 + random.below(2) : pick<int64_t>(random, {1, 1, 2, 3});
  h = g * group;
  sequences = 1 + random.below(3);
  d = ask.small ? pick<int64_t>(random, {3, 8}) : pick<int64_t>(random, {64, 80, 96, 128, 192, 256});
  d_v = chance(random, 0.6) ? d : ask.small ? 5 : pick<int64_t>(random, {64, 80, 128, 256});
  const bool maps = ask.maps && chance(random, 0.25), uneven = !maps && chance(random, 0.3);
  g_v = maps && chance(random, 0.5) ? 1 + random.below(g) : g;

  std::vector<int64_t> n_of, q_lengths, k_lengths, v_lengths;
  for (int64_t s = 0; s < sequences; ++s) {
    int64_t n = ask.small ? random.below(4) : pick<int64_t>(random, {0, 1, 1, 2, 5, 17, 33, 70});
    if (ask.many) n = pick<int64_t>(random, {3, 16, 31, 64, 97, 200});
    int64_t more = ask.small ? random.below(5) : pick<int64_t>(random, {0, 0, 1, 13, 64, 131});
    if (ask.many && chance(random, 0.2)) more = 300 + random.below(200);
    if (h * d * n > (ask.many ? 200000 : 40000)) n = 1 + n / 8;
    for (int64_t head = 0; head < h; ++head) q_lengths.push_back(n);
    int64_t m = n + more;
    if (chance(random, 0.05)) m = 0;
    if (chance(random, 0.05)) m = n / 2;
    for (int64_t kv = 0; kv < g; ++kv) k_lengths.push_back(uneven ? random.below(m + 1) : m);
    for (int64_t kv = 0; kv < g_v; ++kv) v_lengths.push_back(uneven ? k_lengths[size_t(s * g + kv)] : m);
    terms = std::max(terms, double(m));
  }
  auto type = [&] {
    return ask.low_types ? pick(random, {Dtype::F32, Dtype::BF16, Dtype::BF16, Dtype::F16}) : Dtype::F32;
  };
  const Dtype shared = type();
  const bool mixed = chance(random, 0.2);
  q = normal_ragged(random, mixed ? type() : shared, q_lengths, h, d, Layout::any(random));
  k = normal_ragged(random, ask.many ? Dtype::BF16 : mixed ? type() : shared, k_lengths, g, d, Layout::any(random));
  v = normal_ragged(random, ask.many ? Dtype::BF16 : mixed ? type() : shared, v_lengths, g_v, d_v, Layout::any(random));

  for (int64_t head = 0; head < h; ++head) {
    k_head.push_back(maps ? random.below(g) : head * g / h);
    v_head.push_back(maps ? random.below(g_v) : head * g_v / h);
  }
  const Plan::Form form = ask.plans ? pick(random, {Plan::Form::Dense, Plan::Form::Interval, Plan::Form::Blocks,
                                                    Plan::Form::Tokens})
                                    : Plan::Form::Dense;
  plan = random_plan(random, form, pick(random, {Plan::Scope::QueryHead, Plan::Scope::KvHead, Plan::Scope::Layer}),
                     pick(random, {1, 3, 16, 64, 128}), pick(random, {1, 16, 64, 128, 72}),
                     ask.parts && chance(random, 0.4) ? 1 + int(random.below(4)) : 1, q, k, k_head);

  auto keep = [&](Poisoned t) {
    memory.push_back(std::move(t));
    return memory.back().view();
  };
  auto map = [&](const std::vector<int64_t>& heads) {
    size_t at = 0;
    return keep(filled(Dtype::I32, {h}, [&] { return double(heads[at++]); }));
  };
  if (maps) {
    mods.k_map = map(k_head);
    mods.v_map = map(v_head);
  }
  double temperature = 1, bias = 0;
  const auto some = [&] { return ask.mods && chance(random, 0.2); };
  if (some()) mods.softcap = 5;
  if (some()) mods.key_bias = keep(row_numbers(k, Dtype::F32, 0, [&] { return random.normal(); }, random.below(2)));
  if (some()) {
    const int64_t r = 1 + random.below(3);
    mods.row_factor = keep(row_numbers(q, Dtype::F32, r, [&] { return random.normal(); }));
    mods.key_factor = keep(row_numbers(k, Dtype::F32, r, [&] { return random.normal(); }));
    bias += longest_row(mods.row_factor) * longest_row(mods.key_factor);
  }
  if (mods.key_bias) bias += largest(mods.key_bias);
  if (some()) {
    mods.temperature = keep(row_numbers(q, Dtype::F32, 0, [&] { return 0.5 + random.uniform(); }));
    temperature = 1.5;
  }
  if (some())
    mods.gain = keep(row_numbers(q, Dtype::F32, 0, [&] { return chance(random, 0.3) ? 0.0 : 0.2 + random.uniform(); }));
  if (some()) {
    if (chance(random, 0.5)) {  // positions with holes, as after an eviction
      Poisoned k_pos(Dtype::I32, {k.view.values.size[0]}), q_pos(Dtype::I32, {q.view.values.size[0]});
      for (int64_t s = 0; s < k.view.segments(); ++s) {
        int32_t at = int32_t(random.below(3));
        for (int64_t r = k.view.begin(s); r < k.view.end(s); ++r, at += int32_t(1 + random.below(3)))
          k_pos->at<int32_t>(r) = at;
      }
      for (int64_t s = 0; s < q.view.segments(); ++s) {
        const int64_t n = q.view.length(s);
        int32_t at = int32_t(2 * terms);
        for (int64_t i = 0; i < n; ++i, at += 1) q_pos->at<int32_t>(q.view.begin(s) + i) = at;
      }
      mods.k_pos = keep(std::move(k_pos));
      mods.q_pos = keep(std::move(q_pos));
    }
    if (chance(random, 0.6)) mods.window = 1 + random.below(int64_t(2 * terms));
    if (chance(random, 0.6))
      mods.until = keep(row_numbers(k, Dtype::I32, 0, [&] { return double(random.below(int64_t(3 * terms))); }));
  }
  if (ask.sigmoid && ask.mods && chance(random, 0.15)) mods.weight = WeightFunction::Sigmoid;
  else if (some()) mods.sink_logits = keep(filled(Dtype::F32, {h}, [&] { return random.normal(); }));

  const double dot = longest_row(q.values) * longest_row(k.values) * temperature;
  double scale = 1 / std::sqrt(double(d));
  if (chance(random, 0.3)) scale = double(mods.scale = 0.3f);
  if (ask.extreme && chance(random, 0.1) && dot > 0) scale = double(mods.scale = float(1e4 / dot));
  logit = dot * scale;
  if (mods.softcap > 0) logit = std::min(logit, double(mods.softcap));
  logit += bias;
}

Poisoned AttentionCase::out() const {
  const int64_t rows = q.view.values.size[0];
  return plan.plan.parts > 1 ? Poisoned(Dtype::F32, {plan.plan.parts, rows, d_v}) : Poisoned(Dtype::F32, {rows, d_v});
}

Poisoned AttentionCase::lse() const {
  const int64_t rows = q.view.values.size[0];
  return plan.plan.parts > 1 ? Poisoned(Dtype::F32, {plan.plan.parts, rows}) : Poisoned(Dtype::F32, {rows});
}

std::string AttentionCase::text() const {
  const char* forms[] = {"dense", "interval", "blocks", "tokens"};
  const char* scopes[] = {"query head", "KV head", "layer"};
  std::string out = std::to_string(sequences) + " sequences, heads " + std::to_string(h) + "/" + std::to_string(g) +
                    "/" + std::to_string(g_v) + ", d " + std::to_string(d) + ", d_v " + std::to_string(d_v) + ", " +
                    info(q.view.values.type).name + " " + info(k.view.values.type).name + " " +
                    info(v.view.values.type).name + ", " + forms[int(plan.plan.form)] + " by " +
                    scopes[int(plan.plan.scope)] + " tile " + std::to_string(plan.plan.q_tile) + "x" +
                    std::to_string(plan.plan.k_tile) + (plan.plan.causal ? " causal" : "") + ", parts " +
                    std::to_string(plan.plan.parts);
  if (plan.plan.mask) out += ", masks";
  if (plan.plan.count) out += ", count";
  const std::pair<bool, const char*> set[] = {{mods.scale != 0, "scale"},
                                              {mods.softcap > 0, "softcap"},
                                              {mods.window > 0, "window"},
                                              {bool(mods.q_pos), "positions"},
                                              {bool(mods.key_bias), "key_bias"},
                                              {bool(mods.row_factor), "factors"},
                                              {bool(mods.temperature), "temperature"},
                                              {bool(mods.gain), "gain"},
                                              {bool(mods.sink_logits), "sinks"},
                                              {bool(mods.until), "until"},
                                              {bool(mods.k_map), "maps"},
                                              {mods.weight == WeightFunction::Sigmoid, "sigmoid"}};
  for (const auto& [is, name] : set)
    if (is) out += std::string(", ") + name;
  out += "; n";
  for (int64_t s = 0; s < sequences; ++s) out += " " + std::to_string(q.view.length(s * h));
  out += "; m";
  for (int64_t s = 0; s < k.view.segments(); ++s) out += " " + std::to_string(k.view.length(s));
  return out + "; logits up to " + std::to_string(logit);
}

}  // namespace heed::test
