#include "kernels/cuda/heads.cuh"
#include "kernels/cuda/page_lists.cuh"

namespace heed::cuda {
namespace {

constexpr int kAppendWarps = 8;

struct Appended {
  Lists lists;
  HeadRows q, k, v;
  Matrix q_out;
  Segments q_to;
  const int32_t* positions;
  float eps;
};

/// A block a segment: its new key and value, and the queries of the KV head.
__global__ void __launch_bounds__(32 * kAppendWarps) append_heads_kernel(const __grid_constant__ Appended a) {
  await();
  extern __shared__ float key[];
  float* const value = key + a.k.d;
  __shared__ uint64_t at;
  const int s = blockIdx.x, g = a.k.heads, t = s / g, head = s % g, group = a.q.heads / g, warp = threadIdx.x / 32,
            length = a.lists.length[s], p = length / kPage, in_page = length % kPage;
  if (threadIdx.x == blockDim.x - 1) {
    if (in_page == 0) {
      a.lists.page(s, p) = take(a.lists.supplies.of[0], s, p);
      a.lists.layout_at(s, p) = 0;
    }
    at = a.lists.page(s, p);
  }
  for (int item = warp; item < group + 2; item += kAppendWarps) {
    if (item == 0) {
      put_row(a.k, t, head, a.eps, [&](int c, float x) { key[c] = x; });
    } else if (item == 1) {
      put_row(a.v, t, head, a.eps, [&](int c, float x) { value[c] = x; });
    } else {
      const int q_head = head * group + item - 2;
      const int64_t row = a.q_to.begin(t * a.q.heads + q_head);
      put_row(a.q, t, q_head, a.eps, [&](int c, float x) { a.q_out.set(row, c, x); });
    }
  }
  __syncthreads();
  const PagesView& pages = a.lists.pages;
  const LayoutView& l = pages.layouts[a.lists.layout_at(s, p)];
  char* page = reinterpret_cast<char*>(at);
  const auto none = [](int) { return false; };
  put(l.k, page, in_page, 1, [&](int, int c) { return key[c]; }, none);
  put(l.v, page, in_page, 1, [&](int, int c) { return value[c]; }, none);
  if (threadIdx.x == 0) {
    position_at(l, page, in_page) = a.positions[s];
    if (l.bias_at >= 0) bias_at(l, page, in_page) = 0;
    a.lists.length[s] = length + 1;
  }
  for (int i = 0; i < pages.columns; ++i)
    if (pages.column[i].keeps == Column::Keeps::User)
      for (int c = threadIdx.x; c < pages.column[i].width; c += blockDim.x)
        pages.column_at(l, page, i, in_page)[c] = pages.column[i].fill;
  __syncthreads();
  refresh(pages, l, page, in_page, in_page + 1, in_page + 1);
}

}  // namespace

void append_heads(Queue& queue, float eps, const Heads& q, const Heads& k, const Heads& v, const Pages& pages,
                  Tensor positions) {
  constexpr const char* where = "append_heads";
  const int64_t tokens = k.x.size[0];
  check_tensor(where, "positions", positions, {pages.segments()}, false, Dtype::I32);
  Appended a{};
  a.lists = lists(where, pages);
  a.q = head_rows(where, q, tokens), a.k = head_rows(where, k, tokens), a.v = head_rows(where, v, tokens);
  require(!pages.shared && a.k.heads == pages.kv_heads && a.v.heads == pages.kv_heads &&
              pages.segments() == tokens * pages.kv_heads && a.q.heads % a.k.heads == 0,
          where, "one token of every sequence, of the store's heads, and pages that nobody shares");
  require(q.out.heads == a.q.heads && q.out.segments() == tokens * a.q.heads && q.out.values.rank == 2 &&
              q.out.values.size[1] == a.q.d && is_float(q.out.values.type) && a.k.d == a.lists.pages.d &&
              a.v.d == a.lists.pages.d_v,
          where, "rows have the widths of where they go");
  a.q_out = matrix(q.out.values), a.q_to = segments(q.out), a.positions = positions.as<int32_t>(), a.eps = eps;
  launch_early(queue, where, append_heads_kernel, dim3(unsigned(pages.segments())), 32 * kAppendWarps,
               size_t(a.k.d + a.v.d) * 4, a);
}

}  // namespace heed::cuda
