// What a mechanism is, and what it sees.
//
// In a layer: project, append, plan, attend, edit, observe, keep. A role function is called once a layer for the whole
// batch; every primitive it calls is segmented by (sequence, head). It never waits for the device.
#pragma once
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "attention/numbers.h"
#include "attention/params.h"
#include "attention/store.h"
#include "base/queue.h"
#include "kernels/kernels.h"

namespace heed {

enum class Phase : uint8_t {
  Prompt,  // a whole prompt at once
  Chunk,   // a part of a prompt, or several tokens behind an earlier text
  Decode,  // one token a sequence
  Replay,  // tokens fed by a drive that will be dropped again
};

enum class Role : uint8_t { Plan = 1, Keep = 2, Read = 4, Edit = 8, State = 16, Drive = 32, Weights = 64, Store = 128 };
constexpr uint8_t operator|(Role a, Role b) { return uint8_t(uint8_t(a) | uint8_t(b)); }
constexpr uint8_t operator|(uint8_t a, Role b) { return uint8_t(a | uint8_t(b)); }
constexpr bool has(uint8_t roles, Role role) { return (roles & uint8_t(role)) != 0; }

/// What a token is to policies that keep some for what they are. Punctuation is that of ASCII, alone or with spaces.
enum class TokenClass : uint8_t { Text, Punctuation, Control };

/// The shape of a model, as far as attention is concerned.
struct ModelInfo {
  std::string architecture;
  int layers = 1;
  int h = 1, g = 1;  // query heads, KV heads
  int d = 0, d_v = 0;
  int hidden = 0;
  int vocabulary = 0;
  int64_t context = 0;                 // tokens it was trained for; 0: unknown
  std::vector<int64_t> windows;        // for each layer: its sliding window, 0 for none; empty: none anywhere
  std::vector<const Rope*> ropes;      // for each layer; empty or null: no rotary embedding
  float scale = 0;                     // of the logits; 0: 1/√d
  float softcap = 0;                   // of the logits; 0: none
  uint64_t hash = 0;                   // of the weights file, for calibrations
  std::vector<uint8_t> token_classes;  // TokenClass of every token of the vocabulary; empty: unknown

  int group() const { return h / g; }
  int64_t window(int layer) const { return windows.empty() ? 0 : windows[size_t(layer)]; }
  const Rope* rope(int layer) const { return ropes.empty() ? nullptr : ropes[size_t(layer)]; }
};

/// What the engine must keep or do for a mechanism; it does nothing that nobody named.
struct Needs {
  bool plain_keys = false;    // the store keeps keys before rotary embedding
  bool bias = false;          // entries carry a logit bias
  bool whole_prompt = false;  // plans from the whole prompt; with chunks it plans per chunk
  bool same_entries = false;  // entry i must be the same token in every layer and head: goes with no policy that drops
  bool all_layers = false;    // cuts only after the last layer: scores of all layers are divided together
  Read::Positions positions = Read::Positions::True;
  int64_t reach = 0;  // tokens of a text that it reads at distances the model was trained for; 0: as many as the context has
  std::vector<Column> columns;
  bool basis = false;                 // basis() has something to say: goes with nobody who keeps keys plain
  bool quantised = false;             // settle() moves pages to a second layout of these types
  PageType quantised_k, quantised_v;  // a side whose type is a plain one stays as the store keeps it
  std::vector<PagePoints> points;     // of each layer, in place of theirs; empty: theirs
  bool paired = false;                // settle() makes two layers' pages one: layouts 1 and 2 (PageType::pair)
  SlotOptions slots;                  // its layers keep each segment's pages in a slot; goes with no second layout
  std::vector<std::string> inputs;    // tensors that `heed apply --input` must give: "beta [h, n]"
};

/// Coordinates that a layer is read in: queries and keys, behind their rotary embedding, and values are multiplied by
/// orthogonal matrices F32 [d, d] and [d_v, d_v] (row i makes coordinate i), and the output is turned back. Weights and
/// outputs stay what they are, but quantised entries are nearer. Empty: as they come.
struct Basis {
  Buffer k, v;
  Buffer k_back, v_back;  // their transposes, where kernels read them (placed())
};

/// What a mechanism remembers of one session; copied when the session is forked.
struct State {
  virtual ~State() = default;
  virtual std::unique_ptr<State> clone() const = 0;
  /// Of keys and values of a layer that it holds in place of the store.
  virtual int64_t bytes(int /*layer*/) const { return 0; }
  /// Tokens at positions ≥ `position` of a sequence are forgotten.
  virtual void truncate(int /*sequence*/, int64_t /*position*/) {}
};

/// What makes a layer's keys, before rotary embedding, and values: matrix · input + bias.
struct Projections {
  Tensor k, v;            // any type, [g·d, hidden] and [g·d_v, hidden]; empty where keys are normed behind the product
  Tensor k_bias, v_bias;  // empty: none
};

/// Of an objective on the rows behind the last layer, with respect to what one layer computes. F32.
struct Gradients {
  Tensor output;  // [new tokens, hidden]: what the output matrix gives (its bias included), before any norm of its own
  Tensor q;       // as q's rows, in their coordinates
  Tensor k, v;    // as the panel's rows, old ones too: what this feed's attention makes of them
};

/// Low-rank changes of a layer's matrices (LoRA; Hu et al., 2021): W x + b (a x). F32, where kernels run: a [rank, in],
/// b [out, rank], which holds the scale. Empty: the matrix as it is.
struct Adapter {
  struct Pair {
    Tensor a, b;
  };
  struct Layer {
    Pair q, k, v, o, gate, up, down;
  };
  std::vector<Layer> layers;
};

/// Writes into d_x the gradient of a number with respect to x, the rows behind the last layer before their norm; both
/// F32 [new tokens, hidden], where kernels run.
using Objective = std::function<void(Queue&, Tensor x, Tensor d_x)>;

/// One layer of one step, as a mechanism sees it. Views are valid until the layer ends.
class LayerView {
 public:
  LayerView(const ModelInfo& model, Queue& queue, int layer, Phase phase)
      : model(model), queue(queue), layer(layer), phase(phase) {}

