#include "kernels/cuda/page.cuh"

namespace heed::cuda {
namespace {

/// Rows of the page's own 16 bits or 32, in pieces of 16 bytes; false where they do not lie so.
__device__ inline bool put_rows(const SideView& side, char* page, int begin, int count, const Matrix& from, int64_t row) {
  const bool same = (side.kind == PageType::Kind::BF16 && from.type == Dtype::BF16) ||
                    (side.kind == PageType::Kind::F16 && from.type == Dtype::F16) ||
                    (side.kind == PageType::Kind::F32 && from.type == Dtype::F32);
  const int64_t bytes = side.kind == PageType::Kind::F32 ? 4 : 2, row_bytes = side.width * bytes;
  char* to = page + side.at + begin * row_bytes;
  const char* at = static_cast<const char*>(from.data) + row * from.stride * bytes;
  const auto whole = [](uint64_t x) { return x % 16 == 0; };
  if (!same || side.pair || !whole(row_bytes) || !whole(uint64_t(from.stride * bytes)) ||
      !whole(reinterpret_cast<uint64_t>(to)) || !whole(reinterpret_cast<uint64_t>(at)))
    return false;
  const int pieces = int(row_bytes / 16);
#pragma unroll 4
  for (int i = threadIdx.x; i < count * pieces; i += blockDim.x)
    reinterpret_cast<uint4*>(to)[i] = *reinterpret_cast<const uint4*>(at + i / pieces * from.stride * bytes + i % pieces * 16);
  return true;
}

/// Grid: pages (strided), segments.
__global__ void page_write_kernel(const __grid_constant__ PagesView pages, Matrix k, Segments ks, Matrix v, Segments vs,
                                  const int32_t* positions, const int32_t* first) {
  await();
  const int s = blockIdx.y, begin = first[s], end = begin + ks.length(s);
  for (int p = begin / kPage + blockIdx.x; p * kPage < end; p += gridDim.x) {
    const LayoutView& l = pages.layout_of(s, p);
    char* page = pages.page(s, p);
    const int from = max(begin, p * kPage), count = min(end, (p + 1) * kPage) - from, in_page = from - p * kPage;
    const int64_t k_row = ks.begin(s) + from - begin, v_row = vs.begin(s) + from - begin;
    auto none = [](int) { return false; };
    if (!put_rows(l.k, page, in_page, count, k, k_row))
      put(l.k, page, in_page, count, [&](int e, int c) { return k.get(k_row + e, c); }, none);
    if (!put_rows(l.v, page, in_page, count, v, v_row))
      put(l.v, page, in_page, count, [&](int e, int c) { return v.get(v_row + e, c); }, none);
    for (int e = threadIdx.x; e < count; e += blockDim.x) {
      position_at(l, page, in_page + e) = positions[k_row + e];
      if (l.bias_at >= 0) bias_at(l, page, in_page + e) = 0;
      for (int i = 0; i < pages.columns; ++i)
        if (pages.column[i].keeps == Column::Keeps::User)
          for (int c = 0; c < pages.column[i].width; ++c)
            pages.column_at(l, page, i, in_page + e)[c] = pages.column[i].fill;
    }
    __syncthreads();
    refresh(pages, l, page, in_page, in_page + count, min(kPage, max(pages.length[s], end) - p * kPage));
  }
}

}  // namespace

void page_write(Queue& queue, const Pages& pages, const Ragged& k, const Ragged& v, Tensor positions, Tensor first) {
  constexpr const char* where = "page_write";
  require(k.segments() == pages.segments() && v.segments() == pages.segments(), where,
          "k and v have the store's segments");
  check_tensor(where, "positions", positions, {k.values.size[0]}, false, Dtype::I32);
  check_tensor(where, "first", first, {pages.segments()}, false, Dtype::I32);
  const PagesView view = pages_view(where, pages);
  require(is_float(k.values.type) && is_float(v.values.type) && k.values.size[1] == view.d && v.values.size[1] == view.d_v,
          where, "k and v are F32, BF16 or F16 of the store's widths");
  launch_early(queue, where, page_write_kernel,
               dim3(blocks_for(ceil_div(k.values.size[0], kPage) + 1, view.segments), unsigned(view.segments)), 256, 0,
               view, matrix(k.values), segments(k), matrix(v.values), segments(v), positions.as<int32_t>(),
               first.as<int32_t>());
}

}  // namespace heed::cuda
