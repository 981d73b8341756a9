// column_read and column_write.
#include "kernels/cuda/page.cuh"

namespace heed::cuda {
namespace {

/// Grid: entries (strided), segments.
template <bool kWrite>
__global__ void column_kernel(const __grid_constant__ PagesView pages, int column, int width, Matrix values, Segments at) {
  const int s = blockIdx.y, count = pages.length[s] * width;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const int e = i / width, c = i % width;
    const LayoutView& l = pages.layout_of(s, e / kPage);
    char* page = pages.page(s, e / kPage);
    float none = 0;
    float& kept = column != kBiasColumn ? pages.column_at(l, page, column, e % kPage)[c]
                  : l.bias_at >= 0      ? bias_at(l, page, e % kPage)
                                        : none;
    const int64_t row = at.begin(s) + e;
    if (kWrite) kept = values.get(row, c);
    else values.set(row, c, kept);
  }
}

template <bool kWrite>
void move_column(Queue& queue, const char* where, const Pages& pages, int column, const Ragged& values) {
  const int width = check_column(where, pages, column, values);
  const PagesView view = pages_view(where, pages);
  launch(queue, where, column_kernel<kWrite>,
         dim3(blocks_for(ceil_div(pages.length_bound * width, 256), view.segments), unsigned(view.segments)), 256, 0,
         view, column, width, matrix(values.values), segments(values));
}

}  // namespace

void column_read(Queue& queue, const Pages& pages, int column, Ragged values) {
  move_column<false>(queue, "column_read", pages, column, values);
}
void column_write(Queue& queue, const Pages& pages, int column, const Ragged& values) {
  move_column<true>(queue, "column_write", pages, column, values);
}

}  // namespace heed::cuda
