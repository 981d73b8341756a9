// Products with many tokens (prefill).
#include <algorithm>
#include <atomic>

#include "base/threads.h"
#include "kernels/cpu/product_tile.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/weights.h"

namespace heed::HEED_ISA {
namespace {

/// Groups of tokens whose sums one task holds (512 tokens × 96 rows is 192 KB), and groups packed at a time.
constexpr int64_t kTaskGroups = 32, kPackedGroups = 128;

/// The activations of up to kPackedGroups groups of tokens, as the register tile reads them: strips of Tile::groups
/// groups, the last strip maybe narrower, each with all of k.
template <class Tile>
struct Packed {
  float* words;
  int64_t groups, depth;  // depth: words of k

  int strip_groups(int64_t strip) const { return int(std::min<int64_t>(Tile::groups, groups - strip * Tile::groups)); }
  /// Word `word`, a multiple of 16, of a strip's first group.
  float* at(int64_t strip, int64_t word) const {
    return words + (strip * Tile::groups * depth + word * strip_groups(strip)) * kGroup;
  }
};

/// Packs one group: tokens first_token + 16 group … of x, those past the end as zeros.
template <class Tile>
void pack(const Product& p, int64_t first_token, int64_t group, const Packed<Tile>& to) {
  using Number = typename Tile::Number;
  constexpr int pair = Tile::pair;
  const int64_t strip = group / Tile::groups, stride = Tile::group_stride(to.strip_groups(strip));
  const int64_t first = first_token + group * kGroup, tokens = std::min<int64_t>(kGroup, p.tokens() - first);
  alignas(64) Number rows[kGroup][16 * pair] = {};
  alignas(64) float columns[16][kGroup];
  for (int64_t word = 0; word < to.depth; word += 16) {
    const int64_t n = std::min<int64_t>(16 * pair, p.w.width - word * pair), words = std::min<int64_t>(16, to.depth - word);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* x = p.x_row(first + t) + word * pair;
      over_lanes(n, [&](int64_t i, auto part) { part.put(rows[t] + i, part.get(x + i)); });
      std::fill(rows[t] + n, rows[t] + 16 * pair, Number(0));
    }
    const float* in = reinterpret_cast<const float*>(rows);
    for (int a = 0; a < kGroup; a += kSquare)
      for (int b = 0; b < 16; b += kSquare) {
        Lane square[kSquare];
        for (int i = 0; i < kSquare; ++i) square[i] = load_lane(in + (a + i) * 16 + b);
        transpose(square);
        for (int i = 0; i < kSquare; ++i) store_lane(columns[b + i] + a, square[i]);
      }
    float* out = to.at(strip, word) + Tile::group_at(int(group % Tile::groups));
    for (int64_t i = 0; i < words; ++i) std::memcpy(out + i * stride, columns[i], sizeof columns[i]);
  }
}

template <class Tile>
void unpack_panel(const Product& p, int64_t first_row, int64_t rows, int64_t begin, int64_t depth,
                  typename Tile::Number* panel) {
  using Number = typename Tile::Number;
  const int64_t there = std::min(p.w.width - begin, depth), padded = ceil_div(rows, Tile::rows) * Tile::rows;
  if (there > 0) unpack(p.w, first_row, rows, begin, there, panel, Tile::panel_stride);
  for (int64_t r = 0; r < padded; ++r) {
    Number* out = panel + r * Tile::panel_stride;
    std::fill(out + (r < rows ? there : 0), out + depth, Number(0));
  }
}

/// The sums of a task → y, transposed, with bias.
void finish(const Product& p, int64_t first_row, int64_t rows, int64_t first_token, int64_t tokens, const float* sums,
            int64_t stride) {
  const float* bias = p.bias ? p.bias.as<float>() + first_row : nullptr;
  for (int64_t t = 0; t < tokens; t += kSquare)
    for (int64_t r = 0; r < rows; r += kSquare) {
      if (t + kSquare > tokens || r + kSquare > rows) {
        for (int64_t i = r; i < std::min(rows, r + kSquare); ++i)
          for (int64_t j = t; j < std::min(tokens, t + kSquare); ++j)
            p.put(first_token + j, first_row + i, sums[i * stride + j]);
        continue;
      }
      Lane square[kSquare];
      for (int i = 0; i < kSquare; ++i) square[i] = load_lane(sums + (r + i) * stride + t);
      transpose(square);
      for (int j = 0; j < kSquare; ++j) {
        float* y = p.y_row(first_token + t + j) + first_row + r;
        if (bias) square[j] = square[j] + load_lane(bias + r);
        if (p.accumulate) square[j] = square[j] + load_lane(y);
        store_lane(y, square[j]);
      }
    }
}

/// Rows of weights × groups of tokens. panel and sums are the worker's own room; sums[row][token].
template <class Tile>
void multiply_task(const Product& p, const Packed<Tile>& x, int64_t first_row, int64_t rows, int64_t first_token,
                   int64_t first_group, int64_t groups, typename Tile::Number* panel, float* sums) {
  const int64_t stride = groups * kGroup, depth = x.depth * Tile::pair;
  for (int64_t begin = 0; begin < depth; begin += Tile::part) {
    const int64_t numbers = std::min<int64_t>(Tile::part, depth - begin), words = numbers / Tile::pair;
    unpack_panel<Tile>(p, first_row, rows, begin, numbers, panel);
    for (int64_t strip = first_group / Tile::groups; strip * Tile::groups < first_group + groups; ++strip) {
      const float* in = x.at(strip, begin / Tile::pair);
      float* out = sums + (strip * Tile::groups - first_group) * kGroup;
      const int width = x.strip_groups(strip);
      for (int64_t r = 0; r < rows; r += Tile::rows) {
        const auto* w = panel + r * Tile::panel_stride;
        float* c = out + r * stride;
        if (width == 1) Tile::template multiply<1>(w, in, words, c, stride, begin == 0);
        if constexpr (Tile::groups > 1)
          if (width == 2) Tile::template multiply<2>(w, in, words, c, stride, begin == 0);
        if constexpr (Tile::groups > 2)
          if (width == 3) Tile::template multiply<3>(w, in, words, c, stride, begin == 0);
        if constexpr (Tile::groups > 3)
          if (width == 4) Tile::template multiply<4>(w, in, words, c, stride, begin == 0);
      }
    }
  }
  finish(p, first_row, rows, first_token, std::min(stride, p.tokens() - first_token), sums, stride);
}

template <class Tile>
void multiply(Arena& arena, const Product& p) {
  using Number = typename Tile::Number;
  const Scratch give_back(arena);
  const int64_t depth = ceil_div(p.w.width, Tile::align) * Tile::align / Tile::pair,
                all_groups = ceil_div(p.tokens(), kGroup);
  const int64_t most = std::min(all_groups, kPackedGroups), task_groups = std::min(most, kTaskGroups);
  const Tensor packed = arena.take(Dtype::F32, {most * kGroup * depth});

  // About four tasks for each worker even out what else the machine does; each should still use a panel well.
  const int workers = threads();
  const int64_t tiles = ceil_div(p.w.rows, Tile::rows), token_tasks = ceil_div(all_groups, kTaskGroups);
  const int64_t panel_rows = Tile::rows * std::clamp<int64_t>(tiles * token_tasks / (4 * workers),
                                                              ceil_div(24, Tile::rows), Tile::most_rows / Tile::rows);
  const int64_t panels = ceil_div(p.w.rows, panel_rows);
  const int64_t panel_numbers = panel_rows * Tile::panel_stride, sums = panel_rows * task_groups * kGroup;
  const Tensor panel_room = arena.take(Dtype::U8, {workers, panel_numbers * int64_t(sizeof(Number))});
  const Tensor sums_room = arena.take(Dtype::F32, {workers, sums});

  for (int64_t first_group = 0; first_group < all_groups; first_group += most) {
    const Packed<Tile> x{packed.as<float>(), std::min(most, all_groups - first_group), depth};
    const int64_t first_token = first_group * kGroup;
    parallel_for(x.groups, [&](int64_t g) { pack(p, first_token, g, x); });

    const int64_t splits = ceil_div(x.groups, task_groups);
    std::atomic<int64_t> next{0};
    parallel([&](int worker) {
      const typename Tile::Registers registers;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < panels * splits;) {
        const int64_t row = i / splits * panel_rows, group = i % splits * task_groups;
        multiply_task(p, x, row, std::min(panel_rows, p.w.rows - row), first_token + group * kGroup, group,
                      std::min(task_groups, x.groups - group), static_cast<Number*>(panel_room.data) + worker * panel_numbers,
                      sums_room.as<float>() + worker * sums);
      }
    });
  }
}

}  // namespace

void multiply_many(Arena& arena, const Product& p) {
  // Weights of 16 bits and fewer lose less to bf16 than they already have; f32 ones keep their precision.
  if (p.w.type == Dtype::F32) multiply<VectorTile<float>>(arena, p);
  else multiply<BestTile>(arena, p);
}

}  // namespace heed::HEED_ISA
