// The store as kernels see it: pages of 64 entries of one (sequence, KV head), addressed through a table.
#pragma once
#include <array>
#include <string>
#include <vector>

#include "base/tensor.h"

namespace heed {

inline constexpr int kPage = 64;  // entries of a page

/// How one side (K or V) of a page is kept.
struct PageType {
  enum class Kind : uint8_t { F32, BF16, F16, Q8, Q4, Q2, Q3, Q1 } kind = Kind::BF16;
  /// Quantised kinds keep codes and, for each group, a scale (and a zero): `group` consecutive channels of one entry
  /// (Token; the last group may be shorter) or `group` consecutive entries of one channel (Channel, as KIVI keeps keys;
  /// group divides 64; only entries that are there count; not of Signed, Table and Sphere).
  enum class Axis : uint8_t { Token, Channel } axis = Axis::Token;
  int group = 32;
  /// Value: zero + point · scale. Scale and zero are rounded to f16 before the codes are made; a scale of 0 gives the code
  /// of the value 0 (Range: 0); codes are clamped to their range. With half = 2^(bits − 1):
  enum class Codes : uint8_t {
    Range,   // point = code = round((x − zero) / scale), scale = (max − min) / (2^bits − 1), zero = min
    Signed,  // no zeros; point = code − half = ⌊x / scale + 1/2⌋; 8 bits: scale = max|x| / 127, the code 0 unused;
             // fewer: scale = e / −half, e the first of the largest |x| (llama.cpp's q8_0 and q4_0)
    Table,  // no zeros; point = points[code], the nearest to x / scale, of equals the lower; scale = √(mean x²); at most
            // 4 bits
    Polar,  // groups of entries; point = code + 1/2. Channels make pairs: in the place of the first lies the pair's angle in
            // [0, 2π), in that of the second its length; code = ⌊(x − zero) / scale⌋, scale = (max − min) / 2^bits
    Sphere,  // 3 bits, groups of 16 channels of one entry, no zeros. The 48 bits are a word (the first code lowest) of angles of
    // neighbours: eight of 4 bits in [0, 2π), the middles of equal parts; then four, two and one of 2 bits in [0, π/2],
    // among neighbours' lengths, the nearest of points[4 (level − 2) …]; 2 bits unused. scale: the length left at last
    Sparse,  // point = points[code], the nearest to (x − zero) / scale, of equals the lower; at most 4 bits. Of a group, the
    // `outliers` numbers farthest from its mean (of equals the first) are kept as they are, in f16; zero and scale are
    // the middle and half the width of the range of the others
    Sketch,  // 1 bit, groups of entries: what stands for x has about its dot products with others, not its numbers. The
             // `outliers` channels with most of a group's squares (of equals the first) make one part of x, the others
    // another; of each the norm is kept and the signs (1: > 0) of so many projections, `sketch` of the others and
    // `outlier_sketch` of these. value = √(π/2) √n norm / projections · Σ ± row. Rows: sketch_width and sketch_signs
  } codes = Codes::Range;
  std::array<float, 16> points = {};   // Table, Sparse: 2^bits of them, ascending; Sphere: 4 for each of three levels
  uint8_t outliers = 0;                // Sparse: at most a quarter of a group; Sketch: fewer than there are channels
  int sketch = 0, outlier_sketch = 0;  // Sketch: multiples of 32; the second is 0 without outliers
  uint32_t seed = 1;                   // Sketch
  int turned = 0;  // Polar: of the first so many channels c and c + turned / 2 are a pair, of those behind them every two
  /// Of plain kinds: pages that two layers hold, as the first (1) or the second (2) of them sees it. 64 rows are directions,
  /// which each layer multiplies by norms of its own (value = row · norm); of kSpare entries the second layer has rows of
  /// its own. Rows; then F32 [2][64] norms; then U8 [64]: 0, or which of the spare rows (from 1) is the second layer's.
  uint8_t pair = 0;
  static constexpr int kSpare = 4;

