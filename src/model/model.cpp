#include "model/model.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <optional>

#include "base/memory.h"
#include "kernels/quant.h"
#include "model/random_weights.h"

namespace heed {
namespace {

constexpr const char* kKnown = "llama, qwen2, qwen3, gemma3";

std::string layer_name(int layer, const char* what) { return "blk." + std::to_string(layer) + "." + what; }

std::vector<uint8_t> token_classes(const Tokenizer& tokenizer, int vocabulary) {
  std::vector<uint8_t> out;
  for (int32_t id = 0; id < vocabulary; ++id) {
    bool punctuation = false, other = false;
    for (const char c : tokenizer.piece(id)) {
      const auto byte = static_cast<unsigned char>(c);
      punctuation |= byte < 128 && std::ispunct(byte), other |= byte >= 128 || std::isalnum(byte);
    }
    out.push_back(uint8_t(tokenizer.is_control(id) ? TokenClass::Control
                          : punctuation && !other  ? TokenClass::Punctuation
                                                   : TokenClass::Text));
  }
  return out;
}

Buffer rope_table(int dims, double base, double scale, const Tensor& factors) {
  Buffer table(Dtype::F32, {dims / 2});
  for (int i = 0; i < dims / 2; ++i) {
    const double factor = factors ? double(factors.at<float>(i)) : 1.0;
    table->at<float>(i) = float(scale * std::pow(base, -2.0 * i / dims) / factor);
  }
  return table;
}

}  // namespace

// Reads what the model needs from a file; throws Error, which load() turns into a Failure.
struct ModelLoader {
  const Gguf& file;
  std::string arch;

  std::string key(const char* name) const { return arch + "." + name; }
  int64_t integer(const char* name) const { return value_or_throw(file.integer(key(name))); }
  int64_t integer(const char* name, int64_t absent) const { return value_or_throw(file.integer(key(name), absent)); }
  double number(const char* name, double absent) const { return value_or_throw(file.number(key(name), absent)); }

  int bounded(const char* name, int64_t low, int64_t high) const {
    const int64_t x = integer(name);
    if (x < low || x > high)
      throw Error(Code::Corrupt, file.name(),
                  key(name) + " is " + std::to_string(x) + ", not " + std::to_string(low) + "…" + std::to_string(high));
    return int(x);
  }
  Tensor need(const std::string& name, std::initializer_list<int64_t> sizes) const {
    return value_or_throw(file.tensor(name, sizes));
  }
  Tensor may(const std::string& name, std::initializer_list<int64_t> sizes) const {
    return file.tensor(name) ? need(name, sizes) : Tensor();
  }
  // Norms and biases are used as f32 wherever they are; files keep them so.
  Tensor f32(Tensor t, const std::string& name) const {
    if (t && t.type != Dtype::F32)
      throw Error(Code::Unsupported, file.name(), name + " is " + info(t.type).name + ", not f32");
    return t;
  }
  Tensor vector(const std::string& name, int64_t size) const { return f32(need(name, {size}), name); }
  Tensor may_vector(const std::string& name, int64_t size) const { return f32(may(name, {size}), name); }

  ModelInfo shape() const {
    ModelInfo m;
    m.architecture = arch;
    m.layers = bounded("block_count", 1, 4096);
    m.hidden = bounded("embedding_length", 1, 1 << 20);
    m.h = bounded("attention.head_count", 1, 1 << 14);
    m.g = int(integer("attention.head_count_kv", m.h));
    if (m.g < 1 || m.h % m.g != 0)
      throw Error(Code::Corrupt, file.name(),
                  std::to_string(m.h) + " query heads do not divide over " + std::to_string(m.g) + " KV heads");
    m.d = int(integer("attention.key_length", m.hidden / m.h));
    m.d_v = int(integer("attention.value_length", m.d));
    if (m.d < 1 || m.d > 4096 || m.d_v < 1 || m.d_v > 4096)
      throw Error(Code::Corrupt, file.name(), "head widths of " + std::to_string(m.d) + " and " + std::to_string(m.d_v));
    m.context = integer("context_length", 0);
    m.scale = float(number("attention.scale", 0));
    m.softcap = float(number("attn_logit_softcapping", 0));
    m.hash = file.hash();
    return m;
  }

