// Rows of numbers of any plain type, read as f32 into padded scratch, and work handed to the pool with a worker's number.
#pragma once
#include <algorithm>
#include <vector>

#include "base/queue.h"
#include "base/threads.h"
#include "kernels/cpu/simd.h"

namespace heed::HEED_ISA {

inline constexpr int kPad = 16;  // scratch rows are padded to this many floats on every instruction set

HEED_INLINE int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

/// n numbers from `from` to `to`, times `by`; then zeros up to `width`.
template <class T>
HEED_INLINE void widen(const T* from, int64_t n, int64_t width, float by, float* to) {
  const F factor = set(by);
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) store(to + c, load(from + c) * factor);
  if (c < n) store(to + c, load_part(from + c, int(n - c)) * factor), c += kLanes;
  for (; c < width; c += kLanes) store(to + c, zero());
}

/// Rows of a tensor [rows] or [rows, width], each contiguous: F32, BF16 or F16.
struct Rows {
  const char* data = nullptr;
  int64_t stride = 0;  // bytes
  int64_t width = 0;
  Dtype type = Dtype::F32;

  Rows() = default;
  explicit Rows(const Tensor& t)
      : data(static_cast<const char*>(t.data)), stride(t.stride[0] * info(t.type).bytes),
        width(t.rank > 1 ? t.size[1] : 1), type(t.type) {}

  /// Row `row` times `by` into `to`, which has padded(width) floats.
  void read(int64_t row, float* to, float by = 1) const { read_part(row, 0, width, to, by); }
  /// Numbers first … first + count of it, into padded(count) floats.
  void read_part(int64_t row, int64_t first, int64_t count, float* to, float by = 1) const {
    const char* from = data + row * stride;
    switch (type) {
      case Dtype::BF16: return widen(reinterpret_cast<const bf16*>(from) + first, count, padded(count), by, to);
      case Dtype::F16: return widen(reinterpret_cast<const f16*>(from) + first, count, padded(count), by, to);
      default: return widen(reinterpret_cast<const float*>(from) + first, count, padded(count), by, to);
    }
  }
};

/// Numbers in a row of [rows] or [rows, width].
inline int64_t width_of(const Tensor& t) { return t.rank > 1 ? t.size[1] : 1; }

/// Pieces of work, numbered through all segments.
class Pieces {
 public:
  /// The next segment has `count` pieces.
  void add(int64_t count) { starts_.push_back(starts_.back() + count); }
  int64_t count() const { return starts_.back(); }
  struct Place {
    int64_t segment, piece;
  };
  Place operator[](int64_t i) const {
    const int64_t s = std::upper_bound(starts_.begin(), starts_.end(), i) - starts_.begin() - 1;
    return {s, i - starts_[size_t(s)]};
  }

 private:
  std::vector<int64_t> starts_{0};
};

/// Scratch of `floats` for each worker, taken before a region starts, and body(i, scratch) for each i in [0, count).
/// What body(i) computes must not depend on who runs it.
template <class Body>
void for_each(Queue& queue, int64_t count, int64_t floats, Body&& body) {
  const int64_t workers = std::min<int64_t>(threads(), count);
  if (workers <= 0) return;
  const Scratch scope(queue.scratch);
  const int64_t each = padded(floats);
  float* scratch = queue.scratch.take(Dtype::F32, {workers * each}).template as<float>();
  parallel_for(count, int(workers), [&](int worker, int64_t i) { body(i, scratch + worker * each); });
}

}  // namespace heed::HEED_ISA
