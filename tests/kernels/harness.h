// What every check of a kernel needs: poisoned memory with guards, random inputs laid out awkwardly, one comparison.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/random.h"
#include "cases.h"
#include "kernels/kernels.h"

namespace heed::test {

/// One of the values given.
template <class T>
T pick(Random& random, std::initializer_list<T> values) {
  return values.begin()[random.below(int64_t(values.size()))];
}
inline bool chance(Random& random, double p) { return random.uniform() < p; }

/// A tensor inside poisoned memory: every byte 0xFF (NaN in every float type, −1 in integers), guard rows around, the
/// first number `shift` elements past a 64-byte line, rows `pad` elements further apart than they are wide.
class Poisoned {
 public:
  Poisoned() = default;
  Poisoned(Dtype type, std::vector<int64_t> sizes, int64_t shift = 0, int64_t pad = 0);
  operator const Tensor&() const { return view_; }
  const Tensor* operator->() const { return &view_; }
  const Tensor& view() const { return view_; }
  /// All bytes, guards and gaps between rows included.
  std::span<const uint8_t> bytes() const {
    return {static_cast<const uint8_t*>(memory_->data), size_t(memory_->bytes())};
  }
  /// A poisoned twin with the same layout.
  Poisoned twin() const { return Poisoned(view_.type, sizes_, shift_, pad_); }
  /// Bytes outside the view that are no longer poison.
  int64_t strays() const;

 private:
  std::vector<int64_t> sizes_;
  int64_t shift_ = 0, pad_ = 0;
  Buffer memory_;
  Tensor view_;
};

/// The number at a multi-index, as f64, and the way in (converted to the tensor's type).
double number(const Tensor& t, std::span<const int64_t> index);
/// Every multi-index of a tensor in order.
template <class Body>
void each(const Tensor& t, Body&& body) {
  std::vector<int64_t> index(size_t(t.rank), 0);
  for (int64_t left = t.numel(); left > 0; --left) {
    body(std::span<const int64_t>(index));
    for (int axis = t.rank - 1; axis >= 0 && ++index[size_t(axis)] == t.size[size_t(axis)]; --axis)
      index[size_t(axis)] = 0;
  }
}
void set(const Tensor& t, std::span<const int64_t> index, double x);

/// Segments of unequal length; with gaps, rows between them stay poisoned.
struct RaggedData {
  Poisoned values;
  Buffer offsets, ends;
  Ragged view;
  operator const Ragged&() const { return view; }
};

/// How awkwardly memory is laid out.
struct Layout {
  bool gaps = false;
  int64_t shift = 0, pad = 0;
  static Layout any(Random& random) {
    return {chance(random, 0.4), chance(random, 0.5) ? 1 : 0, chance(random, 0.3) ? 5 : 0};
  }
};

/// Poisoned segments; width 0 makes values of rank 1.
RaggedData ragged(Random& random, Dtype type, const std::vector<int64_t>& lengths, int64_t heads, int64_t width,
                  Layout layout);
/// The same with normal numbers in every segment.
RaggedData normal_ragged(Random& random, Dtype type, const std::vector<int64_t>& lengths, int64_t heads, int64_t width,
                         Layout layout, double deviation = 1);
/// Every number drawn by `draw`.
template <class Draw>
Poisoned filled(Dtype type, std::vector<int64_t> sizes, Draw&& draw, int64_t shift = 0, int64_t pad = 0) {
  Poisoned out(type, std::move(sizes), shift, pad);
  each(out, [&](auto index) { set(out, index, draw()); });
  return out;
}
/// Numbers drawn for the rows of `like`'s segments alone; the others stay poisoned. One number a row, or `width`.
template <class Draw>
Poisoned row_numbers(const Ragged& like, Dtype type, int64_t width, Draw&& draw, int64_t shift = 0) {
  std::vector<int64_t> sizes{like.values.size[0]};
  if (width > 0) sizes.push_back(width);
  Poisoned out(type, sizes, shift);
  for (int64_t s = 0; s < like.segments(); ++s)
    for (int64_t r = like.begin(s); r < like.end(s); ++r)
      each(out->select(0, r), [&](auto index) { set(out->select(0, r), index, draw()); });
  return out;
}

/// What every table is compared with.
inline const Kernels& oracle() { return reference_kernels(); }

/// Its elements in order.
inline std::vector<float> read(const Tensor& t) {
  std::vector<float> out;
  each(t, [&](auto index) { out.push_back(float(number(t, index))); });
  return out;
}

/// What the oracle wrote, `got` holds within `bound`; what it left poisoned is poisoned still, guards included.
/// Infinities must agree; NaN never passes.
void expect_close(const char* what, const Poisoned& expected, const Poisoned& got, double bound);

/// The largest magnitude a tensor holds, poison aside.
double largest(const Tensor& t);
/// Its largest row norm (last dimension), poison aside.
double longest_row(const Tensor& t);

inline double low_precision(Dtype a, Dtype b) {
  auto unit = [](Dtype t) { return t == Dtype::BF16 ? 0x1p-7 : t == Dtype::F16 ? 0x1p-10 : 0.0; };
  return std::max(unit(a), unit(b));
}

}  // namespace heed::test
