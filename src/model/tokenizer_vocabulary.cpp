#include "model/tokenizer_vocabulary.h"

#include <algorithm>
#include <limits>
#include <span>

namespace heed {
namespace {

// Converters leave the kind of these out or wrong often enough that every engine knows them by name.
constexpr std::string_view kTurnEnds[] = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>",         "<|endoftext|>",      "<|end_of_text|>",
    "<EOT>",      "_<EOT>",     "[EOT]",   "<｜end▁of▁sentence｜>", "<end_of_utterance>",
};
constexpr std::string_view kOtherEnds[] = {
    "<|eom_id|>",   "<|return|>",    "<|call|>",   "</s>",   "[EOS]",      "<eos>",
    "<|fim_pad|>",  "<fim-pad>",     "<fim_pad>",  "<PAD>",  "[PAD]",  // padding of fill-in-the-middle
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",  // a new repository or file
};
constexpr std::string_view kOtherControls[] = {
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>",  "<SUF>", "▁<SUF>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>",   "<MID>", "▁<MID>",
};

bool among(std::string_view text, std::span<const std::string_view> names) {
  return std::ranges::find(names, text) != names.end();
}

/// A special token's id: `absent` when the file does not say or names a token that does not exist.
Result<int32_t> special(const Gguf& file, const char* key, int32_t absent, size_t size) {
  const auto id = file.integer(key, absent);
  if (!id) return tl::unexpected<Failure>(id.error());
  return *id >= 0 && uint64_t(*id) < size ? int32_t(*id) : uint64_t(absent) < size ? absent : -1;
}

tl::unexpected<Failure> short_array(const Gguf& file, const char* key, size_t have, size_t want) {
  return fail(Code::Corrupt, file.name(),
              std::string(key) + " has " + std::to_string(have) + " entries for " + std::to_string(want) + " tokens",
              "convert the model again");
}

}  // namespace

Result<Vocabulary> Vocabulary::read(const Gguf& file, bool sentencepiece, bool add_bos) {
  const auto tokens = file.strings("tokenizer.ggml.tokens");
  if (!tokens) return tl::unexpected<Failure>(tokens.error());
  if (tokens->empty() || tokens->size() > size_t(std::numeric_limits<int32_t>::max())) {
    return fail(Code::Corrupt, file.name(), "the vocabulary has " + std::to_string(tokens->size()) + " tokens",
                "convert the model again");
  }
  Vocabulary out;
  for (const std::string_view token : *tokens) out.text.add(token);
  const size_t size = out.size();

  out.kind.assign(size, TokenKind::Normal);
  if (file.find("tokenizer.ggml.token_type")) {
    const auto kinds = file.integers("tokenizer.ggml.token_type");
    if (!kinds) return tl::unexpected<Failure>(kinds.error());
    if (kinds->size() < size) return short_array(file, "tokenizer.ggml.token_type", kinds->size(), size);
    for (size_t i = 0; i < size; ++i) {
      const bool known = (*kinds)[i] >= 0 && (*kinds)[i] <= int64_t(TokenKind::Byte);
      out.kind[i] = known ? TokenKind((*kinds)[i]) : TokenKind::Undefined;
    }
  }
  out.score.assign(size, 0.0f);
  if (file.find("tokenizer.ggml.scores")) {
    auto scores = file.numbers("tokenizer.ggml.scores");
    if (!scores) return tl::unexpected<Failure>(scores.error());
    if (scores->size() < size) return short_array(file, "tokenizer.ggml.scores", scores->size(), size);
    // A NaN would break the order of the merge queue.
    for (size_t i = 0; i < size; ++i) out.score[i] = (*scores)[i] == (*scores)[i] ? (*scores)[i] : 0.0f;
  }

  const struct {
    const char* key;
    int32_t absent;
    int32_t Vocabulary::* field;
  } ids[] = {
      {"tokenizer.ggml.bos_token_id", sentencepiece ? 1 : 11, &Vocabulary::bos},
      {"tokenizer.ggml.eos_token_id", sentencepiece ? 2 : 11, &Vocabulary::eos},
      {"tokenizer.ggml.unknown_token_id", sentencepiece ? 0 : -1, &Vocabulary::unknown},
      {"tokenizer.ggml.eot_token_id", -1, &Vocabulary::eot},
  };
  for (const auto& id : ids) {
    const auto value = special(file, id.key, id.absent, size);
    if (!value) return tl::unexpected<Failure>(value.error());
    out.*id.field = *value;
  }
  const struct {
    const char* key;
    bool absent;
    bool Vocabulary::* field;
  } flags[] = {
      {"tokenizer.ggml.add_bos_token", add_bos, &Vocabulary::add_bos},
      {"tokenizer.ggml.add_eos_token", false, &Vocabulary::add_eos},
      {"tokenizer.ggml.add_space_prefix", sentencepiece, &Vocabulary::add_space_prefix},
  };
  for (const auto& flag : flags) {
    const auto value = file.boolean(flag.key, flag.absent);
    if (!value) return tl::unexpected<Failure>(value.error());
    out.*flag.field = *value;
  }

  out.end.assign(size, false);
  int32_t turn_end = -1;
  for (size_t i = 0; i < size; ++i) {
    const std::string_view text = out.text[i];
    if (text.empty() || (text[0] != '<' && text[0] != '[' && text[0] != '_' && !text.starts_with("▁<"))) continue;
    if (among(text, kTurnEnds) && turn_end < 0) turn_end = int32_t(i);
    if (among(text, kTurnEnds) || among(text, kOtherEnds)) {
      out.end[i] = true;
      out.kind[i] = TokenKind::Control;
    } else if (among(text, kOtherControls)) {
      out.kind[i] = TokenKind::Control;
    }
  }
  if (out.eot < 0) out.eot = turn_end;
  for (const int32_t id : {out.eos, out.eot}) {
    if (id >= 0) out.end[size_t(id)] = true;
  }
  return out;
}

}  // namespace heed
