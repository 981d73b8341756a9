// A GGUF file of a small random llama with a byte vocabulary: what the program can be run on without a download.
#pragma once
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "base/random.h"

namespace heed {

struct TinyModel {
  std::string architecture = "llama";
  int layers = 2, h = 4, g = 2, hidden = 32, feed_forward = 48, context = 512;
  int wrong_rows = 0;  // added to the rows of blk.0.attn_q.weight
  bool tokenizer = true;

  void write(const std::string& path) const {
    std::string meta, table, data;
    uint64_t keys = 0, tensors = 0;
    const auto u32 = [](std::string& to, uint32_t x) { to.append(reinterpret_cast<const char*>(&x), 4); };
    const auto u64 = [](std::string& to, uint64_t x) { to.append(reinterpret_cast<const char*>(&x), 8); };
    const auto text = [&](std::string& to, const std::string& s) { u64(to, s.size()), to += s; };
    const auto key = [&](const std::string& name, uint32_t type) { ++keys, text(meta, name), u32(meta, type); };
    const auto number = [&](const std::string& name, uint32_t x) { key(name, 4), u32(meta, x); };
    const auto words = [&](const std::string& name, const std::vector<std::string>& list) {
      key(name, 9), u32(meta, 8), u64(meta, list.size());
      for (const std::string& s : list) text(meta, s);
    };

    key("general.architecture", 8), text(meta, architecture);
    key("general.name", 8), text(meta, "tiny");
    const std::string a = architecture + ".";
    number(a + "block_count", uint32_t(layers)), number(a + "embedding_length", uint32_t(hidden));
    number(a + "attention.head_count", uint32_t(h)), number(a + "attention.head_count_kv", uint32_t(g));
    number(a + "feed_forward_length", uint32_t(feed_forward)), number(a + "context_length", uint32_t(context));
    key(a + "attention.layer_norm_rms_epsilon", 6);
    const float eps = 1e-5f;
    meta.append(reinterpret_cast<const char*>(&eps), 4);

    // GPT-2's names of bytes: printable ones are themselves, the others letters from U+0100 on.
    std::vector<std::string> tokens;
    for (int byte = 0, other = 256; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
      const int code = printable ? byte : other++;
      tokens.push_back(code < 128 ? std::string(1, char(code))
                                  : std::string{char(0xc0 | code >> 6), char(0x80 | (code & 63))});
    }
    tokens.insert(tokens.end(), {"<|endoftext|>", "<|im_start|>", "<|im_end|>"});
    if (tokenizer) {
      key("tokenizer.ggml.model", 8), text(meta, "gpt2");
      key("tokenizer.ggml.pre", 8), text(meta, "gpt-2");
      words("tokenizer.ggml.tokens", tokens);
      words("tokenizer.ggml.merges", {"t h", "th e"});
      key("tokenizer.ggml.token_type", 9), u32(meta, 5), u64(meta, tokens.size());
      for (size_t i = 0; i < tokens.size(); ++i) u32(meta, i < 256 ? 1 : 3);
      number("tokenizer.ggml.bos_token_id", 256), number("tokenizer.ggml.eos_token_id", 256);
    }

    Random random(7);
    const auto tensor = [&](const std::string& name, std::vector<uint64_t> sizes, bool norm) {
      ++tensors;
      text(table, name), u32(table, uint32_t(sizes.size()));
      uint64_t count = 1;
      for (size_t i = sizes.size(); i-- > 0;) u64(table, sizes[i]), count *= sizes[i];
      u32(table, 0), u64(table, data.size());
      for (uint64_t i = 0; i < count; ++i) {
        const float x = norm ? 1.0f : float(random.normal()) * 0.2f;
        data.append(reinterpret_cast<const char*>(&x), 4);
      }
      data.resize((data.size() + 31) / 32 * 32);
    };
    const uint64_t width = uint64_t(hidden), kv = uint64_t(hidden) / uint64_t(h) * uint64_t(g),
                   wide = uint64_t(feed_forward);
    tensor("token_embd.weight", {tokens.size(), width}, false);
    tensor("output_norm.weight", {width}, true);
    for (int l = 0; l < layers; ++l) {
      const std::string blk = "blk." + std::to_string(l) + ".";
      tensor(blk + "attn_norm.weight", {width}, true), tensor(blk + "ffn_norm.weight", {width}, true);
      tensor(blk + "attn_q.weight", {width + uint64_t(l == 0 ? wrong_rows : 0), width}, false);
      tensor(blk + "attn_k.weight", {kv, width}, false), tensor(blk + "attn_v.weight", {kv, width}, false);
      tensor(blk + "attn_output.weight", {width, width}, false);
      tensor(blk + "ffn_gate.weight", {wide, width}, false), tensor(blk + "ffn_up.weight", {wide, width}, false);
      tensor(blk + "ffn_down.weight", {width, wide}, false);
    }

    std::string head = "GGUF";
    u32(head, 3), u64(head, tensors), u64(head, keys);
    head += meta + table;
    head.resize((head.size() + 31) / 32 * 32);
    std::ofstream(path, std::ios::binary) << head << data;
  }
};

}  // namespace heed
