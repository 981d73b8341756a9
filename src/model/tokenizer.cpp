#include "model/tokenizer.h"

#include <optional>

#include "model/tokenizer_bpe.h"
#include "model/tokenizer_special.h"
#include "model/tokenizer_spm.h"
#include "model/tokenizer_vocabulary.h"

namespace heed {
namespace {

std::string with_spaces(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const bool mark = text.starts_with(kSpaceMark);
    out += mark ? ' ' : text[0];
    text.remove_prefix(mark ? kSpaceMark.size() : 1);
  }
  return out;
}

/// What a token puts into the text.
std::string piece_of(const Vocabulary& vocabulary, size_t id, bool sentencepiece) {
  const std::string text(vocabulary.text[id]);
  switch (vocabulary.kind[id]) {
    case TokenKind::Control:
    case TokenKind::Unknown:
    case TokenKind::User: return text;
    case TokenKind::Byte:
      if (const int byte = Spm::byte_of(text); byte >= 0) return std::string(1, char(byte));
      break;
    case TokenKind::Undefined:
    case TokenKind::Normal:
    case TokenKind::Unused: break;
  }
  std::string bytes;
  if (sentencepiece) return with_spaces(text);
  return Bpe::bytes_of(text, bytes) ? bytes : text;
}

}  // namespace

struct Tokenizer::State {
  explicit State(Vocabulary read) : vocabulary(std::move(read)) {}

  Vocabulary vocabulary;
  Strings pieces;
  SpecialTokens user{vocabulary, false}, all{vocabulary, true};
  TokenMap by_text;
  std::optional<Bpe> bpe;
  std::optional<Spm> spm;
  std::string chat_template;
};

Result<Tokenizer> Tokenizer::from(const Gguf& file) {
  const auto model = file.string("tokenizer.ggml.model");
  if (!model) return tl::unexpected<Failure>(model.error());
  const bool sentencepiece = *model == "llama";
  if (!sentencepiece && *model != "gpt2") {
    return fail(Code::Unsupported, file.name(), "tokenizer '" + std::string(model->substr(0, 80)) + "' is not known",
                "known are gpt2 (byte-level BPE) and llama (SentencePiece)");
  }
  std::optional<Splitter> splitter;
  if (!sentencepiece) {
    auto named = file.string("tokenizer.ggml.pre", "default").and_then(Splitter::named);
    if (!named) return tl::unexpected<Failure>(named.error());
    splitter = std::move(*named);
  }
  auto vocabulary = Vocabulary::read(file, sentencepiece, sentencepiece || splitter->add_bos());
  if (!vocabulary) return tl::unexpected<Failure>(vocabulary.error());
  const auto chat_template = file.string("tokenizer.chat_template", "");
  if (!chat_template) return tl::unexpected<Failure>(chat_template.error());

  auto state = std::make_shared<State>(std::move(*vocabulary));
  state->chat_template = *chat_template;
  state->by_text.reserve(state->vocabulary.size());
  for (size_t i = 0; i < state->vocabulary.size(); ++i) {
    state->pieces.add(piece_of(state->vocabulary, i, sentencepiece));
    state->by_text.try_emplace(state->vocabulary.text[i], int32_t(i));
  }
  if (sentencepiece) {
    state->spm.emplace(state->vocabulary);
  } else {
    auto bpe = Bpe::from(file, state->vocabulary, std::move(*splitter));
    if (!bpe) return tl::unexpected<Failure>(bpe.error());
    state->bpe = std::move(*bpe);
  }
  Tokenizer out;
  out.state_ = std::move(state);
  return out;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, Options options) const {
  std::vector<int32_t> out;
  const Vocabulary& vocabulary = state_->vocabulary;
  if (options.bos && vocabulary.bos >= 0) out.push_back(vocabulary.bos);
  bool after_special = true;  // the beginning counts as such
  for (const auto& fragment : (options.special ? state_->all : state_->user).split(text)) {
    if (fragment.token >= 0) {
      out.push_back(fragment.token);
    } else if (state_->bpe) {
      state_->bpe->encode(fragment.text, out);
    } else {
      state_->spm->encode(fragment.text, vocabulary.add_space_prefix && after_special, out);
    }
    after_special = fragment.token >= 0;
  }
  return out;
}

std::string_view Tokenizer::piece(int32_t id) const {
  return id >= 0 && int64_t(id) < size() ? state_->pieces[size_t(id)] : std::string_view();
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool special) const {
  std::string out;
  // Encoding puts a space before text that begins or follows a literal token; it is no part of the text.
  bool drop_space = state_->vocabulary.add_space_prefix;
  for (const int32_t id : ids) {
    if (id < 0 || id >= size()) continue;
    const TokenKind kind = state_->vocabulary.kind[size_t(id)];
    const bool named = kind == TokenKind::Control || kind == TokenKind::Unknown;
    const bool literal = named || kind == TokenKind::User;
    std::string_view text = piece(id);
    if (drop_space && !literal && text.starts_with(' ')) text.remove_prefix(1);
    if (special || !named) out += text;
    drop_space = literal && state_->vocabulary.add_space_prefix;
  }
  return out;
}

int64_t Tokenizer::size() const { return int64_t(state_->vocabulary.size()); }
int32_t Tokenizer::bos() const { return state_->vocabulary.bos; }
int32_t Tokenizer::eos() const { return state_->vocabulary.eos; }
int32_t Tokenizer::eot() const { return state_->vocabulary.eot; }
int32_t Tokenizer::unknown() const { return state_->vocabulary.unknown; }
bool Tokenizer::add_bos() const { return state_->vocabulary.add_bos; }
bool Tokenizer::add_eos() const { return state_->vocabulary.add_eos; }
bool Tokenizer::is_end(int32_t id) const {
  return id >= 0 && int64_t(id) < size() && state_->vocabulary.end[size_t(id)];
}
bool Tokenizer::is_control(int32_t id) const {
  return id >= 0 && int64_t(id) < size() && state_->vocabulary.kind[size_t(id)] == TokenKind::Control;
}

int32_t Tokenizer::find(std::string_view text) const {
  const auto found = state_->by_text.find(text);
  return found == state_->by_text.end() ? -1 : found->second;
}

const std::string& Tokenizer::chat_template() const { return state_->chat_template; }

}  // namespace heed
