// The lists of pages themselves: growing, sharing, letting go, converting. Pages are taken from a stack and given back to
// it by separate launches, so that a place of the stack is never read and written at once.
#include "kernels/cuda/page_lists.cuh"

namespace heed::cuda {
namespace {

__device__ void let_go(const SupplyView& supply, uint64_t page) {
  if (atomicAdd(holders(page), ~0ull) == 1 && !supply.base) supply.free[atomicAdd(supply.top, 1)] = page;
}

/// By a warp: a page that others hold too is exchanged for a copy; the page let go of, or 0.
__device__ uint64_t own(const Lists& a, int s, int p) {
  const uint64_t page = a.page(s, p);
  const int lane = threadIdx.x % 32;
  if (__shfl_sync(0xffffffffu, *holders(page), 0) == 1) return 0;
  const SupplyView& supply = a.supplies.of[a.layout_at(s, p)];
  uint64_t copy = 0;
  if (lane == 0) copy = take(supply, s, p);
  copy = __shfl_sync(0xffffffffu, copy, 0);
  for (int64_t at = lane * 16; at < supply.bytes; at += 32 * 16)
    *reinterpret_cast<uint4*>(copy + at) = *reinterpret_cast<const uint4*>(page + at);
  if (lane == 0) a.page(s, p) = copy;
  __syncwarp();
  return page;
}

__global__ void supply_kernel(SupplyView supply, char* block, int64_t count) {
  const int top = *supply.top;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const uint64_t page = reinterpret_cast<uint64_t>(block) + i * (kPageHeader + supply.bytes) + kPageHeader;
    *holders(page) = 0;
    supply.free[top + i] = page;
  }
  if (threadIdx.x == 0) *supply.top = top + int(count);
}

/// One warp a segment. left[s]: the page that it let go of, or 0.
__global__ void grow_kernel(const __grid_constant__ Lists a, Segments rows, int32_t* first, uint64_t* left) {
  await();
  const int s = blockIdx.x, lane = threadIdx.x, length = a.length[s], count = rows.length(s), end = length + count;
  __syncwarp();
  uint64_t old = 0;
  if (count > 0) {
    if (length % kPage != 0) old = own(a, s, length / kPage);
    for (int p = pages_for(length) + lane; p < pages_for(end); p += 32) {
      a.page(s, p) = take(a.supplies.of[0], s, p);
      a.layout_at(s, p) = 0;
    }
  }
  if (lane != 0) return;
  left[s] = old;
  first[s] = length;
  if (count > 0) a.length[s] = end;
}

/// Lets go of the pages that growing segments left: they were part-filled, so their layout has not changed.
__global__ void leave_grown_kernel(const __grid_constant__ Lists a, const int32_t* first, const uint64_t* left) {
  await();
  const int s = blockIdx.x * blockDim.x + threadIdx.x;
  if (s < a.pages.segments && left[s]) let_go(a.supplies.of[a.layout_at(s, first[s] / kPage)], left[s]);
}

/// One warp a page. Grid: pages (strided), segments. left [segments, capacity].
__global__ void own_kernel(const __grid_constant__ Lists a, const int32_t* until, uint64_t* left, int64_t capacity) {
  const int s = blockIdx.y, end = pages_for(min(until[s], a.length[s]));
  for (int p = blockIdx.x; p < capacity; p += gridDim.x) {
    const uint64_t old = p < end ? own(a, s, p) : 0;
    if (threadIdx.x == 0) left[s * capacity + p] = old;
  }
}

/// Thread by page: those named in `left` are let go of; `layouts` says what they were.
__global__ void leave_kernel(const __grid_constant__ Lists a, const uint64_t* left, const uint8_t* layouts, int64_t capacity) {
  const int s = blockIdx.y;
  for (int64_t p = blockIdx.x * blockDim.x + threadIdx.x; p < capacity; p += gridDim.x * blockDim.x) {
    const uint64_t old = left[s * capacity + p];
    if (old) let_go(a.supplies.of[layouts ? layouts[s * capacity + p] : a.layout_at(s, int(p))], old);
  }
}

__global__ void shrink_kernel(const __grid_constant__ Lists a, const int32_t* to) {
  const int s = blockIdx.x, length = a.length[s], left = max(0, min(to[s], length));
  for (int p = pages_for(left) + threadIdx.x; p < pages_for(length); p += blockDim.x)
    let_go(a.supplies.of[a.layout_at(s, p)], a.page(s, p));
  __syncthreads();
  if (threadIdx.x == 0) a.length[s] = left;
}

__global__ void hold_kernel(const __grid_constant__ Lists a) {
  const int s = blockIdx.y;
  for (int p = blockIdx.x * blockDim.x + threadIdx.x; p < pages_for(a.length[s]); p += gridDim.x * blockDim.x)
    atomicAdd(holders(a.page(s, p)), 1ull);
}

__device__ void convert_side(const SideView& from, char* old_page, const SideView& to, char* page, int count) {
  const bool raw = to.raw() && from.same_type(to);
  put(to, page, 0, count, [&](int e, int c) { return from.one(old_page, e, c); }, [&](int) { return raw; });
  if (!raw) return;
  for (int64_t b = threadIdx.x; b < count * to.row_bytes(); b += blockDim.x) page[to.at + b] = old_page[from.at + b];
  for (int g = threadIdx.x; g < count * to.row_groups(); g += blockDim.x) {
    for (int i = 0; i < to.halves(); ++i) to.scales(page)[i * to.groups + g] = from.scales(old_page)[i * to.groups + g];
    for (int i = 0; i < to.row_places(); ++i)
      to.places(page)[i * to.groups + g] = from.places(old_page)[i * to.groups + g];
  }
}

/// One block a page. Grid: pages (strided), segments. left, layouts: what converted pages were.
__global__ void convert_kernel(const __grid_constant__ Lists a, const int32_t* first, const int32_t* last, int layout,
                               bool again, uint64_t* left, uint8_t* layouts, int64_t capacity) {
  __shared__ uint64_t taken;
  const int s = blockIdx.y, length = a.length[s], end = min(last[s], pages_for(length));
  for (int p = blockIdx.x; p < capacity; p += gridDim.x) {
    const bool changes = p >= first[s] && p < end && (again || a.layout_at(s, p) != layout);
    const uint64_t old = changes ? a.page(s, p) : 0;
    const int was = changes ? a.layout_at(s, p) : 0;
    __syncthreads();
    if (threadIdx.x == 0) {
      left[s * capacity + p] = old;
      layouts[s * capacity + p] = uint8_t(was);
      if (changes) {
        taken = take(a.supplies.of[layout], s, p);
        if (taken == old) left[s * capacity + p] = 0;  // anew where it lay
        a.page(s, p) = taken;
        a.layout_at(s, p) = uint8_t(layout);
      }
    }
    __syncthreads();
    if (!changes) continue;
    char *page = reinterpret_cast<char*>(taken), *old_page = reinterpret_cast<char*>(old);
    const LayoutView &from = a.pages.layouts[was], &to = a.pages.layouts[layout];
    const int count = min(kPage, length - p * kPage);
    convert_side(from.k, old_page, to.k, page, count);
    convert_side(from.v, old_page, to.v, page, count);
    for (int e = threadIdx.x; e < count; e += blockDim.x) {
      position_at(to, page, e) = position_at(from, old_page, e);
      if (to.bias_at >= 0) bias_at(to, page, e) = from.bias_at >= 0 ? bias_at(from, old_page, e) : 0.0f;
      for (int c = 0; c < a.pages.columns; ++c)
        if (a.pages.column[c].keeps == Column::Keeps::User)
          for (int j = 0; j < a.pages.column[c].width; ++j)
            a.pages.column_at(to, page, c, e)[j] = a.pages.column_at(from, old_page, c, e)[j];
    }
    __syncthreads();
    refresh(a.pages, to, page, 0, count, count);
  }
}

__device__ void put_plain(const SideView& side, char* page, int row, int c, float x) {
  char* to = page + side.at + row * side.row_bytes();
  switch (side.kind) {
    case PageType::Kind::F32: reinterpret_cast<float*>(to)[c] = x; break;
    case PageType::Kind::F16: reinterpret_cast<__half*>(to)[c] = from_float<__half>(x); break;
    default: reinterpret_cast<__nv_bfloat16*>(to)[c] = from_float<__nv_bfloat16>(x);
  }
}

/// By a block: a warp takes an entry at a time. number[e]: 0, or which spare row entry e has.
__device__ void pair_side(const SideView& one, char* page_one, const SideView& two, char* page_two, const SideView& to,
                          char* page, const int* number, double t) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int e = threadIdx.x / 32; e < kPage; e += warps) {
    const int spare = number[e];
    double m = 0, n = 0, dot = 0;
    for (int c = lane; c < to.width && !spare; c += 32) {
      const double x = one.get(page_one, e, c), y = two.get(page_two, e, c);
      m += x * x, n += y * y, dot += x * y;
    }
    for (int far = 16; far > 0; far /= 2) {
      m += __shfl_xor_sync(0xffffffffu, m, far);
      n += __shfl_xor_sync(0xffffffffu, n, far);
      dot += __shfl_xor_sync(0xffffffffu, dot, far);
    }
    m = sqrt(m), n = sqrt(n);
    const double angle = m * n > 0 ? acos(fmin(fmax(dot / (m * n), -1.0), 1.0)) : 0;
    double from_one = 1 - t, from_two = t;
    if (m * n == 0) from_one = 1, from_two = 1;  // where one is 0, the other's
    else if (sin(angle) >= 1e-7) from_one = sin((1 - t) * angle) / sin(angle), from_two = sin(t * angle) / sin(angle);
    for (int c = lane; c < to.width; c += 32) {
      const double x = one.get(page_one, e, c), y = two.get(page_two, e, c);
      put_plain(to, page, e, c, spare ? float(x) : float((m > 0 ? from_one * x / m : 0) + (n > 0 ? from_two * y / n : 0)));
      if (spare) put_plain(to, page, kPage + spare - 1, c, float(y));
    }
    if (lane != 0) continue;
    to.norms(page)[e] = spare ? 1.0f : float(m);
    to.norms(page)[kPage + e] = spare ? 1.0f : float(n);
    to.spares(page)[e] = uint8_t(spare);
  }
}

