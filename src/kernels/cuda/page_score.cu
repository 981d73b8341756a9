#include "kernels/cuda/page.cuh"

namespace heed::cuda {
namespace {

/// One warp a block of entries. Grid: blocks (strided), segments of q.
__global__ void page_score_kernel(Matrix q, Segments qs, const __grid_constant__ PagesView pages, int low, int high,
                                  Matrix scores, Segments at) {
  const int s = blockIdx.y, h = qs.heads, g = pages.kv_heads, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (qs.length(s) <= 0) return;
  const int kv = s / h * g + s % h * g / h, block = pages.column[low].block, length = pages.length[kv];
  for (int b = blockIdx.x * warps + threadIdx.x / 32; b * block < length; b += gridDim.x * warps) {
    const int e = b * block;
    const LayoutView& l = pages.layout_of(kv, e / kPage);
    char* page = pages.page(kv, e / kPage);
    const float *lo = pages.column_at(l, page, low, e % kPage / block),
                *hi = pages.column_at(l, page, high, e % kPage / block);
    float sum = 0;
    for (int c = lane; c < pages.d; c += 32) {
      const float x = q.get(qs.begin(s), c);
      sum += fmaxf(x * lo[c], x * hi[c]);
    }
    sum = warp_sum(sum);
    if (lane == 0) scores.set(at.begin(s) + b, 0, sum);
  }
}

}  // namespace

void page_score(Queue& queue, const Ragged& q, const Pages& pages, int low, int high, Ragged scores) {
  constexpr const char* where = "page_score";
  auto is_block = [&](int i) {
    return pages.columns && i >= 0 && i < int(pages.columns->size()) &&
           (*pages.columns)[size_t(i)].keeps != Column::Keeps::User;
  };
  require(is_block(low) && is_block(high), where, "low and high name columns that the store keeps for blocks");
  const int block = (*pages.columns)[size_t(low)].block;
  require((*pages.columns)[size_t(high)].block == block, where, "the two columns have blocks of one size");
  const int64_t h = q.heads, g = pages.kv_heads;
  require(h % g == 0 && q.segments() == pages.segments() * (h / g) && scores.segments() == q.segments(), where,
          "q and scores have a segment for each sequence and query head");
  const PagesView view = pages_view(where, pages);
  const unsigned count = unsigned(q.segments());
  launch(queue, where, page_score_kernel, dim3(blocks_for(ceil_div(ceil_div(pages.length_bound, block), 8), count), count),
         256, 0, matrix(q.values), segments(q), view, low, high, matrix(scores.values), segments(scores));
}

}  // namespace heed::cuda
