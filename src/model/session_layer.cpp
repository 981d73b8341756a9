// One layer of a session's step: its heads, the store, attention by plan or read, and what policies then cut.
#include <algorithm>
#include <optional>

#include "attention/plans.h"
#include "attention/rotation.h"
#include "attention/select.h"
#include "model/session_impl.h"
#include "model/transformer.h"

namespace heed {

Dtype panel_type(const PageType& type) {
  switch (type.kind) {
    case PageType::Kind::BF16: return Dtype::BF16;
    case PageType::Kind::F16: return Dtype::F16;
    default: return Dtype::F32;
  }
}

Ragged Session::Impl::head_major(const Batch& batch, Dtype type, int64_t heads, int64_t width) {
  const int64_t all = batch.total * heads;
  return {.values = queue.scratch.take(type, {all, width}),
          .offsets = heads == info().h ? batch.q_offsets : batch.kv_offsets,
          .ends = {},
          .heads = heads,
          .bound = all};
}

LayerView Session::Impl::view_of(const Batch& batch, int l, Tensor x) {
  const ModelInfo& m = info();
  const LayerWeights& w = weights->layers[size_t(l)];
  LayerView view(m, queue, l, batch.phase);
  view.enter(step);
  view.prompt = prompt, view.store = &store->layer(l), view.stores = store.get();
  view.rows = batch.count, view.first = batch.first;
  view.ids = batch.ids, view.hidden = x, view.output_matrix = w.o;
  if (!w.k_norm) view.projections = {w.k, w.v, w.k_bias, w.v_bias};
  view.basis = bases.empty() ? nullptr : bases[size_t(l)].get();
  view.read.rope = m.rope(l), view.read.positions = positions;
  view.mods.scale = m.scale, view.mods.softcap = m.softcap, view.mods.window = m.window(l);
  view.q_pos = view.mods.q_pos = batch.q_pos;
  return view;
}

/// A layer's queries, keys and values as they come from its matrices: F32 [T, heads, width].
struct Session::Impl::Projected {
  Tensor q, k, v;
};

Session::Impl::Projected Session::Impl::project_heads(const Batch& batch, int l, Tensor x) {
  const ModelInfo& m = info();
  // Side by side in a token's row: products that are one where a backend makes it so.
  const int64_t q_width = int64_t(m.h) * m.d, k_width = int64_t(m.g) * m.d, v_width = int64_t(m.g) * m.d_v;
  const Tensor all_rows = queue.scratch.take(Dtype::F32, {batch.total, q_width + k_width + v_width});
  const auto columns = [&](int64_t first, int64_t width) { return all_rows.slice(1, first, first + width); };
  const Tensor q = columns(0, q_width), k = columns(q_width, k_width), v = columns(q_width + k_width, v_width);
  {
    Clock clock(times.products);
    project(queue, *weights, architecture(), l, x, options.ubatch, q, k, v, batch.adapter_of(l));
  }
  const auto by_head = [](Tensor rows, int64_t heads, int64_t width) {
    rows.rank = 3;
    rows.size[1] = heads, rows.size[2] = width, rows.stride[1] = width, rows.stride[2] = 1;
    return rows;
  };
  return {by_head(q, m.h, m.d), by_head(k, m.g, m.d), by_head(v, m.g, m.d_v)};
}

/// Where the new tokens are read, for keys and for queries: their true positions, or behind what each KV head holds. Heads
/// that hold different numbers of entries read the same token at different places, so these are numbers for each (token,
/// head).
std::pair<Tensor, Tensor> Session::Impl::read_places(const Batch& batch, LayerStore& entries) {
  if (positions != Read::Positions::Cache) return {batch.positions, batch.positions};
  const ModelInfo& m = info();
  const Num s = find(batch.first, 1, options.sequences + 1, place() + 1) - 1, i = place() - load(batch.first, s);
  const Tensor held = entries.pages().length;
  return {compute(queue, Dtype::I32, {batch.total, m.g}, load(held, s * m.g + channel()) + i),
          compute(queue, Dtype::I32, {batch.total, m.h}, load(held, s * m.g + floor_div(channel(), m.group())) + i)};
}

/// Where new keys and values are put before they go to the store.
struct Session::Impl::NewRows {
  Ragged k, v;
  Tensor positions;
};

/// view.k and view.v, a panel with room for the new keys and values behind what is held, which is read into it.
Session::Impl::NewRows Session::Impl::open_panel(const Batch& batch, LayerView& view, bool plain_keys) {
  const ModelInfo& m = info();
  const Kernels& run = *queue.run;
  LayerStore& entries = *view.store;
  const int64_t all = entries.segments(), rows = entries.entries() + batch.total * m.g;
  for (int64_t s = 0; s < all; ++s) view.key_rows.push_back(entries.length(s) + batch.count[size_t(s / m.g)]);
  const Tensor old = entries.offsets(queue);
  const Tensor offsets = compute(queue, Dtype::I64, {all + 1}, load(old, index()) + load(batch.kv_offsets, index()));
  // Where the old ones of each segment end.
  const Tensor middle = compute(queue, Dtype::I64, {all + 1}, load(old, index() + 1) + load(batch.kv_offsets, index()));
  view.k = {.values = queue.scratch.take(panel_type(store->options().k), {rows, m.d}),
            .offsets = offsets,
            .ends = {},
            .heads = m.g,
            .bound = rows};
  view.v = view.k;
  view.v.values = queue.scratch.take(panel_type(store->options().v), {rows, m.d_v});
  view.k_pos = view.mods.k_pos = queue.scratch.take(Dtype::I32, {rows});
  NewRows out{view.k, view.v, view.k_pos};
  for (Ragged* fresh : {&out.k, &out.v}) fresh->offsets = middle, fresh->ends = offsets.slice(0, 1, all + 1);
  if (entries.entries() > 0) {
    Ragged k_old = view.k, v_old = view.v;
    k_old.ends = v_old.ends = middle.slice(0, 0, all);
    const Read read{.plan = {}, .positions = positions, .rope = m.rope(view.layer)};
    run.page_read(queue, entries.pages(), plain_keys ? &read : nullptr, k_old, v_old, view.k_pos);
    if (store->options().bias) {
      Ragged bias = k_old;
      bias.values = view.mods.key_bias = compute(queue, Dtype::F32, {rows}, 0);
      run.column_read(queue, entries.pages(), kBiasColumn, bias);
    }
  }
  compute(queue, out.k, load(batch.positions, load(batch.first, floor_div(segment(), m.g)) + place()), out.positions);
  return out;
}

/// Queries, keys and values head by head, normed, rotated and in the layer's coordinates: view.q, a prompt's panel, and the
/// store with the new entries.
void Session::Impl::enter_heads(const Batch& batch, LayerView& view, const Projected& rows) {
  const ModelInfo& m = info();
  const bool decoding = batch.phase == Phase::Decode;
  LayerStore& entries = *view.store;
  const LayerWeights& w = weights->layers[size_t(view.layer)];
  const float eps = architecture().norm_eps;
  const Rope* rope = m.rope(view.layer);
  const bool plain_keys = store->options().plain_keys && rope;
  const auto [read_at, query_at] = read_places(batch, entries);

  const Basis none, &basis = view.basis ? *view.basis : none;
  // Queries, keys and values are split together, when all there is to split is known; some then change their basis.
  struct Change {
    Ragged from;
    const Buffer* matrix;
    Ragged to;
  };
  std::vector<Heads> splits;
  std::vector<Change> changes;
  const auto split = [&](Tensor from, Tensor norm, const Rope* turn, Tensor places, const Buffer& matrix, const Ragged& out) {
    splits.push_back({from, norm, turn, places, out});
    if (!matrix) return;
    splits.back().out = head_major(batch, Dtype::F32, from.size[1], from.size[2]);
    changes.push_back({splits.back().out, &matrix, out});
  };

  // Nobody but attention looks at a prompt's queries, which it rounds to the type of its keys.
  const Dtype k_type = panel_type(store->options().k), v_type = panel_type(store->options().v);
  const bool looked_at = parts() > 0 || tap || tapes;
  view.q = head_major(
      batch, decoding || looked_at || k_type != Dtype::BF16 ? Dtype::F32 : row_type(queue, batch.total, w.q), m.h, m.d);
  // One token each: all of it at once.
  const bool one_each = decoding && std::all_of(batch.count.begin(), batch.count.end(), [](int64_t n) { return n == 1; });
  const bool appended = one_each && !plain_keys && !basis.k && !basis.v &&
                        entries.append_heads(queue, eps, {rows.q, w.q_norm, rope, query_at, view.q},
                                             {rows.k, w.k_norm, rope, read_at, {}}, {.x = rows.v}, batch.kv_pos);
  if (appended) return;
  split(rows.q, w.q_norm, rope, query_at, basis.k, view.q);
  if (plain_keys) {
    view.plain_q = head_major(batch, Dtype::F32, m.h, m.d);
    splits.push_back({rows.q, w.q_norm, nullptr, {}, view.plain_q});
  }

  // New keys and values, in the panel behind the old ones or, while decoding, on their own.
  const NewRows fresh = decoding ? NewRows{head_major(batch, k_type, m.g, m.d), head_major(batch, v_type, m.g, m.d_v),
                                           batch.kv_pos}
                                 : open_panel(batch, view, plain_keys);
  split(rows.v, {}, nullptr, {}, basis.v, fresh.v);
  Ragged kept = fresh.k;
  if (plain_keys) {  // the same rows, unrotated
    kept.values = queue.scratch.take(k_type, {fresh.k.values.size[0], m.d});
    splits.push_back({rows.k, w.k_norm, nullptr, {}, kept});
    if (!decoding) splits.push_back({rows.k, w.k_norm, rope, read_at, fresh.k});
  } else {
    split(rows.k, w.k_norm, rope, read_at, basis.k, fresh.k);
  }
  queue.run->split_heads(queue, batch.first, eps, splits);
  for (const Change& change : changes) change_basis(queue, change.from, *change.matrix, change.to);
  entries.append(queue, kept, fresh.v, fresh.positions, batch.count);
}

/// From attention's output to the residual stream.
void Session::Impl::leave_heads(const Batch& batch, const LayerView& view, Tensor x) {
  const ModelInfo& m = info();
  Ragged out = view.q;
  out.values = view.out;
  if (view.basis && view.basis->v) {
    Ragged back = out;
    back.values = queue.scratch.take(Dtype::F32, {batch.total * m.h, m.d_v});
    change_basis(queue, out, view.basis->v_back, back);
    out = back;
  }
  Clock products(times.products);
  // Of one token a sequence, rows of heads already lie as the token's row.
  Tensor merged = out.values.reshape({batch.total, int64_t(m.h) * m.d_v});
  if (std::any_of(batch.count.begin(), batch.count.end(), [](int64_t n) { return n > 1; })) {
    merged = queue.scratch.take(row_type(queue, batch.total, weights->layers[size_t(view.layer)].o),
                                {batch.total, int64_t(m.h) * m.d_v});
    queue.run->merge_heads(queue, out, batch.first, merged);
  }
  finish(queue, *weights, architecture(), view.layer, merged, options.ubatch, x, batch.adapter_of(view.layer));
}

void Session::Impl::layer(Batch& batch, int l, Tensor x) {
  const ModelInfo& m = info();
  Scratch scope(queue.scratch);
  LayerView view = view_of(batch, l, x);
  const Projected rows = project_heads(batch, l, x);
  {
    Clock clock(times.rest);
    if (batch.phase == Phase::Decode) make_room(batch, view);
    enter_heads(batch, view, rows);
    view.out = queue.scratch.take(Dtype::F32, {batch.total * m.h, m.d_v});
    view.lse = queue.scratch.take(Dtype::F32, {batch.total * m.h});
  }
  attend(batch, view);
  if (tapes) {
    const Tape& tape = (*tapes)[size_t(l)];
    queue.move(x, tape.x), queue.move(view.q.values, tape.q), queue.move(view.out, tape.out), queue.move(view.lse, tape.lse);
  }
  keep(batch, view);
  leave_heads(batch, view, x);
}

void Session::Impl::attend(Batch& batch, LayerView& view) {
  const Kernels& run = *queue.run;
  const int planner = composition->owner(Role::Plan, view.layer), reader = composition->owner(Role::Read, view.layer);
  auto enter = [&](int p) -> const Mechanism& {
    view.enter(states[size_t(p)].get());
    return part(p);
  };
  if (batch.phase == Phase::Decode) {
    if (reader >= 0) {
      Clock clock(times.plan);
      const Mechanism& mechanism = enter(reader);
      const Read chosen = mechanism.read(view);
      view.read.plan = chosen.plan, view.read.places = chosen.places;
      const Ragged keys{
          .values = {}, .offsets = view.store->offsets(queue), .ends = {}, .heads = view.model.g, .bound = view.store->entries()};
      view.read.plan = limit_heads(view, view.read.plan, keys, view.store->longest(), mechanism.heads);
    }
    Clock clock(times.attend);
    run.attend_store(queue, view.q, view.store->pages(), view.read, view.mods, view.out, view.lse);
    if (!counts_at_end(batch)) count_reads(view);
  } else {
    if (planner >= 0 && batch.phase != Phase::Replay) {
      Clock clock(times.plan);
      const Mechanism& mechanism = enter(planner);
      view.plan = limit_heads(view, mechanism.plan(view), view.k,
                              *std::max_element(view.key_rows.begin(), view.key_rows.end()), mechanism.heads);
    }
    {
      Clock clock(times.attend);
      run.attend(queue, view.q, view.k, view.v, view.plan, view.mods, view.out, view.lse);
    }
    if (batch.phase != Phase::Replay) count_shares(batch, view);
  }
  if (batch.phase != Phase::Replay)
    for (int p : composition->edits(view.layer)) {
      Clock clock(times.attend);
      view.out = enter(p).edit(view);
    }
  Clock clock(times.observe);
  for (int p = 0; p < parts() && !tapes; ++p) {
    const bool looks = batch.phase != Phase::Replay || has(composition->parts()[size_t(p)].roles, Role::Drive);
    if (looks && part(p).layers.holds(view.layer, view.model.layers)) enter(p).observe(view);
  }
  view.enter(nullptr);
  if (tap) tap(view);
}

/// Weighted by rows, so that chunks of a prompt add up.
void Session::Impl::count_shares(const Batch& batch, LayerView& view) {
  const double worth = double(batch.total) * pair_weight[size_t(view.layer)];
  rows[size_t(view.layer)] += double(batch.total) * row_weight;
  if (view.plan.form == Plan::Form::Dense && !view.mods.until) {
    dense_rows[size_t(view.layer)] += worth;
    return;
  }
  Scratch scope(queue.scratch);
  const Tensor pairs = queue.scratch.take(Dtype::F64, {2, view.model.h}), sum = shares->select(0, view.layer);
  count_density(queue, view.plan, view.q, {.panel = &view.k, .pages = nullptr, .read = nullptr}, view.mods, pairs);
  const Num possible = load(pairs, view.model.h + index());
  compute(queue, load(sum, index()) + pick(possible > 0, load(pairs, index()) / possible, 1) * worth, sum);
}

/// Whether what a decode step reads are the lengths that all layers have when it is over.
bool Session::Impl::counts_at_end(const Batch& batch) const {
  bool windows = false;
  for (int64_t window : info().windows) windows |= window > 0;
  return parts() == 0 && !windows && options.sequences <= 4 && batch.total == options.sequences &&
         batch.layers == info().layers;
}

void Session::Impl::count_all_reads() {
  const ModelInfo& m = info();
  Num sum = load(reads, index() * m.h + channel());
  for (int64_t s = 0; s < options.sequences; ++s)
    sum = sum + load(store->lengths(), (index() * options.sequences + s) * m.g + floor_div(channel(), m.group()));
  compute(queue, sum, reads);
}

void Session::Impl::count_reads(LayerView& view) {
  Mods mods;
  // Plans are counted as they read, whatever a window hides of it.
  if (view.read.plan.form == Plan::Form::Dense) mods.window = view.mods.window, mods.q_pos = view.q_pos;
  queue.run->count_pairs(queue, view.read.plan, view.q,
                         {.panel = nullptr, .pages = &view.store->pages(), .read = &view.read}, mods,
                         reads->select(0, view.layer));
}

bool Session::Impl::due(const Batch& batch, const KeepPolicy& policy) const {
  const When& when = policy.timing();
  if (batch.phase == Phase::Decode) return when.decodes() && (step + 1) % when.every == 0;
  return when.prompts() && (when.at != When::At::Prompt || batch.last_chunk);
}

/// What a policy's fractions refer to: the prompts, or all text with the `coming` tokens of each sequence.
std::vector<int64_t> Session::Impl::lengths(const KeepPolicy& policy, std::span<const int64_t> coming) const {
  if (!policy.kept().seen) return prompt;
  std::vector<int64_t> out = next;
  for (size_t s = 0; s < coming.size(); ++s) out[s] += coming[s];
  return out;
}

// Scores, allocates and evicts in one layer, leaving room for `coming` tokens of each sequence.
void Session::Impl::cut(const Batch& batch, LayerView& view, const KeepPolicy& policy, std::span<const int64_t> coming) {
  if (policy.kept().seen) queue.varies();
  view.prompt = lengths(policy, batch.count);
  const int64_t all = view.store->segments(), g = view.model.g;
  std::vector<int64_t> most;
  int64_t together = 0;
  bool fits = !policy.unbounded();
  for (int64_t s = 0; s < all; ++s) {
    const int64_t length = view.store->length(s), room = coming.empty() ? 0 : coming[size_t(s / g)];
    const bool counted = !policy.unbounded() && policy.heads.holds(int(s % g), int(g));
    const int64_t granted = counted ? std::max<int64_t>(0, policy.entries(policy.kept(), view.model, view.layer,
                                                                          view.prompt[size_t(s / g)]) -
                                                               room)
                                    : length;
    fits &= length <= granted;
    together += std::min(length, granted) + 1;  // an allocator may round up
    most.push_back(length);
  }
  if (fits) return;
  Scratch scope(queue.scratch);
  std::optional<Clock> clock(std::in_place, times.observe);
  const Ragged scores = policy.score(view);
  Tensor counts = policy
                      .allocate({.queue = queue,
                                 .model = view.model,
                                 .first_layer = view.layer,
                                 .scores = std::span(&scores, 1),
                                 .prompt = view.prompt,
                                 .budget = policy.kept(),
                                 .state = view.state_held()})
                      .select(0, 0);
  if (!coming.empty()) {
    const Num s = floor_div(index(), g);
    counts = compute(queue, Dtype::I32, {all},
                     max(0, load(counts, index()) - (load(view.first, s + 1) - load(view.first, s))));
  }
  clock.reset();
  Clock select(times.select);
  for (int64_t& length : most) length = std::min(length, together);
  evict(view, policy, scores, counts, most, together);
}

void Session::Impl::make_room(Batch& batch, LayerView& view) {
  for (int p : composition->keepers(view.layer)) {
    const auto& policy = static_cast<const KeepPolicy&>(part(p));
    if (!policy.makes_room() || !due(batch, policy)) continue;
    view.enter(states[size_t(p)].get());
    cut(batch, view, policy, batch.count);
    view.prompt = prompt;
  }
}

void Session::Impl::keep(Batch& batch, LayerView& view) {
  if (batch.phase == Phase::Replay) return;
  for (int p : composition->keepers(view.layer)) {
    const auto& policy = static_cast<const KeepPolicy&>(part(p));
    view.enter(states[size_t(p)].get());
    if (policy.settle(view) || policy.needs(view.model).all_layers || !due(batch, policy)) continue;
    if (view.decoding() && policy.makes_room()) continue;
    cut(batch, view, policy, {});
    view.prompt = prompt;
  }
}

void Session::Impl::evict_all(int p, Phase phase) {
  const auto& policy = static_cast<const KeepPolicy&>(part(p));
  const ModelInfo& m = info();
  Scratch scope(queue.scratch);
  std::vector<int> where;
  std::vector<Ragged> scores;
  std::vector<LayerView> views;
  const std::vector<int64_t> whole = lengths(policy, {});
  std::optional<Clock> clock(std::in_place, times.observe);
  for (int l = 0; l < m.layers; ++l) {
    if (!policy.layers.holds(l, m.layers)) continue;
    LayerView& view = views.emplace_back(m, queue, l, phase);
    view.enter(step), view.enter(states[size_t(p)].get());
    view.prompt = whole, view.store = &store->layer(l), view.stores = store.get();
    view.output_matrix = weights->layers[size_t(l)].o;
    view.basis = bases.empty() ? nullptr : bases[size_t(l)].get();
    view.read.rope = m.rope(l), view.read.positions = positions;
    scores.push_back(policy.score(view));
  }
  if (scores.empty()) return;
  const Tensor counts = policy.allocate({.queue = queue,
                                         .model = m,
                                         .first_layer = views[0].layer,
                                         .scores = scores,
                                         .prompt = whole,
                                         .budget = policy.kept(),
                                         .state = states[size_t(p)].get()});
  clock.reset();
  Clock select(times.select);
  for (size_t i = 0; i < views.size(); ++i) evict(views[i], policy, scores[i], counts.select(0, int64_t(i)));
}

}  // namespace heed
