#include "model/session.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "attention/plans.h"
#include "attention/rotation.h"
#include "mechanisms/registry.h"
#include "model/transformer.h"

namespace heed {
namespace {

std::atomic<bool> stop_requested{false};

class Clock {
 public:
  explicit Clock(double& into) : into_(into), begin_(std::chrono::steady_clock::now()) {}
  ~Clock() { into_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

 private:
  double& into_;
  std::chrono::steady_clock::time_point begin_;
};

Dtype plain(PageType type) {
  switch (type.kind) {
    case PageType::Kind::BF16: return Dtype::BF16;
    case PageType::Kind::F16: return Dtype::F16;
    default: return Dtype::F32;
  }
}

}  // namespace

void interrupt() noexcept { stop_requested.store(true, std::memory_order_relaxed); }
void clear_interrupt() noexcept { stop_requested.store(false, std::memory_order_relaxed); }
bool interrupted() noexcept { return stop_requested.load(std::memory_order_relaxed); }

const Kernels& backend(const std::string& name, int device) {
  const bool gpu = name == "auto" && cuda_kernels();
  const Kernels& table = gpu                               ? *cuda_kernels()
                         : name == "auto" || name == "cpu" ? *cpu_kernels().front()
                                                           : kernels_named(name);
  if (device != 0)
    throw Error(Code::NotFound, "--device",
                "there is no device " + std::to_string(device) + " of backend '" + table.name + "'", "it has one: 0");
  return table;
}

struct Session::Impl {
  std::shared_ptr<const Model> model;
  SessionOptions options;
  std::shared_ptr<const Composition> composition;
  Queue queue;
  std::shared_ptr<const ModelWeights> weights;
  ModelInfo shape;  // of the model, ropes where kernels read them
  std::unique_ptr<Store> store;
  std::vector<std::unique_ptr<State>> states;       // one for each part
  std::vector<std::shared_ptr<const Basis>> bases;  // for each layer; null, or none at all: coordinates as they come
  Read::Positions positions = Read::Positions::True;
  int64_t reach = 0;  // the most tokens of a sequence; 0: any number
  std::vector<std::vector<int32_t>> tokens;
  std::vector<int64_t> next;                 // position of each sequence's next token
  std::vector<int64_t> prompt;               // tokens of each sequence's prompt
  std::vector<std::vector<int32_t>> chosen;  // of a prompt that a drive shortened: the numbers of the tokens read
  std::vector<int64_t> given;                // tokens that the prompt had before
  int64_t step = 0;
  Times times;
  std::vector<double> dense_rows, rows;  // for each layer: prompt rows that a dense plan read, and all of them
  // What a row that is read counts for in them, for each layer: more than 1 row of a shortened prompt, and fewer pairs.
  double row_weight = 1;
  std::vector<double> pair_weight;
  Buffer shares;  // F64 [layers, h], of kernels: rows under other plans, each times the share of pairs computed
  Buffer reads;   // F64 [layers, h], of kernels: keys read while decoding
  int64_t reads_count = 0;
  Buffer logits_out;
  // Decode steps of one token for each sequence. Steps in which other policies are due are other work.
  struct Recorded {
    uint64_t due = 0;  // a bit for each part
    bool evicts = false;
    Recording work;  // empty: such steps cannot be recorded
  };
  std::vector<Recorded> recorded;
  // What recorded steps read and write: I32 [2, sequences], tokens and positions; F32 [sequences, vocabulary].
  Buffer fed, logits_there;
  Tap tap;
  std::function<void(int64_t, int64_t)> progress;

  Impl(std::shared_ptr<const Model> model_in, const SessionOptions& o);
  Impl(Impl& other);

  int parts() const { return int(composition->parts().size()); }
  const Mechanism& part(int p) const { return *composition->parts()[size_t(p)].mechanism; }
  const ModelInfo& info() const { return shape; }
  const Architecture& architecture() const { return model->architecture(); }

