// Entries move through scratch, a range of places at a time: a range's sources are read before it is written, and, since
// moves go downward, later ranges find theirs untouched.
#include "kernels/cuda/page.cuh"

namespace heed::cuda {
namespace {

constexpr int64_t kRange = 64 * kPage;  // places of a segment moved at a time

struct Record {  // of one entry: key, value, position, bias, User columns
  int64_t v_at, position_at, bytes;
};

struct Move {
  const int32_t *index, *count;
  int64_t capacity, first;  // places first … first + kRange
  char* records;
  Record record;
  __device__ char* of(int s, int64_t i) const { return records + (s * kRange + i - first) * record.bytes; }
};

/// By a warp; in words where both ends allow.
__device__ void copy_row(const char* from, char* to, int64_t bytes, int lane) {
  if ((reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to) | uint64_t(bytes)) % 4 == 0) {
    for (int64_t b = lane; b < bytes / 4; b += 32)
      reinterpret_cast<uint32_t*>(to)[b] = reinterpret_cast<const uint32_t*>(from)[b];
    return;
  }
  for (int64_t b = lane; b < bytes; b += 32) to[b] = from[b];
}

/// An entry's side as it is, codes then what lies beside them, or as f32 where groups span entries.
__device__ void gather(const SideView& side, char* page, int entry, char* to, int lane) {
  if (!side.raw()) {
    for (int c = lane; c < side.width; c += 32) reinterpret_cast<float*>(to)[c] = side.get(page, entry, c);
    return;
  }
  const char* row = page + side.at + entry * side.row_bytes();
  copy_row(row, to, side.row_bytes(), lane);
  __half* scales = reinterpret_cast<__half*>(to + (side.row_bytes() + 1) / 2 * 2);
  const int own = side.row_groups();
  auto* places = reinterpret_cast<uint8_t*>(scales + side.halves() * own);
  for (int g = lane; g < own; g += 32) {
    for (int i = 0; i < side.halves(); ++i) scales[i * own + g] = side.scales(page)[i * side.groups + entry * own + g];
    for (int i = 0; i < side.row_places(); ++i)
      places[i * own + g] = side.places(page)[i * side.groups + entry * own + g];
  }
}

/// Not inlined: put() has a dozen places that read a number.
__noinline__ __device__ float gathered(const SideView& side, const char* from, int c) {
  if (!side.raw()) return reinterpret_cast<const float*>(from)[c];
  if (!side.quantised()) return side.plain(from, c);
  const __half* scales = reinterpret_cast<const __half*>(from + (side.row_bytes() + 1) / 2 * 2);
  const int g = c / side.group;
  const int own = side.row_groups();
  const auto* places = reinterpret_cast<const uint8_t*>(scales + side.halves() * own);
  for (int i = 0; i < side.row_places(); ++i)
    if (places[i * own + g] == c % side.group) return __half2float(scales[(2 + i) * own + g]);
  if (side.sphere()) return side.of_block(from, __half2float(scales[g]), c);
  return __fadd_rn(side.has_zeros() ? __half2float(scales[own + g]) : 0.0f,
                   __fmul_rn(side.point(side.code(from, c)), __half2float(scales[g])));
}

/// One warp an entry. Grid: entries (strided), segments.
__global__ void gather_kernel(const __grid_constant__ PagesView from, const __grid_constant__ Move move) {
  const int s = blockIdx.y, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t end = min(int64_t(move.count[s]), move.first + kRange);
  for (int64_t i = move.first + blockIdx.x * warps + threadIdx.x / 32; i < end; i += gridDim.x * warps) {
    const int source = move.index[s * move.capacity + i], entry = source % kPage;
    const LayoutView& l = from.layout_of(s, source / kPage);
    char *page = from.page(s, source / kPage), *to = move.of(s, i);
    gather(l.k, page, entry, to, lane);
    gather(l.v, page, entry, to + move.record.v_at, lane);
    float* rest = reinterpret_cast<float*>(to + move.record.position_at);
    if (lane == 0) {
      rest[0] = __int_as_float(position_at(l, page, entry));
      rest[1] = l.bias_at >= 0 ? bias_at(l, page, entry) : 0;
    }
    int at = 2;
    for (int c = 0; c < from.columns; ++c) {
      if (from.column[c].keeps != Column::Keeps::User) continue;
      for (int j = lane; j < from.column[c].width; j += 32) rest[at + j] = from.column_at(l, page, c, entry)[j];
      at += from.column[c].width;
    }
  }
}

__device__ void place(const SideView& side, char* page, int count, const PagesView& from, bool keys, int s,
                      int64_t first, const Move& move) {
  auto source = [&](int e) -> const SideView& {
    const LayoutView& l = from.layout_of(s, move.index[s * move.capacity + first + e] / kPage);
    return keys ? l.k : l.v;
  };
  auto record = [&](int e) { return move.of(s, first + e) + (keys ? 0 : move.record.v_at); };
  auto raw = [&](int e) { return side.raw() && source(e).same_type(side); };
  bool own = false;
  for (int e = threadIdx.x; e < count; e += blockDim.x) own |= !raw(e);
  if (__syncthreads_or(own))
    put(side, page, 0, count, [&](int e, int c) { return gathered(source(e), record(e), c); }, raw);
  if (!side.raw()) return;
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  for (int e = threadIdx.x / 32; e < count; e += warps) {
    if (!raw(e)) continue;
    const char* from_record = record(e);
    char* row = page + side.at + e * side.row_bytes();
    copy_row(from_record, row, side.row_bytes(), lane);
    const __half* scales = reinterpret_cast<const __half*>(from_record + (side.row_bytes() + 1) / 2 * 2);
    const int own = side.row_groups();
    const auto* places = reinterpret_cast<const uint8_t*>(scales + side.halves() * own);
    for (int g = lane; g < own; g += 32) {
      for (int i = 0; i < side.halves(); ++i) side.scales(page)[i * side.groups + e * own + g] = scales[i * own + g];
      for (int i = 0; i < side.row_places(); ++i)
        side.places(page)[i * side.groups + e * own + g] = places[i * own + g];
    }
  }
}

/// Grid: pages of the range, segments.
__global__ void place_kernel(const __grid_constant__ PagesView from, const __grid_constant__ PagesView to,
                             const __grid_constant__ Move move) {
  const int s = blockIdx.y;
  const int64_t end = min(int64_t(move.count[s]), move.first + kRange);
  for (int64_t first = move.first + blockIdx.x * kPage; first < end; first += gridDim.x * kPage) {
    const int p = int(first / kPage), count = int(min(int64_t(kPage), end - first));
    if (from.table == to.table && count == kPage) {  // a full page whose entries all stay where they are
      bool moves = false;
      for (int e = threadIdx.x; e < count; e += blockDim.x)
        moves |= move.index[s * move.capacity + first + e] != first + e;
      if (!__syncthreads_or(moves)) continue;
    }
    const LayoutView& l = to.layout_of(s, p);
    char* page = to.page(s, p);
    place(l.k, page, count, from, true, s, first, move);
    place(l.v, page, count, from, false, s, first, move);
    for (int e = threadIdx.x; e < count; e += blockDim.x) {
      const float* rest = reinterpret_cast<const float*>(move.of(s, first + e) + move.record.position_at);
      position_at(l, page, e) = __float_as_int(rest[0]);
      if (l.bias_at >= 0) bias_at(l, page, e) = rest[1];
      int at = 2;
      for (int c = 0; c < to.columns; ++c) {
        if (to.column[c].keeps != Column::Keeps::User) continue;
        for (int j = 0; j < to.column[c].width; ++j) to.column_at(l, page, c, e)[j] = rest[at + j];
        at += to.column[c].width;
      }
    }
    __syncthreads();
    refresh(to, l, page, 0, count, count);
  }
}

int64_t side_bytes(const SideView& side) {
  const int64_t raw = (side.row_bytes() + 1) / 2 * 2 + (2 * side.halves() + side.row_places()) * side.row_groups();
  return ceil_div(std::max<int64_t>(raw, side.raw() ? 0 : 4 * side.width), 16) * 16;
}

}  // namespace

