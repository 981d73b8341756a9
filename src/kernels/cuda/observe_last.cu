// observe of a last row's logits over pages of plain keys, turned as they are read: what readers choose entries by while
// decoding.
#include "kernels/cuda/observe.cuh"
#include "kernels/cuda/page.cuh"

namespace heed::cuda {
namespace {

constexpr int kMostWidth = 256, kLastWarps = 8;

struct LastLogits {
  Matrix q;
  Segments qs;
  int group;  // query heads of a KV head
  float scale, softcap;
  int64_t window;
  const int32_t* q_pos;
  RopeView rope;
  ReadPlaces places;
  Matrix columns;
  Segments at;
  Observe::Heads heads;
  bool runs;  // Each: of a run for each query head
};

/// A warp an entry; its lanes share the channels, pair by pair where keys are turned. Grid: runs of entries (strided),
/// segments of pages.
__global__ void __launch_bounds__(32 * kLastWarps)
    last_logits_kernel(const __grid_constant__ PagesView pages, const __grid_constant__ LastLogits a) {
  await();
  extern __shared__ float rows[];  // [group][d]
  using Heads = Observe::Heads;
  const int segment = blockIdx.y, sequence = segment / pages.kv_heads, head = segment % pages.kv_heads * a.group,
            d = pages.d, length = pages.length[segment], lane = threadIdx.x % 32;
  const int n = a.qs.length(sequence * a.qs.heads + head);
  auto row_of = [&](int member) { return a.qs.begin(sequence * a.qs.heads + head + member) + n - 1; };
  if (n > 0)
    for (int e = threadIdx.x; e < a.group * d; e += blockDim.x) rows[e] = a.scale * a.q.get(row_of(e / d), e % d);
  __syncthreads();
  const int turned = a.rope.inv_freq ? a.rope.dims : 0;
  float sines[kMostWidth / 64], cosines[kMostWidth / 64];
  int turned_for = -1 << 31;  // the place they are of
  for (int e = blockIdx.x * kLastWarps + threadIdx.x / 32; e < length; e += gridDim.x * kLastWarps) {
    const LayoutView& l = pages.layout_of(segment, e / kPage);
    char* page = pages.page(segment, e / kPage);
    const int entry = e % kPage;
    float pairs[kMostWidth / 64][2], rest[kMostWidth / 32];
#pragma unroll
    for (int t = 0; t < kMostWidth / 64; ++t)
      if (const int i = lane + 32 * t; i < turned / 2)
        pairs[t][0] = l.k.get(page, entry, a.rope.first(i)), pairs[t][1] = l.k.get(page, entry, a.rope.second(i));
#pragma unroll
    for (int t = 0; t < kMostWidth / 32; ++t)
      if (const int c = turned + lane + 32 * t; c < d) rest[t] = l.k.get(page, entry, c);
    if (turned > 0) {
      const int place = a.places.at(segment, e, l, page);
      if (place != turned_for) {
#pragma unroll
        for (int t = 0; t < kMostWidth / 64; ++t)
          if (const int i = lane + 32 * t; i < turned / 2)
            sincosf(float(place) * a.rope.inv_freq[i], &sines[t], &cosines[t]);
        turned_for = place;
      }
#pragma unroll
      for (int t = 0; t < kMostWidth / 64; ++t)
        if (lane + 32 * t < turned / 2) {
          const float x = pairs[t][0], y = pairs[t][1];
          pairs[t][0] = x * cosines[t] - y * sines[t], pairs[t][1] = x * sines[t] + y * cosines[t];
        }
    }
    const float bias = l.bias_at >= 0 ? bias_at(l, page, entry) : 0;
    float sum = 0, top = -kInfinity;
    for (int member = 0; member < a.group; ++member) {
      const float* q = rows + member * d;
      float x = 0;
#pragma unroll
      for (int t = 0; t < kMostWidth / 64; ++t)
        if (const int i = lane + 32 * t; i < turned / 2)
          x += pairs[t][0] * q[a.rope.first(i)] + pairs[t][1] * q[a.rope.second(i)];
#pragma unroll
      for (int t = 0; t < kMostWidth / 32; ++t)
        if (const int c = turned + lane + 32 * t; c < d) x += rest[t] * q[c];
      x = warp_sum(x);
      if (a.softcap > 0) x = a.softcap * tanhf(x / a.softcap);
      x += bias;
      bool seen = n > 0;
      if (seen && a.window > 0) {
        const int64_t position = a.q_pos ? a.q_pos[row_of(member)] : length - 1;
        seen = position - position_at(l, page, entry) < a.window;
      }
      if (!seen) x = -kInfinity;
      if (a.heads == Heads::Each && lane == 0) {
        if (a.runs) a.columns.set(a.at.begin(sequence * a.qs.heads + head + member) + e, 0, x);
        else a.columns.set(a.at.begin(segment) + e, member, x);
      }
      sum += x, top = fmaxf(top, x);
    }
    if (a.heads != Heads::Each && lane == 0)
      a.columns.set(a.at.begin(segment) + e, 0,
                    a.heads == Heads::GroupMean  ? sum / float(a.group)
                    : a.heads == Heads::GroupMax ? top
                                                 : sum);
  }
}

/// `columns`: those of observe, or runs.
bool last_logits(Queue& queue, const char* where, const Ragged& q, const Keys& keys, const Mods& mods,
                 Observe::Heads heads, bool runs, const Ragged& columns) {
  const Pages& pages = *keys.pages;
  if (!pages.plain_keys || !keys.read || mods.k_map || mods.temperature || mods.weight != WeightFunction::Softmax)
    return false;
  check_read(where, pages, keys.read);
  const PagesView view = pages_view(where, pages);
  const int64_t group = q.heads / pages.kv_heads;
  if (q.values.rank != 2 || !is_float(q.values.type) || q.values.size[1] != view.d || view.d > kMostWidth ||
      q.heads % pages.kv_heads || q.sequences() * pages.kv_heads != pages.segments() || group * view.d * 4 > 48 * 1024)
    return false;  // refused where every observation is
  LastLogits a{matrix(q.values),
               segments(q),
               int(group),
               mods.scale != 0 ? mods.scale : 1 / std::sqrt(float(view.d)),
               mods.softcap,
               mods.window,
               mods.q_pos.as<int32_t>(),
               rope_view(keys.read->rope),
               read_places(*keys.read),
               matrix(columns.values),
               segments(columns),
               heads,
               runs};
  launch_early(queue, where, last_logits_kernel,
               dim3(blocks_for(ceil_div(pages.length_bound, 4 * kLastWarps), view.segments), unsigned(view.segments)),
               32 * kLastWarps, size_t(group * view.d) * sizeof(float), view, a);
  return true;
}

}  // namespace

bool observe_last(Queue& queue, const Ragged& q, const Keys& keys, const Plan* plan, const Mods& mods,
                  const Observe& how, const Ragged& columns) {
  if (!keys.pages || how.rows != Observe::Rows::Last || !how.logits || how.heads == Observe::Heads::LayerMean ||
      (plan && plan->form != Plan::Form::Dense) || columns.segments() != keys.pages->segments())
    return false;
  const int64_t width = columns.values.rank == 2 ? columns.values.size[1] : 1;
  if (how.heads == Observe::Heads::Each && width != q.heads / keys.pages->kv_heads) return false;
  return last_logits(queue, "observe", q, keys, mods, how.heads, false, columns);
}

bool observe_last_runs(Queue& queue, const Ragged& q, const Keys& keys, const Mods& mods, const Ragged& runs) {
  return last_logits(queue, "observe_runs", q, keys, mods, Observe::Heads::Each, true, runs);
}

}  // namespace heed::cuda