  bool quantised() const { return kind >= Kind::Q8; }
  bool zeros() const { return codes == Codes::Range || codes == Codes::Polar || codes == Codes::Sparse; }
  bool sphere() const { return quantised() && codes == Codes::Sphere; }
  bool sparse() const { return quantised() && codes == Codes::Sparse; }
  bool sketched() const { return quantised() && codes == Codes::Sketch; }
  int bits() const;
  /// Of the codes of one entry.
  int64_t row_bits(int width) const { return sketched() ? sketch + outlier_sketch : int64_t(width) * bits(); }
  /// Numbers in f16 that a group keeps: scale, zero, outliers.
  int halves() const { return (zeros() ? 2 : 1) + (sparse() ? outliers : 0); }
  float point(uint32_t code) const {
    return codes == Codes::Range    ? float(code)
           : codes == Codes::Signed ? float(int(code) - (1 << (bits() - 1)))
           : codes == Codes::Polar  ? float(code) + 0.5f
                                    : points[code & 15];
  }
  /// Polar: the other channel of c's pair, and whether c is the first.
  bool first(int c) const { return c < turned ? c < turned / 2 : (c - turned) % 2 == 0; }
  int mate(int c) const {
    const int away = c < turned ? turned / 2 : 1;
    return first(c) ? c + away : c - away;
  }
  int64_t norms_at(int width) const { return int64_t(kPage + kSpare) * width * bits() / 8; }
  /// Scales of 64 entries of `width` numbers; 0 unless quantised. Sketch: norms, 64 of the others, then 64 of the outliers.
  int64_t groups(int width) const;
  /// U8 that say where outliers are: in their group (Sparse, [outliers][groups]), or which channels ([64 / group][outliers]).
  int64_t places(int width) const;
  /// Bytes of 64 entries of `width` numbers, padded to 64: codes in the side's order (Sketch: row by row, the outliers' signs
  /// behind the others'), the first in the low bits of a byte; then scales, then zeros where they are kept, then each
  /// outlier, as [64][⌈width / group⌉] (Token) or [64 / group][width] (Channel) whatever the side's order; then places.
  int64_t bytes(int width) const;
  bool operator==(const PageType&) const = default;
};

/// Points of both sides.
struct PagePoints {
  std::array<float, 16> k = {}, v = {};
};

/// Projections of a sketch come in blocks of n, the power of two from 32 on that holds the width (x is filled up with
/// zeros): block b's rows are those of the orthonormal H D1 H D0, H the Walsh–Hadamard matrix over √n, Dr diagonal with the
/// signs of round r. Bit i % 32 of word i / 32 set: −1.
constexpr int sketch_width(int width) {
  int n = 32;
  while (n < width) n *= 2;
  return n;
}
constexpr uint32_t sketch_signs(uint32_t seed, int block, int round, int word) {
  const auto mixed = [](uint32_t x) {
    x *= 0x9E3779B1u, x ^= x >> 16, x *= 0x85EBCA6Bu, x ^= x >> 13, x *= 0xC2B2AE35u;
    return x ^ x >> 16;
  };
  return mixed(seed + mixed(uint32_t(block * 512 + round * 256 + word) + 1));
}
inline constexpr int kMostSketchWidth = 256;

/// A number kept beside entries inside their page, so that it moves with them.
struct Column {
  enum class Keeps : uint8_t {
    User,    // written by a mechanism; `width` f32 an entry
    KeyMin,  // the store keeps, for each block of `block` entries, the channel-wise minimum of its keys (d f32)
    KeyMax,
    KeyMean,
  };
  std::string name;
  Keeps keeps = Keeps::User;
  int width = 1;   // User only
  int block = 1;   // entries of a block, a divisor of 64; 1 for User
  float fill = 0;  // User: the value of a new entry
};

/// In place of a column's number: the logit biases of synthetic entries, one an entry. Pages without have 0 and take none.
inline constexpr int kBiasColumn = -1;

/// Where things lie inside a page of one store. Everything is 64-byte aligned.
/// K is row-major [64][d]; V's order is the backend's choice (v_transposed: [d_v][64]).
struct PageLayout {
  int d = 0, d_v = 0;
  PageType k, v;
  bool v_transposed = false;
  int64_t k_at = 0, v_at = 0;
  int64_t position_at = 0;         // I32 [64]: true positions
  int64_t bias_at = -1;            // F32 [64]: logit bias of synthetic entries; −1: none
  std::vector<int64_t> column_at;  // column_type() [64 / block][width or d], in the order of the store's columns
  int64_t bytes = 0;
  int lists = 1;  // that hold such a page: of so many layers
};

/// How a column's numbers are kept: F32, but bounds of plain keys are some of these keys and lie exactly in their type.
Dtype column_type(const PageType& keys, Column::Keeps keeps);

/// Lays out a page of d-wide keys and d_v-wide values with these columns. Throws Error(Invalid) for widths, groups or
/// blocks that do not fit.
PageLayout page_layout(int d, int d_v, PageType k, PageType v, bool v_transposed, bool bias,
                       const std::vector<Column>& columns);

/// Pages of one layout that lie free, as a stack in device memory. Each page follows 64 bytes whose first I64 counts the
/// page lists that hold it. What needs pages finds enough of them: the host sees to that beforehand.
struct PageSupply {
  Tensor free;  // U64 [capacity]: addresses, the first top of them free
  Tensor top;   // I32 [1]
  int64_t page_bytes = 0;
  /// U64 [segments]; where it is given, page p of a segment is the one at base[segment] + kPageHeader + p · (kPageHeader +
  /// page_bytes), and the stack is not looked at: who let go of it may be given it again.
  Tensor base;
};
inline constexpr int64_t kPageHeader = 64;

/// One layer of a store. Segment = sequence · kv_heads + KV head. Pages of different layouts (a quantised past and a
/// recent part in full precision) may follow each other in one segment.
struct Pages {
  Tensor table;   // U64 [segments, capacity]: addresses of pages
  Tensor layout;  // U8 [segments, capacity]: which of `layouts` a page has
  Tensor length;  // I32 [segments]: entries held
  int64_t kv_heads = 1;
  int64_t length_bound = 0;         // host: no segment is longer
  bool plain_keys = false;          // keys are kept before rotary embedding
  bool shared = true;               // host: other lists may hold the same pages, so that growing copies one
  std::vector<PageLayout> layouts;  // at most 4
  const std::vector<Column>* columns = nullptr;
  std::vector<PageSupply> supply;  // for each of layouts; only kernels that change page lists need it

  int64_t segments() const { return length.size[0]; }
  // Host-visible pages only.
  char* page(int64_t segment, int64_t p) const { return reinterpret_cast<char*>(table.at<uint64_t>(segment, p)); }
  const PageLayout& layout_of(int64_t segment, int64_t p) const { return layouts[layout.at<uint8_t>(segment, p)]; }
};

}  // namespace heed
