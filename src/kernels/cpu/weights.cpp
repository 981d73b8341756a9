#include "kernels/cpu/weights.h"

#include <algorithm>

#include "kernels/cpu/product_tile.h"
#include "kernels/cpu/quants.h"
#include "kernels/cpu/transpose_words.h"

namespace heed::HEED_ISA {

Weights::Weights(const Tensor& w, const char* where) : data(w.as<const char>()), type(w.type) {
  const DtypeInfo i = info(type);
  require(w.rank == 2 && w.size[1] % i.block == 0 && w.stride[0] % i.block == 0 && (w.stride[1] == 1 || w.size[1] <= 1),
          where, "weights are [rows, width] with contiguous rows of whole blocks, got " + w.shape() + " of " + i.name);
  rows = w.size[0];
  width = w.size[1];
  row_bytes = w.stride[0] / i.block * i.bytes;
  if (w.interleaved) {
    require(is_block(type) && w.stride[0] == w.size[1], where, "interleaved rows are whole and of a block type");
    side_by_side = rows / kSideBySide * kSideBySide;
  }
}

namespace {

template <Dtype D, class Out>
void unpack_quant(const char* from, int64_t count, Out* out) {
  using Q = Quant<D>;
  using Block = typename Q::Block;
  constexpr int per_block = info(D).block, per_group = Q::group / kLanes;
  const Block* blocks = reinterpret_cast<const Block*>(from);
  for (int64_t n = count / per_block; n > 0; --n, ++blocks, out += per_block) {
    float scale[per_block / Q::group], low[per_block / Q::group];
    Q::scales(*blocks, scale, low);
    const auto unit = [&]<int i>() {
      F f[32 / kLanes];
      widen<Q::is_signed>(Q::template codes<i>(*blocks), f);
      for (int v = 0; v < 32 / kLanes; ++v) {
        const int g = i * (32 / Q::group) + v / per_group;
        const float shift = Q::has_low ? low[g] : -float(Q::offset) * scale[g];
        store(out + 32 * i + v * kLanes, fma(f[v], set(scale[g]), set(shift)));
      }
    };
    [&]<int... i>(std::integer_sequence<int, i...>) {
      (unit.template operator()<i>(), ...);
    }(std::make_integer_sequence<int, per_block / 32>());
  }
}

template <class In, class Out>
void unpack_plain(const In* from, int64_t count, Out* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
  if (i < count) store_part(out + i, load_part(from + i, int(count - i)), int(count - i));
}

/// Blocks of four neighbouring rows of sixteen, from a column on, as files hold them.
template <Dtype D>
void separate(const char* column, int first, int64_t blocks, char* const to[4]) {
  using Four = uint32_t __attribute__((vector_size(16)));
  constexpr BlockNumbers numbers = block_numbers(D);
  constexpr int bytes = info(D).bytes, words = (bytes - 2 * numbers.count) / 4,
                words_at = numbers.at == 0 ? 2 * numbers.count : 0;
  for (int64_t b = 0; b < blocks; ++b, column += kSideBySide * bytes) {
    for (int n = 0; n < numbers.count; ++n)
      for (int r = 0; r < 4; ++r)
        std::memcpy(to[r] + b * bytes + numbers.at + 2 * n, column + 2 * (kSideBySide * n + first + r), 2);
    const char* from = column + 2 * kSideBySide * numbers.count + 4 * first;
    constexpr int fours = words / 4 * 4;
    for (int w = 0; w < fours; w += 4) {
      Four x[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&x[i], from + 4 * kSideBySide * (w + i), 16);
      // Words 0 and 1 of rows 0 and 1 (low) and 2 and 3 (high), in pairs; then whole rows.
      const Four low01 = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5),
                 low23 = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5),
                 high01 = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7),
                 high23 = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
      const Four row[4] = {
          __builtin_shufflevector(low01, low23, 0, 1, 4, 5), __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
          __builtin_shufflevector(high01, high23, 0, 1, 4, 5), __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
      for (int r = 0; r < 4; ++r) std::memcpy(to[r] + b * bytes + words_at + 4 * w, &row[r], 16);
    }
    for (int w = fours; w < words; ++w)
      for (int r = 0; r < 4; ++r)
        std::memcpy(to[r] + b * bytes + words_at + 4 * w, from + 4 * (kSideBySide * w + r), 4);
  }
}

