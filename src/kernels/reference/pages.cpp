#include <algorithm>

#include "kernels/check.h"
#include "kernels/choose.h"
#include "kernels/reference/page.h"

namespace heed::reference {
namespace {

int64_t held(const Pages& pages, int64_t segment) { return pages.length.at<int32_t>(segment); }

/// Entries begin … end of a segment, page by page: body(page, first entry in the page, entries, entry of the segment).
template <class Body>
void each_page(const Pages& pages, int64_t segment, int64_t begin, int64_t end, Body&& body) {
  for (int64_t e = begin; e < end;) {
    const int in_page = int(e % kPage), count = int(std::min<int64_t>(kPage - in_page, end - e));
    body(Page(pages, segment, e / kPage), in_page, count, e);
    e += count;
  }
}

std::vector<double> rows(const Tensor& t, int64_t first, int64_t count) {
  std::vector<double> out;
  for (int64_t r = first; r < first + count; ++r)
    for (double x : row(t, r)) out.push_back(x);
  return out;
}

void fill_user_columns(const Page& page, int begin, int count) {
  for (size_t i = 0; page.columns && i < page.columns->size(); ++i) {
    const Column& c = (*page.columns)[i];
    if (c.keeps == Column::Keeps::User)
      for (int e = begin; e < begin + count; ++e) std::fill_n(page.column(int(i), e), c.width, c.fill);
  }
}

void check_capacity(const char* where, const Pages& pages, int64_t segment, int64_t entries) {
  require(entries <= pages.table.size[1] * kPage, where, [&] {
    return "segment " + std::to_string(segment) + " has no pages for " + std::to_string(entries) + " entries";
  });
}

}  // namespace

void page_write(Queue&, const Pages& pages, const Ragged& k, const Ragged& v, Tensor positions, Tensor first) {
  constexpr const char* where = "page_write";
  require(k.segments() == pages.segments() && v.segments() == pages.segments(), where,
          "k and v have the store's segments");
  check_tensor(where, "positions", positions, {k.values.size[0]}, false, Dtype::I32);
  check_tensor(where, "first", first, {pages.segments()}, false, Dtype::I32);
  for (int64_t s = 0; s < pages.segments(); ++s) {
    require(k.length(s) == v.length(s), where, "a segment of v is not as long as its keys");
    const int64_t begin = first.at<int32_t>(s), end = begin + k.length(s);
    check_capacity(where, pages, s, end);
    each_page(pages, s, begin, end, [&](const Page& page, int in_page, int count, int64_t e) {
      page.k().put(in_page, count, rows(k.values, k.begin(s) + e - begin, count));
      page.v().put(in_page, count, rows(v.values, v.begin(s) + e - begin, count));
      for (int i = 0; i < count; ++i) {
        page.position(in_page + i) = positions.at<int32_t>(k.begin(s) + e - begin + i);
        if (page.has_bias()) page.bias(in_page + i) = 0;
      }
      fill_user_columns(page, in_page, count);
      const int64_t page_first = e - in_page;
      page.refresh(in_page, in_page + count, int(std::min<int64_t>(kPage, std::max(held(pages, s), end) - page_first)));
    });
  }
}

void page_read(Queue&, const Pages& pages, const Read* read, const Ragged& k, const Ragged& v, Tensor positions) {
  constexpr const char* where = "page_read";
  check_read(where, pages, read);
  const Rope* rope = pages.plain_keys && read ? read->rope : nullptr;
  for (int64_t s = 0; s < pages.segments(); ++s)
    each_page(pages, s, 0, held(pages, s), [&](const Page& page, int in_page, int count, int64_t e) {
      for (int i = 0; i < count; ++i, ++e) {
        const int32_t position = page.position(in_page + i);
        if (k.values) {
          std::vector<double> key;
          for (int c = 0; c < page.layout.d; ++c) key.push_back(double(page.k().get(in_page + i, c)));
          if (rope) rotate(*rope, read->place(s, e, position), key.data());
          set_row(k.values, k.begin(s) + e, key);
        }
        if (v.values)
          for (int c = 0; c < page.layout.d_v; ++c)
            store(v.values, offset(v.values, v.begin(s) + e, c), double(page.v().get(in_page + i, c)));
        if (positions) positions.at<int32_t>((k.offsets ? k : v).begin(s) + e) = position;
      }
    });
}

void page_move(Queue&, const Pages& from, const Pages& to, Tensor index, Tensor count, int64_t capacity) {
  constexpr const char* where = "page_move";
  require(from.segments() == to.segments(), where, "both stores have the same segments");
  check_tensor(where, "index", index, {from.segments() * capacity}, false, Dtype::I32);
  check_tensor(where, "count", count, {from.segments()}, false, Dtype::I32);

  struct Entry {
    PageType k_type, v_type;
    bool k_raw, v_raw;
    PageSide::Raw k_codes, v_codes;
    std::vector<double> k, v;
    int32_t position;
    float bias;
    std::vector<std::vector<float>> columns;
  };
  for (int64_t s = 0; s < from.segments(); ++s) {
    const int64_t n = count.at<int32_t>(s);
    check_capacity(where, to, s, n);
    // Everything is read before anything is written: `to` may be `from`.
    std::vector<Entry> entries;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t e = index.at<int32_t>(s * capacity + i);
      require(e >= 0 && e < from.table.size[1] * kPage, where, [&] { return "there is no entry " + std::to_string(e); });
      const Page page(from, s, e / kPage);
      const int at = int(e % kPage);
      const PageSide k = page.k(), v = page.v();
      Entry entry{
          k.type(), v.type(), k.moves_raw(), v.moves_raw(), {}, {}, {}, {}, page.position(at), page.has_bias() ? page.bias(at) : 0, {}};
      if (entry.k_raw) entry.k_codes = k.raw(at);
      if (entry.v_raw) entry.v_codes = v.raw(at);
      for (int c = 0; c < page.layout.d; ++c) entry.k.push_back(double(k.get(at, c)));
      for (int c = 0; c < page.layout.d_v; ++c) entry.v.push_back(double(v.get(at, c)));
      for (size_t i = 0; page.columns && i < page.columns->size(); ++i) {
        const Column& c = (*page.columns)[i];
        entry.columns.emplace_back();
        if (c.keeps == Column::Keeps::User)
          entry.columns.back().assign(page.column(int(i), at), page.column(int(i), at) + c.width);
      }
      entries.push_back(std::move(entry));
    }
    each_page(to, s, 0, n, [&](const Page& page, int in_page, int here, int64_t first) {
      bool stays = here == kPage && first < held(from, s) && from.page(s, first / kPage) == page.data;
      for (int i = 0; i < here; ++i) stays = stays && index.at<int32_t>(s * capacity + first + i) == first + i;
      if (stays) return;  // a full page as it is
      const PageSide k = page.k(), v = page.v();
      std::vector<double> all_k, all_v;
      for (int i = 0; i < here; ++i) {
        const Entry& e = entries[size_t(first + i)];
        all_k.insert(all_k.end(), e.k.begin(), e.k.end());
        all_v.insert(all_v.end(), e.v.begin(), e.v.end());
      }
      k.put(in_page, here, all_k);
      v.put(in_page, here, all_v);
      for (int i = 0; i < here; ++i) {
        const Entry& e = entries[size_t(first + i)];
        if (e.k_raw && e.k_type == k.type()) k.put_raw(in_page + i, e.k_codes);
        if (e.v_raw && e.v_type == v.type()) v.put_raw(in_page + i, e.v_codes);
        page.position(in_page + i) = e.position;
        if (page.has_bias()) page.bias(in_page + i) = e.bias;
        for (size_t c = 0; c < e.columns.size(); ++c)
          std::copy(e.columns[c].begin(), e.columns[c].end(), page.column(int(c), in_page + i));
      }
      page.refresh(in_page, in_page + here, in_page + here);
    });
  }
}

