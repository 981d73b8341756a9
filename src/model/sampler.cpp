#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace heed {
namespace {

using Candidate = Sampler::Candidate;

bool likelier(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

/// e^((logit − top) / temperature), with +∞ equal to itself.
double weight(float logit, float top, double temperature) {
  return logit == top ? 1.0 : std::exp((double(logit) - double(top)) / temperature);
}

/// Sorts and keeps the fewest likeliest candidates whose weights reach `p` of the total.
void keep_top_p(std::vector<Candidate>& all, float top, double p) {
  double total = 0;
  for (const Candidate& c : all) total += weight(c.logit, top, 1);
  // A heap instead of a sort: a few tokens of a quarter of a million usually suffice.
  const auto less = [](const Candidate& a, const Candidate& b) { return likelier(b, a); };
  std::make_heap(all.begin(), all.end(), less);
  auto end = all.end();
  for (double sum = 0; end != all.begin() && sum < p * total;) {
    std::pop_heap(all.begin(), end, less);
    sum += weight((--end)->logit, top, 1);
  }
  all.erase(all.begin(), end);
  std::reverse(all.begin(), all.end());
}

}  // namespace

Sampler::Sampler(const Sampling& sampling) : sampling_(sampling), random_(sampling.seed) {
  const Sampling& s = sampling_;
  require(s.temperature >= 0 && s.temperature < std::numeric_limits<float>::infinity(), "sampler",
          "temperature is below 0");
  require(s.top_k >= 0, "sampler", "top_k is below 0", "0 keeps all tokens");
  require(s.top_p > 0 && s.top_p <= 1, "sampler", "top_p is not in (0, 1]", "1 keeps all tokens");
  require(s.min_p >= 0 && s.min_p <= 1, "sampler", "min_p is not in [0, 1]", "0 keeps all tokens");
}

std::vector<Candidate> Sampler::candidates(std::span<const float> logits) const {
  std::vector<Candidate> out = filtered(logits);
  std::sort(out.begin(), out.end(), likelier);
  return out;
}

std::vector<Candidate> Sampler::filtered(std::span<const float> logits) const {
  std::vector<Candidate> out;
  out.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > -std::numeric_limits<float>::infinity()) out.push_back({int32_t(i), logits[i], 0});
  }
  require(!out.empty(), "sampler", "every logit is NaN or −∞");
  const Candidate best = *std::min_element(out.begin(), out.end(), likelier);
  const auto keep = size_t(sampling_.temperature == 0 ? 1 : sampling_.top_k);
  if (keep > 0 && keep < out.size()) {
    std::nth_element(out.begin(), out.begin() + std::ptrdiff_t(keep), out.end(), likelier);
    out.resize(keep);
  }
  if (sampling_.top_p < 1) keep_top_p(out, best.logit, sampling_.top_p);
  if (sampling_.min_p > 0) {
    std::erase_if(out, [&](const Candidate& c) { return weight(c.logit, best.logit, 1) < double(sampling_.min_p); });
  }
  // What nth_element and the heap leave has no order of its own; untouched logits are in order of id.
  if (out.size() < logits.size()) std::sort(out.begin(), out.end(), likelier);
  double total = 0;
  for (Candidate& c : out) {
    c.probability = weight(c.logit, best.logit, sampling_.temperature);
    total += c.probability;
  }
  for (Candidate& c : out) c.probability /= total;
  return out;
}

int32_t Sampler::operator()(std::span<const float> logits) {
  if (sampling_.temperature == 0) {
    // NaN compares false and so never wins.
    size_t best = logits.size();
    float top = -std::numeric_limits<float>::infinity();
    for (size_t i = 0; i < logits.size(); ++i) {
      if (logits[i] > top) top = logits[best = i];
    }
    require(best < logits.size(), "sampler", "every logit is NaN or −∞");
    return int32_t(best);
  }
  const std::vector<Candidate> from = filtered(logits);
  double left = random_.uniform();
  for (const Candidate& c : from) {
    left -= c.probability;
    if (left < 0) return c.id;
  }
  return from.back().id;
}

}  // namespace heed
