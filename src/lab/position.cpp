#include "lab/position.h"

#include <algorithm>

#include "lab/score.h"

namespace heed {

double PositionBucket::nll() const { return mean(losses); }

std::vector<PositionBucket> loss_by_position(std::shared_ptr<const Model> model, const SessionOptions& options,
                                             std::span<const int32_t> tokens, int64_t context, int64_t chunks,
                                             int buckets, const std::function<void(double)>& done) {
  const int64_t there = int64_t(tokens.size()) / std::max<int64_t>(1, context);
  require(buckets >= 1 && context >= 2 * buckets, "-c",
          std::to_string(context) + " tokens are too few for " + std::to_string(buckets) + " parts");
  require(there >= 1, "text",
          "it has " + std::to_string(tokens.size()) + " tokens, fewer than one chunk of " + std::to_string(context),
          "give a longer text or a smaller -c");
  chunks = chunks < 0 ? there : std::min(chunks, there);
  const Tokenizer* words = model->tokenizer();
  const bool bos = words && words->add_bos() && words->bos() >= 0;
  std::vector<PositionBucket> out(static_cast<size_t>(buckets));
  for (int b = 0; b < buckets; ++b)
    out[size_t(b)].first = b * context / buckets, out[size_t(b)].end = (b + 1) * context / buckets;
  for (int64_t chunk = 0; chunk < chunks && !interrupted(); ++chunk) {
    const auto text = tokens.subspan(size_t(chunk * context), size_t(context));
    std::vector<int32_t> fed(text.begin(), text.end());
    if (bos) fed[0] = words->bos();
    std::vector<double> losses(size_t(context), 0.0);
    Session session(model, options);
    try {
      session.prefill({std::span<const int32_t>(fed)}, Session::Logits::None, [&](int64_t first, Tensor logits) {
        for (int64_t row = 0; row < logits.size[0]; ++row)
          if (first + row + 1 < context)
            losses[size_t(first + row + 1)] = nll(logits.select(0, row).span<const float>(), text[size_t(first + row + 1)]);
      });
    } catch (const Error& e) {
      if (e.failure().code == Code::Interrupted) break;
      throw;
    }
    for (PositionBucket& b : out)
      for (int64_t i = std::max<int64_t>(1, b.first); i < b.end; ++i) b.losses.push_back(losses[size_t(i)]);
    if (done) done(double(chunk + 1) / double(chunks));
  }
  return out;
}

}  // namespace heed
