#include "kernels/cuda/page.cuh"

namespace heed::cuda {
namespace {

struct Wanted {
  Matrix k, v;
  Segments ks, vs;
  int32_t* positions;
  Segments positions_at;
  RopeView rope;
  ReadPlaces places;
};

/// Grid: pages (strided), segments.
__global__ void page_read_kernel(const __grid_constant__ PagesView pages, const __grid_constant__ Wanted to) {
  const int s = blockIdx.y, length = pages.length[s];
  for (int p = blockIdx.x; p * kPage < length; p += gridDim.x) {
    const LayoutView& l = pages.layout_of(s, p);
    char* page = pages.page(s, p);
    const int count = min(kPage, length - p * kPage);
    if (to.k) {
      const int64_t row = to.ks.begin(s) + p * kPage;
      const int turned = to.rope.inv_freq ? to.rope.dims : 0, rest = pages.d - turned, items = turned / 2 + rest;
      for (int e = threadIdx.x; e < count * items; e += blockDim.x) {
        const int entry = e / items, i = e % items;
        if (i >= turned / 2) {
          const int c = i + turned / 2;
          to.k.set(row + entry, c, l.k.get(page, entry, c));
          continue;
        }
        const int first = to.rope.first(i), second = to.rope.second(i);
        const int position = to.places.at(s, p * kPage + entry, l, page);
        float a = l.k.get(page, entry, first), b = l.k.get(page, entry, second);
        turn(a, b, float(position) * to.rope.inv_freq[i]);
        to.k.set(row + entry, first, a);
        to.k.set(row + entry, second, b);
      }
    }
    if (to.v) {
      const int64_t row = to.vs.begin(s) + p * kPage;
      for (int e = threadIdx.x; e < count * pages.d_v; e += blockDim.x)
        to.v.set(row + e / pages.d_v, e % pages.d_v, l.v.get(page, e / pages.d_v, e % pages.d_v));
    }
    if (to.positions)
      for (int e = threadIdx.x; e < count; e += blockDim.x)
        to.positions[to.positions_at.begin(s) + p * kPage + e] = position_at(l, page, e);
  }
}

}  // namespace

void page_read(Queue& queue, const Pages& pages, const Read* read, const Ragged& k, const Ragged& v, Tensor positions) {
  constexpr const char* where = "page_read";
  check_read(where, pages, read);
  const Rope* rope = pages.plain_keys && read ? read->rope : nullptr;
  const PagesView view = pages_view(where, pages);
  Wanted to{};
  to.k = matrix(k.values);
  to.v = matrix(v.values);
  if (k.offsets) to.ks = segments(k);
  if (v.offsets) to.vs = segments(v);
  to.positions = positions.as<int32_t>();
  to.positions_at = k.offsets ? to.ks : to.vs;
  to.rope = rope_view(rope);
  if (read) to.places = read_places(*read);
  launch(queue, where, page_read_kernel,
         dim3(blocks_for(ceil_div(pages.length_bound, kPage), view.segments), unsigned(view.segments)), 256, 0, view, to);
}

}  // namespace heed::cuda