__device__ void keep_beside(const PagesView& pages, const LayoutView& from, char* old_page, const LayoutView& to, char* page) {
  for (int e = threadIdx.x; e < kPage; e += blockDim.x) {
    if (to.bias_at >= 0) bias_at(to, page, e) = from.bias_at >= 0 ? bias_at(from, old_page, e) : 0.0f;
    for (int c = 0; c < pages.columns; ++c)
      if (pages.column[c].keeps == Column::Keeps::User)
        for (int j = 0; j < pages.column[c].width; ++j)
          pages.column_at(to, page, c, e)[j] = pages.column_at(from, old_page, c, e)[j];
  }
  __syncthreads();
  refresh(pages, to, page, 0, kPage, kPage);
}

/// One block a page. Grid: pages (strided), segments. left [2, segments, capacity]: pages that were let go of.
__global__ void pair_kernel(const __grid_constant__ Lists one, const __grid_constant__ Lists two, const int32_t* first,
                            const int32_t* last, int layout, const float* k_apart, const float* v_apart, Segments rows,
                            double t, uint64_t* left, int64_t capacity) {
  __shared__ uint64_t taken;
  __shared__ int number[2][kPage];  // of keys and values: which spare row an entry has
  __shared__ int most;
  const int s = blockIdx.y, end = min(last[s], min(one.length[s], two.length[s]) / kPage);
  for (int p = blockIdx.x; p < capacity; p += gridDim.x) {
    __syncthreads();
    const bool candidate = p >= first[s] && p < end && one.layout_at(s, p) == 0 && two.layout_at(s, p) == 0;
    if (threadIdx.x == 0) {
      most = candidate ? 0 : kPage;
      for (int side = 0; side < 2 && candidate; ++side) {
        const float* apart = (side ? v_apart : k_apart) + rows.begin(s) + p * kPage;
        int count = 0;
        for (int e = 0; e < kPage; ++e) number[side][e] = apart[e] != 0 ? ++count : 0;
        most = max(most, count);
      }
      left[s * capacity + p] = left[(gridDim.y + s) * capacity + p] = 0;
    }
    __syncthreads();
    if (most > PageType::kSpare) continue;
    const uint64_t old_one = one.page(s, p), old_two = two.page(s, p);
    __syncthreads();
    if (threadIdx.x == 0) {
      taken = take(one.supplies.of[layout], s, p);
      *holders(taken) = 2;
      one.page(s, p) = two.page(s, p) = taken;
      one.layout_at(s, p) = uint8_t(layout), two.layout_at(s, p) = uint8_t(layout + 1);
      left[s * capacity + p] = old_one, left[(gridDim.y + s) * capacity + p] = old_two;
    }
    __syncthreads();
    char *page = reinterpret_cast<char*>(taken), *from_one = reinterpret_cast<char*>(old_one),
         *from_two = reinterpret_cast<char*>(old_two);
    const LayoutView &plain_one = one.pages.layouts[0], &plain_two = two.pages.layouts[0],
                     &to_one = one.pages.layouts[layout], &to_two = two.pages.layouts[layout + 1];
    pair_side(plain_one.k, from_one, plain_two.k, from_two, to_one.k, page, number[0], t);
    pair_side(plain_one.v, from_one, plain_two.v, from_two, to_one.v, page, number[1], t);
    for (int e = threadIdx.x; e < kPage; e += blockDim.x)
      position_at(to_one, page, e) = position_at(plain_one, from_one, e);
    __syncthreads();
    keep_beside(one.pages, plain_one, from_one, to_one, page);
    keep_beside(two.pages, plain_two, from_two, to_two, page);
  }
}

