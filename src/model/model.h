// A language model: its configuration and weights, as a GGUF file holds them.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "attention/mechanism.h"
#include "model/gguf.h"
#include "model/tokenizer.h"

namespace heed {

/// Weights of one layer; tensors are views into the mapped file. Empty: the architecture has none.
struct LayerWeights {
  Tensor attn_norm, attn_post_norm, ffn_norm, ffn_post_norm;  // [hidden]
  Tensor q, k, v, o;                                          // [out, in]
  Tensor q_bias, k_bias, v_bias, o_bias;
  Tensor q_norm, k_norm;  // [d]
  Tensor gate, up, down;
};

/// How the four families differ, as data.
struct Architecture {
  Activation activation = Activation::Silu;
  float embedding_scale = 1;
  float norm_eps = 1e-5f;
  float final_softcap = 0;
};

/// All weights where one kind of kernels can read them.
struct ModelWeights {
  std::vector<LayerWeights> layers;
  Tensor embedding, final_norm, output;
  std::vector<Rope> ropes;    // for each layer
  std::vector<Buffer> owned;  // what of it lies in no file and in no other's memory
};

class Session;
struct SessionOptions;

class Model {
 public:
  /// Errors name the architecture and list the known ones, or the missing tensor or key, or the wrong shape.
  static Result<std::shared_ptr<const Model>> load(const std::string& path);
  /// Random weights (`fill_random`) of a llama shape, for speed and tests only. One matrix serves as embedding and output.
  /// Throws Error(Invalid) when a row does not divide into the type's blocks.
  static std::shared_ptr<const Model> random(const ModelInfo& shape, int feed_forward, Dtype type, uint64_t seed,
                                             const std::string& name = "random");

  const ModelInfo& info() const { return info_; }
  const Architecture& architecture() const { return architecture_; }
  const std::vector<LayerWeights>& layers() const { return layers_; }
  const Tensor& embedding() const { return embedding_; }
  const Tensor& final_norm() const { return final_norm_; }
  const Tensor& output() const { return output_; }
  /// The weights in the memory of the queue's kernels: views of the file where that is the host's, else one copy that all
  /// sessions on it share. Where the host's kernels read interleaved matrices faster, those of block types are such a copy
  /// too, unless memory is short of it; the model keeps that one, since making it takes longer than a short session. Waits
  /// for the copy. Throws Error(Memory).
  std::shared_ptr<const ModelWeights> place(Queue& queue) const;
  /// Null when the file has no vocabulary.
  const Tokenizer* tokenizer() const { return tokenizer_ ? &*tokenizer_ : nullptr; }
  /// Bytes of all weights.
  int64_t bytes() const { return bytes_; }
  const std::string& path() const { return path_; }
  const std::string& name() const { return name_; }

 private:
  std::string path_, name_;
  std::optional<Gguf> file_;
  std::vector<Buffer> owned_;
  ModelInfo info_;
  Architecture architecture_;
  std::vector<LayerWeights> layers_;
  std::vector<Buffer> rope_tables_;
  std::vector<Rope> ropes_;
  Tensor embedding_, final_norm_, output_;
  std::optional<Tokenizer> tokenizer_;
  int64_t bytes_ = 0;
  mutable std::mutex placing_;
  mutable std::map<const Memory*, std::weak_ptr<const ModelWeights>> placed_;
  mutable std::shared_ptr<const ModelWeights> interleaved_;
};

}  // namespace heed