namespace {
/// Calls body(number in the page, number in values) for every number of a User column.
template <class Body>
void each_column_number(const char* where, const Pages& pages, int column, const Ragged& values, Body&& body) {
  const int width = check_column(where, pages, column, values);
  for (int64_t s = 0; s < pages.segments(); ++s)
    each_page(pages, s, 0, held(pages, s), [&](const Page& page, int in_page, int count, int64_t e) {
      for (int i = 0; i < count; ++i)
        for (int c = 0; c < width; ++c) {
          float none = 0;
          float& kept = column != kBiasColumn ? page.column(column, in_page + i)[c]
                        : page.has_bias()     ? page.bias(in_page + i)
                                              : none;
          body(kept, offset(values.values, values.begin(s) + e + i, c));
        }
    });
}
}  // namespace

void column_read(Queue&, const Pages& pages, int column, Ragged values) {
  each_column_number("column_read", pages, column, values,
                     [&](float& kept, int64_t at) { store(values.values, at, double(kept)); });
}

void column_write(Queue&, const Pages& pages, int column, const Ragged& values) {
  each_column_number("column_write", pages, column, values,
                     [&](float& kept, int64_t at) { kept = float(load(values.values, at)); });
}

void page_score(Queue&, const Ragged& q, const Pages& pages, int low, int high, Ragged scores) {
  constexpr const char* where = "page_score";
  const int block = check_blocks(where, q, pages, low, high);
  const int64_t h = q.heads, g = pages.kv_heads;
  require(scores.segments() == q.segments(), where, "scores have a segment for each sequence and query head");
  for (int64_t s = 0; s < q.segments(); ++s) {
    require(q.length(s) <= 1, where, "q has at most one row a segment");
    if (q.length(s) == 0) continue;
    const int64_t kv = s / h * g + s % h * g / h;
    const std::vector<double> query = row(q.values, q.begin(s));
    for (int64_t b = 0; b * block < held(pages, kv); ++b) {
      const int64_t e = b * block;
      const Page page(pages, kv, e / kPage);
      const std::vector<double> lo = row(page.block(low, int(e % kPage) / block), 0),
                                hi = row(page.block(high, int(e % kPage) / block), 0);
      double sum = 0;
      for (size_t c = 0; c < query.size(); ++c) sum += std::max(query[c] * lo[c], query[c] * hi[c]);
      store(scores.values, offset(scores.values, scores.begin(s) + b), sum);
    }
  }
}