  const ModelInfo& model;
  Queue& queue;
  int layer;
  Phase phase;
  std::vector<int64_t> prompt;  // for each sequence: tokens of its prompt so far (what fractions refer to)
  // What the host knows of this step; everything else lies where kernels run.
  std::vector<int64_t> rows;      // new tokens of each sequence: the queries of each of its heads
  std::vector<int64_t> key_rows;  // Prompt, Chunk, Replay: keys in each segment of the panel
  Tensor first;                   // I64 [sequences + 1]: where each sequence's new tokens begin

  Ragged q;         // F32, head-major, heads = h: the new queries, rotated
  Ragged plain_q;   // before rotary embedding; empty unless keys are kept plain
  Tensor q_pos;     // I32, as q's rows: true positions
  Ragged k, v;      // Prompt, Chunk, Replay: panels of every key the new queries may see, old ones first. Decode: empty
  Tensor k_pos;     // I32, as k's rows: true positions
  Mods mods;        // of this layer; plan and read may change it
  Plan plan;        // after attention of a Prompt, Chunk or Replay: the plan that ran; before it: dense, causal or not
  Read read;        // after attention of a Decode: what was read
  Tensor out, lse;  // after attention: F32, as q's rows
  Tensor ids;       // I32 [new tokens], as `first` counts them; `heed apply` has none
  Tensor hidden;    // F32 [new tokens, hidden]: the residual stream before this layer; `heed apply` has none
  const Basis* basis = nullptr;  // what q, k, v and out are multiplied by
  Tensor output_matrix;          // any type, [hidden, h·d_v]: the layer's W_O; read it by output()
  Projections projections;       // of the layer; `heed apply` has none
  LayerStore* store = nullptr;   // the new entries are in it
  Store* stores = nullptr;       // for column numbers
  const std::map<std::string, Tensor>* inputs = nullptr;  // `heed apply --input`
  const Gradients* gradients = nullptr;                   // Mechanism::gradient, or a tap of Session::gradients

  /// Tokens decoded before this one. Where decoding is recorded and replayed, steps that ask for it are not.
  int64_t step() const {
    queue.varies();
    return step_;
  }
  /// Of the mechanism being called; likewise.
  State& state() const {
    queue.varies();
    return *state_;
  }
  /// The same for who only hands it on, does not change it while decoding, or writes in every step where it wrote before.
  State* state_held() const { return state_; }
  void enter(int64_t step) { step_ = step; }
  void enter(State* state) { state_ = state; }

