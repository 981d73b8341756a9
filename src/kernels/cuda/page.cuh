// Pages on the device, number by number.
#pragma once
#include "kernels/cuda/device.cuh"

namespace heed::cuda {

constexpr int kMostLayouts = 4, kMostColumns = 12;

/// The keys or the values of a page, row-major.
struct SideView {
  int64_t at;         // in the page
  int64_t scales_at;  // from `at`; zeros follow the scales where they are kept
  int width, group, bits, groups;
  PageType::Kind kind;
  PageType::Codes codes;
  bool by_channel;   // groups of entries
  float points[16];  // Table, Sparse
  int turned;        // Polar
  int pair;
  int64_t norms_at;  // from `at`
  int outliers, sketch, outlier_sketch;
  uint32_t seed;

  __host__ __device__ bool quantised() const { return kind >= PageType::Kind::Q8; }
  /// Whether an entry moves as it is, codes and scales.
  __host__ __device__ bool raw() const { return !pair && (!quantised() || !by_channel); }
  __host__ __device__ int row_groups() const { return quantised() ? (width + group - 1) / group : 0; }
  __host__ __device__ int64_t row_bytes() const {
    return (sketched() ? sketch + outlier_sketch : int64_t(width) * bits) / 8;
  }
  __host__ __device__ bool has_zeros() const {
    return codes == PageType::Codes::Range || codes == PageType::Codes::Polar || codes == PageType::Codes::Sparse;
  }
  __host__ __device__ bool sparse() const { return quantised() && codes == PageType::Codes::Sparse; }
  __host__ __device__ bool sketched() const { return quantised() && codes == PageType::Codes::Sketch; }
  __host__ __device__ int halves() const { return (has_zeros() ? 2 : 1) + (sparse() ? outliers : 0); }
  /// U8 for each group that moves with an entry.
  __host__ __device__ int row_places() const { return sparse() ? outliers : 0; }
  __host__ __device__ bool polar() const { return quantised() && codes == PageType::Codes::Polar; }
  __device__ bool first(int c) const { return c < turned ? c < turned / 2 : (c - turned) % 2 == 0; }
  __device__ int mate(int c) const { return c + (first(c) ? 1 : -1) * (c < turned ? turned / 2 : 1); }
  __device__ float* norms(char* page) const { return reinterpret_cast<float*>(page + at + norms_at); }
  __device__ uint8_t* spares(char* page) const { return reinterpret_cast<uint8_t*>(norms(page) + 2 * kPage); }
  __device__ bool same_type(const SideView& o) const {
    if (pair || o.pair) return false;
    if (kind != o.kind || !quantised()) return kind == o.kind;
    bool same = by_channel == o.by_channel && group == o.group && codes == o.codes && turned == o.turned &&
                outliers == o.outliers && sketch == o.sketch && outlier_sketch == o.outlier_sketch && seed == o.seed;
    for (int i = 0; i < 16; ++i) same = same && points[i] == o.points[i];
    return same;
  }
  __device__ float point(int code) const {
    return codes == PageType::Codes::Range    ? float(code)
           : codes == PageType::Codes::Signed ? float(code - (1 << (bits - 1)))
           : codes == PageType::Codes::Polar  ? float(code) + 0.5f
                                              : points[code];
  }
  __device__ int group_of(int entry, int c) const {
    return by_channel ? entry / group * width + c : entry * row_groups() + c / group;
  }
  __device__ __half* scales(char* page) const { return reinterpret_cast<__half*>(page + at + scales_at); }
  __device__ __half* zeros(char* page) const { return scales(page) + groups; }
  __device__ uint8_t* places(char* page) const { return reinterpret_cast<uint8_t*>(scales(page) + halves() * groups); }
  __device__ float plain(const char* row, int c) const {
    switch (kind) {
      case PageType::Kind::F32: return reinterpret_cast<const float*>(row)[c];
      case PageType::Kind::F16: return to_float(reinterpret_cast<const __half*>(row)[c]);
      default: return to_float(reinterpret_cast<const __nv_bfloat16*>(row)[c]);
    }
  }
  __device__ int code(const char* row, int c) const {
    const auto* bytes = reinterpret_cast<const uint8_t*>(row) + c * bits / 8;
    const bool crosses = c * bits % 8 + bits > 8;
    return (bytes[0] | (crosses ? bytes[1] << 8 : 0)) >> (c * bits % 8) & ((1 << bits) - 1);
  }
  __device__ float get(char* page, int entry, int c) const {
    if (pair) {
      const int spare = pair == 2 ? spares(page)[entry] : 0;
      return plain(page + at + (spare ? kPage + spare - 1 : entry) * row_bytes(), c) *
             norms(page)[(pair - 1) * kPage + entry];
    }
    if (sketched()) {
      float x[1];
      open_sketch(page, entry, c, x);
      return x[0];
    }
    if (sphere()) {
      const char* row = page + at + entry * row_bytes();
      return of_block(row, __half2float(scales(page)[group_of(entry, c)]), c);
    }
    if (!polar()) return number(page, entry, c);
    const bool of_first = first(c);
    const double angle = number(page, entry, of_first ? c : mate(c)), size = number(page, entry, of_first ? mate(c) : c);
    return float(size * (of_first ? cos(angle) : sin(angle)));
  }
  __host__ __device__ bool sphere() const { return quantised() && codes == PageType::Codes::Sphere; }
  /// Channels c … c + N − 1 of an entry: Σ over a block's rows i of H_ci D_i (Σ_j H_ij s_j), the inner sums as counts of bits,
  /// 32 signs at a time.
  template <int N> __noinline__ __device__ void open_sketch(char* page, int entry, int c, float (&x)[N]) const {
    const int n = sketch_width(width);
    const uint8_t* apart = places(page) + entry / group * outliers;
    uint32_t outlier = 0;
    for (int i = 0; i < outliers; ++i)
      if (apart[i] >= c && apart[i] < c + N) outlier |= 1u << (apart[i] - c);
    for (int part = 0; part < 2; ++part) {
      if (part == 0 ? outlier == (1u << N) - 1 : outlier == 0) continue;
      const auto* signs = reinterpret_cast<const uint32_t*>(page + at + entry * row_bytes()) + (part ? sketch / 32 : 0);
      const int count = part ? outlier_sketch : sketch;
      float sum[N] = {};
      for (int first = 0; first < count; first += n) {
        const int words = min(n, count - first) / 32, block = first / n;
        int own[N] = {};
        for (int i = 0; i < n; ++i) {
          const uint32_t low = (i & 1 ? 0xaaaaaaaau : 0u) ^ (i & 2 ? 0xccccccccu : 0u) ^ (i & 4 ? 0xf0f0f0f0u : 0u) ^
                               (i & 8 ? 0xff00ff00u : 0u) ^ (i & 16 ? 0xffff0000u : 0u);
          int dot = -32 * words;
          for (int w = 0; w < words; ++w)
            dot += 2 * __popc(signs[first / 32 + w] ^ low ^ (__popc(i >> 5 & w) & 1 ? 0xffffffffu : 0u));
          if (sketch_signs(seed, block, 1, i / 32) >> (i % 32) & 1) dot = -dot;
          for (int k = 0; k < N; ++k) own[k] += __popc(i & (c + k)) & 1 ? -dot : dot;
        }
        for (int k = 0; k < N; ++k)
          sum[k] += float(sketch_signs(seed, block, 0, (c + k) / 32) >> ((c + k) % 32) & 1 ? -own[k] : own[k]);
      }
      const float scale = float(sqrt(1.5707963267948966 * n) / count / n) * __half2float(scales(page)[part * kPage + entry]);
      for (int k = 0; k < N; ++k)
        if ((outlier >> k & 1) == uint32_t(part)) x[k] = c + k < width ? sum[k] * scale : 0.0f;
    }
  }
  /// Channel c of a block: the product of the sines and cosines on its way down from the block's length.
  __device__ float of_block(const char* row, float length, int c) const {
    const auto* bytes = reinterpret_cast<const uint8_t*>(row) + c / 16 * 6;
    uint64_t word = 0;
    for (int i = 0; i < 6; ++i) word |= uint64_t(bytes[i]) << (8 * i);
    const int i = c % 16;
    const int begin[4] = {0, 32, 40, 44};
    float x = length;
    for (int level = 3; level >= 0; --level) {
      const int bits = level ? 2 : 4, code = int(word >> (begin[level] + (i >> (level + 1)) * bits)) & ((1 << bits) - 1);
      const double angle = level ? double(points[4 * (level - 1) + code]) : (code + 0.5) * 0.39269908169872414;
      x *= float(i >> level & 1 ? sin(angle) : cos(angle));
    }
    return x;
  }
  /// As its place holds it.
  __device__ float number(char* page, int entry, int c) const {
    const char* row = page + at + entry * row_bytes();
    if (!quantised()) return plain(row, c);
    const int g = group_of(entry, c);
    const int place = by_channel ? entry % group : c % group;
    for (int i = 0; i < row_places(); ++i)
      if (places(page)[i * groups + g] == place) return __half2float(scales(page)[(2 + i) * groups + g]);
    return __fadd_rn(has_zeros() ? __half2float(zeros(page)[g]) : 0.0f,
                     __fmul_rn(point(code(row, c)), __half2float(scales(page)[g])));
  }
  /// get() as a call: it has many forms, and eight copies of it in every place that reads made nvcc take minutes.
  __noinline__ __device__ float one(char* page, int entry, int c) const { return get(page, entry, c); }
  /// Channels c … c + 7 (c a multiple of eight), zeros past the width.
  __device__ void get8(char* page, int entry, int c, float (&x)[8]) const {
    const char* row = page + at + entry * row_bytes();
    if (sketched()) return open_sketch(page, entry, c, x);
    if (pair || polar() || sphere() || sparse()) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = c + i < width ? one(page, entry, c + i) : 0.0f;
      return;
    }
    if (!quantised()) {
      const Dtype type = kind == PageType::Kind::F32   ? Dtype::F32
                         : kind == PageType::Kind::F16 ? Dtype::F16
                                                       : Dtype::BF16;
      return load8(row, type, c, width - c, x);
    }
    if (c + 8 > width || width % 8 != 0 || (!by_channel && group % 8 != 0)) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = c + i < width ? one(page, entry, c + i) : 0.0f;
      return;
    }
    uint32_t words[2] = {};  // rows start at multiples of `bits` bytes
    const char* codes = row + c * bits / 8;
    if (bits == 8) {
      const uint2 both = *reinterpret_cast<const uint2*>(codes);
      words[0] = both.x;
      words[1] = both.y;
    } else if (bits == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(codes);
    } else {
      words[0] = *reinterpret_cast<const uint16_t*>(codes);
    }
    const int g = group_of(entry, c), most = (1 << bits) - 1;
    const __half *scale = scales(page) + g, *zero = zeros(page) + g;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int of = by_channel ? i : 0, code = words[i * bits / 32] >> (i * bits % 32) & most;
      x[i] = (has_zeros() ? __half2float(zero[of]) : 0.0f) + point(code) * __half2float(scale[of]);
    }
  }
};

