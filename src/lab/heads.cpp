#include "lab/heads.h"

#include <algorithm>

#include "attention/on_host.h"
#include "base/random.h"

namespace heed {

std::vector<std::vector<HeadView>> head_views(std::shared_ptr<const Model> model, std::span<const int32_t> tokens,
                                              const HeadOptions& options) {
  constexpr int kSinks = 4;
  const ModelInfo& m = model->info();
  const int64_t length = int64_t(tokens.size());
  require(length > kSinks + options.window + options.queries, "heads",
          std::to_string(length) + " tokens are too few to tell near from far",
          "give more than " + std::to_string(kSinks + options.window + options.queries));
  std::vector<std::vector<HeadView>> out(size_t(m.layers), std::vector<HeadView>(size_t(m.h)));
  SessionOptions dense = options.session;
  dense.attention = "dense", dense.chunk = 0;
  Session session(model, dense);
  session.tap([&](LayerView& at) {
    Scratch scope(at.queue.scratch);
    const Ragged rows = at.last_queries(options.queries);
    const int64_t all = at.q.values.size[0];
    RowStats stats;
    stats.entropy = at.queue.scratch.take(Dtype::F32, {all});
    stats.distance = at.queue.scratch.take(Dtype::F32, {all});
    stats.span = at.queue.scratch.take(Dtype::F32, {all, 2});
    const std::vector<int32_t> bounds{0, kSinks, int32_t(length - options.window), int32_t(length)};
    stats.spans = at.queue.upload(bounds).reshape({2, 2});
    at.run().observe_rows(at.queue, rows, at.keys(), nullptr, at.mods, stats);
    OnHost host(at.queue);
    const Ragged seen = host.segments(rows);
    const Tensor span = host(stats.span), distance = host(stats.distance), entropy = host(stats.entropy);
    for (int head = 0; head < m.h; ++head) {
      HeadView& view = out[size_t(at.layer)][size_t(head)];
      const double share = 1.0 / double(seen.length(head));
      for (int64_t row = seen.begin(head); row < seen.end(head); ++row) {
        view.sink += share * span.at<float>(row, 0);
        view.local += share * span.at<float>(row, 1);
        view.distance += share * distance.at<float>(row);
        view.entropy += share * entropy.at<float>(row);
      }
    }
  });
  session.prefill(tokens, Session::Logits::None);
  return out;
}

std::vector<RetrievalPrompt> retrieval_prompts(const Tokenizer& words, std::span<const int32_t> text, int64_t length,
                                               int count, uint64_t seed) {
  static const char* const keepers[] = {"the baker",      "the pilot",    "the gardener",
                                        "the clockmaker", "the ferryman", "the librarian"};
  static const char* const things[] = {"a silver whistle",    "three green lanterns",       "an old brass compass",
                                       "a box of dried figs", "the letters of her brother", "seven painted spoons"};
  Random random(seed + 1);
  std::vector<RetrievalPrompt> out;
  for (int i = 0; i < count; ++i) {
    const std::string who = keepers[random.below(6)], what = things[random.below(6)];
    const std::string place = " hides in the tower at the harbour";
    const std::vector<int32_t> before = words.encode("\nWhat " + who + place + " is"),
                               needle = words.encode(" " + what), behind = words.encode(".\n");
    const int64_t room = length - int64_t(2 * before.size() + needle.size() + behind.size());
    require(room > 1 && room <= int64_t(text.size()), "heads",
            "the text has " + std::to_string(text.size()) + " tokens for prompts of " + std::to_string(length),
            "give a longer text or a smaller -c");
    const int64_t at = std::max<int64_t>(1, room * (2 * i + 1) / (2 * count));
    RetrievalPrompt prompt;
    const auto add = [&](std::span<const int32_t> tokens) {
      prompt.tokens.insert(prompt.tokens.end(), tokens.begin(), tokens.end());
    };
    add(text.first(size_t(at)));
    add(before);
    prompt.begin = int64_t(prompt.tokens.size());
    add(needle);
    prompt.end = int64_t(prompt.tokens.size());
    add(behind);
    add(text.subspan(size_t(at), size_t(room - at)));
    add(before);
    out.push_back(std::move(prompt));
  }
  return out;
}

HeadStudy study_heads(std::shared_ptr<const Model> model, std::span<const int32_t> text, int64_t length, int prompts,
                      uint64_t seed, const SessionOptions& session, const std::function<void(double)>& progress) {
  require(int64_t(text.size()) >= length, "heads",
          "the text has " + std::to_string(text.size()) + " tokens, fewer than -c " + std::to_string(length),
          "give a longer text or a smaller -c");
  HeadStudy out;
  HeadOptions options;
  options.session = session;
  out.views = head_views(model, text.first(size_t(length)), options);
  if (prompts == 0) return out;
  const Tokenizer* words = model->tokenizer();
  require(words != nullptr, "heads", "this file has no tokenizer, and needles are text", "--prompts 0 does without");
  RetrievalOptions retrieval;
  retrieval.limit = 16;
  retrieval.backend = session.backend, retrieval.device = session.device;
  retrieval.stop = words->encode(".");
  for (int32_t token : words->encode("\n")) retrieval.stop.push_back(token);
  const auto needles = retrieval_prompts(*words, text, length, prompts, seed);
  out.retrieval = retrieval_heads(model, needles, retrieval, [&](int64_t done, int64_t all) {
    if (progress) progress(double(done) / double(all));
  });
  return out;
}

}  // namespace heed