/// Lets go of pages of layout 0.
__global__ void leave_plain_kernel(const __grid_constant__ Lists a, const uint64_t* left, int64_t capacity) {
  for (int64_t p = blockIdx.x * blockDim.x + threadIdx.x; p < capacity; p += gridDim.x * blockDim.x)
    if (const uint64_t old = left[blockIdx.y * capacity + p]) let_go(a.supplies.of[0], old);
}

dim3 page_grid(const Pages& pages, int64_t at_once) {
  return dim3(blocks_for(ceil_div(pages.table.size[1], at_once), pages.segments()), unsigned(pages.segments()));
}

}  // namespace

void page_supply(Queue& queue, const PageSupply& supply, Tensor block) {
  const int64_t count = block.numel() / (kPageHeader + supply.page_bytes);
  launch(queue, "page_supply", supply_kernel, dim3(1), 256, 0, supply_view(supply), block.as<char>(), count);
}

void page_grow(Queue& queue, const Pages& pages, const Ragged& rows, Tensor first) {
  constexpr const char* where = "page_grow";
  check_tensor(where, "first", first, {pages.segments()}, false, Dtype::I32);
  require(rows.segments() == pages.segments(), where, "rows have the store's segments");
  if (pages.segments() == 0) return;
  Scratch scratch(queue.scratch);
  uint64_t* left = queue.scratch.take(Dtype::U64, {pages.segments()}).as<uint64_t>();
  const Lists a = lists(where, pages);
  launch_early(queue, where, grow_kernel, dim3(unsigned(pages.segments())), 32, 0, a, segments(rows),
               first.as<int32_t>(), left);
  if (!pages.shared) return;
  launch_early(queue, where, leave_grown_kernel, dim3(unsigned(ceil_div(pages.segments(), 64))), 64, 0, a,
               first.as<int32_t>(), left);
}

