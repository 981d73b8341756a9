#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/check.h"
#include "kernels/reference/page.h"

namespace heed::reference {
namespace {

int64_t pages_for(int64_t entries) { return (entries + kPage - 1) / kPage; }
int64_t& holders(char* page) { return *reinterpret_cast<int64_t*>(page - kPageHeader); }

char* take(const PageSupply& supply, int64_t s, int64_t p) {
  if (supply.base) {
    char* page = reinterpret_cast<char*>(supply.base.at<uint64_t>(s)) + p * (kPageHeader + supply.page_bytes) + kPageHeader;
    holders(page) = 1;
    return page;
  }
  int32_t& top = supply.top.at<int32_t>(0);
  require(top > 0, "page supply", "no page lies free: the store promised more than it has");
  char* page = reinterpret_cast<char*>(supply.free.at<uint64_t>(--top));
  holders(page) = 1;
  return page;
}

void let_go(const PageSupply& supply, char* page) {
  if (--holders(page) == 0 && !supply.base)
    supply.free.at<uint64_t>(supply.top.at<int32_t>(0)++) = reinterpret_cast<uint64_t>(page);
}

const PageSupply& supply_of(const Pages& pages, int64_t s, int64_t p) {
  return pages.supply[pages.layout.at<uint8_t>(s, p)];
}

void own(const Pages& pages, int64_t s, int64_t p) {
  char* page = pages.page(s, p);
  if (holders(page) == 1) return;
  const PageSupply& supply = supply_of(pages, s, p);
  char* copy = take(supply, s, p);
  std::memcpy(copy, page, size_t(supply.page_bytes));
  let_go(supply, page);
  pages.table.at<uint64_t>(s, p) = reinterpret_cast<uint64_t>(copy);
}

void check_segments(const char* where, const Pages& pages, const Tensor& t) {
  check_tensor(where, "numbers", t, {pages.segments()}, false, Dtype::I32);
}

}  // namespace

void page_supply(Queue&, const PageSupply& supply, Tensor block) {
  const int64_t stride = kPageHeader + supply.page_bytes;
  int32_t& top = supply.top.at<int32_t>(0);
  require(top + block.numel() / stride <= supply.free.size[0], "page_supply", "more pages than the supply has room for");
  for (int64_t at = 0; at + stride <= block.numel(); at += stride) {
    char* page = block.as<char>() + at + kPageHeader;
    holders(page) = 0;
    supply.free.at<uint64_t>(top++) = reinterpret_cast<uint64_t>(page);
  }
}

void page_grow(Queue&, const Pages& pages, const Ragged& rows, Tensor first) {
  check_segments("page_grow", pages, first);
  require(rows.segments() == pages.segments(), "page_grow", "rows have the store's segments");
  for (int64_t s = 0; s < pages.segments(); ++s) {
    int32_t& length = pages.length.at<int32_t>(s);
    first.at<int32_t>(s) = length;
    const int64_t count = rows.length(s), end = length + count;
    if (count == 0) continue;
    require(pages_for(end) <= pages.table.size[1], "page_grow",
            [&] { return "the table is too narrow for " + std::to_string(end) + " entries"; });
    if (length % kPage != 0) own(pages, s, length / kPage);
    for (int64_t p = pages_for(length); p < pages_for(end); ++p) {
      pages.table.at<uint64_t>(s, p) = reinterpret_cast<uint64_t>(take(pages.supply[0], s, p));
      pages.layout.at<uint8_t>(s, p) = 0;
    }
    length = int32_t(end);
  }
}

void page_own(Queue&, const Pages& pages, Tensor until) {
  check_segments("page_own", pages, until);
  for (int64_t s = 0; s < pages.segments(); ++s)
    for (int64_t p = 0; p < pages_for(std::min(until.at<int32_t>(s), pages.length.at<int32_t>(s))); ++p)
      own(pages, s, p);
}

void page_shrink(Queue&, const Pages& pages, Tensor to) {
  check_segments("page_shrink", pages, to);
  for (int64_t s = 0; s < pages.segments(); ++s) {
    int32_t& length = pages.length.at<int32_t>(s);
    const int32_t left = std::clamp(to.at<int32_t>(s), 0, length);
    for (int64_t p = pages_for(left); p < pages_for(length); ++p) let_go(supply_of(pages, s, p), pages.page(s, p));
    length = left;
  }
}

void page_hold(Queue&, const Pages& pages) {
  for (int64_t s = 0; s < pages.segments(); ++s)
    for (int64_t p = 0; p < pages_for(pages.length.at<int32_t>(s)); ++p) ++holders(pages.page(s, p));
}

void page_convert(Queue& queue, const Pages& pages, Tensor first, Tensor last, int layout, bool again) {
  check_segments("page_convert", pages, first);
  check_segments("page_convert", pages, last);
  for (int64_t s = 0; s < pages.segments(); ++s) {
    const int64_t length = pages.length.at<int32_t>(s), end = std::min<int64_t>(last.at<int32_t>(s), pages_for(length));
    for (int64_t p = std::max(0, first.at<int32_t>(s)); p < end; ++p) {
      uint8_t& has = pages.layout.at<uint8_t>(s, p);
      if (has == layout && !again) continue;
      // One page as a store of its own, so that page_move sees nothing else.
      uint64_t& old_page = pages.table.at<uint64_t>(s, p);
      uint64_t new_page = reinterpret_cast<uint64_t>(take(pages.supply[size_t(layout)], s, p));
      uint8_t new_layout = uint8_t(layout);
      int32_t count = int32_t(std::min<int64_t>(kPage, length - p * kPage)), index[kPage];
      for (int i = 0; i < count; ++i) index[i] = i;
      Pages from = pages, to;
      from.kv_heads = 1, from.length_bound = kPage;
      from.table = Tensor(&old_page, Dtype::U64, {1, 1}), from.layout = Tensor(&has, Dtype::U8, {1, 1});
      from.length = Tensor(&count, Dtype::I32, {1});
      to = from;
      to.table = Tensor(&new_page, Dtype::U64, {1, 1}), to.layout = Tensor(&new_layout, Dtype::U8, {1, 1});
      queue.run->page_move(queue, from, to, Tensor(index, Dtype::I32, {count}), from.length, count);
      if (old_page != new_page) let_go(pages.supply[has], reinterpret_cast<char*>(old_page));
      old_page = new_page, has = new_layout;
    }
  }
}

namespace {

/// What one side of two layers' pages becomes in a page that both hold.
void pair_side(const PageSide& one, const PageSide& two, const PageSide& to, int width, const float* apart, float t) {
  int spare = 0;
  std::vector<double> x(static_cast<size_t>(width)), y = x;
  for (int e = 0; e < kPage; ++e) {
    double xx = 0, yy = 0, xy = 0;
    for (int c = 0; c < width; ++c) {
      const double a = x[size_t(c)] = double(one.get(e, c)), b = y[size_t(c)] = double(two.get(e, c));
      xx += a * a, yy += b * b, xy += a * b;
    }
    if (apart[e] != 0) {
      to.spare(e) = uint8_t(++spare);
      to.norm(0, e) = to.norm(1, e) = 1;
      for (int c = 0; c < width; ++c)
        to.put_row(e, c, float(x[size_t(c)])), to.put_row(kPage + spare - 1, c, float(y[size_t(c)]));
      continue;
    }
    to.spare(e) = 0;
    const double m = std::sqrt(xx), n = std::sqrt(yy),
                 angle = m * n > 0 ? std::acos(std::clamp(xy / (m * n), -1.0, 1.0)) : 0;
    double from_one = 1 - double(t), from_two = double(t);
    if (m * n == 0) from_one = 1, from_two = 1;  // where one is 0, the other's
    else if (std::sin(angle) >= 1e-7)
      from_one = std::sin((1 - double(t)) * angle) / std::sin(angle),
      from_two = std::sin(double(t) * angle) / std::sin(angle);
    to.norm(0, e) = float(m), to.norm(1, e) = float(n);
    for (int c = 0; c < width; ++c)
      to.put_row(e, c, float((m > 0 ? from_one * x[size_t(c)] / m : 0) + (n > 0 ? from_two * y[size_t(c)] / n : 0)));
  }
}

/// Biases and columns of a page's entries, as they are in another of the same layer.
void keep_beside(const Page& from, const Page& to) {
  for (int e = 0; e < kPage && to.has_bias(); ++e) to.bias(e) = from.has_bias() ? from.bias(e) : 0;
  for (size_t i = 0; to.columns && i < to.columns->size(); ++i)
    if (const Column& c = (*to.columns)[i]; c.keeps == Column::Keeps::User)
      std::copy_n(from.column(int(i), 0), int64_t(kPage) * c.width, to.column(int(i), 0));
  to.refresh(0, kPage, kPage);
}

}  // namespace

void page_pair(Queue&, const Pages& one, const Pages& two, Tensor first, Tensor last, int layout, const Ragged& k_apart,
               const Ragged& v_apart, float t) {
  constexpr const char* where = "page_pair";
  check_segments(where, one, first);
  check_segments(where, one, last);
  check_pair(where, one, two, layout);
  for (int64_t s = 0; s < one.segments(); ++s) {
    const int64_t full = std::min(one.length.at<int32_t>(s), two.length.at<int32_t>(s)) / kPage;
    for (int64_t p = std::max(0, first.at<int32_t>(s)); p < std::min<int64_t>(last.at<int32_t>(s), full); ++p) {
      if (one.layout.at<uint8_t>(s, p) != 0 || two.layout.at<uint8_t>(s, p) != 0) continue;
      const float *k = k_apart.values.as<float>() + k_apart.begin(s) + p * kPage,
                  *v = v_apart.values.as<float>() + v_apart.begin(s) + p * kPage;
      const auto apart = [](const float* flags) { return kPage - std::count(flags, flags + kPage, 0.0f); };
      if (std::max(apart(k), apart(v)) > PageType::kSpare) continue;
      const Page old_one(one, s, p), old_two(two, s, p);
      char* page = take(one.supply[size_t(layout)], s, p);
      holders(page) = 2;
      for (const auto& [pages, as] : {std::pair{&one, layout}, {&two, layout + 1}}) {
        pages->table.at<uint64_t>(s, p) = reinterpret_cast<uint64_t>(page);
        pages->layout.at<uint8_t>(s, p) = uint8_t(as);
      }
      const Page to_one(one, s, p), to_two(two, s, p);
      pair_side(old_one.k(), old_two.k(), to_one.k(), old_one.layout.d, k, t);
      pair_side(old_one.v(), old_two.v(), to_one.v(), old_one.layout.d_v, v, t);
      for (int e = 0; e < kPage; ++e) to_one.position(e) = old_one.position(e);
      keep_beside(old_one, to_one), keep_beside(old_two, to_two);
      let_go(one.supply[0], old_one.data), let_go(two.supply[0], old_two.data);
    }
  }
}

}  // namespace heed::reference
