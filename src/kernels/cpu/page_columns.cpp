#include "kernels/cpu/page_columns.h"

#include <algorithm>

#include "base/threads.h"
#include "kernels/check.h"
#include "kernels/choose.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/page_side.h"
#include "kernels/cpu/workers.h"

namespace heed::HEED_ISA {

void fill_columns(const Pages& pages, const PageLayout& layout, char* page, int begin, int end) {
  for (int i = 0; i < column_count(pages); ++i) {
    const Column& c = (*pages.columns)[size_t(i)];
    if (c.keeps == Column::Keeps::User)
      std::fill_n(column_at(pages, layout, page, i, begin), int64_t(end - begin) * c.width, c.fill);
  }
}

void refresh_columns(const Pages& pages, const PageLayout& layout, char* page, int begin, int end, int held, float* row) {
  const PageSide keys = PageSide::keys(layout, page);
  for (int i = 0; i < column_count(pages); ++i) {
    const Column& c = (*pages.columns)[size_t(i)];
    if (c.keeps == Column::Keeps::User) continue;
    const Dtype type = column_type(layout.k, c.keeps);
    for (int block = begin / c.block; block * c.block < end; ++block) {
      const int first = block * c.block, last = std::min(first + c.block, held);
      const auto made = [&](auto* to) {  // bounds are rounded nowhere: they are keys
        for (int e = first; e < last; ++e) {
          const float* key = read_entry(keys, e, row);
          for (int at = 0; at < layout.d; at += kLanes) {
            const int n = std::min(kLanes, layout.d - at);
            const F x = load_part(key + at, n), old = e == first ? x : load_part(to + at, n);
            F now = c.keeps == Column::Keeps::KeyMin   ? min(old, x)
                    : c.keeps == Column::Keeps::KeyMax ? max(old, x)
                    : e == first                       ? x
                                                       : old + x;
            if (c.keeps == Column::Keeps::KeyMean && e + 1 == last) now = now * set(1 / float(last - first));
            store_part(to + at, now, n);
          }
        }
      };
      char* to = block_at(layout, page, i, type, block);
      if (type == Dtype::BF16) made(reinterpret_cast<bf16*>(to));
      else if (type == Dtype::F16) made(reinterpret_cast<f16*>(to));
      else made(reinterpret_cast<float*>(to));
    }
  }
}

namespace {

/// Calls body(the page's numbers, null where it keeps none; the values' row; how many entries) for every page that holds
/// entries.
template <class Body>
void each_column(const Pages& pages, int column, const Ragged& values, Body&& body) {
  parallel_for(pages.segments(), [&](int64_t s) {
    const int64_t held = pages.length.at<int32_t>(s);
    for (int64_t p = 0; p * kPage < held; ++p) {
      const PageLayout& layout = pages.layout_of(s, p);
      char* page = pages.page(s, p);
      float* kept = column != kBiasColumn ? column_at(pages, layout, page, column, 0)
                    : layout.bias_at < 0  ? nullptr
                                          : reinterpret_cast<float*>(page + layout.bias_at);
      body(kept, values.begin(s) + p * kPage, std::min<int64_t>(kPage, held - p * kPage));
    }
  });
}

}  // namespace

void column_read(Queue&, const Pages& pages, int column, Ragged values) {
  const int64_t width = check_column("column_read", pages, column, values), step = values.values.stride[0];
  each_column(pages, column, values, [&](const float* from, int64_t row, int64_t count) {
    for (int64_t e = 0; e < count; ++e) {
      float* to = values.values.as<float>() + (row + e) * step;
      if (from) std::copy_n(from + e * width, width, to);
      else *to = 0;
    }
  });
}

void column_write(Queue&, const Pages& pages, int column, const Ragged& values) {
  const int64_t width = check_column("column_write", pages, column, values), step = values.values.stride[0];
  each_column(pages, column, values, [&](float* to, int64_t row, int64_t count) {
    for (int64_t e = 0; to && e < count; ++e)
      std::copy_n(values.values.as<float>() + (row + e) * step, width, to + e * width);
  });
}

void page_score(Queue& queue, const Ragged& q, const Pages& pages, int low, int high, Ragged scores) {
  constexpr const char* where = "page_score";
  const int block = check_blocks(where, q, pages, low, high);
  const int64_t h = q.heads, g = pages.kv_heads;
  require(scores.segments() == q.segments() && scores.values.type == Dtype::F32, where,
          "scores are F32 and have a segment for each sequence and query head");
  for (int64_t s = 0; s < q.segments(); ++s) require(q.length(s) <= 1, where, "q has at most one row a segment");
  const Scratch scratch(queue.scratch);
  const int64_t d = q.values.size[1], step = scores.values.stride[0];
  const Column::Keeps keeps[] = {(*pages.columns)[size_t(low)].keeps, (*pages.columns)[size_t(high)].keeps};
  parallel_with(queue, 3 * d * int64_t(sizeof(float)), q.segments(), [&](char* memory, int64_t s) {
    if (q.length(s) == 0) return;
    float* wide = reinterpret_cast<float*>(memory) + d;
    const int64_t kv = s / h * g + s % h * g / h, held = pages.length.at<int32_t>(kv);
    const float* query = widen_row(row_of(q.values, q.begin(s)), q.values.type, d, reinterpret_cast<float*>(memory));
    float* to = scores.values.as<float>() + scores.begin(s) * step;
    for (int64_t b = 0; b * block < held; ++b) {
      const int64_t page = b * block / kPage, in_page = b * block % kPage / block;
      const PageLayout& layout = pages.layout_of(kv, page);
      const auto numbers = [&](int column, int side) {
        const Dtype type = column_type(layout.k, keeps[side]);
        return widen_row(block_at(layout, pages.page(kv, page), column, type, in_page), type, d, wide + side * d);
      };
      const float *lo = numbers(low, 0), *hi = low == high ? lo : numbers(high, 1);
      F sum = zero();
      for (int64_t c = 0; c < d; c += kLanes) {
        const int n = int(std::min<int64_t>(kLanes, d - c));
        const F x = load_part(query + c, n);
        sum = sum + max(x * load_part(lo + c, n), x * load_part(hi + c, n));
      }
      to[b * step] = hsum(sum);
    }
  });
}

void page_choose(Queue& queue, const Ragged& q, const Pages& pages, const PageChoice& how, int64_t capacity,
                 Tensor index, Tensor count, Tensor rowptr) {
  choose_pages(queue, page_score, select, q, pages, how, capacity, index, count, rowptr);
}

}  // namespace heed::HEED_ISA
