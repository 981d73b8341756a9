#include "lab/ask.h"

#include <algorithm>
#include <cctype>

#include "base/utf8.h"
#include "lab/score.h"

namespace heed {

const char* name(Query query) { return query == Query::Aware ? "aware" : "blind"; }

Tensor ask(Session& session, std::span<const int32_t> context, std::span<const int32_t> question, Query query) {
  require(!question.empty() && !context.empty(), "ask", "context or question is empty");
  const std::span<const int32_t> body = question.first(question.size() - 1);
  if (query == Query::Aware) {
    std::vector<int32_t> whole(context.begin(), context.end());
    whole.insert(whole.end(), body.begin(), body.end());
    session.prefill(whole, Session::Logits::None);
  } else {
    session.prefill(context, Session::Logits::None);
    if (!body.empty()) session.prefill(body, Session::Logits::None);
  }
  if (interrupted()) throw Error(Code::Interrupted, "eval", "stopped");
  return session.decode(question.back());
}

Answer answer(Session& session, Tensor logits, int limit, bool one_line) {
  const Tokenizer* words = session.model().tokenizer();
  require(words, "answer", "the model has no vocabulary");
  Answer out;
  std::string bytes;
  const auto spoken = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0; };
  for (int i = 0; i < limit; ++i) {
    if (interrupted()) throw Error(Code::Interrupted, "eval", "stopped");
    const int32_t token = argmax(logits.select(0, 0).span<const float>());
    if (words->is_end(token)) break;
    const std::string_view piece = words->piece(token);
    const size_t line = piece.find('\n');
    if (one_line && line != std::string_view::npos) {
      const std::string before = bytes + std::string(piece.substr(0, line));
      if (std::any_of(before.begin(), before.end(), spoken)) {
        bytes = before;
        break;
      }
    }
    out.tokens.push_back(token);
    bytes += piece;
    if (i + 1 < limit) logits = session.decode(token);
  }
  out.text = valid_utf8(bytes);
  return out;
}

}  // namespace heed
