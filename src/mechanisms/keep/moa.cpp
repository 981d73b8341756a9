#include <cmath>

#include "attention/number_list.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// MoA (Fu et al., 2024), what it keeps: every KV head holds the sinks and a band of its own, α + β N of the latest entries
// for a prompt of N, in whole blocks, at their true positions. The plan is given: finding it takes gradients. A cut comes
// behind every part of a prompt and every token, so a prompt fed at once is read densely.
struct Moa final : KeepPolicy {
  NumberList alpha, beta;
  int sinks, block;

  static std::vector<ParamInfo> params() {
    using M = Moa;
    return {
        param(&M::alpha, "alpha", "list", "", "[x,…] ≥ 0",
              "entries of each KV head's band, layer by layer, or one for all"),
        param(&M::beta, "beta", "list", "[1]", "[x,…] ≥ 0",
              "share of the prompt that comes to it, for each KV head of every layer, or one for all"),
        param(&M::sinks, "sinks", 64, 0, 1 << 20, "first entries that always stay"),
        param(&M::block, "block", 64, 1, 1 << 20, "bands are rounded up to so many entries"),
    };
  }
  const When& timing() const override {
    static const When each{When::At::Every, 1};
    return each;
  }

  static double of_head(const NumberList& list, const char* name, const ModelInfo& m, int64_t head) {
    const size_t heads = size_t(m.layers) * size_t(m.g), given = list.values.size();
    if (given > 1 && given != heads)
      throw Error(Code::Invalid, "moa",
                  std::string(name) + " has " + std::to_string(given) + " numbers, but the model has " +
                      std::to_string(heads) + " KV heads",
                  "give one for each, layer by layer, or one for all");
    return given == 0 ? 0 : list.values[given == 1 ? 0 : size_t(head)];
  }

  Ragged score(LayerView& at) const override { return by_age(at, sinks); }
  bool unbounded() const override { return true; }

  Tensor allocate(const Allocation& a) const override {
    const int64_t layers = int64_t(a.scores.size()), all = a.scores[0].segments(), g = a.model.g;
    Buffer host(Dtype::I32, {layers, all});
    for (int64_t l = 0; l < layers; ++l)
      for (int64_t s = 0; s < all; ++s) {
        const int64_t head = (a.first_layer + l) * g + s % g;
        const double band = of_head(alpha, "alpha", a.model, head) +
                            of_head(beta, "beta", a.model, head) * double(a.prompt[size_t(s / g)]);
        const double blocks = std::max(1.0, std::ceil(band / block - 1e-9));
        host->at<int32_t>(l, s) = int32_t(std::min<double>(1 << 30, sinks + blocks * block));
      }
    return a.queue.upload(host);
  }
};

}  // namespace

Entry moa() {
  Entry e = entry<Moa>("moa", "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
                       "Fu et al., 2024, arXiv 2406.14909", 2024, uint8_t(Role::Keep));
  e.equation = "head h keeps the first s and the last ⌈(α_h + β_h N) / b⌉ b entries";
  e.needs = "a plan: a band for each KV head";
  e.identity = "moa(alpha=[1000000000])";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
