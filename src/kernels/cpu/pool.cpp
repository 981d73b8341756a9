#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/padded_rows.h"
#include "kernels/cpu/rows.h"

namespace heed::HEED_ISA {
namespace {

struct Add {
  static F run(F a, F b) { return a + b; }
};
struct Low {
  static F run(F a, F b) { return min(a, b); }
};
struct High {
  static F run(F a, F b) { return max(a, b); }
};

/// to = fold of `count` rows, over `divisor`.
template <class Fold, class T>
void fold_rows(const T* from, int64_t stride, int64_t count, int64_t width, float divisor, float* to) {
  const F by = set(divisor);
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    F held = load(from + c);
    for (int64_t r = 1; r < count; ++r) held = Fold::run(held, load(from + r * stride + c));
    store(to + c, held / by);
  }
  if (c == width) return;
  const int rest = int(width - c);
  F held = load_part(from + c, rest);
  for (int64_t r = 1; r < count; ++r) held = Fold::run(held, load_part(from + r * stride + c, rest));
  store_part(to + c, held / by, rest);
}

template <class T, class To>
void copy_row(const T* from, int64_t width, To* to) {
  over_lanes(width, [&](int64_t c, auto part) { part.put(to + c, part.get(from + c)); });
}

template <class T, class To>
void put_side_by_side(const T* from, int64_t stride, int64_t count, int64_t width, PoolKind kind, int block, To* to) {
  for (int64_t place = 0; place < block; ++place) {
    const int64_t r = kind == PoolKind::Concat ? place : block - 1 - place;
    if (r < count) copy_row(from + r * stride, width, to + place * width);
    else std::fill_n(to + place * width, width, To(0));
  }
}

template <class T>
void pool_block(const T* from, int64_t stride, int64_t count, int64_t width, PoolKind kind, int block, float* to) {
  switch (kind) {
    case PoolKind::Mean: return fold_rows<Add>(from, stride, count, width, float(count), to);
    case PoolKind::Sum: return fold_rows<Add>(from, stride, count, width, 1, to);
    case PoolKind::Min: return fold_rows<Low>(from, stride, count, width, 1, to);
    case PoolKind::Max: return fold_rows<High>(from, stride, count, width, 1, to);
    case PoolKind::First: return copy_row(from, width, to);
    case PoolKind::Last: return copy_row(from + (count - 1) * stride, width, to);
    case PoolKind::Concat:
    case PoolKind::ConcatReversed: return put_side_by_side(from, stride, count, width, kind, block, to);
  }
}

}  // namespace

void pool(Queue& queue, const Ragged& x, PoolKind kind, int block, Ragged out) {
  constexpr const char* where = "pool";
  const bool concat = kind == PoolKind::Concat || kind == PoolKind::ConcatReversed;
  const int64_t width = width_of(x.values), width_out = concat ? block * width : width;
  require(block >= 1 && is_float(x.values.type), where, "x is F32, BF16 or F16, and blocks have at least one row");
  const bool rounds = concat && out.values.type == Dtype::BF16;
  require(out.segments() == x.segments() && width_of(out.values) == width_out && (rounds || out.values.type == Dtype::F32),
          where,
          "out is F32 (BF16 too where rows are put side by side), has x's segments and is " +
              std::to_string(width_out) + " wide, got " + out.values.shape());
  // Some 8 KB of input a piece: less is lost in handing it out.
  const int64_t batch = std::max<int64_t>(1, 2048 / std::max<int64_t>(1, block * width));
  Pieces pieces;
  for (int64_t s = 0; s < x.segments(); ++s) pieces.add(((x.length(s) + block - 1) / block + batch - 1) / batch);
  const Rows rows(x.values), rows_out(out.values);
  for_each(queue, pieces.count(), 0, [&](int64_t i, float*) {
    const auto [s, piece] = pieces[i];
    const int64_t blocks = (x.length(s) + block - 1) / block;
    for (int64_t b = piece * batch; b < std::min(blocks, (piece + 1) * batch); ++b) {
      const int64_t first = x.begin(s) + b * block, count = std::min<int64_t>(block, x.end(s) - first);
      const int64_t to_row = (out.begin(s) + b) * out.values.stride[0];
      const auto run = [&]<class T>(const T*) {
        if (rounds)
          return put_side_by_side(x.values.as<const T>() + first * x.values.stride[0], x.values.stride[0], count, width,
                                  kind, block, out.values.as<bf16>() + to_row);
        float* to = out.values.as<float>() + to_row;
        pool_block(x.values.as<const T>() + first * x.values.stride[0], x.values.stride[0], count, width, kind, block, to);
      };
      switch (x.values.type) {
        case Dtype::BF16: run((const bf16*)nullptr); break;
        case Dtype::F16: run((const f16*)nullptr); break;
        default: run((const float*)nullptr);
      }
    }
  });
}

void smooth(Queue& queue, const Ragged& x, PoolKind kind, int width, Tensor out) {
  constexpr const char* where = "smooth";
  require(width >= 1 && width % 2 == 1, where, "the window is odd");
  require(kind == PoolKind::Mean || kind == PoolKind::Max, where, "rows are smoothed by Mean or Max");
  require(x.values.type == Dtype::F32 && x.values.rank == 1, where, "x is F32 [rows], got " + x.values.shape());
  check_tensor(where, "out", out, {x.values.size[0]});
  constexpr int64_t batch = 2048;
  Pieces pieces;
  for (int64_t s = 0; s < x.segments(); ++s) pieces.add((x.length(s) + batch - 1) / batch);
  const float* from = x.values.as<float>();
  float* to = out.as<float>();
  const int64_t half = width / 2;
  for_each(queue, pieces.count(), 0, [&](int64_t i, float*) {
    const auto [s, piece] = pieces[i];
    const int64_t low = x.begin(s), high = x.end(s), first = low + piece * batch, last = std::min(high, first + batch);
    const auto one = [&](int64_t r) {
      float sum = 0, top = -INFINITY;
      for (int64_t j = std::max(low, r - half); j <= std::min(high - 1, r + half); ++j) {
        sum += from[j];
        top = std::max(top, from[j]);
      }
      to[r] = kind == PoolKind::Mean ? sum / float(width) : top;
    };
    int64_t r = first;
    for (; r < last && r - half < low; ++r) one(r);
    for (; r + kLanes <= last && r + kLanes - 1 + half < high; r += kLanes) {
      F held = load(from + r - half);
      if (kind == PoolKind::Mean) {
        for (int64_t j = 1; j < width; ++j) held = held + load(from + r - half + j);
        held = held / set(float(width));
      } else {
        for (int64_t j = 1; j < width; ++j) held = max(held, load(from + r - half + j));
      }
      store(to + r, held);
    }
    for (; r < last; ++r) one(r);
  });
}

}  // namespace heed::HEED_ISA