struct LayoutView {
  SideView k, v;
  int64_t position_at, bias_at, column_at[kMostColumns];
  Dtype column_type[kMostColumns];
};

struct ColumnView {
  Column::Keeps keeps;
  int width, block;
  float fill;
};

struct PagesView {
  const uint64_t* table;
  const uint8_t* layout;
  const int32_t* length;
  int64_t table_stride, layout_stride;
  int kv_heads, segments, columns, d, d_v;
  LayoutView layouts[kMostLayouts];
  ColumnView column[kMostColumns];

  __device__ char* page(int segment, int p) const { return reinterpret_cast<char*>(table[segment * table_stride + p]); }
  __device__ const LayoutView& layout_of(int segment, int p) const {
    return layouts[layout[segment * layout_stride + p]];
  }
  /// The numbers of entry i of a User column.
  __device__ float* column_at(const LayoutView& l, char* page, int c, int i) const {
    return reinterpret_cast<float*>(page + l.column_at[c]) + int64_t(i) * column[c].width;
  }
  /// Those of block i of a column that the store keeps.
  __device__ Matrix block_at(const LayoutView& l, char* page, int c, int i) const {
    const Dtype type = l.column_type[c];
    return {page + l.column_at[c] + int64_t(i) * d * (type == Dtype::F32 ? 4 : 2), d, d, type};
  }
};

