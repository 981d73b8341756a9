#include "kernels/cpu/bf16_panels.h"

#include <algorithm>

#include "base/threads.h"

namespace heed::HEED_ISA {

#if defined(HEED_BF16_DOT)

namespace {

constexpr int64_t kUnitsAtOnce = 4;

int64_t units_of(int64_t keys) { return (keys + kUnit - 1) / kUnit; }

void copy_row(const bf16* from, int d, int width, bf16* to) {
  std::memcpy(static_cast<void*>(to), from, size_t(d) * sizeof(bf16));
  std::memset(static_cast<void*>(to + d), 0, size_t(width - d) * sizeof(bf16));
}

}  // namespace

Bf16Panels::Bf16Panels(Queue& queue, const Ragged& k, const Ragged* v, bool made)
    : k_(k), v_(v), d_(int(k.values.size[1])), d_v_(v ? int(v->values.size[1]) : 0), steps_((d_ + 31) / 32),
      channel_tiles_((d_v_ + 15) / 16) {
  const int64_t row_bytes = k.values.stride[0] * int64_t(sizeof(bf16));
  in_place_ = d_ % 32 == 0 && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(k.values.data) % 64 == 0;
  int64_t k_units = 0, v_units = 0;
  for (int64_t s = 0; s < k.segments(); ++s) {
    k_first_.push_back({in_place_ ? s : k_units});
    k_units += in_place_ ? 1 : units_of(k.length(s));
  }
  std::vector<int64_t> starts;
  for (int64_t s = 0; v && s < v->segments(); ++s) {
    v_first_.push_back({v_units});
    starts.push_back(v_units);
    v_units += units_of(v->length(s));
  }
  if (!made) return;
  k_units_ = queue.scratch.take(Dtype::BF16, {std::max<int64_t>(1, k_units) * key_numbers()}).as<bf16>();
  v_units_ = queue.scratch.take(Dtype::BF16, {std::max<int64_t>(1, v_units * value_numbers())}).as<bf16>();
  // Both are indexed alike unless there are separate maps for k and v; so each is a list of its own.
  std::vector<int64_t> k_starts;
  int64_t copies = 0;
  for (int64_t s = 0; s < k.segments(); ++s) {
    k_starts.push_back(copies);
    copies += in_place_ ? 1 : units_of(k.length(s));
  }
  const auto segment_of = [](const std::vector<int64_t>& from, int64_t unit) {
    return int64_t(std::upper_bound(from.begin(), from.end(), unit) - from.begin()) - 1;
  };
  parallel_for((v_units + kUnitsAtOnce - 1) / kUnitsAtOnce, [&](int64_t piece) {
    const bf16* rows[kUnit];
    for (int64_t unit = piece * kUnitsAtOnce; unit < std::min(v_units, (piece + 1) * kUnitsAtOnce); ++unit) {
      const int64_t s = segment_of(starts, unit), first = (unit - starts[size_t(s)]) * kUnit, length = v->length(s);
      for (int64_t j = 0; j < kUnit; ++j) rows[j] = first + j < length ? v_row(s, first + j) : nullptr;
      transpose_values(rows, d_v_, channel_tiles_, v_units_ + unit * value_numbers());
    }
  });
  parallel_for((copies + kUnitsAtOnce - 1) / kUnitsAtOnce, [&](int64_t piece) {
    for (int64_t unit = piece * kUnitsAtOnce; unit < std::min(copies, (piece + 1) * kUnitsAtOnce); ++unit) {
      const int64_t s = segment_of(k_starts, unit);
      const int64_t first = in_place_ ? k.length(s) / kUnit * kUnit : (unit - k_starts[size_t(s)]) * kUnit;
      copy_keys(s, first, k_units_ + unit * key_numbers());
    }
  });
}

void Bf16Panels::copy_keys(int64_t segment, int64_t first, bf16* to) const {
  const int width = steps_ * 32;
  const int64_t length = k_.length(segment);
  for (int64_t j = 0; j < kUnit; ++j, to += width) {
    if (first + j < length) copy_row(k_row(segment, first + j), d_, width, to);
    else std::memset(static_cast<void*>(to), 0, size_t(width) * sizeof(bf16));
  }
}

UnitKeys Bf16Panels::keys(int64_t segment, int64_t unit) const {
  const int64_t packed = int64_t(steps_) * 32 * int64_t(sizeof(bf16));
  if (!in_place_) return {k_units_ + (k_first_[size_t(segment)].units + unit) * key_numbers(), packed};
  if ((unit + 1) * kUnit > k_.length(segment)) return {k_units_ + segment * key_numbers(), packed};
  return {k_row(segment, unit * kUnit), k_.values.stride[0] * int64_t(sizeof(bf16))};
}

void Bf16Panels::gather(int64_t k_segment, int64_t v_segment, const int32_t* chosen, int count, bf16* to_k, bf16* to_v) const {
  const int width = steps_ * 32;
  const bf16* rows[kUnit];
  for (int j = 0; j < kUnit; ++j, to_k += width) {
    rows[j] = v_ && j < count ? v_row(v_segment, chosen[j]) : nullptr;
    if (j < count) copy_row(k_row(k_segment, chosen[j]), d_, width, to_k);
    else std::memset(static_cast<void*>(to_k), 0, size_t(width) * sizeof(bf16));
  }
  if (v_) transpose_values(rows, d_v_, channel_tiles_, to_v);
}

#endif

}  // namespace heed::HEED_ISA