void page_own(Queue& queue, const Pages& pages, Tensor until) {
  constexpr const char* where = "page_own";
  check_tensor(where, "until", until, {pages.segments()}, false, Dtype::I32);
  const int64_t capacity = pages.table.size[1];
  if (pages.segments() * capacity == 0) return;
  Scratch scratch(queue.scratch);
  uint64_t* left = queue.scratch.take(Dtype::U64, {pages.segments() * capacity}).as<uint64_t>();
  const Lists a = lists(where, pages);
  launch(queue, where, own_kernel, page_grid(pages, 1), 32, 0, a, until.as<int32_t>(), left, capacity);
  launch(queue, where, leave_kernel, page_grid(pages, 64), 64, 0, a, left, nullptr, capacity);
}

void page_shrink(Queue& queue, const Pages& pages, Tensor to) {
  constexpr const char* where = "page_shrink";
  check_tensor(where, "to", to, {pages.segments()}, false, Dtype::I32);
  launch(queue, where, shrink_kernel, dim3(unsigned(pages.segments())), 64, 0, lists(where, pages), to.as<int32_t>());
}

void page_hold(Queue& queue, const Pages& pages) {
  launch(queue, "page_hold", hold_kernel, page_grid(pages, 64), 64, 0, lists("page_hold", pages));
}

