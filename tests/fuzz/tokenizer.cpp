// Any text under sound vocabularies, and any vocabulary. The first byte chooses: below 128 one of the vocabularies of
// tests/data/tokenizer for the text that follows, else what follows is a GGUF file whose last bytes are also the text.
#include "model/tokenizer.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "base/utf8.h"

namespace {

using namespace heed;

Tokenizer load(const char* name, const char* pre) {
  std::ifstream in(std::string(HEED_TEST_DATA "/tokenizer/") + name, std::ios::binary);
  std::string file{std::istreambuf_iterator<char>(in), {}};
  if (pre) {
    const size_t at = file.find("tokenizer.ggml.pre") + 18 + sizeof(uint32_t);
    const uint64_t length = std::strlen(pre);
    file.replace(at, sizeof length + 7, std::string(reinterpret_cast<const char*>(&length), sizeof length) + pre);
  }
  return value_or_throw(Tokenizer::from(value_or_throw(Gguf::parse(std::as_bytes(std::span(file))))));
}

void check(const Tokenizer& tokenizer, std::string_view text, bool complete) {
  for (const bool special : {false, true}) {
    const auto ids = tokenizer.encode(text, {.special = special, .bos = special});
    for (const int32_t id : ids) {
      if (id < 0 || id >= tokenizer.size()) std::abort();
    }
    const std::string back = tokenizer.decode(ids);
    if (complete && !special && back != valid_utf8(text)) std::abort();
    (void)valid_utf8(tokenizer.decode(ids, true));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] < 128) {
    static const Tokenizer sound[] = {
        load("bpe.gguf", "default"),        load("bpe.gguf", "gpt-2"), load("bpe.gguf", "smollm"),
        load("bpe.gguf", "llama-bpe"),      load("bpe.gguf", "qwen2"), load("bpe.gguf", "qwen35"),
        load("bpe.gguf", "deepseek-coder"), load("spm.gguf", nullptr),
    };
    const size_t which = data[0] % std::size(sound);
    check(sound[which], rest, which < 7);
    return 0;
  }
  const std::string file(rest);  // aligned, as a mapped file is
  const auto parsed = Gguf::parse(std::as_bytes(std::span(file)));
  if (!parsed) return 0;
  const auto tokenizer = Tokenizer::from(*parsed);
  if (!tokenizer) return 0;
  for (int32_t id = -1; id <= tokenizer->size(); ++id) {
    (void)tokenizer->piece(id);
    (void)tokenizer->is_end(id);
  }
  check(*tokenizer, rest.substr(rest.size() - std::min<size_t>(rest.size(), 200)), false);
  return 0;
}
