// Code books of KVQuant, learnt from numbers.
#pragma once
#include <array>
#include <span>
#include <vector>

namespace heed::mechanisms {

/// Where numbers lie between the ends of their groups' ranges, outliers left out, as pages measure it
/// (PageType::Codes::Sparse): a histogram over −1 … 1.
class RangeHistogram {
 public:
  /// weights: what each number counts; empty: 1.
  void add(std::span<const float> group, int outliers, std::span<const float> weights = {});
  /// The 2^bits points of least squared error, ascending; evenly spread when nothing was added.
  std::array<float, 16> points(int bits) const;

 private:
  std::vector<double> cells_ = std::vector<double>(4096, 0.0);
  double count_ = 0;
};

}  // namespace heed::mechanisms
