// What goes through the layers: sessions from their options on, feeding, recorded steps, logits. session_layer.cpp is the rest.
#include <algorithm>
#include <atomic>

#include "attention/rotation.h"
#include "mechanisms/registry.h"
#include "model/session_impl.h"
#include "model/transformer.h"

namespace heed {
namespace {

std::atomic<bool> stop_requested{false};

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
    impl_.feed(batch, Phase::Replay, true, Session::Logits::None, {}, {.depth = layers});
    deepest = std::max(deepest, layers > 0 ? layers : model().layers);
    impl_.store->truncate(impl_.queue, sequence, impl_.next[size_t(sequence)]);
  }
  void replay_backward(int sequence, std::span<const int32_t> tokens, const Objective& objective) override {
    std::vector<std::span<const int32_t>> batch(size_t(impl_.options.sequences));
    batch[size_t(sequence)] = tokens;
    impl_.gradients(batch, objective, [this](LayerView& at) {
      at.enter(state());
      impl_.part(part_).gradient(at);
    });
  }
  void append(int sequence, const Tensor& rows, const Adapter* adapter) override {
    std::vector<int32_t> ids(size_t(rows.size[0]));
    std::vector<std::span<const int32_t>> batch(size_t(impl_.options.sequences));
    batch[size_t(sequence)] = ids;
    impl_.check_reach(impl_.next[size_t(sequence)] + rows.size[0]);
    impl_.feed(batch, Phase::Replay, true, Session::Logits::None, {}, {.rows = rows, .adapter = adapter});
    impl_.next[size_t(sequence)] += rows.size[0];
    auto& text = impl_.tokens[size_t(sequence)];
    text.insert(text.end(), size_t(rows.size[0]), -1);
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
  for (const Composition::Part& p : composition->parts()) {
    const Needs needs = p.mechanism->needs(m);
    for (int l = 0; !needs.points.empty() && l < m.layers; ++l)
      if (p.mechanism->layers.holds(l, m.layers)) store->layer(l).set_points(1, needs.points[size_t(l)]);
  }
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
                         Logits want, const std::function<void(int64_t, Tensor)>& visit, const Replayed& how) {
  const int sequences = options.sequences;
  const ModelInfo& m = info();
  Batch batch{.phase = phase, .last_chunk = last_chunk, .layers = how.depth > 0 ? how.depth : m.layers};
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
    if (how.rows) batch.rows = queue.upload(how.rows);
    batch.adapter = how.adapter;
    x = how.gradients ? forward(batch, *how.gradients) : forward(batch);
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
  if (batch.rows) queue.move(batch.rows, x);
  else queue.run->embed(queue, weights->embedding, batch.ids, architecture().embedding_scale, x);
  for (int l = 0; l < batch.layers; ++l) {
    if (batch.phase != Phase::Decode && interrupted())
      throw Error(Code::Interrupted, "session", "stopped in layer " + std::to_string(l));
    layer(batch, l, x);
    if (progress && batch.phase != Phase::Decode) progress(l + 1, m.layers);
  }
  if (batch.phase == Phase::Decode && counts_at_end(batch)) count_all_reads();
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
  if (!logits_out || logits_out->size[0] != sequences)
    logits_out = Buffer(Dtype::F32, {sequences, info().vocabulary}, queue.host_memory());
  queue.read_back(logits_there, logits_out->data);
  return true;
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
    logits_out = Buffer(Dtype::F32, {options.sequences, vocabulary}, queue.host_memory());
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

void Session::gradients(const std::vector<std::span<const int32_t>>& tokens, const Objective& objective, const Tap& look) {
  require(int(tokens.size()) == impl_->options.sequences, "gradients",
          std::to_string(tokens.size()) + " texts for " + std::to_string(impl_->options.sequences) + " sequences");
  impl_->gradients(tokens, objective, look);
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
void Session::check_reach(int64_t length) const { impl_->check_reach(length); }
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