void page_move(Queue& queue, const Pages& from, const Pages& to, Tensor index, Tensor count, int64_t capacity) {
  constexpr const char* where = "page_move";
  require(from.segments() == to.segments(), where, "both stores have the same segments");
  check_tensor(where, "index", index, {from.segments() * capacity}, false, Dtype::I32);
  check_tensor(where, "count", count, {from.segments()}, false, Dtype::I32);
  const PagesView source = pages_view(where, from), target = pages_view(where, to);
  require(source.columns == target.columns && source.d == target.d && source.d_v == target.d_v, where,
          "both stores have the same widths and columns");
  Move move{index.as<int32_t>(), count.as<int32_t>(), capacity, 0, nullptr, {}};
  for (size_t i = 0; i < from.layouts.size(); ++i) {
    move.record.v_at = std::max(move.record.v_at, side_bytes(source.layouts[i].k));
    move.record.position_at = std::max(move.record.position_at, side_bytes(source.layouts[i].v));
  }
  move.record.position_at += move.record.v_at;
  int64_t numbers = 2;
  for (int c = 0; c < source.columns; ++c)
    if (source.column[c].keeps == Column::Keeps::User) numbers += source.column[c].width;
  move.record.bytes = ceil_div(move.record.position_at + 4 * numbers, 16) * 16;
  Scratch scratch(queue.scratch);
  const unsigned segments = unsigned(from.segments());
  move.records = queue.scratch.take(Dtype::U8, {std::max<int64_t>(1, from.segments() * kRange * move.record.bytes)}).as<char>();
  for (; move.first < capacity; move.first += kRange) {
    const int64_t here = std::min(kRange, capacity - move.first);
    launch(queue, where, gather_kernel, dim3(blocks_for(ceil_div(here, 4), segments), segments), 128, 0, source, move);
    launch(queue, where, place_kernel, dim3(unsigned(ceil_div(here, kPage)), segments), 256, 0, source, target, move);
  }
}

}  // namespace heed::cuda
