#include "mechanisms/keep/kvquant.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>

#include "attention/array_file.h"
#include "attention/clusters.h"
#include "base/random.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/quantised_past.h"

namespace heed::mechanisms {

void RangeHistogram::add(std::span<const float> group, int outliers, std::span<const float> weights) {
  double mean = 0;
  for (float x : group) mean += double(x) / double(group.size());
  std::vector<std::pair<float, float>> left;  // numbers and weights
  for (size_t i = 0; i < group.size(); ++i) left.emplace_back(group[i], weights.empty() ? 1.0f : weights[i]);
  std::stable_sort(left.begin(), left.end(), [&](const auto& a, const auto& b) {
    return std::abs(double(a.first) - mean) < std::abs(double(b.first) - mean);
  });
  left.resize(left.size() - std::min(left.size(), size_t(outliers)));
  if (left.empty()) return;
  const auto [low, high] = std::minmax_element(left.begin(), left.end());
  const double middle = (double(low->first) + double(high->first)) / 2,
               half = (double(high->first) - double(low->first)) / 2;
  for (const auto& [x, weight] : left) {
    const double at = half > 0 ? (double(x) - middle) / half : 0;
    cells_[size_t(std::clamp((at + 1) / 2 * double(cells_.size()), 0.0, double(cells_.size()) - 1))] += double(weight);
    count_ += double(weight);
  }
}

std::array<float, 16> RangeHistogram::points(int bits) const {
  const auto density = [&](double t) {
    return count_ > 0 ? cells_[size_t(std::clamp((t + 1) / 2 * double(cells_.size()), 0.0, double(cells_.size()) - 1))] : 1;
  };
  const std::vector<double> found = lloyd_max(1 << bits, -1, 1, density);
  std::array<float, 16> out = {};
  std::copy(found.begin(), found.end(), out.begin());
  return out;
}

namespace {

/// Of groups of normal numbers. Needs are asked for more than once, so what was found is remembered.
std::array<float, 16> points_of_normal(int bits, int group, int outliers) {
  static std::mutex busy;
  static std::map<std::array<int, 3>, std::array<float, 16>> known;
  const std::lock_guard lock(busy);
  const auto [found, is_new] = known.try_emplace({bits, group, outliers});
  if (!is_new) return found->second;
  Random random(1);
  RangeHistogram normal;
  std::vector<float> numbers(static_cast<size_t>(group));
  for (int i = 0; i < (1 << 16) / group; ++i) {
    for (float& x : numbers) x = float(random.normal());
    normal.add(numbers, outliers);
  }
  return found->second = normal.points(bits);
}

// KVQuant (Hooper et al., 2024): keys before rotary embedding and by channel, values by entry; a code book that is not
// uniform; few outliers exact, beside the codes. Ranges and outliers of keys are those of the 64 entries of a page (the
// authors set them beforehand, for a channel of a whole text), so that only code books are learnt: `heed calibrate` makes
// one for the keys and one for the values of each layer. The authors weigh every number by the squared gradient of the
// loss, as `heed calibrate --gradients` does. Without a file the books are those
// of normal numbers. The mean and deviation that the authors restore at 2 bits are not.
struct Kvquant final : QuantisedPast {
  int outliers;
  ArrayFile book;

  static std::vector<ParamInfo> params() {
    using M = Kvquant;
    return {
        param(&M::bits, "bits", 3, 2, 4, "bits a number"),
        param(&M::outliers, "outliers", 1, 0, 16, "of 64 numbers, those that stay exact"),
        first_param(1),
        residual_param(0),
        array_file_param(&M::book, "book", "keys and values [layers, 2^bits]: points between −1 and 1"),
    };
  }

  PageType side(PageType::Axis axis, int group, int apart) const {
    PageType out;
    out.kind = kind(bits), out.axis = axis, out.codes = PageType::Codes::Sparse;
    out.group = group, out.outliers = uint8_t(apart);
    out.points = points_of_normal(bits, group, apart);
    return out;
  }

  Needs needs(const ModelInfo& m) const override {
    Needs n;
    n.quantised = n.plain_keys = true;
    const int group = std::clamp(m.d_v, 1, 256);
    n.quantised_k = side(PageType::Axis::Channel, kPage, outliers);
    n.quantised_v = side(PageType::Axis::Token, group, (outliers * group + kPage - 1) / kPage);
    if (!book) return n;
    const Buffer &k = book.array("keys", {m.layers, 1 << bits}), &v = book.array("values", {m.layers, 1 << bits});
    for (int64_t l = 0; l < m.layers; ++l) {
      PagePoints& points = n.points.emplace_back();
      for (int64_t i = 0; i < 1 << bits; ++i)
        points.k[size_t(i)] = k->at<float>(l, i), points.v[size_t(i)] = v->at<float>(l, i);
    }
    return n;
  }
  std::unique_ptr<State> open(const ModelInfo& m) const override {
    if (book) book.check_model(m);
    return nullptr;
  }
};

}  // namespace

Entry kvquant() {
  Entry e = entry<Kvquant>("kvquant",
                           "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization",
                           "Hooper et al., 2024, arXiv 2401.18079", 2024, uint8_t(Role::Keep));
  e.equation =
      "of 64 entries of a channel of plain keys, or of an entry's value: the farthest from the mean exact; "
      "of the others x ≈ (hi + lo)/2 + p (hi − lo)/2, p the nearest of 2^b points";
  e.needs =
      "keys before rotation; a second layout of pages; "
      "code books that are learnt (`heed calibrate`) or of normal numbers";
  e.identity = "kvquant(residual=1000000000)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