void page_choose(Queue& queue, const Ragged& q, const Pages& pages, const PageChoice& how, int64_t capacity,
                 Tensor index, Tensor count, Tensor rowptr) {
  choose_pages(queue, page_score, select, q, pages, how, capacity, index, count, rowptr);
}

Unpacked::Unpacked(const char* where, const Pages& pages, const Read* read) {
  require(!pages.layouts.empty(), where, "the store has no layouts");
  require(!pages.plain_keys || read, where, "the store keeps plain keys, and no read turns them");
  offsets = Buffer(Dtype::I64, {pages.segments() + 1});
  int64_t total = 0;
  for (int64_t s = 0; s < pages.segments(); ++s) {
    offsets->at<int64_t>(s) = total;
    total += held(pages, s);
  }
  offsets->at<int64_t>(pages.segments()) = total;
  k_values = Buffer(Dtype::F32, {total, pages.layouts[0].d});
  v_values = Buffer(Dtype::F32, {total, pages.layouts[0].d_v});
  positions = Buffer(Dtype::I32, {total});
  k = {k_values, offsets, {}, pages.kv_heads, total};
  v = {v_values, offsets, {}, pages.kv_heads, total};
  Queue queue;
  page_read(queue, pages, read, k, v, positions);
  if (std::any_of(pages.layouts.begin(), pages.layouts.end(), [](const PageLayout& l) { return l.bias_at >= 0; })) {
    bias = Buffer::zeros(Dtype::F32, {total});
    for (int64_t s = 0; s < pages.segments(); ++s)
      each_page(pages, s, 0, held(pages, s), [&](const Page& page, int in_page, int count, int64_t e) {
        for (int i = 0; page.has_bias() && i < count; ++i) bias->at<float>(k.begin(s) + e + i) = page.bias(in_page + i);
      });
  }
}

}  // namespace heed::reference
