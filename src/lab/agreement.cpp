#include "lab/agreement.h"

#include <algorithm>

#include "lab/score.h"

namespace heed {

Agreement agreement(std::span<const int32_t> dense, std::span<const int32_t> other) {
  require(dense.size() == other.size(), "agreement",
          "continuations of " + std::to_string(dense.size()) + " and " + std::to_string(other.size()) + " tokens");
  const auto differ = std::mismatch(dense.begin(), dense.end(), other.begin());
  Agreement out;
  out.tokens = int64_t(dense.size()), out.first_difference = differ.first - dense.begin();
  if (differ.first == dense.end()) return out;
  out.before = double(out.first_difference) / double(out.tokens);
  int64_t equal = 0;
  for (int64_t i = out.first_difference; i < out.tokens; ++i) equal += dense[size_t(i)] == other[size_t(i)];
  out.after = double(equal) / double(out.tokens - out.first_difference);
  return out;
}

Agreement generation_agreement(std::shared_ptr<const Model> model, const SessionOptions& options,
                               std::span<const int32_t> prompt, int64_t tokens) {
  const auto continued = [&](const std::string& attention) {
    SessionOptions how = options;
    how.attention = attention;
    Session session(model, how);
    session.check_reach(int64_t(prompt.size()) + tokens - 1);  // the last one is not fed
    std::vector<int32_t> out;
    Tensor logits = session.prefill(prompt);
    while (true) {
      if (interrupted()) throw Error(Code::Interrupted, "agreement", "stopped");
      out.push_back(argmax(logits.select(0, 0).span<const float>()));
      if (int64_t(out.size()) == tokens) return out;
      logits = session.decode(out.back());
    }
  };
  return agreement(continued("dense"), continued(options.attention));
}

}  // namespace heed