  const Kernels& run() const { return *queue.run; }
  /// What a dot product of query and key is multiplied by.
  float scale() const { return mods.scale > 0 ? mods.scale : 1 / std::sqrt(float(model.d)); }
  bool decoding() const { return phase == Phase::Decode; }
  int sequences() const { return int(rows.size()); }
  /// The last `rows` new queries of every sequence (fewer where it has fewer). No copy: indices stay those of q.
  Ragged last_queries(int64_t rows) const;
  /// The keys that the new queries see: the panel, or while decoding the store's pages.
  Keys keys() const;
  /// An input by name; throws Error(Invalid) that names it and its shape when it is missing.
  Tensor input(const std::string& name, const std::string& shape) const;
  /// The output matrix W_O [hidden, h·d_v], any type: of the model's layer, or `heed apply`'s input "output".
  Tensor output() const;
  /// Scratch, F32: `width` numbers for each entry of the store, segment by segment (heads = g).
  Ragged per_entry(int64_t width = 1) const;
  /// Statistics of the attention that `rows` pay to each entry of the store: observe() over keys().
  /// plan (may be null): which keys count, softmax included.
  Ragged observe(const Ragged& rows, const Observe& how, const Plan* plan = nullptr) const;
  /// A User column of the store by name, read or written for all entries.
  Ragged column(const std::string& name) const;
  void set_column(const std::string& name, const Ragged& values) const;
  /// The logit bias of every entry (Needs::bias).
  Ragged bias() const;
  void set_bias(const Ragged& values) const;

 private:
  int64_t step_ = 0;
  State* state_ = nullptr;
};

/// What an allocator divides: scores of one layer, or of all of them.
struct Allocation {
  Queue& queue;
  const ModelInfo& model;
  int first_layer = 0;              // scores[0] belongs to it
  std::span<const Ragged> scores;   // F32, one for each entry; heads = g
  std::span<const int64_t> prompt;  // for each sequence
  Budget budget;
  State* state = nullptr;  // of the policy
};

struct Lists;  // attention/select.h

class Run;

struct Mechanism {
  virtual ~Mechanism() = default;

  virtual Needs needs(const ModelInfo&) const { return {}; }
  virtual std::unique_ptr<State> open(const ModelInfo&) const { return nullptr; }
  /// The coordinates that its layers are read in, on the host (Needs::basis).
  virtual Basis basis(const ModelInfo&) const { return {}; }

  /// plan: which keys the new queries read (Prompt, Chunk). May also change at.mods.
  virtual Plan plan(LayerView&) const { return {}; }
  /// Called after attention of every step, whatever the role: the place to gather statistics.
  virtual void observe(LayerView&) const {}
  /// keep: one number for each entry of the store (heads = g); higher stays, +∞ must stay.
  virtual Ragged score(LayerView&) const { return {}; }
  /// keep: entries that each (layer, segment) may hold: I32 [layers, segments].
  virtual Tensor allocate(const Allocation&) const { return {}; }
  /// keep: stores entries otherwise (quantised, merged) instead of dropping them. True when that was all there is to do.
  virtual bool settle(LayerView&) const { return false; }
  /// read: what the new token of each sequence reads (Decode), and with Needs::plain_keys at which places. May also change
  /// at.mods.
  virtual Read read(LayerView&) const { return {}; }
  /// edit: the attention output that takes the place of at.out (F32, same rows).
  virtual Tensor edit(LayerView& at) const { return at.out; }
  /// state: a linear form on given tensors: writes at.out, returns the final state [segments, d, d_v].
  virtual Tensor recur(LayerView&) const { return {}; }
  /// drive: feeds the model its own way, behind the prompt.
  virtual void drive(Run&) const {}
  /// drive: called by Run::replay_backward, with at.gradients, a dense plan, and the attention that was computed.
  virtual void gradient(LayerView&) const {}
  /// drive, before a sequence's first prompt is read: the tokens of it that are read at all, ascending numbers, which
  /// then stand at positions 0, 1, …; empty: all of them. What it has fed (Run::feed) comes first and is not read again.
  virtual std::vector<int32_t> shorten(Run&, int /*sequence*/, std::span<const int32_t> /*prompt*/) const { return {}; }

  /// A message when parameters contradict each other, else empty.
  virtual std::string check() const { return {}; }