  LayerWeights layer(int l, const ModelInfo& m, int feed_forward) const {
    const auto name = [l](const char* what) { return layer_name(l, what); };
    const int64_t hidden = m.hidden, q_out = int64_t(m.h) * m.d, k_out = int64_t(m.g) * m.d, v_out = int64_t(m.g) * m.d_v;
    LayerWeights w;
    w.attn_norm = vector(name("attn_norm.weight"), hidden);
    w.ffn_norm = vector(name("ffn_norm.weight"), hidden);
    w.q = need(name("attn_q.weight"), {q_out, hidden});
    w.k = need(name("attn_k.weight"), {k_out, hidden});
    w.v = need(name("attn_v.weight"), {v_out, hidden});
    w.o = need(name("attn_output.weight"), {hidden, int64_t(m.h) * m.d_v});
    w.q_bias = may_vector(name("attn_q.bias"), q_out);
    w.k_bias = may_vector(name("attn_k.bias"), k_out);
    w.v_bias = may_vector(name("attn_v.bias"), v_out);
    w.o_bias = may_vector(name("attn_output.bias"), hidden);
    if (arch == "gemma3" || arch == "qwen3") {
      w.q_norm = vector(name("attn_q_norm.weight"), m.d);
      w.k_norm = vector(name("attn_k_norm.weight"), m.d);
    }
    if (arch == "gemma3") {
      w.attn_post_norm = vector(name("post_attention_norm.weight"), hidden);
      w.ffn_post_norm = vector(name("post_ffw_norm.weight"), hidden);
    }
    w.gate = need(name("ffn_gate.weight"), {feed_forward, hidden});
    w.up = need(name("ffn_up.weight"), {feed_forward, hidden});
    w.down = need(name("ffn_down.weight"), {hidden, feed_forward});
    return w;
  }
};

Result<std::shared_ptr<const Model>> Model::load(const std::string& path) try {
  auto model = std::make_shared<Model>();
  model->path_ = path;
  model->file_ = value_or_throw(Gguf::open(path));
  const Gguf& file = *model->file_;
  ModelLoader load{file, std::string(value_or_throw(file.string("general.architecture")))};
  const std::string& arch = load.arch;
  const bool gemma = arch == "gemma3", qwen = arch == "qwen2" || arch == "qwen3";
  if (!gemma && !qwen && arch != "llama")
    return fail(Code::Unsupported, path, "architecture '" + arch + "' is not known", std::string("known: ") + kKnown);

  ModelInfo& m = model->info_;
  m = load.shape();
  model->name_ = std::string(value_or_throw(file.string("general.name", arch)));
  const int feed_forward = load.bounded("feed_forward_length", 1, 1 << 20);

  Architecture& a = model->architecture_;
  a.norm_eps = float(load.number("attention.layer_norm_rms_epsilon", 1e-5));
  a.final_softcap = float(load.number("final_logit_softcapping", 0));
  if (gemma) a.activation = Activation::GeluTanh, a.embedding_scale = std::sqrt(float(m.hidden));

  // Rotary embedding: one table for all layers, and for Gemma another for its sliding-window layers.
  const int dims = int(load.integer("rope.dimension_count", m.d));
  if (dims < 2 || dims > m.d || dims % 2)
    return fail(Code::Corrupt, path,
                "rotary embedding of " + std::to_string(dims) + " of " + std::to_string(m.d) + " channels");
  const std::string_view scaling = value_or_throw(file.string(load.key("rope.scaling.type"), "none"));
  double scale = 1;
  if (scaling == "linear") scale = 1.0 / load.number("rope.scaling.factor", 1);
  else if (scaling != "none")
    return fail(Code::Unsupported, path, "rope scaling '" + std::string(scaling) + "'",
                "known: none, linear, and frequency factors");
  const double base = load.number("rope.freq_base", 10000);
  model->rope_tables_.push_back(rope_table(dims, base, scale, load.may_vector("rope_freqs.weight", dims / 2)));
  if (gemma) model->rope_tables_.push_back(rope_table(dims, load.number("rope.freq_base_swa", 10000), 1, {}));
  for (const Buffer& table : model->rope_tables_) model->ropes_.push_back({table, dims, arch != "llama"});
  m.ropes.assign(size_t(m.layers), &model->ropes_[0]);
  if (gemma) {
    // Five layers of sliding windows, then one that sees everything (Gemma 3 report, 2025).
    const int64_t window = load.integer("attention.sliding_window", 512),
                  pattern = load.integer("attention.sliding_window_pattern", 6);
    m.windows.assign(size_t(m.layers), 0);
    for (int l = 0; l < m.layers; ++l)
      if (pattern > 0 && l % pattern != pattern - 1)
        m.windows[size_t(l)] = window, m.ropes[size_t(l)] = &model->ropes_[1];
  }

  const Tensor* embedding = file.tensor("token_embd.weight");
  if (!embedding || embedding->rank != 2) return fail(Code::Corrupt, path, "token_embd.weight is missing or no matrix");
  m.vocabulary = int(embedding->size[0]);
  model->embedding_ = load.need("token_embd.weight", {m.vocabulary, m.hidden});
  model->output_ = load.may("output.weight", {m.vocabulary, m.hidden});
  if (!model->output_) model->output_ = model->embedding_;
  model->final_norm_ = load.vector("output_norm.weight", m.hidden);
  for (int l = 0; l < m.layers; ++l) model->layers_.push_back(load.layer(l, m, feed_forward));
  for (const Gguf::Entry& entry : file.tensors()) model->bytes_ += entry.tensor.bytes();
  // Files without a vocabulary say "none"; they run on token numbers.
  const std::string_view vocabulary = value_or_throw(file.string("tokenizer.ggml.model", "none"));
  if (vocabulary != "none" && vocabulary != "no_vocab") {
    model->tokenizer_ = value_or_throw(Tokenizer::from(file));
    m.token_classes = token_classes(*model->tokenizer_, m.vocabulary);
  }
  return model;
} catch (const Error& error) { return tl::unexpected(error.failure()); }

std::shared_ptr<const ModelWeights> Model::place(Queue& queue) const {
  const std::lock_guard lock(placing_);
  const bool host = queue.memory->device == Device::Cpu;
  // Copies of quantised matrices in the order that is read fastest take the place of the file's pages, which the system gets
  // back; where memory is short the file stays what is read, since its pages can go and return.
  const bool can_interleave = host && queue.run->interleave;
  if (can_interleave && interleaved_) return interleaved_;  // however little memory is left by now
  const bool interleaved = can_interleave && bytes_ < free_memory() / 4 * 3;
  std::weak_ptr<const ModelWeights>& known = placed_[queue.memory];
  if (auto found = interleaved ? nullptr : known.lock()) return found;
  auto out = std::make_shared<ModelWeights>();
  auto place = [&](const Tensor& t) {
    const bool turned = interleaved && t && t.rank == 2 && is_block(t.type) && t.contiguous();
    if (!t || (host && !turned)) return t;
    out->owned.emplace_back(t.type, std::span(t.size.data(), size_t(t.rank)), *queue.memory);
    Tensor to = out->owned.back();
    if (!turned) return queue.upload(t, to), to;
    to.interleaved = true;
    // A few megabytes at a time, so that the file's pages and the copy are never both there.
    const int64_t rows = t.size[0], sixteen = std::max<int64_t>(t.bytes() / std::max<int64_t>(rows, 1) * kSideBySide, 1),
                  step = std::max<int64_t>((int64_t(8) << 20) / sixteen, 1) * kSideBySide;
    for (int64_t at = 0; at < rows; at += step) {
      const Tensor part = t.slice(0, at, std::min(rows, at + step));
      queue.run->interleave(queue, part, to.slice(0, at, std::min(rows, at + step)));
      if (file_) file_->let_go(part);
    }
    return to;
  };
  for (const LayerWeights& w : layers_) {
    LayerWeights& to = out->layers.emplace_back(w);
    for (Tensor* t : {&to.attn_norm, &to.attn_post_norm, &to.ffn_norm, &to.ffn_post_norm, &to.q, &to.k, &to.v, &to.o,
                      &to.q_bias, &to.k_bias, &to.v_bias, &to.o_bias, &to.q_norm, &to.k_norm, &to.gate, &to.up, &to.down})
      *t = place(*t);
  }
  out->embedding = place(embedding_), out->final_norm = place(final_norm_);
  out->output = output_.data == embedding_.data ? out->embedding : place(output_);
  std::map<const Rope*, Tensor> tables;
  for (const Rope* rope : info_.ropes) {
    Tensor& table = tables[rope];
    if (!table) table = place(rope->inv_freq);
    out->ropes.push_back({table, rope->dims, rope->neox});
  }
  if (!host) queue.memory->finish(queue.stream);
  if (interleaved) interleaved_ = out;
  else known = out;
  return out;
}

std::shared_ptr<const Model> Model::random(const ModelInfo& shape, int feed_forward, Dtype type, uint64_t seed,
                                           const std::string& name) {
  auto model = std::make_shared<Model>();
  model->name_ = model->path_ = name;
  model->info_ = shape;
  ModelInfo& m = model->info_;
  m.architecture = "llama";
  auto make = [&](Dtype t, std::initializer_list<int64_t> sizes, bool ones) {
    const int64_t width = sizes.end()[-1];
    require(width % heed::info(t).block == 0, "random weights",
            "rows of " + std::to_string(width) + " do not divide into the blocks of " + heed::info(t).name);
    Buffer buffer(t, sizes);
    if (ones) std::fill_n(buffer->as<float>(), buffer->numel(), 1.0f);
    else fill_random(buffer, seed++);
    model->bytes_ += buffer->bytes();
    model->owned_.push_back(std::move(buffer));
    return model->owned_.back().view();
  };
  model->rope_tables_.push_back(rope_table(m.d, 10000, 1, {}));
  model->ropes_.push_back({model->rope_tables_[0], m.d, true});
  m.ropes.assign(size_t(m.layers), &model->ropes_[0]);
  model->embedding_ = model->output_ = make(type, {m.vocabulary, m.hidden}, false);
  model->final_norm_ = make(Dtype::F32, {m.hidden}, true);
  for (int l = 0; l < m.layers; ++l) {
    LayerWeights w;
    w.attn_norm = make(Dtype::F32, {m.hidden}, true), w.ffn_norm = make(Dtype::F32, {m.hidden}, true);
    w.q = make(type, {int64_t(m.h) * m.d, m.hidden}, false), w.k = make(type, {int64_t(m.g) * m.d, m.hidden}, false);
    w.v = make(type, {int64_t(m.g) * m.d_v, m.hidden}, false), w.o = make(type, {m.hidden, int64_t(m.h) * m.d_v}, false);
    w.gate = make(type, {feed_forward, m.hidden}, false), w.up = make(type, {feed_forward, m.hidden}, false);
    w.down = make(type, {m.hidden, feed_forward}, false);
    model->layers_.push_back(w);
  }
  return model;
}

}  // namespace heed