/// Error(Unsupported) for what these kernels cannot hold: more than 12 columns, transposed values, groups of quantised
/// numbers that share a byte.
PagesView pages_view(const char* where, const Pages& pages);

__device__ inline int32_t& position_at(const LayoutView& l, char* page, int entry) {
  return reinterpret_cast<int32_t*>(page + l.position_at)[entry];
}
/// Where plain keys are turned.
struct ReadPlaces {
  const int32_t* given = nullptr;
  Segments segments;
  bool cache = false;
  __device__ int at(int segment, int entry, const LayoutView& l, char* page) const {
    if (given) return given[segments.begin(segment) + entry];
    return cache ? entry : position_at(l, page, entry % kPage);
  }
};
inline ReadPlaces read_places(const Read& read) {
  ReadPlaces out;
  out.given = read.places.values.as<int32_t>();
  if (out.given) out.segments = segments(read.places);
  out.cache = read.positions == Read::Positions::Cache;
  return out;
}

__device__ inline float& bias_at(const LayoutView& l, char* page, int entry) {
  return reinterpret_cast<float*>(page + l.bias_at)[entry];
}

/// What a group's scale and zero are made of.
struct Extent {
  float low = kInfinity, high = -kInfinity, largest = 0;  // largest: the first of the largest size
  double squares = 0;
  int count = 0;
  __device__ void add(float x) {
    low = fminf(low, x), high = fmaxf(high, x);
    if (fabsf(x) > fabsf(largest)) largest = x;
    squares += double(x) * double(x);
    ++count;
  }
};

