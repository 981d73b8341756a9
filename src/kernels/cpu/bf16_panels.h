// Keys and values of a call in the layouts of bf16_products.h.
#pragma once
#include <vector>

#include "base/queue.h"
#include "kernels/cpu/bf16_products.h"

namespace heed::HEED_ISA {

#if defined(HEED_BF16_DOT)

/// Units of all segments of k and v. Values are transposed once a call, which costs what one row of queries does for each
/// 16 channels; keys are read where they lie unless their rows miss 64-byte lines, and then copied once.
class Bf16Panels {
 public:
  /// v null: no values. With `made` false nothing is prepared: only gather() may be used.
  Bf16Panels(Queue& queue, const Ragged& k, const Ragged* v, bool made);

  int steps() const { return steps_; }                  // of 32 channels of q and k
  int channel_tiles() const { return channel_tiles_; }  // of 16 channels of v
  UnitKeys keys(int64_t segment, int64_t unit) const;
  const bf16* values(int64_t segment, int64_t unit) const {
    return v_units_ + (v_first_[size_t(segment)].units + unit) * value_numbers();
  }
  int64_t key_numbers() const { return int64_t(steps_) * 32 * kUnit; }
  int64_t value_numbers() const { return int64_t(channel_tiles_) * 16 * kUnit; }
  /// `count` ≤ 32 chosen keys (numbers within their segments) as one unit; the rest of it is zeros.
  void gather(int64_t k_segment, int64_t v_segment, const int32_t* chosen, int count, bf16* to_k, bf16* to_v) const;

 private:
  struct Place {
    int64_t units;
  };  // of the segments before
  const bf16* k_row(int64_t segment, int64_t key) const {
    return k_.values.as<bf16>() + (k_.begin(segment) + key) * k_.values.stride[0];
  }
  const bf16* v_row(int64_t segment, int64_t key) const {
    return v_->values.as<bf16>() + (v_->begin(segment) + key) * v_->values.stride[0];
  }
  void copy_keys(int64_t segment, int64_t first, bf16* to) const;

  const Ragged& k_;
  const Ragged* v_;
  int d_, d_v_, steps_, channel_tiles_;
  bool in_place_;
  std::vector<Place> k_first_, v_first_;
  bf16 *k_units_ = nullptr, *v_units_ = nullptr;  // in place: k_units_ holds the last, short unit of each segment
};

#endif

}  // namespace heed::HEED_ISA
