#include "model/tokenizer_split.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <span>

namespace heed {
namespace {

// Unicode's White_Space, written out: PCRE2's own \s has U+180E besides, which no tokenizer's has.
#define SPACE "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
// All but the last of a run of spaces: the last belongs to the word that follows.
#define SPACES_BEFORE_WORD "[" SPACE "]+(?![^" SPACE "])"
// Letters of both cases spelt out: a caseless s would also match U+017F.
#define CONTRACTION "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
#define AFTER_LETTERS(NUMBER, MARK) \
  NUMBER "| ?[^" SPACE "\\p{L}" MARK "\\p{N}]+[\\r\\n]*|[" SPACE "]*[\\r\\n]+|" SPACES_BEFORE_WORD "|[" SPACE "]+"

constexpr const char* kGpt2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" SPACE
                              "\\p{L}\\p{N}]+|" SPACES_BEFORE_WORD;
constexpr const char* kLlama3 = CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" AFTER_LETTERS("\\p{N}{1,3}", "");
constexpr const char* kQwen2 = CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" AFTER_LETTERS("\\p{N}", "");
constexpr const char* kQwen35 = CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|" AFTER_LETTERS("\\p{N}", "\\p{M}");

struct Known {
  std::vector<std::string_view> names;
  std::vector<const char*> stages;
  bool whole_words = false, add_bos = false;
};

const std::vector<Known>& known() {
  static const std::vector<Known> all = {
      {{"default", ""}, {"[\\p{P}$+<=>^~|]+", kGpt2, "\\p{N}+", "[0-9][0-9][0-9]"}},
      {{"gpt-2",   "gpt2",        "phi-2",      "mpt",        "olmo",       "jais",           "trillion",
        "jina-es", "jina-de",     "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code",   "roberta-bpe",
        "exaone4", "modern-bert", "mellum",     "a.x-4.0",    "gigachat",   "granite-docling"},
       {kGpt2}},
      {{"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}, {"\\p{N}", kGpt2}},
      {{"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}, {kLlama3}, true, true},
      {{"dbrx", "smaug-bpe", "chatglm-bpe", "glm4"}, {kLlama3}},
      {{"qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"}, {kQwen2}},
      {{"qwen35"}, {kQwen35}},
      {{"falcon"}, {"[\\p{P}$+<=>^~|`]+", kGpt2, "[0-9][0-9][0-9]"}},
      {{"deepseek-coder"},
       {"[\\r\\n]", "[" SPACE "]?\\p{L}+", "[" SPACE "]?\\p{P}+", "[\\x{800}-\\x{9fa5}\\x{ac00}-\\x{d7ff}]+", "\\p{N}"}},
  };
  return all;
}

struct FreeMatch {
  void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
};
struct FreeContext {
  void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
};

/// What one split needs besides the compiled patterns; it belongs to the call, so that patterns can be shared.
struct MatchMemory {
  std::unique_ptr<pcre2_match_data, FreeMatch> match{pcre2_match_data_create(1, nullptr)};
  std::unique_ptr<pcre2_match_context, FreeContext> context{pcre2_match_context_create(nullptr)};
};

std::string message(int code) {
  PCRE2_UCHAR text[256] = {};
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

}  // namespace

struct Splitter::Pattern {
  pcre2_code* code;
  explicit Pattern(const char* text) {
    int error;
    PCRE2_SIZE at;
    code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text), PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &error, &at,
                         nullptr);
    if (!code) throw Error(Code::Internal, "Splitter", "pattern '" + std::string(text) + "': " + message(error));
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // without JIT support the interpreter does the same, slower
  }
  ~Pattern() { pcre2_code_free(code); }
  Pattern(const Pattern&) = delete;
  Pattern& operator=(const Pattern&) = delete;
};

Result<Splitter> Splitter::named(std::string_view name) {
  std::string names;
  for (const Known& entry : known()) {
    if (std::ranges::find(entry.names, name) != entry.names.end()) {
      Splitter out;
      for (const char* stage : entry.stages) out.stages_.push_back(std::make_shared<const Pattern>(stage));
      out.whole_words_ = entry.whole_words;
      out.add_bos_ = entry.add_bos;
      return out;
    }
    names += (names.empty() ? "" : ", ") + std::string(entry.names[0]);
  }
  return fail(Code::Unsupported, "tokenizer.ggml.pre",
              "pre-tokenizer '" + std::string(name.substr(0, 80)) + "' is not known",
              "known are " + names + " and others that split alike");
}

void Splitter::split(std::string_view text, FunctionRef<void(std::string_view)> word) const {
  MatchMemory scratch;
  // Every pattern is linear on any text; the limit only keeps a mistake in one from hanging.
  pcre2_set_match_limit(scratch.context.get(), uint32_t(std::min<size_t>(10'000'000 + 64 * text.size(), UINT32_MAX)));
  split(0, text, &scratch, word);
}

void Splitter::split(size_t stage, std::string_view text, void* memory, FunctionRef<void(std::string_view)> word) const {
  if (stage == stages_.size()) return word(text);
  auto& scratch = *static_cast<MatchMemory*>(memory);
  // A piece is matched as if it were alone: looking ahead stops at its end.
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  size_t done = 0, from = 0;
  while (from < text.size()) {
    const int found = pcre2_match(stages_[stage]->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK,
                                  scratch.match.get(), scratch.context.get());
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) throw Error(Code::Internal, "Splitter", message(found));
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(scratch.match.get());
    const size_t begin = range[0], end = range[1];
    if (begin > done) split(stage + 1, text.substr(done, begin - done), memory, word);
    split(stage + 1, text.substr(begin, end - begin), memory, word);
    done = from = end;
  }
  if (done < text.size()) split(stage + 1, text.substr(done), memory, word);
}

}  // namespace heed