/// Of a table, of equals the lower.
__device__ inline int nearest_point(const SideView& side, float x) {
  int best = 0;
  for (int i = 1; i < 1 << side.bits; ++i)
    if (fabsf(x - side.points[i]) < fabsf(x - side.points[best])) best = i;
  return best;
}

struct Quantiser {
  const SideView& side;
  float zero = 0, scale;
  int most, half;
  /// As pages.h says: scale and zero are rounded to f16 before the codes are made.
  __device__ Quantiser(const SideView& side, const Extent& of, __half* zero_to, __half* scale_to)
      : side(side), most((1 << side.bits) - 1), half(1 << (side.bits - 1)) {
    using Codes = PageType::Codes;
    if (side.has_zeros()) {
      *zero_to = __float2half_rn(of.low);
      zero = __half2float(*zero_to);
    }
    *scale_to = __float2half_rn(side.codes == Codes::Range   ? __fdiv_rn(of.high - of.low, float(most))
                                : side.codes == Codes::Polar ? __fdiv_rn(of.high - of.low, float(most + 1))
                                : side.codes == Codes::Table ? float(sqrt(of.squares / of.count))
                                : side.bits == 8             ? __fdiv_rn(fabsf(of.largest), 127.0f)
                                                             : __fdiv_rn(of.largest, float(-half)));
    scale = __half2float(*scale_to);
  }
  __device__ int code(float value) const {
    const float x = scale != 0 ? __fdiv_rn(value - zero, scale) : 0.0f;
    if (side.codes == PageType::Codes::Table) return nearest_point(side, x);
    const float code = side.codes == PageType::Codes::Range   ? rintf(x)
                       : side.codes == PageType::Codes::Polar ? floorf(x)
                                                              : floorf(x + 0.5f) + float(half);
    return int(fminf(fmaxf(code, 0.0f), float(most)));
  }
};

/// Channels first … first + 15 of an entry take get(channel), by one thread.
template <class Get>
__device__ inline void put_block(const SideView& side, char* page, int entry, int first, Get get) {
  double lengths[16];
  for (int i = 0; i < 16; ++i) lengths[i] = get(first + i);
  uint64_t word = 0;
  for (int count = 8, at = 0, level = 0; count > 0; count /= 2, ++level)
    for (int i = 0; i < count; ++i) {
      const double angle = atan2(lengths[2 * i + 1], lengths[2 * i]);
      int code = 0;
      if (level == 0) {
        code = min(15, int(floor((angle < 0 ? angle + 6.283185307179586 : angle) / 0.39269908169872414)));
      } else {
        const float* points = side.points + 4 * (level - 1);
        for (int p = 1; p < 4; ++p)
          if (fabs(angle - points[p]) < fabs(angle - points[code])) code = p;
      }
      word |= uint64_t(code) << at, at += level ? 2 : 4;
      lengths[i] = hypot(lengths[2 * i], lengths[2 * i + 1]);
    }
  uint8_t* row = reinterpret_cast<uint8_t*>(page + side.at + entry * side.row_bytes()) + first / 16 * 6;
  for (int i = 0; i < 6; ++i) row[i] = uint8_t(word >> (8 * i));
  side.scales(page)[side.group_of(entry, first)] = __float2half_rn(float(lengths[0]));
}

