// A question about a context, put to a session, and its greedy answer.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "model/session.h"

namespace heed {

/// What a mechanism knows when it plans and cuts. Scores of the two do not compare.
enum class Query : uint8_t {
  Aware,  // context and question are one prompt: it sees what is asked
  Blind,  // the context is the whole prompt; the question follows as a chunk, when the context has been cut
};
const char* name(Query query);

/// Feeds an empty session and returns the logits of the answer's first token, F32 [1, vocabulary]. The question's last
/// token is decoded, so that the whole answer is read the way a mechanism reads while decoding. `question` may not be
/// empty. Throws Error(Interrupted) when stopped.
Tensor ask(Session& session, std::span<const int32_t> context, std::span<const int32_t> question, Query query);

struct Answer {
  std::string text;  // UTF-8; without the token that ended it
  std::vector<int32_t> tokens;
};

/// The likeliest tokens from `logits` on, at most `limit`; ends at an end token and, with `one_line`, at the first line
/// break that has a letter or a digit before it. Throws Error(Interrupted) when stopped.
Answer answer(Session& session, Tensor logits, int limit, bool one_line);

}  // namespace heed
