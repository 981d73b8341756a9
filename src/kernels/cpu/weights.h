// A matrix of weights as products read it, and its rows as plain numbers.
#pragma once
#include <span>

#include "base/queue.h"
#include "kernels/cpu/products.h"
#include "kernels/cpu/simd.h"
#include "kernels/kernels.h"
#include "kernels/quant.h"

namespace heed::HEED_ISA {

struct Weights {
  const char* data;
  Dtype type;
  int64_t rows, width, row_bytes;
  int64_t side_by_side = 0;  // of the rows: whole sixteens of an interleaved matrix

  /// Throws Error(Invalid) unless w is [rows, width], its rows contiguous and whole blocks.
  Weights(const Tensor& w, const char* where);
  /// Whether this is a type that files keep weights in; others are left to the reference.
  static bool holds(Dtype type) {
    return is_block(type) || type == Dtype::F32 || type == Dtype::F16 || type == Dtype::BF16;
  }
  /// Where value `column` of row `row` lies; column is a multiple of the type's block. Of rows side by side: where the column
  /// of blocks begins; row is a multiple of 16 then.
  const char* at(int64_t row, int64_t column) const {
    const DtypeInfo i = info(type);
    return data + row * row_bytes + column / i.block * i.bytes * (row < side_by_side ? kSideBySide : 1);
  }
};

/// Values begin … begin + count of rows first … first + rows; row i to out + i · stride. begin and count are multiples of the
/// block.
void unpack(const Weights& w, int64_t first, int64_t rows, int64_t begin, int64_t count, float* out, int64_t stride);

/// Values begin … begin + count of rows row … row + 15 as a panel of a tile (product_tile.h): in f32, rounded to bf16, or as
/// integers with scales; with zeros for rows that there are not and up to `padded` numbers, a multiple of the tile's align. row is
/// a multiple of 16; begin and count as above.
void unpack_sixteen(const Weights& w, int64_t row, int64_t begin, int64_t count, int64_t padded, float* panel);
#if defined(HEED_BF16_DOT)
void unpack_sixteen(const Weights& w, int64_t row, int64_t begin, int64_t count, int64_t padded, bf16* panel);
#endif
#if defined(HEED_PAIR_DOT)
void unpack_sixteen(const Weights& w, int64_t row, int64_t begin, int64_t count, int64_t padded, int16_t* panel);
#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// y [T, rows] (+)= x [T, width] · w^T + bias, checked: x and y F32 with contiguous rows, bias contiguous or empty.
struct Product {
  Weights w;
  Tensor x, bias, y;
  bool accumulate;

  int64_t tokens() const { return x.size[0]; }
  const float* x_row(int64_t t) const { return x.as<float>() + t * x.stride[0]; }
  float* y_row(int64_t t) const { return y.as<float>() + t * y.stride[0]; }
  /// Writes or adds kLanes neighbours, or one result.
  HEED_INLINE void put(int64_t t, int64_t row, F value) const {
    float* place = y_row(t) + row;
    if (bias) value = value + load(bias.as<float>() + row);
    store(place, accumulate ? load(place) + value : value);
  }
  void put(int64_t t, int64_t row, float value) const {
    float& place = y_row(t)[row];
    if (bias) value += bias.as<float>()[row];
    place = accumulate ? place + value : value;
  }
};

/// For a few tokens: the weights are read once, as they are, against activations rounded to 8 bits with a scale for
/// each 32 (plain types: against the activations themselves). Bound by memory. All products are of the same x.
void multiply_few(Arena& scratch, std::span<const Product> products);
/// gate.y = act(gate) · up of two products of one shape; up.y is scratch.
void multiply_few(Arena& scratch, const Product& gate, const Product& up, Activation activation);

/// For many tokens: panels of weights are unpacked to what `kind` says (f32 weights: to f32) and multiplied in registers. Bound by arithmetic. All products are of the same x; with `glu` they are gate and up, of one shape,
/// and gate.y = glu(gate) · up, up.y is not used. False, and nothing done, where they cannot be made together: f32 weights
/// beside others, glu of rows longer than 4096.
bool multiply_many(Products kind, Arena& scratch, std::span<const Product> products, const Activation* glu = nullptr);

}  // namespace heed::HEED_ISA