/// Group g takes value(0) … value(size − 1), by one thread; keep(i, code) has the codes.
template <class Value, class Keep>
__device__ inline void put_sparse(const SideView& side, char* page, int g, int size, Value value, Keep keep) {
  double mean = 0;
  for (int i = 0; i < size; ++i) mean += double(value(i)) / size;
  uint32_t left_out[8] = {};
  const auto is_out = [&](int i) { return left_out[i / 32] >> (i % 32) & 1; };
  for (int i = 0, best = 0; i < side.outliers; ++i) {
    int farthest = -1;
    for (int j = 0; j < size; ++j)
      if (!is_out(j) && (farthest < 0 || fabs(double(value(j)) - mean) > fabs(double(value(farthest)) - mean)))
        farthest = j;
    if (farthest >= 0) best = farthest;  // a group of few keeps one again
    left_out[best / 32] |= 1u << (best % 32);
    side.scales(page)[(2 + i) * side.groups + g] = __float2half_rn(value(best));
    side.places(page)[i * side.groups + g] = uint8_t(best);
  }
  float low = kInfinity, high = -kInfinity;
  for (int i = 0; i < size; ++i)
    if (!is_out(i)) low = fminf(low, value(i)), high = fmaxf(high, value(i));
  if (low > high) low = high = 0;
  side.zeros(page)[g] = __float2half_rn((low + high) / 2), side.scales(page)[g] = __float2half_rn((high - low) / 2);
  const float zero = __half2float(side.zeros(page)[g]), scale = __half2float(side.scales(page)[g]);
  for (int i = 0; i < size; ++i) keep(i, nearest_point(side, scale != 0 ? __fdiv_rn(value(i) - zero, scale) : 0.0f));
}

/// Codes of whole bytes are 0 before: of `channels` channels from c on of an entry.
__device__ inline void clear_codes(const SideView& side, char* page, int entry, int c, int channels) {
  char* row = page + side.at + entry * side.row_bytes() + c * side.bits / 8;
  for (int i = 0; i < channels * side.bits / 8; ++i) row[i] = 0;
}
__device__ inline void add_code(const SideView& side, char* page, int entry, int c, int code) {
  char* row = page + side.at + entry * side.row_bytes() + c * side.bits / 8;
  const int shift = c * side.bits % 8;
  row[0] = char(row[0] | code << shift);
  if (shift + side.bits > 8) row[1] = char(row[1] | code << shift >> 8);
}

__device__ inline void walsh(double* x, int n) {
  for (int half = 1; half < n; half *= 2)
    for (int i = 0; i < n; i += 2 * half)
      for (int j = i; j < i + half; ++j) {
        const double a = x[j], b = x[j + half];
        x[j] = a + b, x[j + half] = a - b;
      }
}