/// Rows first … first + rows of sixteen side by side; `row` the first of the sixteen.
template <Dtype D, class Out>
void unpack_some(const Weights& w, int64_t row, int first, int rows, int64_t begin, int64_t count, Out* out, int64_t stride) {
  constexpr int64_t most = 512, block = info(D).block;
  alignas(64) char room[4][most / block * info(D).bytes];
  char* const to[4] = {room[0], room[1], room[2], room[3]};
  for (int four = first / 4 * 4; four < first + rows; four += 4)
    for (int64_t at = 0; at < count; at += most) {
      const int64_t n = std::min(most, count - at);
      separate<D>(w.at(row, begin + at), four, n / block, to);
      for (int r = std::max(four, first); r < std::min(four + 4, first + rows); ++r)
        unpack_quant<D>(to[r - four], n, out + (r - first) * stride + at);
    }
}

template <class Out>
void unpack_any(const Weights& w, int64_t first, int64_t rows, int64_t begin, int64_t count, Out* out, int64_t stride) {
  int64_t r = first;
  const int64_t end = first + rows;
  while (r < std::min(end, w.side_by_side)) {
    const int64_t group = r / kSideBySide * kSideBySide, n = std::min(end, group + kSideBySide) - r;
    with_quant(w.type, [&]<Dtype D>() {
      unpack_some<D>(w, group, int(r - group), int(n), begin, count, out + (r - first) * stride, stride);
    });
    r += n;
  }
  for (; r < end; ++r) {
    const char* from = w.at(r, begin);
    Out* to = out + (r - first) * stride;
    if (with_quant(w.type, [&]<Dtype D>() { unpack_quant<D>(from, count, to); })) continue;
    if (w.type == Dtype::F32) unpack_plain(reinterpret_cast<const float*>(from), count, to);
    else if (w.type == Dtype::F16) unpack_plain(reinterpret_cast<const f16*>(from), count, to);
    else unpack_plain(reinterpret_cast<const bf16*>(from), count, to);
  }
}

}  // namespace

void unpack(const Weights& w, int64_t first, int64_t rows, int64_t begin, int64_t count, float* out, int64_t stride) {
  unpack_any(w, first, rows, begin, count, out, stride);
}

namespace {

/// Numbers 2 i and 2 i + 1 of kLanes rows, lanes being rows, into words of a panel.
HEED_INLINE void put_pair(float* word, F even, F odd) {
  store(word, even);
  store(word + kSideBySide, odd);
}
#if defined(HEED_BF16_DOT)
HEED_INLINE void put_pair(bf16* word, F even, F odd) { _mm512_storeu_si512(word, pair_bf16(even, odd)); }
#endif

/// `blocks` columns of blocks of sixteen rows that lie side by side.
template <Dtype D, class Out>
void unpack_columns(const char* column, int64_t blocks, Out* panel) {
  using Q = Quant<D>;
  constexpr int per_block = info(D).block, groups = per_block / Q::group;
  for (int64_t b = 0; b < blocks; ++b, column += kSideBySide * info(D).bytes, panel += kSideBySide * per_block)
    for (int part = 0; part < kSideBySide / kLanes; ++part) {
      const Sixteen<D> block(column, part);
      F scale[groups], low[groups];
      Q::scales(block, scale, low);
      if constexpr (!Q::has_low)
        for (int g = 0; g < groups; ++g) low[g] = scale[g] * set(-float(Q::offset));
      const auto unit = [&]<int i>() {
        const RowCodes codes = Q::template codes<i>(block);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          const int g = (32 * i + 4 * j) / Q::group;
          F x[4];
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) {
            const F code = Q::is_signed ? signed_byte_of(codes.word[j], n) : byte_of(codes.word[j], n);
            x[n] = fma(code, scale[g], low[g]);
          }
          Out* to = panel + kSideBySide * (32 * i + 4 * j) + part * kLanes;
          put_pair(to, x[0], x[1]);
          put_pair(to + 2 * kSideBySide, x[2], x[3]);
        }
      };
      [&]<int... i>(std::integer_sequence<int, i...>) {
        (unit.template operator()<i>(), ...);
      }(std::make_integer_sequence<int, per_block / 32>());
    }
}

