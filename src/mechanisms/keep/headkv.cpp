#include <cmath>
#include <numeric>

#include "attention/number_list.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// HeadKV (Fu et al., 2024): heads that retrieve get more of one pool over all layers. The inner window lies outside the
// pool; of the rest of a head's budget b, ⌊b / β⌋ goes to the pool and is shared in proportion to given head scores. The
// authors keep a set for each query head; here the scores of a group are added up, one set a KV head.
struct HeadKV final : KeepWrapper {
  NumberList scores;
  double beta, temperature;
  int window;

  static std::vector<ParamInfo> params() {
    using M = HeadKV;
    return {
        param(&M::scores, "scores", "list", "", "[x,…] ≥ 0",
              "a score for each KV head (or query head) of every layer, layer by layer; all alike if empty"),
        param(&M::beta, "beta", 1.2, 1, 1e9, "1 / beta of a budget is shared by score"),
        param(&M::temperature, "temp", 1, 0, 100, "power of a head's share of all scores"),
        param(&M::window, "window", 32, 0, 4096, "entries that the inner policy keeps in any case"),
    };
  }
  std::string check() const override {
    if (!scores.values.empty() && std::accumulate(scores.values.begin(), scores.values.end(), 0.0) <= 0)
      return "scores add up to 0";
    const std::string below = too_small(inner->kept(), window, "window");
    return below.empty() ? inner->check() : below;
  }

  /// What each KV head's share of the pool is.
  std::vector<double> shares(const ModelInfo& model) const {
    const size_t heads = size_t(model.layers) * size_t(model.g), given = scores.values.size(),
                 group = size_t(model.group());
    if (given != 0 && given != heads && given != heads * group)
      throw Error(Code::Invalid, "headkv",
                  "scores are " + std::to_string(given) + ", but the model has " + std::to_string(heads) +
                      " KV heads and " + std::to_string(heads * group) + " query heads",
                  "give one for each, layer by layer");
    std::vector<double> out(heads, given == 0 ? 1.0 : 0.0);
    for (size_t i = 0; i < given; ++i) out[given == heads ? i : i / group] += scores.values[i];
    for (const double power : {1.0, temperature}) {
      for (double& x : out) x = std::pow(x, power);
      const double sum = std::accumulate(out.begin(), out.end(), 0.0);
      for (double& x : out) x /= sum;
    }
    return out;
  }

  bool unbounded() const override { return true; }
  Tensor allocate(const Allocation& a) const override {
    const std::vector<double> share = shares(a.model);
    const int64_t layers = int64_t(a.scores.size()), all = a.scores[0].segments(), g = a.model.g;
    Buffer host(Dtype::I32, {layers, all});
    for (int64_t l = 0; l < layers; ++l)
      for (int64_t s = 0; s < all; ++s) {
        const double b = double(std::max<int64_t>(0, a.budget.entries(a.prompt[size_t(s / g)]) - window)),
                     shared = std::floor(b / beta);
        const double own = share[size_t((a.first_layer + l) * g + s % g)] * shared * double(share.size());
        host->at<int32_t>(l, s) = int32_t(std::min<double>(1 << 30, std::nearbyint(own + b - shared) + window));
      }
    return a.queue.upload(host);
  }
};

}  // namespace

Entry headkv() {
  Entry e = entry<HeadKV>(
      "headkv", "Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval and Reasoning",
      "Fu et al., 2024, arXiv 2410.19258", 2024, uint8_t(Role::Keep));
  e.equation = "n_h = round(S_h ⌊b / β⌋ N g + b − ⌊b / β⌋) + w, b = B − w, S = head scores that add up to 1";
  e.needs = "a keep policy inside, and head scores (`heed heads`)";
  e.identity = "headkv(snapkv(budget=1.0))";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