/// Entry begin + e takes get(e, channel), by one thread, which finds for itself which channels are outliers of the group
/// begin + first … begin + end − 1.
template <class Get>
__device__ inline void put_sketch(const SideView& side, char* page, int begin, int first, int end, int e, Get get) {
  const int n = sketch_width(side.width);
  uint32_t apart[kMostSketchWidth / 32] = {};
  const auto is_apart = [&](int c) { return apart[c / 32] >> (c % 32) & 1; };
  if (side.outliers > 0) {
    double squares[kMostSketchWidth];
    for (int c = 0; c < side.width; ++c) {
      squares[c] = 0;
      for (int i = first; i < end; ++i) squares[c] += double(get(i, c)) * double(get(i, c));
    }
    for (int i = 0; i < side.outliers; ++i) {
      int most = 0;
      for (int c = 1; c < side.width; ++c)
        if (squares[c] > squares[most]) most = c;
      squares[most] = -1, apart[most / 32] |= 1u << (most % 32);
      if (e == first) side.places(page)[(begin + first) / side.group * side.outliers + i] = uint8_t(most);
    }
  }
  auto* signs = reinterpret_cast<uint32_t*>(page + side.at + (begin + e) * side.row_bytes());
  for (int part = 0; part < (side.outliers > 0 ? 2 : 1); ++part) {
    double norm = 0;
    for (int c = 0; c < side.width; ++c)
      if (is_apart(c) == uint32_t(part)) norm += double(get(e, c)) * double(get(e, c));
    side.scales(page)[part * kPage + begin + e] = __float2half_rn(float(sqrt(norm)));
    const int count = part ? side.outlier_sketch : side.sketch;
    for (int at = 0; at < count; at += n) {
      double x[kMostSketchWidth];
      for (int c = 0; c < n; ++c) {
        x[c] = c < side.width && is_apart(c) == uint32_t(part) ? double(get(e, c)) : 0.0;
        if (sketch_signs(side.seed, at / n, 0, c / 32) >> (c % 32) & 1) x[c] = -x[c];
      }
      walsh(x, n);
      for (int c = 0; c < n; ++c)
        if (sketch_signs(side.seed, at / n, 1, c / 32) >> (c % 32) & 1) x[c] = -x[c];
      walsh(x, n);
      for (int w = 0; w < min(n, count - at) / 32; ++w) {
        uint32_t word = 0;
        for (int i = 0; i < 32; ++i) word |= uint32_t(x[32 * w + i] > 0) << i;
        signs[at / 32 + w] = word;
      }
    }
    signs += count / 32;
  }
}

/// Entries begin … begin + count take get(entry − begin, channel), but those for which skip(entry − begin); by every thread
/// of a block. With groups of entries begin starts one, and none is skipped.
template <class Get, class Skip>
__device__ inline void put(const SideView& side, char* page, int begin, int count, Get get, Skip skip) {
  if (!side.quantised()) {
    for (int e = threadIdx.x; e < count * side.width; e += blockDim.x) {
      const int entry = e / side.width, c = e % side.width;
      if (skip(entry)) continue;
      const float x = get(entry, c);
      char* row = page + side.at + (begin + entry) * side.row_bytes();
      switch (side.kind) {
        case PageType::Kind::F32: reinterpret_cast<float*>(row)[c] = x; break;
        case PageType::Kind::F16: reinterpret_cast<__half*>(row)[c] = from_float<__half>(x); break;
        default: reinterpret_cast<__nv_bfloat16*>(row)[c] = from_float<__nv_bfloat16>(x);
      }
    }
    return;
  }
  if (side.sketched()) {
    for (int e = threadIdx.x; e < count; e += blockDim.x) {
      const int first = e / side.group * side.group;
      put_sketch(side, page, begin, first, min(first + side.group, count), e, get);
    }
    return;
  }
  if (side.sparse() && side.by_channel) {
    const int run = side.bits == 3 ? 8 : 8 / side.bits;  // channels whose codes are whole bytes
    const int runs = side.width / run, groups = (count + side.group - 1) / side.group;
    for (int item = threadIdx.x; item < groups * runs; item += blockDim.x) {
      const int first = item / runs * side.group, size = min(side.group, count - first), c0 = item % runs * run;
      for (int e = first; e < first + size; ++e) clear_codes(side, page, begin + e, c0, run);
      for (int c = c0; c < c0 + run; ++c)
        put_sparse(
            side, page, side.group_of(begin + first, c), size, [&](int i) { return float(get(first + i, c)); },
            [&](int i, int code) { add_code(side, page, begin + first + i, c, code); });
    }
    return;
  }
  const int per = 8 / side.bits;  // codes of a byte
  if (!side.by_channel) {
    const int groups = side.row_groups();
    for (int item = threadIdx.x; item < count * groups; item += blockDim.x) {
      const int entry = item / groups, first = item % groups * side.group, end = min(first + side.group, side.width);
      if (skip(entry)) continue;
      if (side.sphere()) {
        put_block(side, page, begin + entry, first, [&](int c) { return get(entry, c); });
        continue;
      }
      const int g = side.group_of(begin + entry, first);
      if (side.sparse()) {
        clear_codes(side, page, begin + entry, first, end - first);
        put_sparse(
            side, page, g, end - first, [&](int i) { return float(get(entry, first + i)); },
            [&](int i, int code) { add_code(side, page, begin + entry, first + i, code); });
        continue;
      }
      Extent of;
      for (int c = first; c < end; ++c) of.add(get(entry, c));
      const Quantiser by(side, of, side.zeros(page) + g, side.scales(page) + g);
      uint8_t* row = reinterpret_cast<uint8_t*>(page + side.at + (begin + entry) * side.row_bytes());
      for (int c = first; c < end; c += per) {
        int byte = 0;
        for (int i = 0; i < per; ++i) byte |= by.code(get(entry, c + i)) << (i * side.bits);
        row[c / per] = uint8_t(byte);
      }
    }
    return;
  }
  const auto number = [&](int entry, int c) {
    if (!side.polar()) return float(get(entry, c));
    const bool first = side.first(c);
    const double x = get(entry, first ? c : side.mate(c)), y = get(entry, first ? side.mate(c) : c);
    if (!first) return float(hypot(x, y));
    const double angle = atan2(y, x);
    return float(angle < 0 ? angle + 6.283185307179586 : angle);
  };
  const int bytes = side.width / per, groups = (count + side.group - 1) / side.group;
  for (int item = threadIdx.x; item < groups * bytes; item += blockDim.x) {
    const int first = item / bytes * side.group, end = min(first + side.group, count), c0 = item % bytes * per;
    for (int i = 0; i < per; ++i) {
      Extent of;
      for (int e = first; e < end; ++e) of.add(number(e, c0 + i));
      const int g = side.group_of(begin + first, c0 + i);
      const Quantiser by(side, of, side.zeros(page) + g, side.scales(page) + g);
      for (int e = first; e < end; ++e) {
        uint8_t& byte = *reinterpret_cast<uint8_t*>(page + side.at + (begin + e) * side.row_bytes() + c0 / per);
        const int code = by.code(number(e, c0 + i)) << (i * side.bits);
        byte = uint8_t(i == 0 ? code : byte | code);
      }
    }
  }
}

