// A session: sequences of one model, fed in a batch, with the attention of the user's choice.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "attention/spec.h"
#include "model/model.h"

namespace heed {

struct SessionOptions {
  std::string attention = "dense";
  int sequences = 1;
  int64_t ubatch = 0;  // rows of a tile inside a layer: bounds scratch, changes nothing else; 0: Kernels::tile_rows
  int64_t chunk = 0;   // > 0: prompts are fed in parts of so many tokens; mechanisms then plan for each part
  PageType k = {}, v = {};       // how the store keeps entries; BF16 unless said
  std::string backend = "auto";  // auto, cpu, reference, or the name of a kernel table
  int device = 0;                // which of a backend's devices
  bool record = true;            // decode steps are recorded and replayed where the device can and no step differs
};

/// Seconds by part of a step, since the session began.
struct Times {
  double plan = 0, observe = 0, select = 0, attend = 0, products = 0, rest = 0;
  double total() const { return plan + observe + select + attend + products + rest; }
  Times operator-(const Times& b) const {
    return {plan - b.plan,     observe - b.observe,   select - b.select,
            attend - b.attend, products - b.products, rest - b.rest};
  }
};

/// Called in every layer of every step behind attention and before entries are evicted: reads of what happened, for
/// traces and analyses. With none set nothing is computed for it. What it looks at lies where kernels run
/// (Queue::read_back).
using Tap = std::function<void(LayerView&)>;

class Session final {
 public:
  /// Throws Error: a bad spec, an unknown backend, memory.
  Session(std::shared_ptr<const Model> model, const SessionOptions& options);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// Which rows' logits a feed returns.
  enum class Logits { None, Last, All };

  /// Feeds the next tokens of each sequence (one span for each; spans may be empty and of unequal length): layer by
  /// layer, rows tiled. A feed into an empty session, or one before any decode, counts as prompt.
  /// Returns F32 [rows, vocabulary]: Last: one row for each sequence; All: one for each token, sequences in order. It
  /// is of the host and valid until the next feed. For long texts give `visit` instead of asking for All: it is called with tiles of
  /// rows (first token number of sequence 0 …) so that no [tokens, vocabulary] matrix is built. Throws Error(Unsupported)
  /// when rows are wanted of a prompt that a drive shortens.
  /// Throws Error(Invalid) when the text becomes longer than the model's context, Error(Interrupted) between layers
  /// when interrupt() was called; the session is then as it was before the feed.
  Tensor prefill(const std::vector<std::span<const int32_t>>& tokens, Logits want = Logits::Last,
                 const std::function<void(int64_t first, Tensor logits)>& visit = {});
  /// One sequence.
  Tensor prefill(std::span<const int32_t> tokens, Logits want = Logits::Last) {
    return prefill(std::vector{tokens}, want);
  }
  /// One new token for each sequence (−1: none, its row of logits is zero) → F32 [sequences, vocabulary].
  Tensor decode(std::span<const int32_t> tokens);
  Tensor decode(int32_t token) { return decode(std::span(&token, 1)); }

  /// Reads the next tokens of each sequence (as prefill() takes them) under dense attention behind what is held, then goes
  /// backward through the layers from the gradient that `objective` gives; `look` sees each layer with its
  /// LayerView::gradients, the last one first; a tap sees the way forward. Nothing of it is kept. Weights are constants.
  /// Throws as prefill() does, and Error(Unsupported) where keys are not read at their true positions; the session is then
  /// as it was.
  void gradients(const std::vector<std::span<const int32_t>>& tokens, const Objective& objective, const Tap& look);

  /// −Σ log p of each of a sequence's tokens given those before it, but the first: what gradients() of them may be of.
  Objective prediction_loss(std::span<const int32_t> tokens) const;

  /// A copy that shares all pages and goes on separately.
  std::unique_ptr<Session> fork() const;
  /// Forgets tokens at positions ≥ `position` of a sequence. Entries that were evicted do not come back.
  void truncate(int sequence, int64_t position);

  /// The most tokens that a sequence may have: the model's context, or what a mechanism makes of it; 0: any number.
  int64_t reach() const;
  /// For long work, before it begins: throws Error(Invalid), as feeding would, when `length` tokens are more than that.
  void check_reach(int64_t length) const;
  const Model& model() const;
  const Composition& composition() const;
  Store& store();
  /// Bytes held for keys and values, in the store or by mechanisms in its place: of a layer, or of all.
  int64_t kv_bytes(int layer);
  int64_t kv_bytes();
  std::span<const int32_t> tokens(int sequence = 0) const;
  /// Where a segment's entries of a layer stood in what was fed: at their positions, unless a drive left tokens of the
  /// prompt out. Waits.
  std::vector<int32_t> origins(int layer, int64_t segment);
  int64_t step() const;  // tokens decoded
  const Times& times() const;
  /// Share of causal pairs computed in prefill so far: F64 [layers][h].
  std::vector<std::vector<double>> density() const;
  /// Mean keys read for each decoded token so far: [layers][h].
  std::vector<std::vector<double>> read_tokens() const;
  /// Scratch held beside the store and the weights, bytes.
  int64_t scratch_bytes() const;

  void tap(Tap tap);
  /// Called with (layers done, layers) during a prefill.
  void progress(std::function<void(int64_t done, int64_t total)> report);

 private:
  friend class SessionRun;
  struct Impl;
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Asks running sessions to stop at the next layer: safe in a signal handler. clear_interrupt() forgets it.
void interrupt() noexcept;
void clear_interrupt() noexcept;
bool interrupted() noexcept;

/// The table for a backend name: auto (the GPU when there is a usable one, else the best CPU table), cpu, reference, or
/// a table's own name; `device` counts the backend's devices from 0. Throws Error(NotFound) that lists the names, or
/// says how many devices there are.
const Kernels& backend(const std::string& name, int device = 0);

}  // namespace heed
