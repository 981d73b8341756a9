#include <cmath>
#include <limits>

#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Ada-KV (Feng et al., 2024): the KV heads of a layer share one pool of entries, and the best scores of the pool win.
// Forced entries stay outside the pool. A head is safe from starving by the authors' mix with an even share, or by the
// library's floor (kvpress): its own best entries count as forced, inside its share.
struct AdaKV final : KeepWrapper {
  double alpha;
  bool port;

  static std::vector<ParamInfo> params() {
    using M = AdaKV;
    return {
        param(&M::alpha, "alpha", 0.2, 0, 1, "share of a head's budget that it gets in any case; 1: no division"),
        param(&M::port, "port", false, "the library's floor in place of the authors' mix"),
    };
  }

  Tensor allocate(const Allocation& a) const override {
    const Tensor even = inner->allocate(a);
    return port ? floored(a, even) : mixed(a, even);
  }

  // B_i = round((1 − α) c_i + ⌊α B⌋), c_i what falls to head i of the layer's best.
  Tensor mixed(const Allocation& a, const Tensor& even) const {
    const Tensor counts = divide(a, a.scores, even, Pool::Layer);
    const Scratch scratch(a.queue.scratch);
    for (int64_t l = 0; l < counts.size[0]; ++l) {
      const std::vector<int64_t> forced = certain(a, a.scores[size_t(l)]);
      for (int64_t s = 0; s < counts.size[1]; ++s) {
        if (even.at<int32_t>(l, s) >= a.scores[size_t(l)].length(s)) continue;  // room for all: nothing to divide
        const int64_t f = std::min<int64_t>(forced[size_t(s)], even.at<int32_t>(l, s));
        const int64_t share = std::max<int64_t>(0, counts.at<int32_t>(l, s) - f), budget = even.at<int32_t>(l, s) - f;
        counts.at<int32_t>(l, s) = int32_t(f + std::llround((1 - alpha) * double(share) + std::floor(alpha * double(budget))));
      }
    }
    return counts;
  }

  Tensor floored(const Allocation& a, const Tensor& even) const {
    std::vector<Ragged> raised;
    for (size_t l = 0; l < a.scores.size(); ++l) {
      const Ragged& scores = a.scores[l];
      Ragged copied = scores;
      copied.values = a.queue.scratch.take(Dtype::F32, {scores.values.size[0]});
      copy(scores.values, copied.values);
      Select own;
      own.count = a.queue.scratch.take(Dtype::I32, {scores.segments()});
      int64_t capacity = 1;
      for (int64_t s = 0; s < scores.segments(); ++s) {
        own.count.at<int32_t>(s) = std::max(1, int(alpha * even.at<int32_t>(int64_t(l), s)));
        capacity = std::max<int64_t>(capacity, own.count.at<int32_t>(s));
      }
      const Tensor index = a.queue.scratch.take(Dtype::I32, {scores.segments() * capacity});
      const Tensor count = a.queue.scratch.take(Dtype::I32, {scores.segments()});
      a.queue.run->select(a.queue, scores, own, capacity, index, count);
      for (int64_t s = 0; s < scores.segments(); ++s)
        for (int64_t i = 0; i < count.at<int32_t>(s); ++i)
          copied.values.at<float>(scores.begin(s) + index.at<int32_t>(s * capacity + i)) = std::numeric_limits<float>::infinity();
      raised.push_back(copied);
    }
    return divide(a, raised, even, Pool::Layer);
  }

  /// Entries with score +∞ in every segment.
  static std::vector<int64_t> certain(const Allocation& a, const Ragged& scores) {
    const int64_t all = scores.segments();
    int64_t capacity = 1;
    for (int64_t s = 0; s < all; ++s) capacity = std::max(capacity, scores.length(s));
    Select forced;
    forced.by = Select::By::Threshold;
    forced.p = std::numeric_limits<float>::infinity();
    const Tensor index = a.queue.scratch.take(Dtype::I32, {all * capacity}), count = a.queue.scratch.take(Dtype::I32, {all});
    a.queue.run->select(a.queue, scores, forced, capacity, index, count);
    return {count.as<int32_t>(), count.as<int32_t>() + all};
  }
};

}  // namespace

Entry adakv() {
  Entry e = entry<AdaKV>("adakv", "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation", "Feng et al., 2024, arXiv 2407.11550", 2024, uint8_t(Role::Keep));
  e.equation = "B_i = round((1 − α) c_i + ⌊α B⌋), c_i = how many of the layer's g·B best scores lie in head i";
  e.needs = "a keep policy inside";
  e.identity = "adakv(snapkv(budget=1.0))";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
