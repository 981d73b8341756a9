// What session.cpp and session_layer.cpp share; nobody else includes it.
#pragma once
#include <chrono>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "model/session.h"

namespace heed {

/// Adds the seconds of its life.
class Clock {
 public:
  explicit Clock(double& into) : into_(into), begin_(std::chrono::steady_clock::now()) {}
  ~Clock() { into_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

 private:
  double& into_;
  std::chrono::steady_clock::time_point begin_;
};

/// What panels of a store's keys or values hold.
Dtype panel_type(const PageType&);

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
  // Of a feed whose gradients are wanted: what each layer is given and what its attention makes of it, in scratch.
  struct Tape {
    Tensor x, q, out, lse;
  };
  std::vector<Tape>* tapes = nullptr;

  Impl(std::shared_ptr<const Model> model_in, const SessionOptions& o);
  Impl(Impl& other);

  int parts() const { return int(composition->parts().size()); }
  const Mechanism& part(int p) const { return *composition->parts()[size_t(p)].mechanism; }
  const ModelInfo& info() const { return shape; }
  const Architecture& architecture() const { return model->architecture(); }

  struct Batch;
  /// What a feed's gradients are of, and who looks at them in each layer.
  struct Backward {
    const Objective& objective;
    const Tap& look;
  };
  /// What a replay is besides.
  struct Replayed {
    int depth = 0;  // layers that it goes through; 0: all
    const Backward* gradients = nullptr;
    Tensor rows = {};  // F32 [T, hidden] of the host: in place of the tokens' embeddings
    const Adapter* adapter = nullptr;
  };
  void feed(const std::vector<std::span<const int32_t>>& tokens, Phase phase, bool last_chunk, Logits want,
            const std::function<void(int64_t, Tensor)>& visit) {
    feed(tokens, phase, last_chunk, want, visit, Replayed{});
  }
  void feed(const std::vector<std::span<const int32_t>>& tokens, Phase phase, bool last_chunk, Logits want,
            const std::function<void(int64_t, Tensor)>& visit, const Replayed& replayed);
  std::vector<std::span<const int32_t>> shorten(const std::vector<std::span<const int32_t>>& tokens,
                                                std::vector<std::vector<int32_t>>& read);
  void check_reach(int64_t length) const;
  Tensor forward(Batch& batch);
  bool replay(const Batch& batch, std::span<const int32_t> ids, std::span<const int32_t> places);
  LayerView view_of(const Batch& batch, int l, Tensor x);
  void layer(Batch& batch, int l, Tensor x);
  struct Projected;
  struct NewRows;
  Projected project_heads(const Batch& batch, int l, Tensor x);
  std::pair<Tensor, Tensor> read_places(const Batch& batch, LayerStore& entries);
  NewRows open_panel(const Batch& batch, LayerView& view, bool plain_keys);
  void enter_heads(const Batch& batch, LayerView& view, const Projected& rows);
  void leave_heads(const Batch& batch, const LayerView& view, Tensor x);
  void gradients(const std::vector<std::span<const int32_t>>& tokens, const Objective& objective, const Tap& look);
  Tensor forward(Batch& batch, const Backward& gradients);
  void layer_backward(Batch& batch, int l, const Tape& tape, Tensor d_x, const Tap& look);
  Tensor head_rows_backward(const Batch& batch, const Ragged& d, int64_t heads, const Buffer& basis_back,
                            const Rope* rope, Tensor norm, Tensor rows);
  void attend(Batch& batch, LayerView& view);
  void keep(Batch& batch, LayerView& view);
  void make_room(Batch& batch, LayerView& view);
  bool due(const Batch& batch, const KeepPolicy& policy) const;
  std::vector<int64_t> lengths(const KeepPolicy& policy, std::span<const int64_t> coming) const;
  void cut(const Batch& batch, LayerView& view, const KeepPolicy& policy, std::span<const int64_t> coming);
  void evict_all(int p, Phase phase);
  void emit(Batch& batch, Tensor x, Logits want, const std::function<void(int64_t, Tensor)>& visit);
  void count_reads(LayerView& view);
  bool counts_at_end(const Batch& batch) const;
  void count_all_reads();
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
  Tensor rows;                   // in place of the embeddings of ids
  const Adapter* adapter = nullptr;
  const Adapter::Layer* adapter_of(int layer) const { return adapter ? &adapter->layers[size_t(layer)] : nullptr; }
  Tensor q_offsets, kv_offsets;  // I64 [sequences · heads + 1]: the new rows, head-major
  Tensor q_pos, kv_pos;          // I32, as those rows
};

}  // namespace heed