  struct Batch;
  void feed(const std::vector<std::span<const int32_t>>& tokens, Phase phase, bool last_chunk, Logits want,
            const std::function<void(int64_t, Tensor)>& visit, int depth = 0);
  std::vector<std::span<const int32_t>> shorten(const std::vector<std::span<const int32_t>>& tokens,
                                                std::vector<std::vector<int32_t>>& read);
  void check_reach(int64_t length) const;
  Tensor forward(Batch& batch);
  bool replay(const Batch& batch, std::span<const int32_t> ids, std::span<const int32_t> places);
  void layer(Batch& batch, int l, Tensor x);
  void attend(Batch& batch, LayerView& view);
  void keep(Batch& batch, LayerView& view);
  void make_room(Batch& batch, LayerView& view);
  bool due(const Batch& batch, const KeepPolicy& policy) const;
  std::vector<int64_t> lengths(const KeepPolicy& policy, std::span<const int64_t> coming) const;
  void cut(const Batch& batch, LayerView& view, const KeepPolicy& policy, std::span<const int64_t> coming);
  void evict_all(int p, Phase phase);
  void emit(Batch& batch, Tensor x, Logits want, const std::function<void(int64_t, Tensor)>& visit);
  void count_reads(LayerView& view);
  void count_shares(const Batch& batch, LayerView& view);
  Ragged head_major(const Batch& batch, Dtype type, int64_t heads, int64_t width);
  void make_logits(Tensor x, Tensor host);
};

/// One feed: the tokens, where they stand, and what it is.
struct Session::Impl::Batch {
  Phase phase;
  bool last_chunk;
  int layers;                  // that it goes through
  std::vector<int64_t> count;  // new tokens of each sequence
  int64_t total = 0;
  Tensor ids, positions, first;  // I32 [T], I32 [T], I64 [sequences + 1]
  Tensor q_offsets, kv_offsets;  // I64 [sequences · heads + 1]: the new rows, head-major
  Tensor q_pos, kv_pos;          // I32, as those rows
};

/// What a drive sees of its session.
class SessionRun final : public Run {
 public:
  SessionRun(Session::Impl& impl, int part) : impl_(impl), part_(part) {}
  const ModelInfo& model() const override { return impl_.info(); }
  int sequences() const override { return impl_.options.sequences; }
  std::span<const int32_t> tokens(int sequence) const override { return impl_.tokens[size_t(sequence)]; }
  State* state() override { return impl_.states[size_t(part_)].get(); }
  Queue& queue() override { return impl_.queue; }
  void replay(int sequence, std::span<const int32_t> tokens, int layers) override {
    std::vector<std::span<const int32_t>> batch(size_t(impl_.options.sequences));
    batch[size_t(sequence)] = tokens;
    impl_.feed(batch, Phase::Replay, true, Session::Logits::None, {}, layers);
    deepest = std::max(deepest, layers > 0 ? layers : model().layers);
    impl_.store->truncate(impl_.queue, sequence, impl_.next[size_t(sequence)]);
  }
  void feed(int sequence, std::span<const int32_t> tokens) override {
    std::vector<std::span<const int32_t>> batch(size_t(impl_.options.sequences));
    batch[size_t(sequence)] = tokens;
    impl_.feed(batch, Phase::Chunk, false, Session::Logits::None, {});
    fed += tokens.size();
  }
  void evict() override { impl_.evict_all(part_, Phase::Prompt); }
  std::vector<int32_t> tokenize(const std::string& text) const override {
    const Tokenizer* tokenizer = impl_.model->tokenizer();
    return tokenizer ? tokenizer->encode(text) : std::vector<int32_t>{};
  }

  int deepest = 0;  // layers that replays went through
  size_t fed = 0;   // tokens

