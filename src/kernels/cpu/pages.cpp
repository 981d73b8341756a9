// page_write, page_read, page_move: entries in and out of pages.
#include <algorithm>

#include "kernels/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/page_columns.h"
#include "kernels/cpu/page_side.h"
#include "kernels/cpu/rotate.h"
#include "kernels/cpu/workers.h"

namespace heed::HEED_ISA {
namespace {

int64_t held(const Pages& pages, int64_t segment) { return pages.length.at<int32_t>(segment); }

int64_t widest(const Pages& pages) {
  int64_t width = 1;
  for (const PageLayout& layout : pages.layouts) width = std::max<int64_t>({width, layout.d, layout.d_v});
  return width;
}

void check_capacity(const char* where, const Pages& pages, int64_t segment, int64_t entries) {
  require(entries <= pages.table.size[1] * kPage, where, [&] {
    return "segment " + std::to_string(segment) + " has no pages for " + std::to_string(entries) + " entries";
  });
}

void check_side(const char* where, const Pages& pages, const Ragged& x, bool keys) {
  require(x.values.rank == 2 && is_float(x.values.type), where, "k and v are F32, BF16 or F16 [rows, width]");
  require(x.segments() == pages.segments(), where, "k and v have the store's segments");
  for (const PageLayout& layout : pages.layouts)
    require(x.values.size[1] == (keys ? layout.d : layout.d_v), where, "k and v have the store's widths");
}

struct PagePlace {
  int64_t segment, page;
};

/// Pages that entries begin(s) … end(s) of every segment touch.
template <class Begin, class End>
std::vector<PagePlace> pieces_of(const Pages& pages, Begin&& begin, End&& end) {
  std::vector<PagePlace> out;
  for (int64_t s = 0; s < pages.segments(); ++s)
    for (int64_t p = begin(s) / kPage; p * kPage < end(s); ++p) out.push_back({s, p});
  return out;
}

int32_t* positions_of(const PageLayout& layout, char* page) {
  return reinterpret_cast<int32_t*>(page + layout.position_at);
}
float* bias_of(const PageLayout& layout, char* page) { return reinterpret_cast<float*>(page + layout.bias_at); }

/// `count` rows of x from `row` into entries `begin` … of one side.
void put(const PageSide& side, int begin, int count, const Tensor& x, int64_t row, float* memory) {
  const int64_t width = side.width;
  for (int e = 0; e < count; ++e) {
    float* to = memory + e * width;
    const float* from = widen_row(row_of(x, row + e), x.type, width, to);
    if (from != to) std::copy_n(from, width, to);
  }
  write_entries(side, begin, count, memory, width);
}

}  // namespace

void page_write(Queue& queue, const Pages& pages, const Ragged& k, const Ragged& v, Tensor positions, Tensor first) {
  constexpr const char* where = "page_write";
  check_side(where, pages, k, true);
  check_side(where, pages, v, false);
  check_tensor(where, "positions", positions, {k.values.size[0]}, false, Dtype::I32);
  check_tensor(where, "first", first, {pages.segments()}, false, Dtype::I32);
  auto begin = [&](int64_t s) { return int64_t(first.at<int32_t>(s)); };
  auto end = [&](int64_t s) { return begin(s) + k.length(s); };
  for (int64_t s = 0; s < pages.segments(); ++s) {
    require(k.length(s) == v.length(s), where, "a segment of v is not as long as its keys");
    require(begin(s) >= 0, where, "first is negative");
    check_capacity(where, pages, s, end(s));
    for (int64_t p = begin(s) / kPage; k.length(s) > 0 && p * kPage < end(s); ++p) {
      const PageLayout& layout = pages.layout_of(s, p);
      for (const PageType* type : {&layout.k, &layout.v})
        require(
            !type->quantised() || type->axis != PageType::Axis::Channel || begin(s) % type->group == 0, where,
            [&] {
              return "entry " + std::to_string(begin(s)) + " is inside a group of " + std::to_string(type->group) +
                     " entries";
            },
            "write whole groups");
    }
  }
  const std::vector<PagePlace> pieces = pieces_of(pages, begin, [&](int64_t s) { return k.length(s) ? end(s) : 0; });
  const Scratch scratch(queue.scratch);
  const int64_t bytes = kPage * widest(pages) * int64_t(sizeof(float));
  const auto write = [&](char* memory, int64_t i) {
    const auto [s, p] = pieces[size_t(i)];
    const PageLayout& layout = pages.layout_of(s, p);
    char* page = pages.page(s, p);
    auto* rows = reinterpret_cast<float*>(memory);
    const int from = int(std::max(begin(s) - p * kPage, int64_t(0))),
              to = int(std::min<int64_t>(end(s) - p * kPage, kPage));
    const int64_t skipped = p * kPage + from - begin(s);
    put(PageSide::keys(layout, page), from, to - from, k.values, k.begin(s) + skipped, rows);
    put(PageSide::values(layout, page), from, to - from, v.values, v.begin(s) + skipped, rows);
    for (int e = from; e < to; ++e)
      positions_of(layout, page)[e] = positions.as<int32_t>()[k.begin(s) + skipped + e - from];
    if (layout.bias_at >= 0) std::fill(bias_of(layout, page) + from, bias_of(layout, page) + to, 0.0f);
    fill_columns(pages, layout, page, from, to);
    refresh_columns(pages, layout, page, from, to,
                    int(std::min<int64_t>(kPage, std::max(held(pages, s), end(s)) - p * kPage)), rows);
  };
  // The few rows of a decode step are written before a region would have begun.
  if (k.values.size[0] * (k.values.size[1] + v.values.size[1]) > 8192)
    return parallel_with(queue, bytes, int64_t(pieces.size()), write);
  char* memory = queue.scratch.take(Dtype::U8, {bytes}).as<char>();
  for (size_t i = 0; i < pieces.size(); ++i) write(memory, int64_t(i));
}

void page_read(Queue& queue, const Pages& pages, const Read* read, const Ragged& k, const Ragged& v, Tensor positions) {
  constexpr const char* where = "page_read";
  check_read(where, pages, read);
  const Rope* rope = pages.plain_keys && read ? read->rope : nullptr;
  if (k.values) check_side(where, pages, k, true);
  if (v.values) check_side(where, pages, v, false);
  const Scratch scratch(queue.scratch);
  Turns turns;
  if (rope) {
    double* each = queue.scratch.take(Dtype::F64, {std::max(rope->dims / 2, 1)}).as<double>();
    turns_of(*rope, each);
    turns = {rope, each};
  }
  const std::vector<PagePlace> pieces = pieces_of(
      pages, [](int64_t) { return int64_t(0); }, [&](int64_t s) { return held(pages, s); });
  parallel_with(queue, widest(pages) * int64_t(sizeof(float)), int64_t(pieces.size()), [&](char* memory, int64_t i) {
    const auto [s, p] = pieces[size_t(i)];
    const PageLayout& layout = pages.layout_of(s, p);
    char* page = pages.page(s, p);
    auto* to = reinterpret_cast<float*>(memory);
    const int count = int(std::min<int64_t>(kPage, held(pages, s) - p * kPage));
    for (int e = 0; e < count; ++e) {
      const int64_t entry = p * kPage + e;
      const int32_t position = positions_of(layout, page)[e];
      if (k.values) {
        const float* key = read_entry(PageSide::keys(layout, page), e, to);
        if (rope) {
          if (key != to) std::copy_n(key, layout.d, to);
          rotate_row(turns, read->place(s, entry, position), to);
          key = to;
        }
        narrow_row(key, layout.d, k.values.type, const_cast<char*>(row_of(k.values, k.begin(s) + entry)));
      }
      if (v.values)
        narrow_row(read_entry(PageSide::values(layout, page), e, to), layout.d_v, v.values.type,
                   const_cast<char*>(row_of(v.values, v.begin(s) + entry)));
      if (positions) positions.as<int32_t>()[((k.offsets ? k : v).begin(s) + entry) * positions.stride[0]] = position;
    }
  });
}

namespace {

/// What one side of 64 entries is while it moves: codes and their scales when it may move raw, else f32.
struct Moving {
  float* rows;     // [64][width]
  uint8_t* codes;  // [64][width]
  f16* scales;     // [64][2 · width]: scales, zeros and outliers of an entry's groups, then where outliers are

