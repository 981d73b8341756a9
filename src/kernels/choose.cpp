#include "kernels/choose.h"

#include <algorithm>
#include <cmath>

#include "kernels/check.h"

namespace heed {
namespace {

/// Numbers in scratch whose segment s has lengths[s] of them.
Ragged numbers(Queue& queue, const std::vector<int64_t>& lengths, int64_t heads) {
  Ragged out;
  out.heads = heads;
  out.offsets = queue.scratch.take(Dtype::I64, {int64_t(lengths.size()) + 1});
  int64_t* offsets = out.offsets.as<int64_t>();
  offsets[0] = 0;
  for (size_t s = 0; s < lengths.size(); ++s) offsets[s + 1] = offsets[s] + lengths[s];
  out.bound = offsets[lengths.size()];
  out.values = queue.scratch.take(Dtype::F32, {out.bound});
  return out;
}

}  // namespace

void choose_pages(Queue& queue, decltype(Kernels::page_score) score, decltype(Kernels::select) select, const Ragged& q,
                  const Pages& pages, const PageChoice& how, int64_t capacity, Tensor index, Tensor count, Tensor rowptr) {
  const int64_t block = check_choice("page_choose", q, pages, how, capacity, index, count, rowptr), part = block / how.split;
  const int64_t h = q.heads, g = pages.kv_heads, group = h / g, rows = count.size[0];
  const bool each = how.of == PageChoice::Of::Each;
  const Scratch scratch(queue.scratch);
  const auto held = [&](int64_t query_head) {  // a segment of q
    return int64_t(pages.length.at<int32_t>(query_head / h * g + query_head % h / group));
  };
  std::vector<int64_t> parts, first, blocks;  // first: of each list, the query head that it starts with
  for (int64_t s = 0; s < q.segments(); ++s) {
    parts.push_back((held(s) + part - 1) / part);
    if (q.length(s / h * h) == 0 || (!each && s % group != 0)) continue;
    first.push_back(s), blocks.push_back((held(s) + block - 1) / block);
  }
  require(int64_t(first.size()) == rows, "page_choose", "a list for each head of the sequences that have a row");
  const Ragged scores = numbers(queue, parts, h), worth = numbers(queue, blocks, each ? h : g);
  score(queue, q, pages, how.low, how.high, scores);
  Select best;
  best.count = queue.scratch.take(Dtype::I32, {rows});
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t s = first[size_t(r)], entries = held(s), all = blocks[size_t(r)], members = each ? 1 : group;
    const int64_t granted = std::min(entries, std::max(how.number, int64_t(std::floor(how.share * double(entries) + 1e-9))));
    const int64_t recent_from = how.recent > 0 ? std::max<int64_t>(0, entries - how.recent) / block : all;
    const int64_t stays = std::min((how.sinks + block - 1) / block + all - recent_from, all);
    best.count.at<int32_t>(r) = int32_t(std::min(std::max({how.least, stays, (granted + block - 1) / block}), all));
    float* to = worth.values.as<float>() + worth.begin(r);
    for (int64_t b = 0; b < all; ++b) {
      to[b] = -INFINITY;
      for (int64_t p = b * how.split; p < std::min((b + 1) * how.split, parts[size_t(s)]); ++p) {
        float x = how.of == PageChoice::Of::Max ? -INFINITY : 0;
        for (int64_t member = 0; member < members; ++member) {
          const float own = scores.values.at<float>(scores.begin(s + member) + p);
          x = how.of == PageChoice::Of::Max ? std::max(x, own) : x + own;
        }
        to[b] = std::max(to[b], how.of == PageChoice::Of::Mean ? x / float(group) : x);
      }
      if (b * block < how.sinks || b >= recent_from) to[b] = INFINITY;
    }
  }
  select(queue, worth, best, capacity, index, count);
  for (int64_t r = 0; r <= rows; ++r) rowptr.at<int64_t>(r) = r * capacity;
}

}  // namespace heed
