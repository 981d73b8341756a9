// Products with many tokens (prefill).
#include <algorithm>
#include <atomic>

#include "base/threads.h"
#include "kernels/cpu/product_tile.h"
#include "kernels/cpu/weights.h"

namespace heed::HEED_ISA {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Groups of tokens whose sums one task holds (512 tokens × 96 rows is 192 KB), and groups packed at a time.
constexpr int64_t kTaskGroups = 32, kPackedGroups = 128;

/// The activations of up to kPackedGroups groups of tokens, as the register tile reads them: strips of kStripGroups
/// groups, the last strip maybe narrower, each with all of k.
struct Packed {
  float* words;
  int64_t groups, depth;  // depth: words of k

  int strip_groups(int64_t strip) const { return int(std::min<int64_t>(kStripGroups, groups - strip * kStripGroups)); }
  /// Word `word` of a strip's first token. Only multiples of 16 words may be asked for.
  float* at(int64_t strip, int64_t word) const {
    return words + (strip * kStripGroups * depth + word * strip_groups(strip)) * kGroup;
  }
};

/// Packs one group: tokens first … of x, those past the end as zeros.
void pack(const Product& p, int64_t first_token, int64_t group, const Packed& to) {
  const int64_t strip = group / kStripGroups, place = group % kStripGroups;
#if defined(__AMX_BF16__)
  const int64_t stride = kGroup, offset = place * kGroup * 16;
#else
  const int64_t stride = to.strip_groups(strip) * kGroup, offset = place * kGroup;
#endif
  const int64_t first = first_token + group * kGroup, tokens = std::min<int64_t>(kGroup, p.tokens() - first);
  alignas(64) Number rows[kGroup][16 * kPair] = {};
  alignas(64) float columns[16][kGroup];
  for (int64_t word = 0; word < to.depth; word += 16) {
    const int64_t n = std::min<int64_t>(16 * kPair, p.w.width - word * kPair), words = std::min<int64_t>(16, to.depth - word);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* x = p.x_row(first + t) + word * kPair;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(rows[t] + i, load(x + i));
      if (i < n) store_part(rows[t] + i, load_part(x + i, int(n - i)), int(n - i));
      for (i = n; i < 16 * kPair; ++i) rows[t][i] = Number(0);
    }
    const float* in = reinterpret_cast<const float*>(rows);
    for (int a = 0; a < kGroup; a += kSquare)
      for (int b = 0; b < 16; b += kSquare) {
        Lane square[kSquare];
        for (int i = 0; i < kSquare; ++i) square[i] = load_lane(in + (a + i) * 16 + b);
        transpose(square);
        for (int i = 0; i < kSquare; ++i) store_lane(columns[b + i] + a, square[i]);
      }
    float* out = to.at(strip, word) + offset;
    for (int64_t i = 0; i < words; ++i) std::memcpy(out + i * stride, columns[i], sizeof columns[i]);
  }
}

/// One worker's room: a panel of weights and the sums of a task, sums[row][token].
struct Room {
  Number* panel;
  float* sums;
};

void unpack_panel(const Product& p, int64_t first_row, int64_t rows, int64_t begin, int64_t depth, Number* panel) {
  const int64_t there = std::min(p.w.width - begin, depth), padded = ceil_div(rows, kTileRows) * kTileRows;
  for (int64_t r = 0; r < padded; ++r) {
    Number* out = panel + r * kPanelStride;
    const int64_t n = r < rows ? there : 0;
    if (n > 0) unpack(p.w, first_row + r, begin, n, out);
    std::fill(out + n, out + depth, Number(0));
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
          for (int64_t j = t; j < std::min(tokens, t + kSquare); ++j) p.put(first_token + j, first_row + i, sums[i * stride + j]);
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

void multiply_task(const Product& p, const Packed& x, int64_t first_row, int64_t rows, int64_t first_token,
                   int64_t first_group, int64_t groups, const Room& room) {
  const int64_t stride = groups * kGroup, depth = x.depth * kPair;
  for (int64_t begin = 0; begin < depth; begin += kPart) {
    const int64_t numbers = std::min<int64_t>(kPart, depth - begin), words = numbers / kPair;
    unpack_panel(p, first_row, rows, begin, numbers, room.panel);
    for (int64_t strip = first_group / kStripGroups; strip * kStripGroups < first_group + groups; ++strip) {
      const float* in = x.at(strip, begin / kPair);
      float* out = room.sums + (strip * kStripGroups - first_group) * kGroup;
      const int width = x.strip_groups(strip);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const Number* w = room.panel + r * kPanelStride;
        float* c = out + r * stride;
        if (width == 1) tile<1>(w, in, words, c, stride, begin == 0);
        if constexpr (kStripGroups > 1) if (width == 2) tile<2>(w, in, words, c, stride, begin == 0);
        if constexpr (kStripGroups > 2) if (width == 3) tile<3>(w, in, words, c, stride, begin == 0);
        if constexpr (kStripGroups > 3) if (width == 4) tile<4>(w, in, words, c, stride, begin == 0);
      }
    }
  }
  const int64_t tokens = std::min(stride, p.tokens() - first_token);
  finish(p, first_row, rows, first_token, tokens, room.sums, stride);
}

}  // namespace

void multiply_many(Arena& arena, const Product& p) {
  const Scratch give_back(arena);
  const int64_t depth = ceil_div(p.w.width, kAlign) * kAlign / kPair, all_groups = ceil_div(p.tokens(), kGroup);
  const int64_t most = std::min(all_groups, kPackedGroups), task_groups = std::min(most, kTaskGroups);
  const Tensor words = arena.take(Dtype::F32, {most * kGroup * depth});

  // About four tasks for each worker even out what else the machine does; each should still use a panel well.
  const int workers = threads();
  const int64_t tiles = ceil_div(p.w.rows, kTileRows), token_tasks = ceil_div(all_groups, kTaskGroups);
  const int64_t panel_rows = std::clamp<int64_t>(tiles * kTileRows * token_tasks / (4 * workers) / kTileRows,
                                                 std::max(1, 24 / kTileRows), kMaxPanel / kTileRows) * kTileRows;
  const int64_t panels = ceil_div(p.w.rows, panel_rows);
  const int64_t panel_numbers = panel_rows * kPanelStride, sums = panel_rows * task_groups * kGroup;
  const Tensor panel_room = arena.take(Dtype::U8, {workers, panel_numbers * int64_t(sizeof(Number))});
  const Tensor sums_room = arena.take(Dtype::F32, {workers, sums});

  for (int64_t first_group = 0; first_group < all_groups; first_group += most) {
    const Packed x{words.as<float>(), std::min(most, all_groups - first_group), depth};
    const int64_t first_token = first_group * kGroup;
    parallel_for(x.groups, [&](int64_t g) { pack(p, first_token, g, x); });

    const int64_t splits = ceil_div(x.groups, task_groups);
    std::atomic<int64_t> next{0};
    parallel([&](int worker) {
      const TileRegisters registers;
      const Room room{panel_room.as<Number>() + worker * panel_numbers, sums_room.as<float>() + worker * sums};
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < panels * splits;) {
        const int64_t row = i / splits * panel_rows, group = i % splits * task_groups;
        multiply_task(p, x, row, std::min(panel_rows, p.w.rows - row), first_token + group * kGroup, group,
                      std::min(task_groups, x.groups - group), room);
      }
    });
  }
}

}  // namespace heed::HEED_ISA
