#include "lab/perplexity.h"

#include <algorithm>
#include <cmath>

#include "lab/score.h"

namespace heed {

double Perplexity::ppl() const { return std::exp(nll()); }

double Perplexity::error() const {
  if (tokens < 2) return 0;
  const double variance = squares / double(tokens) - nll() * nll();
  return variance > 0 ? std::sqrt(variance / double(tokens - 1)) * ppl() : 0;
}

Perplexity perplexity(std::shared_ptr<const Model> model, const SessionOptions& options,
                      std::span<const int32_t> tokens, int64_t context, int64_t chunks, Perplexity total,
                      const std::function<void(const Perplexity&, double)>& done) {
  require(context >= 4, "-c", "a chunk needs at least 4 tokens");
  const int64_t there = int64_t(tokens.size()) / context;
  require(there >= 1, "text",
          "it has " + std::to_string(tokens.size()) + " tokens, fewer than one chunk of " + std::to_string(context),
          "give a longer text or a smaller -c");
  chunks = chunks < 0 ? there : std::min(chunks, there);
  const Tokenizer* words = model->tokenizer();
  const bool bos = words && words->add_bos() && words->bos() >= 0;
  while (total.chunks < chunks && !interrupted()) {
    const auto text = tokens.subspan(size_t(total.chunks * context), size_t(context));
    std::vector<int32_t> fed(text.begin(), text.end());
    if (bos) fed[0] = words->bos();
    Perplexity with = total;
    Session session(model, options);
    try {
      session.prefill({std::span<const int32_t>(fed)}, Session::Logits::None, [&](int64_t first, Tensor logits) {
        for (int64_t row = 0; row < logits.size[0]; ++row) {
          const int64_t at = first + row;
          if (at < context / 2 || at + 1 >= context) continue;
          const double loss = nll(logits.select(0, row).span<const float>(), text[size_t(at + 1)]);
          with.sum += loss, with.squares += loss * loss, ++with.tokens;
        }
      });
    } catch (const Error& e) {
      if (e.failure().code == Code::Interrupted) break;
      throw;
    }
    ++with.chunks;
    total = with;
    if (done) done(total, double(total.chunks) / double(chunks));
  }
  return total;
}

}  // namespace heed