 private:
  Session::Impl& impl_;
  int part_;
};

Session::Impl::Impl(std::shared_ptr<const Model> model_in, const SessionOptions& o)
    : model(std::move(model_in)), options(o),
      queue(&backend(o.backend, o.device), *backend(o.backend, o.device).memory), shape(model->info()) {
  require(o.sequences >= 1 && o.sequences <= 4096, "session", "sequences: 1…4096");
  require(o.ubatch >= 0, "session", "ubatch must not be negative");
  require(o.chunk >= 0, "session", "chunk must not be negative");
  if (options.ubatch == 0) options.ubatch = queue.run->tile_rows;
  weights = model->place(queue);
  for (size_t l = 0; l < shape.ropes.size(); ++l) shape.ropes[l] = &weights->ropes[l];
  const ModelInfo& m = info();
  composition = std::make_shared<Composition>(value_or_throw(Composition::parse(o.attention, m, registry())));
  StoreOptions store_options;
  store_options.k = o.k, store_options.v = o.v;
  std::vector<StoreShape> shapes(size_t(m.layers), StoreShape{m.g, m.d, m.d_v});
  std::vector<std::pair<PageType, PageType>> later;  // layouts besides the first
  for (const Composition::Part& p : composition->parts()) {
    if (p.entry->kind != "mechanism")
      throw Error(Code::Unsupported, "--attention",
                  "'" + p.entry->name + "' is of kind " + p.entry->kind + ", not a mechanism");
    if (has(p.roles, Role::State))
      throw Error(Code::Unsupported, "--attention",
                  "'" + p.entry->name + "' is a linear layer: it needs weights trained for it", "try `heed apply`");
    const Needs needs = p.mechanism->needs(m);
    if (!needs.inputs.empty())
      throw Error(Code::Unsupported, "--attention",
                  "'" + p.entry->name + "' needs tensors that no model gives: " + needs.inputs[0], "try `heed apply`");
    store_options.plain_keys |= needs.plain_keys;
    store_options.bias |= needs.bias;
    if (needs.positions != Read::Positions::True) positions = needs.positions;
    reach = std::max(reach, needs.reach);
    for (const Column& column : needs.columns)
      if (std::none_of(store_options.columns.begin(), store_options.columns.end(),
                       [&](const Column& c) { return c.name == column.name; }))
        store_options.columns.push_back(column);
    if (needs.slots.group > 0) {
      store_options.slots = needs.slots;
      for (int l = 0; l < m.layers; ++l) shapes[size_t(l)].slots |= p.mechanism->layers.holds(l, m.layers);
    }
    if (needs.quantised)
      later.assign(1, {needs.quantised_k.quantised() ? needs.quantised_k : o.k,
                       needs.quantised_v.quantised() ? needs.quantised_v : o.v});
    for (uint8_t of = 1; needs.paired && of <= 2; ++of) {
      later.emplace_back(o.k, o.v);
      later.back().first.pair = later.back().second.pair = of;
    }
    states.push_back(p.mechanism->open(m));
    if (!needs.basis) continue;
    const auto basis = std::make_shared<const Basis>(placed(queue, p.mechanism->basis(m)));
    bases.resize(size_t(m.layers));
    for (int l = 0; l < m.layers; ++l)
      if (p.mechanism->layers.holds(l, m.layers)) bases[size_t(l)] = basis;
  }
  reach = positions == Read::Positions::Cache || m.context == 0 ? 0 : std::max(reach, m.context);
  store = std::make_unique<Store>(queue, shapes, store_options, o.sequences);
  for (const auto& [k, v] : later) store->add_layout(k, v);
  tokens.resize(size_t(o.sequences));
  next.assign(size_t(o.sequences), 0);
  prompt.assign(size_t(o.sequences), 0);
  chosen.resize(size_t(o.sequences)), given.assign(size_t(o.sequences), 0);
  pair_weight.assign(size_t(m.layers), 1);
  dense_rows.assign(size_t(m.layers), 0), rows.assign(size_t(m.layers), 0);
  shares = Buffer(Dtype::F64, {m.layers, m.h}, *queue.memory), reads = Buffer(Dtype::F64, {m.layers, m.h}, *queue.memory);
  queue.fill(shares, 0), queue.fill(reads, 0);
}

Session::Impl::Impl(Impl& other)
    : model(other.model), options(other.options), composition(other.composition), queue(&other.queue),
      weights(other.weights), shape(other.shape), store(std::make_unique<Store>(queue, *other.store)), bases(other.bases),
      positions(other.positions), reach(other.reach), tokens(other.tokens), next(other.next), prompt(other.prompt),
      chosen(other.chosen), given(other.given), step(other.step), times(other.times), dense_rows(other.dense_rows),
      rows(other.rows), pair_weight(other.pair_weight), shares(Dtype::F64, {shape.layers, shape.h}, *queue.memory),
      reads(Dtype::F64, {shape.layers, shape.h}, *queue.memory), reads_count(other.reads_count) {
  queue.move(other.shares, shares), queue.move(other.reads, reads);
  for (const auto& state : other.states) states.push_back(state ? state->clone() : nullptr);
}

void Session::Impl::check_reach(int64_t length) const {
  const ModelInfo& m = info();
  if (reach == 0 || length <= reach) return;
  throw Error(Code::Invalid, "session",
              std::to_string(length) + " tokens are more than " +
                  (reach == m.context ? "the model's context of " : "what this mechanism makes of it: ") +
                  std::to_string(reach),
              "shorten the text with -c, or read it at distances that the model knows: --attention "
              "\"self-extend(group=" +
                  std::to_string(length / m.context + 1) + ")\", \"dca\" or \"streaming-llm\"");
}

/// What of the first prompts is still to be read: the tokens themselves, or `read`, where a drive has read or left out some.
std::vector<std::span<const int32_t>> Session::Impl::shorten(const std::vector<std::span<const int32_t>>& tokens,
                                                             std::vector<std::vector<int32_t>>& read) {
  std::vector<std::span<const int32_t>> out = tokens;
  for (auto& list : chosen) list.clear();
  for (int p = 0; p < parts(); ++p) {
    if (!has(composition->parts()[size_t(p)].roles, Role::Drive)) continue;
    std::vector<double> pairs(size_t(info().layers), 0.0);
    double all = 0, left = 0, done = 0;  // rows: given, still to be read, read by the drive
    for (size_t s = 0; s < tokens.size(); ++s) {
      check_reach(int64_t(tokens[s].size()));
      SessionRun run(*this, p);
      auto numbers = part(p).shorten(run, int(s), tokens[s]);
      const int64_t length = int64_t(tokens[s].size()), count = numbers.empty() ? length : int64_t(numbers.size());
      all += double(length), left += double(count) - double(run.fed), done += double(run.fed);
      for (int l = 0; l < info().layers; ++l) {
        const double window = double(info().window(l));
        const auto of = [&](double n) {
          return window > 0 && n > window ? window * (window + 1) / 2 + (n - window) * window : n * (n + 1) / 2;
        };
        if (length > 0) pairs[size_t(l)] += double(length) * of(double(count)) / of(double(length));
        if (count < length && l < run.deepest) dense_rows[size_t(l)] += double(length);
      }
      if (count < length) {
        for (int32_t i : numbers) read[s].push_back(tokens[s][size_t(i)]);
        out[s] = read[s], chosen[s] = std::move(numbers), given[s] = length;
      }
      out[s] = out[s].subspan(run.fed);
    }
    if (left + done == all) continue;
    row_weight = (all - done) / left;
    for (size_t l = 0; l < pairs.size(); ++l) pair_weight[l] = (pairs[l] - done) / left;
  }
  return out;
}

void Session::Impl::feed(const std::vector<std::span<const int32_t>>& fed_tokens, Phase phase, bool last_chunk,
                         Logits want, const std::function<void(int64_t, Tensor)>& visit, int depth) {
  const int sequences = options.sequences;
  const ModelInfo& m = info();
  Batch batch{.phase = phase, .last_chunk = last_chunk, .layers = depth > 0 ? depth : m.layers};
  for (const auto& span : fed_tokens) batch.count.push_back(int64_t(span.size())), batch.total += int64_t(span.size());
  if (batch.total == 0) return;
  std::vector<int32_t> ids, places;
  std::vector<int64_t> first{0};
  for (int s = 0; s < sequences; ++s) {
    if (phase != Phase::Replay) check_reach(next[size_t(s)] + batch.count[size_t(s)]);
    for (int64_t i = 0; i < batch.count[size_t(s)]; ++i) {
      const int32_t id = fed_tokens[size_t(s)][size_t(i)];
      if (id < 0 || id >= m.vocabulary)
        throw Error(Code::Invalid, "session",
                    "token " + std::to_string(id) + " is not in the vocabulary of " + std::to_string(m.vocabulary));
      ids.push_back(id), places.push_back(int32_t(next[size_t(s)] + i));
    }
    first.push_back(int64_t(ids.size()));
  }
  if (phase != Phase::Decode) recorded.clear();
  if (phase == Phase::Prompt || phase == Phase::Chunk)
    for (int s = 0; s < sequences; ++s) prompt[size_t(s)] += batch.count[size_t(s)];
  Scratch scope(queue.scratch);
  const bool replayed = phase == Phase::Decode && replay(batch, ids, places);
  Tensor x;
  if (!replayed) {  // all that a step tells the device; the rest follows from it there
    batch.ids = queue.upload(ids), batch.positions = queue.upload(places), batch.first = queue.upload(first);
    x = forward(batch);
  }
  if (phase == Phase::Replay) return store->sync();
  for (int s = 0; s < sequences; ++s) {
    next[size_t(s)] += batch.count[size_t(s)];
    tokens[size_t(s)].insert(tokens[size_t(s)].end(), fed_tokens[size_t(s)].begin(), fed_tokens[size_t(s)].end());
  }
  if (phase == Phase::Decode) ++step, ++reads_count;
  if (!replayed) emit(batch, x, want, visit);
  store->sync();  // the step is over: what was evicted by counts of the device becomes known
  if (phase == Phase::Decode || !last_chunk) return;
  for (int p = 0; p < parts(); ++p) {
    const uint8_t roles = composition->parts()[size_t(p)].roles;
    if (has(roles, Role::Drive)) {
      SessionRun run(*this, p);
      part(p).drive(run);
    } else if (has(roles, Role::Keep) && part(p).needs(m).all_layers && due(batch, static_cast<const KeepPolicy&>(part(p)))) {
      evict_all(p, phase);
    }
  }
  store->sync();
}

/// Everything from the tokens to the rows behind the last layer.
Tensor Session::Impl::forward(Batch& batch) {
  const ModelInfo& m = info();
  const int64_t sequences = options.sequences;
  auto rows_of_heads = [&](int64_t heads, Tensor& offsets, Tensor& at) {
    const Num s = floor_div(index(), heads), begin = load(batch.first, s);
    offsets = compute(queue, Dtype::I64, {sequences * heads + 1},
                      begin * heads + mod(index(), heads) * (load(batch.first, s + 1) - begin));
    at = queue.scratch.take(Dtype::I32, {batch.total * heads});
    Ragged rows_there;
    rows_there.offsets = offsets, rows_there.heads = heads, rows_there.bound = batch.total * heads;
    compute(queue, rows_there, load(batch.positions, load(batch.first, floor_div(segment(), heads)) + place()), at);
  };
  rows_of_heads(m.h, batch.q_offsets, batch.q_pos), rows_of_heads(m.g, batch.kv_offsets, batch.kv_pos);
  Tensor x = queue.scratch.take(Dtype::F32, {batch.total, m.hidden});
  queue.run->embed(queue, weights->embedding, batch.ids, architecture().embedding_scale, x);
  for (int l = 0; l < batch.layers; ++l) {
    if (batch.phase != Phase::Decode && interrupted())
      throw Error(Code::Interrupted, "session", "stopped in layer " + std::to_string(l));
    layer(batch, l, x);
    if (progress && batch.phase != Phase::Decode) progress(l + 1, m.layers);
  }
  return x;
}

/// The step as a recording that only its tokens and positions change: logits are then in logits_out. False when it
/// cannot be: somebody looks on, a sequence has no token, a fork shares pages, or a mechanism does something else in
/// every step.
bool Session::Impl::replay(const Batch& batch, std::span<const int32_t> ids, std::span<const int32_t> places) {
  const int64_t sequences = options.sequences;
  if (!options.record || !queue.can_record() || tap || batch.total != sequences || store->shared() || parts() > 64)
    return false;
  Clock clock(times.rest);
  uint64_t due_parts = 0;
  for (int p = 0; p < parts(); ++p)
    if (has(composition->parts()[size_t(p)].roles, Role::Keep))
      due_parts |= uint64_t(due(batch, static_cast<const KeepPolicy&>(part(p)))) << p;
  if (!store->prepare()) recorded.clear();
  auto found = std::find_if(recorded.begin(), recorded.end(), [&](const Recorded& r) { return r.due == due_parts; });
  if (found == recorded.end()) {
    if (!fed) fed = Buffer(Dtype::I32, {2, sequences}, *queue.memory);
    if (!logits_there) logits_there = Buffer(Dtype::F32, {sequences, info().vocabulary}, *queue.memory);
    const Times before = times;
    Batch own = batch;
    own.ids = fed->select(0, 0), own.positions = fed->select(0, 1);
    store->begin_step();
    Recorded made{.due = due_parts};
    made.work = queue.record([&] {
      own.first = compute(queue, Dtype::I64, {sequences + 1}, index());
      logits(queue, *weights, architecture(), forward(own), logits_there);
    });
    made.evicts = store->end_step();
    times = before;
    found = recorded.insert(recorded.end(), std::move(made));
  }
  if (!found->work) {
    store->withdraw();
    return false;
  }
  std::vector<int32_t> step_input(ids.begin(), ids.end());
  step_input.insert(step_input.end(), places.begin(), places.end());
  queue.upload(Tensor(step_input.data(), Dtype::I32, {2, sequences}), fed);
  queue.replay(found->work);
  store->replayed(found->evicts);
  if (!logits_out || logits_out->size[0] != sequences) logits_out = Buffer(Dtype::F32, {sequences, info().vocabulary});
  queue.read_back(logits_there, logits_out->data);
  return true;
}

Ragged Session::Impl::head_major(const Batch& batch, Dtype type, int64_t heads, int64_t width) {
  const int64_t all = batch.total * heads;
  return {.values = queue.scratch.take(type, {all, width}),
          .offsets = heads == info().h ? batch.q_offsets : batch.kv_offsets,
          .ends = {},
          .heads = heads,
          .bound = all};
}

void Session::Impl::layer(Batch& batch, int l, Tensor x) {
  const ModelInfo& m = info();
  const Kernels& run = *queue.run;
  const int64_t total = batch.total;
  const bool decoding = batch.phase == Phase::Decode;
  LayerStore& entries = store->layer(l);
  const LayerWeights& w = weights->layers[size_t(l)];
  Scratch scope(queue.scratch);
  LayerView view(m, queue, l, batch.phase);
  view.enter(step);
  view.prompt = prompt, view.store = &entries, view.stores = store.get();
  view.rows = batch.count, view.first = batch.first;
  view.ids = batch.ids, view.hidden = x, view.output_matrix = w.o;
  view.basis = bases.empty() ? nullptr : bases[size_t(l)].get();
  view.read.rope = m.rope(l), view.read.positions = positions;
  view.mods.scale = m.scale, view.mods.softcap = m.softcap, view.mods.window = m.window(l);

  Tensor q_rows = queue.scratch.take(Dtype::F32, {total, int64_t(m.h) * m.d});
  Tensor k_rows = queue.scratch.take(Dtype::F32, {total, int64_t(m.g) * m.d});
  Tensor v_rows = queue.scratch.take(Dtype::F32, {total, int64_t(m.g) * m.d_v});
  {
    Clock clock(times.products);
    project(queue, *weights, architecture(), l, x, options.ubatch, q_rows, k_rows, v_rows);
  }
  std::optional<Clock> clock(std::in_place, times.rest);
  Tensor q_heads = q_rows.reshape({total, m.h, m.d}), k_heads = k_rows.reshape({total, m.g, m.d}),
         v_heads = v_rows.reshape({total, m.g, m.d_v});
  const float eps = architecture().norm_eps;
  const Rope* rope = m.rope(l);
  const bool plain_keys = store->options().plain_keys && rope;
  if (decoding) make_room(batch, view);

  // Where the new tokens are read: their true positions, or behind what each KV head holds. Heads that hold different
  // numbers of entries read the same token at different places, so these are numbers for each (token, KV head).
  Tensor read_at = batch.positions, query_at = batch.positions;
  if (positions == Read::Positions::Cache) {
    const Num s = find(batch.first, 1, options.sequences + 1, place() + 1) - 1, i = place() - load(batch.first, s);
    const Tensor held = entries.pages().length;
    read_at = compute(queue, Dtype::I32, {total, m.g}, load(held, s * m.g + channel()) + i);
    query_at = compute(queue, Dtype::I32, {total, m.h}, load(held, s * m.g + floor_div(channel(), m.group())) + i);
  }

  const Basis none, &basis = view.basis ? *view.basis : none;
  // Queries, keys and values are split together, when all there is to split is known; some then change their basis.
  struct Change {
    Ragged from;
    const Buffer* matrix;
    Ragged to;
  };
  std::vector<Heads> splits;
  std::vector<Change> changes;
  const auto split = [&](Tensor rows, Tensor norm, const Rope* turn, Tensor places, const Buffer& matrix, const Ragged& out) {
    splits.push_back({rows, norm, turn, places, out});
    if (!matrix) return;
    splits.back().out = head_major(batch, Dtype::F32, rows.size[1], rows.size[2]);
    changes.push_back({splits.back().out, &matrix, out});
  };

  view.q = head_major(batch, Dtype::F32, m.h, m.d);
  split(q_heads, w.q_norm, rope, query_at, basis.k, view.q);
  if (plain_keys) {
    view.plain_q = head_major(batch, Dtype::F32, m.h, m.d);
    splits.push_back({q_heads, w.q_norm, nullptr, {}, view.plain_q});
  }
  view.q_pos = view.mods.q_pos = batch.q_pos;

  // New keys and values, in the panel behind the old ones or, while decoding, on their own.
  const Dtype k_type = plain(store->options().k), v_type = plain(store->options().v);
  Ragged k_new, v_new;
  Tensor new_positions = batch.kv_pos;
  if (decoding) {
    k_new = head_major(batch, k_type, m.g, m.d), v_new = head_major(batch, v_type, m.g, m.d_v);
  } else {
    const int64_t all = entries.segments(), rows = entries.entries() + total * m.g;
    for (int64_t s = 0; s < all; ++s) view.key_rows.push_back(entries.length(s) + batch.count[size_t(s / m.g)]);
    const Tensor old = entries.offsets(queue);
    const Tensor offsets = compute(queue, Dtype::I64, {all + 1}, load(old, index()) + load(batch.kv_offsets, index()));
    // Where the old ones of each segment end.
    const Tensor middle = compute(queue, Dtype::I64, {all + 1}, load(old, index() + 1) + load(batch.kv_offsets, index()));
    view.k = {.values = queue.scratch.take(k_type, {rows, m.d}), .offsets = offsets, .ends = {}, .heads = m.g, .bound = rows};
    view.v = view.k;
    view.v.values = queue.scratch.take(v_type, {rows, m.d_v});
    view.k_pos = view.mods.k_pos = new_positions = queue.scratch.take(Dtype::I32, {rows});
    Ragged k_old = view.k, v_old = view.v;
    k_old.ends = v_old.ends = middle.slice(0, 0, all);
    k_new = view.k;
    k_new.offsets = middle, k_new.ends = offsets.slice(0, 1, all + 1);
    v_new = k_new;
    v_new.values = view.v.values;
    if (entries.entries() > 0) {
      const Read read{.plan = {}, .positions = positions, .rope = rope};
      run.page_read(queue, entries.pages(), plain_keys ? &read : nullptr, k_old, v_old, view.k_pos);
      if (store->options().bias) {
        Ragged bias = k_old;
        bias.values = view.mods.key_bias = compute(queue, Dtype::F32, {rows}, 0);
        run.column_read(queue, entries.pages(), kBiasColumn, bias);
      }
    }
    compute(queue, k_new, load(batch.positions, load(batch.first, floor_div(segment(), m.g)) + place()), new_positions);
  }
  split(v_heads, {}, nullptr, {}, basis.v, v_new);
  Ragged kept = k_new;
  if (plain_keys) {  // the same rows, unrotated
    kept.values = queue.scratch.take(k_type, {k_new.values.size[0], m.d});
    splits.push_back({k_heads, w.k_norm, nullptr, {}, kept});
    if (!decoding) splits.push_back({k_heads, w.k_norm, rope, read_at, k_new});
  } else {
    split(k_heads, w.k_norm, rope, read_at, basis.k, k_new);
  }
  run.split_heads(queue, batch.first, eps, splits);
  for (const Change& change : changes) change_basis(queue, change.from, *change.matrix, change.to);
  entries.append(queue, kept, v_new, new_positions, batch.count);

  view.out = queue.scratch.take(Dtype::F32, {total * m.h, m.d_v});
  view.lse = queue.scratch.take(Dtype::F32, {total * m.h});
  clock.reset();
  attend(batch, view);
  keep(batch, view);
  Ragged out = view.q;
  out.values = view.out;
  if (basis.v) {
    Ragged back = out;
    back.values = queue.scratch.take(Dtype::F32, {total * m.h, m.d_v});
    change_basis(queue, out, basis.v_back, back);
    out = back;
  }
  Clock products(times.products);
  // Of one token a sequence, rows of heads already lie as the token's row.
  Tensor merged = out.values.reshape({total, int64_t(m.h) * m.d_v});
  if (std::any_of(batch.count.begin(), batch.count.end(), [](int64_t n) { return n > 1; })) {
    merged = queue.scratch.take(Dtype::F32, {total, int64_t(m.h) * m.d_v});
    run.merge_heads(queue, out, batch.first, merged);
  }
  finish(queue, *weights, architecture(), l, merged, options.ubatch, x);
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
    count_reads(view);
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
  for (int p = 0; p < parts(); ++p) {
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

/// Logits of rows x, into memory of the host.
void Session::Impl::make_logits(Tensor x, Tensor host) {
  if (queue.memory->device == Device::Cpu) return logits(queue, *weights, architecture(), x, host);
  Scratch scope(queue.scratch);
  const Tensor y = queue.scratch.take(Dtype::F32, {host.size[0], host.size[1]});
  logits(queue, *weights, architecture(), x, y);
  queue.read_back(y, host.data);
}

void Session::Impl::emit(Batch& batch, Tensor x, Logits want, const std::function<void(int64_t, Tensor)>& visit) {
  if (want == Logits::None && !visit) return;
  Clock clock(times.products);
  const int64_t vocabulary = info().vocabulary;
  if (visit || want == Logits::All) {
    const int64_t tile = visit ? 64 : options.ubatch;  // visited rows exist at once: 67 MB of logits at Gemma's vocabulary
    Buffer visited;
    if (visit) visited = Buffer(Dtype::F32, {std::min(tile, batch.total), vocabulary});
    else logits_out = Buffer(Dtype::F32, {batch.total, vocabulary});
    for (int64_t a = 0; a < batch.total; a += tile) {
      const int64_t b = std::min(a + tile, batch.total);
      const Tensor to = visit ? visited->slice(0, 0, b - a) : logits_out->slice(0, a, b);
      make_logits(x.slice(0, a, b), to);
      if (!visit) continue;
      visit(a, to);
      if (interrupted()) throw Error(Code::Interrupted, "session", "stopped at row " + std::to_string(b));
    }
    return;
  }
  Scratch scope(queue.scratch);
  if (!logits_out || logits_out->size[0] != options.sequences)
    logits_out = Buffer(Dtype::F32, {options.sequences, vocabulary});
  const Tensor last = queue.scratch.take(Dtype::F32, {options.sequences, info().hidden});
  queue.fill(last, 0);
  for (int64_t s = 0, row = 0; s < options.sequences; ++s) {
    row += batch.count[size_t(s)];
    if (batch.count[size_t(s)] > 0) queue.move(x.select(0, row - 1), last.select(0, s));
  }
  make_logits(last, logits_out);
}

Session::Session(std::shared_ptr<const Model> model, const SessionOptions& options)
    : impl_(std::make_unique<Impl>(std::move(model), options)) {}
Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;

Tensor Session::prefill(const std::vector<std::span<const int32_t>>& tokens, Logits want,
                        const std::function<void(int64_t, Tensor)>& visit) {
  Impl& m = *impl_;
  require(int(tokens.size()) == m.options.sequences, "prefill",
          std::to_string(tokens.size()) + " texts for " + std::to_string(m.options.sequences) + " sequences");
  int64_t longest = 0;
  for (const auto& span : tokens) longest = std::max(longest, int64_t(span.size()));
  if (longest == 0) return {};
  const bool fresh = m.store->entries() == 0;
  const int64_t chunk = m.options.chunk > 0 ? m.options.chunk : longest;
  require(want != Logits::All || visit || chunk >= longest, "prefill", "all logits of a chunked prompt need `visit`");
  std::vector<std::vector<int32_t>> shortened(tokens.size());

  // What an interruption restores. Pages are shared with the copy, so it costs what is then written over.
  auto before = std::make_unique<Impl>(m);
  try {
    const auto read = fresh ? m.shorten(tokens, shortened) : tokens;
    if (want == Logits::All || visit)
      for (size_t s = 0; s < read.size(); ++s)
        if (read[s].size() < tokens[s].size())
          throw Error(Code::Unsupported, "session", "tokens that the mechanism leaves out of a prompt predict nothing",
                      "ask for what follows the prompt: `heed compare`, or `heed eval` with other tasks");
    longest = 0;
    for (const auto& span : read) longest = std::max(longest, int64_t(span.size()));
    int64_t rows = 0;
    for (int64_t a = 0; a < longest; a += chunk) {
      std::vector<std::span<const int32_t>> part;
      for (const auto& span : read) {
        const size_t from = std::min(size_t(a), span.size());
        part.push_back(span.subspan(from, std::min(size_t(chunk), span.size() - from)));
      }
      const bool last = a + chunk >= longest;
      auto shifted = [&](int64_t first, Tensor y) { visit(rows + first, y); };
      const std::function<void(int64_t, Tensor)> shifted_visit = visit ? std::function<void(int64_t, Tensor)>(shifted)
                                                                       : nullptr;
      m.feed(part, fresh && a == 0 && last && m.store->entries() == 0 ? Phase::Prompt : Phase::Chunk, last,
             last ? want : Logits::None, shifted_visit);
      for (const auto& span : part) rows += int64_t(span.size());
    }
    m.row_weight = 1, m.pair_weight.assign(m.pair_weight.size(), 1);
  } catch (...) {
    before->tap = m.tap, before->progress = m.progress;
    impl_ = std::move(before);
    throw;
  }
  return want == Logits::None || visit ? Tensor() : m.logits_out.view();
}

Tensor Session::decode(std::span<const int32_t> tokens) {
  Impl& m = *impl_;
  require(int(tokens.size()) == m.options.sequences, "decode",
          std::to_string(tokens.size()) + " tokens for " + std::to_string(m.options.sequences) + " sequences");
  std::vector<std::span<const int32_t>> fed;
  bool any = false;
  for (const int32_t& token : tokens) {
    fed.push_back(token < 0 ? std::span<const int32_t>() : std::span(&token, 1));
    any |= token >= 0;
  }
  require(any, "decode", "no sequence was given a token");
  m.feed(fed, Phase::Decode, true, Logits::Last, {});
  return m.logits_out;
}

std::unique_ptr<Session> Session::fork() const {
  return std::unique_ptr<Session>(new Session(std::make_unique<Impl>(*impl_)));
}

void Session::truncate(int sequence, int64_t position) {
  Impl& m = *impl_;
  require(sequence >= 0 && sequence < m.options.sequences, "truncate", "no sequence " + std::to_string(sequence));
  position = std::clamp<int64_t>(position, 0, m.next[size_t(sequence)]);
  m.store->truncate(m.queue, sequence, position);
  for (const auto& state : m.states)
    if (state) state->truncate(sequence, position);
  m.recorded.clear();
  m.next[size_t(sequence)] = position;
  m.tokens[size_t(sequence)].resize(size_t(position));
  m.prompt[size_t(sequence)] = std::min(m.prompt[size_t(sequence)], position);
}

std::vector<int32_t> Session::origins(int layer, int64_t segment) {
  std::vector<int32_t> out = store().layer(layer).positions(segment);
  const size_t sequence = size_t(segment / impl_->info().g);
  const auto& read = impl_->chosen[sequence];
  const int32_t count = int32_t(read.size());
  if (count == 0) return out;
  for (int32_t& position : out)
    position = position < count ? read[size_t(position)] : position - count + int32_t(impl_->given[sequence]);
  return out;
}

const Model& Session::model() const { return *impl_->model; }
const Composition& Session::composition() const { return *impl_->composition; }
int64_t Session::reach() const { return impl_->reach; }
Store& Session::store() { return *impl_->store; }
int64_t Session::kv_bytes(int layer) {
  int64_t bytes = store().layer(layer).bytes();
  for (const auto& state : impl_->states) bytes += state ? state->bytes(layer) : 0;
  return bytes;
}
int64_t Session::kv_bytes() {
  int64_t bytes = store().bytes();
  for (int l = 0; l < store().layers(); ++l) bytes += kv_bytes(l) - store().layer(l).bytes();
  return bytes;
}
std::span<const int32_t> Session::tokens(int sequence) const { return impl_->tokens[size_t(sequence)]; }
int64_t Session::step() const { return impl_->step; }
const Times& Session::times() const { return impl_->times; }

std::vector<std::vector<double>> Session::density() const {
  Impl& m = *impl_;
  const Buffer shares = m.queue.read_back(m.shares);
  std::vector<std::vector<double>> out;
  for (int l = 0; l < m.info().layers; ++l) {
    std::vector<double>& heads = out.emplace_back();
    for (int h = 0; h < m.info().h; ++h)
      heads.push_back(m.rows[size_t(l)] > 0 ? (m.dense_rows[size_t(l)] + shares->at<double>(l, h)) / m.rows[size_t(l)] : 1.0);
  }
  return out;
}

std::vector<std::vector<double>> Session::read_tokens() const {
  Impl& m = *impl_;
  const Buffer reads = m.queue.read_back(m.reads);
  std::vector<std::vector<double>> out;
  for (int l = 0; l < m.info().layers; ++l) {
    std::vector<double>& heads = out.emplace_back();
    for (int h = 0; h < m.info().h; ++h)
      heads.push_back(m.reads_count ? reads->at<double>(l, h) / double(m.options.sequences) / double(m.reads_count) : 0.0);
  }
  return out;
}

int64_t Session::scratch_bytes() const { return impl_->queue.scratch.bytes(); }
void Session::tap(Tap tap) { impl_->tap = std::move(tap); }
void Session::progress(std::function<void(int64_t, int64_t)> report) { impl_->progress = std::move(report); }

}  // namespace heed
