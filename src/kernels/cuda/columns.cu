// column_read and column_write.
#include "kernels/cuda/page.cuh"

namespace heed::cuda {
namespace {

/// Grid: entries (strided), segments.
template <bool kWrite>
__global__ void column_kernel(const __grid_constant__ PagesView pages, int column, Matrix values, Segments at) {
  const int s = blockIdx.y, width = pages.column[column].width, count = pages.length[s] * width;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const int e = i / width, c = i % width;
    float& kept = pages.column_at(pages.layout_of(s, e / kPage), pages.page(s, e / kPage), column, e % kPage)[c];
    const int64_t row = at.begin(s) + e;
    if (kWrite) kept = values.get(row, c);
    else values.set(row, c, kept);
  }
}

template <bool kWrite>
void move_column(Queue& queue, const char* where, const Pages& pages, int column, const Ragged& values) {
  require(pages.columns && column >= 0 && column < int(pages.columns->size()) &&
              (*pages.columns)[size_t(column)].keeps == Column::Keeps::User,
          where, "column " + std::to_string(column) + " is not one that a mechanism writes");
  const int width = (*pages.columns)[size_t(column)].width;
  require((values.values.rank > 1 ? values.values.size[1] : 1) == width, where,
          "the column is " + std::to_string(width) + " wide");
  const PagesView view = pages_view(where, pages);
  launch(queue, where, column_kernel<kWrite>,
         dim3(blocks_for(ceil_div(pages.length_bound * width, 256), view.segments), unsigned(view.segments)), 256, 0,
         view, column, matrix(values.values), segments(values));
}

}  // namespace

void column_read(Queue& queue, const Pages& pages, int column, Ragged values) {
  move_column<false>(queue, "column_read", pages, column, values);
}
void column_write(Queue& queue, const Pages& pages, int column, const Ragged& values) {
  move_column<true>(queue, "column_write", pages, column, values);
}

}  // namespace heed::cuda
