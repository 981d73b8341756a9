#include "kernels/cuda/page.cuh"

#include <algorithm>

namespace heed::cuda {
namespace {

SideView side_view(const char* where, const PageType& type, int width, int64_t at) {
  SideView out{at,
               kPage * type.row_bits(width) / 8,
               width,
               type.group,
               type.bits(),
               int(type.groups(width)),
               type.kind,
               type.codes,
               type.quantised() && type.axis == PageType::Axis::Channel,
               {},
               type.turned,
               type.pair,
               type.norms_at(width),
               type.outliers,
               type.sketch,
               type.outlier_sketch,
               type.seed};
  std::copy(type.points.begin(), type.points.end(), out.points);
  if (type.quantised() && !type.sketched() &&
      (width * type.bits() % 8 != 0 || (!out.by_channel && type.group * type.bits() % 8 != 0 && type.group < width)))
    throw Error(Code::Unsupported, where, "groups of quantised numbers that share a byte",
                "use a group of a multiple of 4 numbers");
  return out;
}

__global__ void segment_bounds_kernel(const int32_t* length, int segments, int64_t bound, int64_t* offsets, int64_t* ends) {
  const int s = blockIdx.x * blockDim.x + threadIdx.x;
  if (s > segments) return;
  offsets[s] = s * bound;
  if (s < segments) ends[s] = s * bound + length[s];
}

__global__ void bias_kernel(const __grid_constant__ PagesView pages, int64_t bound, float* to) {
  const int s = blockIdx.y;
  for (int e = blockIdx.x * blockDim.x + threadIdx.x; e < pages.length[s]; e += gridDim.x * blockDim.x) {
    const LayoutView& l = pages.layout_of(s, e / kPage);
    to[s * bound + e] = l.bias_at >= 0 ? bias_at(l, pages.page(s, e / kPage), e % kPage) : 0.0f;
  }
}

/// The narrowest type that holds this side of every layout exactly.
Dtype panel_type(const Pages& pages, bool keys) {
  bool bf16 = true, f16 = true;
  for (const PageLayout& l : pages.layouts) {
    const PageType& type = keys ? l.k : l.v;
    bf16 &= type.kind == PageType::Kind::BF16 && !type.pair;
    f16 &= type.kind == PageType::Kind::F16 && !type.pair;
  }
  if (keys && pages.plain_keys) return Dtype::F32;  // turned keys are not rounded again
  return bf16 ? Dtype::BF16 : f16 ? Dtype::F16 : Dtype::F32;
}

}  // namespace

PagesView pages_view(const char* where, const Pages& pages) {
  require(!pages.layouts.empty() && pages.layouts.size() <= kMostLayouts, where, "a store has one to four layouts");
  PagesView out{};
  out.table = pages.table.as<uint64_t>();
  out.layout = pages.layout.as<uint8_t>();
  out.length = pages.length.as<int32_t>();
  out.table_stride = pages.table.stride[0];
  out.layout_stride = pages.layout.stride[0];
  out.kv_heads = int(pages.kv_heads);
  out.segments = int(pages.segments());
  out.columns = pages.columns ? int(pages.columns->size()) : 0;
  out.d = pages.layouts[0].d;
  out.d_v = pages.layouts[0].d_v;
  if (out.columns > kMostColumns)
    throw Error(Code::Unsupported, where,
                std::to_string(out.columns) + " columns beside entries; the GPU keeps at most 12");
  for (int c = 0; c < out.columns; ++c) {
    const Column& column = (*pages.columns)[size_t(c)];
    out.column[c] = {column.keeps, column.width, column.block, column.fill};
  }
  for (size_t i = 0; i < pages.layouts.size(); ++i) {
    const PageLayout& l = pages.layouts[i];
    require(!l.v_transposed, where, "the GPU keeps values row by row");
    LayoutView& to = out.layouts[i];
    to.k = side_view(where, l.k, l.d, l.k_at);
    to.v = side_view(where, l.v, l.d_v, l.v_at);
    to.position_at = l.position_at;
    to.bias_at = l.bias_at;
    for (int c = 0; c < out.columns; ++c) {
      to.column_at[c] = l.column_at[size_t(c)];
      to.column_type[c] = column_type(l.k, (*pages.columns)[size_t(c)].keeps);
    }
  }
  return out;
}

Unpacked unpack(Queue& queue, const char* where, const Pages& pages, const Read* read, bool keys, bool values) {
  require(!pages.plain_keys || read, where, "the store keeps plain keys, and no read turns them");
  const PagesView view = pages_view(where, pages);
  const int64_t segments = pages.segments(), bound = std::max<int64_t>(1, pages.length_bound), rows = segments * bound;
  const Tensor offsets = queue.scratch.take(Dtype::I64, {segments + 1}), ends = queue.scratch.take(Dtype::I64, {segments});
  launch(queue, where, segment_bounds_kernel, dim3(unsigned(ceil_div(segments + 1, 256))), 256, 0, view.length,
         int(segments), bound, offsets.as<int64_t>(), ends.as<int64_t>());
  auto side = [&](bool of_keys, bool wanted, int64_t width) {
    const Dtype type = panel_type(pages, of_keys);
    // Offsets stand in for numbers that nobody reads: a null tensor would mean that there is no such side.
    const Tensor numbers = wanted ? queue.scratch.take(type, {rows, width})
                                  : Tensor(offsets.data, type, {rows, width}, Device::Cuda);
    return Ragged{numbers, offsets, ends, pages.kv_heads, rows};
  };
  Unpacked out;
  out.k = side(true, keys, view.d);
  out.v = side(false, values, view.d_v);
  out.positions = queue.scratch.take(Dtype::I32, {rows});
  Ragged to_k = out.k, to_v = out.v;
  if (!keys) to_k.values = {};
  if (!values) to_v.values = {};
  page_read(queue, pages, read, to_k, to_v, out.positions);
  if (std::any_of(pages.layouts.begin(), pages.layouts.end(), [](const PageLayout& l) { return l.bias_at >= 0; })) {
    out.bias = queue.scratch.take(Dtype::F32, {rows});
    launch(queue, where, bias_kernel, dim3(blocks_for(ceil_div(bound, 256), segments), unsigned(segments)), 256, 0,
           view, bound, out.bias.as<float>());
  }
  return out;
}

}  // namespace heed::cuda