void page_convert(Queue& queue, const Pages& pages, Tensor first, Tensor last, int layout, bool again) {
  constexpr const char* where = "page_convert";
  check_tensor(where, "first", first, {pages.segments()}, false, Dtype::I32);
  check_tensor(where, "last", last, {pages.segments()}, false, Dtype::I32);
  require(layout >= 0 && size_t(layout) < pages.layouts.size(), where, "there is no layout " + std::to_string(layout));
  const int64_t capacity = pages.table.size[1];
  if (pages.segments() * capacity == 0) return;
  Scratch scratch(queue.scratch);
  uint64_t* left = queue.scratch.take(Dtype::U64, {pages.segments() * capacity}).as<uint64_t>();
  uint8_t* layouts = queue.scratch.take(Dtype::U8, {pages.segments() * capacity}).as<uint8_t>();
  const Lists a = lists(where, pages);
  launch(queue, where, convert_kernel, page_grid(pages, 1), 128, 0, a, first.as<int32_t>(), last.as<int32_t>(), layout,
         again, left, layouts, capacity);
  launch(queue, where, leave_kernel, page_grid(pages, 64), 64, 0, a, left, layouts, capacity);
}

void page_pair(Queue& queue, const Pages& one, const Pages& two, Tensor first, Tensor last, int layout,
               const Ragged& k_apart, const Ragged& v_apart, float t) {
  constexpr const char* where = "page_pair";
  check_tensor(where, "first", first, {one.segments()}, false, Dtype::I32);
  check_tensor(where, "last", last, {one.segments()}, false, Dtype::I32);
  check_pair(where, one, two, layout);
  const int64_t capacity = std::min(one.table.size[1], two.table.size[1]), all = one.segments();
  if (all * capacity == 0) return;
  Scratch scratch(queue.scratch);
  uint64_t* left = queue.scratch.take(Dtype::U64, {2 * all * capacity}).as<uint64_t>();
  const Lists a = lists(where, one), b = lists(where, two);
  const dim3 grid(blocks_for(capacity, all), unsigned(all)), few(blocks_for(ceil_div(capacity, 64), all), unsigned(all));
  launch(queue, where, pair_kernel, grid, 128, 0, a, b, first.as<int32_t>(), last.as<int32_t>(), layout,
         k_apart.values.as<float>(), v_apart.values.as<float>(), segments(k_apart), double(t), left, capacity);
  launch(queue, where, leave_plain_kernel, few, 64, 0, a, left, capacity);
  launch(queue, where, leave_plain_kernel, few, 64, 0, b, left + all * capacity, capacity);
}

}  // namespace heed::cuda