  static int64_t bytes(int64_t width) { return kPage * width * (4 + 1 + 2 * 2); }
  Moving(char* memory, int64_t width)
      : rows(reinterpret_cast<float*>(memory)), codes(reinterpret_cast<uint8_t*>(memory + kPage * width * 4)),
        scales(reinterpret_cast<f16*>(memory + kPage * width * 5)) {}

  /// Plain numbers go through f32 unharmed, so only codes need to move raw.
  static bool raw(const PageSide& from, const PageType& to) {
    return from.type->quantised() && from.type->axis == PageType::Axis::Token && *from.type == to;
  }

  void take(const PageSide& from, int entry, int at) const {
    const int64_t width = from.width;
    const float* row = read_entry(from, entry, rows + at * width);
    if (row != rows + at * width) std::copy_n(row, width, rows + at * width);
    if (!from.type->quantised() || from.type->axis == PageType::Axis::Channel) return;
    read_codes(from, entry, codes + at * width);
    f16* to = scales + at * 2 * width;
    each_beside(
        from, entry, [&](f16* numbers, int64_t n) { to = std::copy_n(numbers, n, to); },
        [&](uint8_t* places, int64_t n, int64_t done) { std::copy_n(places, n, reinterpret_cast<uint8_t*>(to) + done); });
  }