/// The extremes and the sum of channel c of entries first … last − 1. Loads come eight at a time: what was just written takes as
/// long to come back as anything.
struct Fold {
  float low = kInfinity, high = -kInfinity, sum = 0;
  template <class Get> __device__ Fold(int first, int last, Get get) {
    for (int e = first; e < last; e += 8) {
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = get(min(e + i, last - 1));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        low = fminf(low, x[i]), high = fmaxf(high, x[i]);
        if (e + i < last) sum += x[i];
      }
    }
  }
};

/// Makes the block columns of entries begin … end anew, of the page's first `held` entries; by every thread of a block,
/// after a barrier behind the writes.
__device__ inline void refresh(const PagesView& pages, const LayoutView& l, char* page, int begin, int end, int held) {
  unsigned taken = 0;  // numbers so far: the next column's go to the threads behind
  for (int i = 0; i < pages.columns; ++i) {
    const ColumnView& column = pages.column[i];
    if (column.keeps == Column::Keeps::User) continue;
    const int first_block = begin / column.block, blocks = (end + column.block - 1) / column.block - first_block;
    for (int item = int((threadIdx.x + blockDim.x - taken % blockDim.x) % blockDim.x); item < blocks * pages.d;
         item += int(blockDim.x)) {
      const int block = first_block + item / pages.d, c = item % pages.d;
      const int first = block * column.block, last = min(first + column.block, held);
      if (first >= last) continue;
      const auto made = [&](const Fold& of) {
        pages.block_at(l, page, i, block)
            .set(0, c,
                 column.keeps == Column::Keeps::KeyMin   ? of.low
                 : column.keeps == Column::Keeps::KeyMax ? of.high
                                                         : of.sum / float(last - first));
      };
      if (l.k.kind == PageType::Kind::BF16 && !l.k.pair) {
        const auto* row = reinterpret_cast<const __nv_bfloat16*>(page + l.k.at) + c;
        made(Fold(first, last, [&](int e) { return to_float(row[e * pages.d]); }));
      } else {
        made(Fold(first, last, [&](int e) { return l.k.one(page, e, c); }));
      }
    }
    taken += unsigned(blocks * pages.d);
  }
}

/// What a store holds, as panels in scratch: keys turned for reading, positions, biases (absent when no layout has them).
/// Without keys or values those have shapes and segments but no numbers.
struct Unpacked {
  Ragged k, v;
  Tensor positions, bias;
};
Unpacked unpack(Queue& queue, const char* where, const Pages& pages, const Read* read, bool keys, bool values);

}  // namespace heed::cuda