  Range layers, heads;  // where it applies
};

/// What every keep policy has besides: how much and when.
struct KeepPolicy : Mechanism {
  Budget budget;
  When when;
  virtual const Budget& kept() const { return budget; }
  virtual const When& timing() const { return when; }
  /// Entries for each KV head of a layer, behind a prompt of `length` tokens. An allocator divides a layer's total of these
  /// between heads (or, with all_layers, that of all layers): the host counts on it when it bounds what a layer holds.
  virtual int64_t entries(const Budget& kept, const ModelInfo&, int /*layer*/, int64_t length) const {
    return kept.entries(length);
  }
  /// Whether allocate() may grant any number (what passes a threshold, say): entries() then bounds nothing, and every cut is made.
  virtual bool unbounded() const { return false; }
  /// By default entries(), evenly.
  Tensor allocate(const Allocation&) const override;
  /// While decoding, cut before the new token is appended and leave room for it, so that no query ever sees more than
  /// the budget. Others cut behind attention: a query sees one entry more, and that step's weights decide.
  virtual bool makes_room() const { return false; }
  /// What ranks entries inside a head once allocate() has said how many it may hold (counts, I32 [segments]); by
  /// default the scores that the allocator divided by.
  virtual Ragged rank(LayerView&, const Ragged& scores, const Tensor& /*counts*/) const { return scores; }
  /// Before the others go: the place to write what they held into the entries that stay, which `kept` lists.
  virtual void fold(LayerView&, const Lists& /*kept*/) const {}
};

/// A keep policy around another: what it does not override goes to the inner one, budget and timing included.
struct KeepWrapper : KeepPolicy {
  std::unique_ptr<KeepPolicy> inner;
  Needs needs(const ModelInfo& m) const override { return inner->needs(m); }
  std::unique_ptr<State> open(const ModelInfo& m) const override { return inner->open(m); }
  void observe(LayerView& at) const override { inner->observe(at); }
  Ragged score(LayerView& at) const override { return inner->score(at); }
  Tensor allocate(const Allocation& a) const override { return inner->allocate(a); }
  bool settle(LayerView& at) const override { return inner->settle(at); }
  void drive(Run& run) const override { inner->drive(run); }
  std::string check() const override { return inner->check(); }
  const Budget& kept() const override { return inner->kept(); }
  int64_t entries(const Budget& b, const ModelInfo& m, int layer, int64_t length) const override {
    return inner->entries(b, m, layer, length);
  }
  const When& timing() const override { return inner->timing(); }
  bool unbounded() const override { return inner->unbounded(); }
  bool makes_room() const override { return inner->makes_room(); }
  Ragged rank(LayerView& at, const Ragged& scores, const Tensor& counts) const override {
    return inner->rank(at, scores, counts);
  }
  void fold(LayerView& at, const Lists& kept) const override { inner->fold(at, kept); }
};

/// The run of a model that a drive steers; implemented by model/.
class Run {
 public:
  virtual ~Run() = default;
  virtual const ModelInfo& model() const = 0;
  virtual int sequences() const = 0;
  /// Tokens of a sequence so far.
  virtual std::span<const int32_t> tokens(int sequence) const = 0;
  /// The driving mechanism's own state.
  virtual State* state() = 0;
  /// Where its kernels run.
  virtual Queue& queue() = 0;
  /// Runs tokens through the first `layers` layers of the model (0: all) behind what is held, in Phase::Replay:
  /// observe() of the driving mechanism is called in each, and the new entries leave the store when the feed ends.
  virtual void replay(int sequence, std::span<const int32_t> tokens, int layers) = 0;
  void replay(int sequence, std::span<const int32_t> tokens) { replay(sequence, tokens, 0); }
  /// replay() of all layers and, behind the last one, backward through them: gradient() of the driving mechanism is called in
  /// each, the last layer first. About three times a replay's work. Throws Error(Unsupported) where keys are not read at their
  /// true positions.
  virtual void replay_backward(int sequence, std::span<const int32_t> tokens, const Objective&) = 0;
  /// Rows in place of tokens' embeddings, F32 [n, hidden] of the host, go through the model under `adapter` (may be null), dense
  /// and in Phase::Replay, and stay: n entries behind those of the sequence, at its next positions; tokens() has −1 for each.
  virtual void append(int sequence, const Tensor& rows, const Adapter* adapter) = 0;
  /// In shorten(): reads the next tokens of the prompt for good, as a part of it (Phase::Chunk). The last ones, behind which
  /// the prompt is at its end, are not the drive's to read.
  virtual void feed(int sequence, std::span<const int32_t> tokens) = 0;
  /// Scores, allocates and evicts in all layers now.
  virtual void evict() = 0;
  /// Text → ids without special tokens; empty where the model has no tokenizer.
  virtual std::vector<int32_t> tokenize(const std::string& text) const = 0;
};

/// The first `sinks` and the last `recent` entries of every segment of scores become +∞. Returns scores.
Ragged force(Queue&, Ragged scores, int64_t sinks, int64_t recent);

/// Keeps in each segment of the layer its counts[segment] best entries by the policy's rank() of scores. KV heads outside
/// the policy's `heads` keep all. What the host knows of the counts beforehand: no segment keeps more than most[segment],
/// the layer no more than `together`.
void evict(LayerView&, const KeepPolicy&, const Ragged& scores, Tensor counts, std::span<const int64_t> most = {},
           int64_t together = -1);

}  // namespace heed