  /// What lies beside an entry's codes: numbers(from, count) for scales, zeros and each outlier of its groups, then
  /// places(from, count, so many before).
  template <class Numbers, class Places>
  static void each_beside(const PageSide& side, int entry, Numbers&& numbers, Places&& places) {
    const int64_t all = side.type->groups(side.width), own = all / kPage, first = entry * own;
    for (int i = 0; i < side.type->halves(); ++i) numbers(side.scales() + i * all + first, own);
    for (int i = 0; side.type->sparse() && i < side.type->outliers; ++i)
      places(side.places() + i * all + first, own, i * own);
  }

  void give_raw(const PageSide& to, int entry, int at) const {
    const int64_t width = to.width;
    write_codes(to, entry, codes + at * width);
    const f16* from = scales + at * 2 * width;
    each_beside(
        to, entry, [&](f16* numbers, int64_t n) { std::copy_n(from, n, numbers), from += n; },
        [&](uint8_t* places, int64_t n, int64_t done) {
          std::copy_n(reinterpret_cast<const uint8_t*>(from) + done, n, places);
        });
  }
};

/// Moves one side of the entries index[0 … count) to entries 0 … of a page.
void move_side(const Pages& from, int64_t s, const int32_t* index, int count, const PageSide& to, bool keys,
               const Moving& moving) {
  bool raw[kPage], all_raw = true;
  for (int i = 0; i < count; ++i) {
    const int64_t page = index[i] / kPage;
    const PageLayout& layout = from.layout_of(s, page);
    const PageSide side = keys ? PageSide::keys(layout, from.page(s, page)) : PageSide::values(layout, from.page(s, page));
    moving.take(side, index[i] % kPage, i);
    raw[i] = Moving::raw(side, *to.type);
    all_raw = all_raw && raw[i];
  }
  if (!all_raw) write_entries(to, 0, count, moving.rows, to.width);
  for (int i = 0; i < count; ++i)
    if (raw[i]) moving.give_raw(to, i, i);
}

/// Whether entries are a full page's and stay where they are: groups of entries are then not made anew.
bool stays(const Pages& from, int64_t s, const int32_t* index, int count, const char* page) {
  const int64_t number = index[0] / kPage;
  if (count < kPage || from.page(s, number) != page) return false;
  for (int i = 0; i < count; ++i)
    if (index[i] != number * kPage + i) return false;
  return true;
}

}  // namespace

void page_move(Queue& queue, const Pages& from, const Pages& to, Tensor index, Tensor count, int64_t capacity) {
  constexpr const char* where = "page_move";
  require(from.segments() == to.segments(), where, "both stores have the same segments");
  check_tensor(where, "index", index, {from.segments() * capacity}, false, Dtype::I32);
  check_tensor(where, "count", count, {from.segments()}, false, Dtype::I32);
  for (int64_t s = 0; s < from.segments(); ++s) {
    const int64_t n = count.at<int32_t>(s);
    require(n <= capacity, where, "more entries than the index has room for");
    check_capacity(where, to, s, n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t e = index.at<int32_t>(s * capacity + i);
      require(e >= 0 && e < from.table.size[1] * kPage, where, [&] { return "there is no entry " + std::to_string(e); });
    }
  }
  const int64_t width = std::max(widest(from), widest(to));
  int64_t beside = 0;  // numbers of an entry's User columns
  for (int i = 0; i < column_count(from); ++i)
    if ((*from.columns)[size_t(i)].keeps == Column::Keeps::User) beside += (*from.columns)[size_t(i)].width;
  const Scratch scratch(queue.scratch);
  // Pages of a segment in ascending order: an entry never moves up, so what is written has been read.
  const int64_t bytes = Moving::bytes(width) + kPage * (beside + 2) * 4;
  parallel_with(queue, bytes, from.segments(), [&](char* memory, int64_t s) {
    const Moving moving(memory, width);
    auto* numbers = reinterpret_cast<float*>(memory + Moving::bytes(width));
    for (int64_t first = 0; first < count.at<int32_t>(s); first += kPage) {
      const int here = int(std::min<int64_t>(kPage, count.at<int32_t>(s) - first));
      const int32_t* entries = index.as<int32_t>() + s * capacity + first;
      const PageLayout& layout = to.layout_of(s, first / kPage);
      char* page = to.page(s, first / kPage);
      if (stays(from, s, entries, here, page)) continue;
      int32_t moved_position[kPage];
      float moved_bias[kPage];
      for (int i = 0; i < here; ++i) {
        const int64_t p = entries[i] / kPage, e = entries[i] % kPage;
        const PageLayout& old = from.layout_of(s, p);
        char* source = from.page(s, p);
        moved_position[i] = positions_of(old, source)[e];
        moved_bias[i] = old.bias_at >= 0 ? bias_of(old, source)[e] : 0;
        float* at = numbers + i * beside;
        for (int c = 0; c < column_count(from); ++c)
          if ((*from.columns)[size_t(c)].keeps == Column::Keeps::User) {
            const int n = (*from.columns)[size_t(c)].width;
            std::copy_n(column_at(from, old, source, c, e), n, at);
            at += n;
          }
      }
      move_side(from, s, entries, here, PageSide::keys(layout, page), true, moving);
      move_side(from, s, entries, here, PageSide::values(layout, page), false, moving);
      for (int i = 0; i < here; ++i) {
        positions_of(layout, page)[i] = moved_position[i];
        if (layout.bias_at >= 0) bias_of(layout, page)[i] = moved_bias[i];
        const float* at = numbers + i * beside;
        for (int c = 0; c < column_count(to); ++c)
          if ((*to.columns)[size_t(c)].keeps == Column::Keeps::User) {
            const int n = (*to.columns)[size_t(c)].width;
            std::copy_n(at, n, column_at(to, layout, page, c, i));
            at += n;
          }
      }
      refresh_columns(to, layout, page, 0, here, here, moving.rows);
    }
  });
}

}  // namespace heed::HEED_ISA