template <class Out>
void unpack_sixteen_any(const Weights& w, int64_t row, int64_t begin, int64_t count, int64_t padded, Out* panel) {
  constexpr int64_t pair = 4 / sizeof(Out), square = 16 * pair;
  const int64_t rows = std::min<int64_t>(kSideBySide, w.rows - row);
  int64_t done = 0;
  if (row < w.side_by_side)
    with_quant(w.type, [&]<Dtype D>() {
      unpack_columns<D>(w.at(row, begin), count / info(D).block, panel);
      done = count;
    });
  // Rows that lie one behind the other: unpacked so, a part of them after the other, and transposed.
  constexpr int64_t most = 512;
  alignas(64) Out part[kSideBySide][most];
  for (; done < padded; done += most) {
    const int64_t n = std::clamp<int64_t>(count - done, 0, most), all = std::min(padded - done, most);
    const int64_t whole = (all + square - 1) / square * square;
    if (n > 0) unpack_any(w, row, rows, begin + done, n, &part[0][0], most);
    for (int64_t r = 0; r < kSideBySide; ++r) std::fill(part[r] + (r < rows ? n : 0), part[r] + whole, Out(0));
    for (int64_t at = 0; at < all; at += square) {
      alignas(64) uint32_t words[kSideBySide][kSideBySide];
      transpose_words(reinterpret_cast<const uint32_t*>(part[0] + at), most / pair, words[0], kSideBySide);
      std::memcpy(panel + kSideBySide * (done + at), words, size_t(std::min(square, all - at)) / pair * sizeof words[0]);
    }
  }
}

}  // namespace

void unpack_sixteen(const Weights& w, int64_t row, int64_t begin, int64_t count, int64_t padded, float* panel) {
  unpack_sixteen_any(w, row, begin, count, padded, panel);
}
#if defined(HEED_BF16_DOT)
void unpack_sixteen(const Weights& w, int64_t row, int64_t begin, int64_t count, int64_t padded, bf16* panel) {
  unpack_sixteen_any(w, row, begin, count, padded, panel);
}
#endif
#if defined(HEED_PAIR_DOT)
void unpack_sixteen(const Weights& w, int64_t row, int64_t begin, int64_t count, int64_t padded, int16_t* panel) {
  constexpr int64_t most = 256;  // which every type's blocks divide: 16 KB of the first cache
  alignas(64) float numbers[most * kSideBySide];
  for (int64_t at = 0; at < padded; at += most) {
    const int64_t all = std::min(most, padded - at);
    unpack_sixteen_any(w, row, begin + std::min(at, count), std::clamp<int64_t>(count - at, 0, all), all, numbers);
    for (int64_t first = 0; first < all; first += IntegerTile::unit) {
      const int64_t n = std::min<int64_t>(IntegerTile::unit, all - first);
      for (int v = 0; v < kSideBySide; v += kLanes) {
        const float* from = numbers + first * kSideBySide + v;
        IntegerTile::Scales rows;
        for (int64_t i = 0; i < n; ++i) rows.see(load(from + i * kSideBySide));
        store(reinterpret_cast<float*>(panel + v * IntegerTile::pair), rows.scale());
        const F inverse = rows.inverse();
        for (int64_t i = 0; i < n; i += 2)
          store_pairs(panel + (kSideBySide * (1 + i / 2) + v) * IntegerTile::pair,
                      load(from + i * kSideBySide) * inverse, load(from + (i + 1) * kSideBySide) * inverse);
      }
      panel += words_of<IntegerTile>(n) * kSideBySide * IntegerTile::pair;
    }
  }
}
#endif

}  // namespace heed::HEED_ISA
