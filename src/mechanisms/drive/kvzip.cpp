#include "mechanisms/drive/kvzip.h"

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

std::vector<ParamInfo> KVzip::params(int tokens) {
  using M = KVzip;
  return keep_params<M>(
      "0.3", "prompt",
      {
          param(&M::chunk, "chunk", tokens, 16, 1 << 20, "tokens repeated at a time"),
          param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries that always stay, and that each repetition sees"),
          param(&M::share, "share", {"all", "layer", "head"}, 0,
                "what divides the budget: all layers, each layer's heads, or each head alone"),
      });
}

std::string KVzip::check() const { return too_small(budget, sinks, "sinks"); }

Needs KVzip::needs(const ModelInfo&) const {
  Needs n;
  n.all_layers = true;
  n.columns = {{"kvzip.most"}};
  return n;
}

std::unique_ptr<State> KVzip::open(const ModelInfo&) const { return std::make_unique<Part>(); }

void KVzip::drive(Run& run) const {
  auto& part = static_cast<Part&>(*run.state());
  for (int s = 0; s < run.sequences(); ++s) {
    const std::vector<int32_t> text(run.tokens(s).begin(), run.tokens(s).end());
    for (int64_t begin = 0; begin < int64_t(text.size()); begin += chunk) {
      part.begin = begin, part.end = std::min<int64_t>(begin + chunk, int64_t(text.size()));
      std::vector<int32_t> request;
      if (begin == 0) {
        request = run.tokenize("\n\nRepeat the previous context exactly.\n\n");
      } else {
        request = run.tokenize("\n\nRepeat the part of the previous context exactly, starting with ");
        request.insert(request.end(), text.begin() + std::max<int64_t>(0, begin - 8), text.begin() + begin);
        const std::vector<int32_t> stop = run.tokenize("\n\n");
        request.insert(request.end(), stop.begin(), stop.end());
      }
      request.insert(request.end(), text.begin() + part.begin, text.begin() + part.end);
      repeat(run, s, request);
    }
    part.begin = part.end = 0;
    behind(run, s);
  }
  run.evict();
}

Plan KVzip::seen(const LayerView& at) const {
  const auto& part = static_cast<const Part&>(at.state());
  Plan seen;
  seen.form = Plan::Form::Interval, seen.scope = Plan::Scope::KvHead, seen.q_tile = int(longest_queries(at));
  std::vector<int32_t> ranges;
  std::vector<int64_t> rows{0};
  for (int64_t s = 0; s < at.k.segments(); ++s) {
    const int64_t n = at.rows[size_t(s / at.k.heads)], m = at.key_rows[size_t(s)];
    if (n == 0) continue;
    const int64_t first = std::min({int64_t(sinks), part.begin, m - n});
    auto add = [&](int64_t begin, int64_t end) {
      if (begin < end) ranges.push_back(int32_t(begin)), ranges.push_back(int32_t(end));
    };
    add(0, first);
    add(part.begin, std::min(part.end, m - n));
    add(m - n, m);
    rows.push_back(int64_t(ranges.size()) / 2);
  }
  seen.nnz_bound = rows.back();
  seen.rowptr = at.queue.upload(rows), seen.index = at.queue.upload(ranges).reshape({rows.back(), 2});
  return seen;
}

// The softmax is over what a repetition sees. Parts are disjoint and sinks always stay, so the sum over repetitions is the
// largest of them.
void KVzip::observe(LayerView& at) const {
  if (at.phase != Phase::Replay || at.model.window(at.layer) > 0) return;
  const Plan plan = seen(at);
  Observe how;
  how.rows = Observe::Rows::Max, how.heads = Observe::Heads::GroupMax;
  const Ragged most = at.column("kvzip.most"), now = at.observe(at.q, how, &plan);
  at.run().add(at.queue, now.values.reshape({1, now.bound}), most.values.reshape({1, most.bound}));
  at.set_column("kvzip.most", most);
}

Ragged KVzip::score(LayerView& at) const {
  if (at.model.window(at.layer) > 0) return newest_seen(at);
  return force(at.queue, at.column("kvzip.most"), sinks, newest());
}

Tensor KVzip::allocate(const Allocation& a) const {
  const Tensor even = KeepPolicy::allocate(a);
  if (share.value == 2) return even;
  return without_windows(a, even, [&](std::span<const Ragged> scores, const Tensor& granted) {
    return divide(a, scores, granted, share.value ? Pool::Layer : Pool::All);
  });
}

Entry kvzip() {
  Entry e = entry<KVzip>("kvzip", "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
                         "Kim et al., 2025, arXiv 2505.23416", 2025, Role::Keep | Role::Drive);
  e.equation =
      "s_j = max over rows of the repeated chunk and the group of softmax over [sinks, chunk, repetition]; keep the "
      "best of all layers and heads";
  e.needs = "the prompt fed again, part by part: two to three times its cost";
  e.identity = "kvzip(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
