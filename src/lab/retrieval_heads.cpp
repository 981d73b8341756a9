#include "lab/retrieval_heads.h"

#include <algorithm>
#include <map>
#include <set>

namespace heed {
namespace {

std::set<int32_t> distinct(std::span<const int32_t> tokens) { return {tokens.begin(), tokens.end()}; }

std::span<const int32_t> needle_of(const RetrievalPrompt& p) {
  return std::span(p.tokens).subspan(size_t(p.begin), size_t(p.end - p.begin));
}

}  // namespace

std::pair<int64_t, int64_t> find_needle(std::span<const int32_t> tokens, std::span<const int32_t> needle) {
  const std::set<int32_t> wanted = distinct(needle);
  std::map<int32_t, int64_t> seen;  // wanted tokens in the window
  const size_t length = needle.size();
  for (size_t i = 0; length > 0 && i < tokens.size(); ++i) {
    if (wanted.contains(tokens[i])) ++seen[tokens[i]];
    if (i >= length)
      if (auto left = seen.find(tokens[i - length]); left != seen.end() && --left->second == 0) seen.erase(left);
    if (i + 1 >= length && double(seen.size()) > 0.9 * double(wanted.size()))
      return {int64_t(i + 1 - length), int64_t(i + 1)};
  }
  return {-1, -1};
}

double copy_score(const RetrievalPrompt& p, std::span<const int32_t> looked, std::span<const int32_t> said, bool repeats) {
  std::set<int32_t> copied;
  int64_t times = 0;
  for (size_t i = 0; i < said.size(); ++i) {
    if (looked[i] < p.begin || looked[i] >= p.end || p.tokens[size_t(looked[i])] != said[i]) continue;
    copied.insert(said[i]);
    ++times;
  }
  if (p.begin >= p.end) return 0;
  return repeats ? double(times) / double(p.end - p.begin) : double(copied.size()) / double(distinct(needle_of(p)).size());
}

double recall(const RetrievalPrompt& p, std::span<const int32_t> answer) {
  std::map<int32_t, int64_t> there;
  for (int32_t token : answer) ++there[token];
  int64_t found = 0;
  for (int32_t token : needle_of(p)) found += there[token]-- > 0;
  return p.begin < p.end ? double(found) / double(p.end - p.begin) : 0;
}

RetrievalScores retrieval_heads(std::shared_ptr<const Model> model, std::span<const RetrievalPrompt> prompts,
                                const RetrievalOptions& options, const std::function<void(int64_t, int64_t)>& progress) {
  const ModelInfo& m = model->info();
  RetrievalScores out;
  out.layers = m.layers, out.heads = m.h;
  out.score.assign(size_t(m.layers * m.h), 0.0);
  for (size_t number = 0; number < prompts.size(); ++number) {
    const RetrievalPrompt& p = prompts[number];
    require(p.tokens.size() >= 2 && p.begin >= 0 && p.begin < p.end && p.end <= int64_t(p.tokens.size()), "heads",
            "prompt " + std::to_string(number) + " has no needle inside its tokens");
    SessionOptions how;
    how.backend = options.backend, how.device = options.device;
    Session session(model, how);
    std::vector<std::vector<int32_t>> looked(static_cast<size_t>(m.layers * m.h));
    session.tap([&](LayerView& at) {
      if (!at.decoding()) return;
      RowStats stats;
      stats.argmax = at.queue.scratch.take(Dtype::I32, {at.q.values.size[0]});
      at.run().observe_rows(at.queue, at.q, at.keys(), nullptr, at.mods, stats);
      const Buffer most = at.queue.read_back(stats.argmax);  // one row a head
      for (int head = 0; head < m.h; ++head) looked[size_t(at.layer * m.h + head)].push_back(most->at<int32_t>(head));
    });
    // Decoding starts with the prompt's last token, so that every answer token has a row of its own.
    session.prefill(std::span(p.tokens).first(p.tokens.size() - 1), Session::Logits::None);
    std::vector<int32_t> said;
    int32_t next = p.tokens.back();
    while (int(said.size()) < options.limit && (m.context == 0 || int64_t(p.tokens.size() + said.size()) <= m.context)) {
      const Tensor logits = session.decode(next);
      const float* x = logits.as<float>();
      next = int32_t(std::max_element(x, x + logits.size[1]) - x);
      said.push_back(next);
      if (std::find(options.stop.begin(), options.stop.end(), next) != options.stop.end()) break;
    }
    if (recall(p, said) > options.least_recall) {
      ++out.counted;
      for (size_t i = 0; i < looked.size(); ++i) out.score[i] += copy_score(p, looked[i], said, options.repeats);
    }
    if (progress) progress(int64_t(number) + 1, int64_t(prompts.size()));
  }
  for (double& score : out.score) score = out.counted ? score / out.counted : 0;
  return out;
}

}  // namespace heed
