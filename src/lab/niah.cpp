#include "lab/niah.h"

#include <algorithm>

#include "base/random.h"
#include "lab/ask.h"
#include "lab/score.h"

namespace heed {

NiahScore niah(std::shared_ptr<const Model> model, std::span<const int32_t> haystack, const NiahOptions& options) {
  const Tokenizer* words = model->tokenizer();
  if (!words)
    throw Error(Code::Unsupported, "niah", "the model has no vocabulary", "use a GGUF file with its tokenizer");
  Random random(options.seed + 1);
  NiahScore score;
  int64_t values = 0, hits = 0;
  double loss = 0;
  for (int depth = 0; depth < options.depths; ++depth) {
    const std::string number = std::to_string(10000 + random.below(90000));
    const std::vector<int32_t> needle = words->encode("\nThe secret number of the harbour is " + number + ".\n");
    const std::vector<int32_t> question = words->encode("\nThe secret number of the harbour is");
    const std::vector<int32_t> answer = words->encode(" " + number);
    const int64_t room = int64_t(haystack.size()) - int64_t(needle.size() + question.size() + answer.size());
    require(room > 0, "niah", "a prompt of " + std::to_string(haystack.size()) + " tokens has no room for the needle",
            "give a larger -c");

    // A needle starts a line of its own behind the token where it is put, never before BOS.
    const int64_t at = std::max<int64_t>(1, options.depths > 1 ? room * depth / (options.depths - 1) : room / 2);
    std::vector<int32_t> context(haystack.begin(), haystack.begin() + at);
    context.insert(context.end(), needle.begin(), needle.end());
    context.insert(context.end(), haystack.begin() + at, haystack.begin() + room);

    Session session(model, options.session);
    Tensor logits = ask(session, context, question, options.question_first ? Query::Aware : Query::Blind);
    bool exact = true;
    for (int32_t token : answer) {
      if (interrupted()) throw Error(Code::Interrupted, "niah", "stopped");
      const auto row = logits.select(0, 0).span<const float>();
      const bool hit = argmax(row) == token;
      exact = exact && hit;
      hits += hit, ++values;
      loss += nll(row, token);
      logits = session.decode(token);
    }
    score.accuracy += exact;
    ++score.runs;
  }
  score.accuracy /= std::max(1, score.runs);
  score.recall = double(hits) / double(std::max<int64_t>(1, values));
  score.nll = loss / double(std::max<int64_t>(1, values));
  return score;
}

}  // namespace heed
