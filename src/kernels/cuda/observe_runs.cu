// observe_runs: what a decoded token's query heads pay to each entry, read where bf16 pages lie, once for a whole group.
#include "kernels/cuda/half_warp.cuh"
#include "kernels/cuda/observe.cuh"
#include "kernels/cuda/page.cuh"

namespace heed::cuda {
namespace {

constexpr int kRunWarps = 8, kShare = 512;  // entries that a block adds up: the same whatever the bound

struct Runs {
  Matrix q;
  Segments qs;
  float scale, softcap;
  int64_t window;
  const int32_t* q_pos;
  Matrix values;
  Segments at;
  float2* parts;  // [query heads, shares]: the largest logit and Σ e^(logit − largest); null: only logits are wanted
  int shares;
};

/// Half a warp an entry, H heads at a time; shared memory: the group's queries. Grid: shares (strided), KV heads.
template <int H, int U>
__global__ void __launch_bounds__(32 * kRunWarps)
    run_logits_kernel(const __grid_constant__ PagesView pages, const __grid_constant__ Runs a, int row) {
  await();
  extern __shared__ float4 shared[];
  __shared__ float2 parts[kRunWarps][H];
  const SharedQueries queries{shared, row};
  const LayoutView& l = pages.layouts[0];
  const int g = pages.kv_heads, group = a.qs.heads / g, kv = blockIdx.y, head = kv / g * a.qs.heads + kv % g * group;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = lane / 16, own = lane % 16, d = pages.d,
            heads = (group + H - 1) / H * H, length = pages.length[kv];
  if (int(blockIdx.x) * kShare >= length) return;
  const auto last_row = [&](int member) { return a.qs.end(head + member) - 1; };
  for (int i = threadIdx.x; i < heads * row; i += blockDim.x) {
    const int member = i / row, c = i % row;
    const bool there = c < d && member < group && a.qs.length(head + member) > 0;
    queries.put(member, c, there ? a.scale * a.q.get(last_row(member), c) : 0.0f);
  }
  __syncthreads();
  constexpr int kEach = 16 / (H * U);  // lanes that are left with one number
  const int mine = own / kEach, u = mine / H;
  for (int share = blockIdx.x; share * kShare < length; share += gridDim.x)
    for (int first = 0; first < group; first += H) {
      const int member = first + mine % H;
      const bool there = member < group && a.qs.length(head + min(member, group - 1)) > 0;
      const int64_t to = a.at.begin(head + min(member, group - 1));
      const int64_t position = a.window > 0 && there ? (a.q_pos ? a.q_pos[last_row(member)] : length - 1) : 0;
      float top = -kInfinity, sum = 0;
      const int end = min(length, (share + 1) * kShare);
      constexpr int kStep = kRunWarps * 2 * U;
      Eight<__nv_bfloat16> keys[U];  // the lane's first channels, and its page, of the entries to come
      const char *page = nullptr, *next_page = nullptr;
      const auto page_of = [&](int base) { return base < end ? pages.page(kv, base / kPage) : nullptr; };
      const auto key_of = [&](const char* in, int base, int i) {
        return reinterpret_cast<const __nv_bfloat16*>(in + l.k.at) + (base % kPage + 2 * i + half) * d;
      };
      const auto ask = [&](const char* in, int base) {
        if (base >= end || 8 * own >= d) return;
#pragma unroll
        for (int i = 0; i < U; ++i) keys[i].load(key_of(in, base, i) + 8 * own);
      };
      const int begin = share * kShare + warp * 2 * U;
      page = page_of(begin), next_page = page_of(begin + kStep);
      ask(page, begin);
      for (int base = begin; base < end; base += kStep) {
        const char* const here = page;
        float sums[H * U] = {};
        float own_keys[U][8];
#pragma unroll
        for (int i = 0; i < U; ++i) keys[i].get(own_keys[i]);
        page = next_page, next_page = page_of(base + 2 * kStep);
        ask(page, base + kStep);
        for (int c = 8 * own; c < d; c += 128) {
          if (c >= 128) {
#pragma unroll
            for (int i = 0; i < U; ++i) {
              Eight<__nv_bfloat16> more;
              more.load(key_of(here, base, i) + c);
              more.get(own_keys[i]);
            }
          }
#pragma unroll
          for (int m = 0; m < H; ++m) {
            float q[8];
            queries.get(first + m, c, q);
#pragma unroll
            for (int i = 0; i < U; ++i)
#pragma unroll
              for (int j = 0; j < 8; ++j) sums[i * H + m] = fmaf(q[j], own_keys[i][j], sums[i * H + m]);
          }
        }
        float x = spread_sums<H * U>(sums, own);
        const int e = base + 2 * u + half;
        if (e >= end) continue;
        if (a.softcap > 0) x = a.softcap * tanhf(x / a.softcap);
        if (l.bias_at >= 0) x += reinterpret_cast<const float*>(here + l.bias_at)[e % kPage];
        if (!there ||
            (a.window > 0 && position - reinterpret_cast<const int32_t*>(here + l.position_at)[e % kPage] >= a.window))
          x = -kInfinity;
        if (member < group && own % kEach == 0) a.values.set(to + e, 0, x);
        if (x == -kInfinity) continue;
        const float high = fmaxf(top, x);
        sum = sum * expf(top - high) + expf(x - high), top = high;
      }
      if (!a.parts) continue;
      const auto join = [&](float its_top, float its_sum) {
        const float high = fmaxf(top, its_top);
        if (high == -kInfinity) return;
        sum = sum * expf(top - high) + its_sum * expf(its_top - high), top = high;
      };
#pragma unroll
      for (int far = kEach * H; far < 32; far *= 2) {
        const float its_top = __shfl_xor_sync(~0u, top, far), its_sum = __shfl_xor_sync(~0u, sum, far);
        join(its_top, its_sum);
      }
      __syncthreads();
      if (half == 0 && u == 0 && own % kEach == 0) parts[warp][mine % H] = make_float2(top, sum);
      __syncthreads();
      if (threadIdx.x < H && first + int(threadIdx.x) < group) {
        top = -kInfinity, sum = 0;
        for (int w = 0; w < kRunWarps; ++w) join(parts[w][threadIdx.x].x, parts[w][threadIdx.x].y);
        a.parts[int64_t(head + first + threadIdx.x) * a.shares + share] = make_float2(top, sum);
      }
    }
}

/// Logits become weights. Grid: numbers (strided), query heads.
__global__ void __launch_bounds__(256)
    run_weights_kernel(const __grid_constant__ PagesView pages, const __grid_constant__ Runs a) {
  await();
  __shared__ float2 all;
  const int g = pages.kv_heads, h = a.qs.heads, head = blockIdx.y, length = pages.length[head / h * g + head % h * g / h];
  if (int(blockIdx.x) * 256 >= length) return;
  if (threadIdx.x < 32) {
    float top = -kInfinity, sum = 0;
    const auto join = [&](float2 its) {
      const float high = fmaxf(top, its.x);
      if (high == -kInfinity) return;
      sum = sum * expf(top - high) + its.y * expf(its.x - high), top = high;
    };
    for (int s = threadIdx.x; s * kShare < length; s += 32) join(a.parts[int64_t(head) * a.shares + s]);
    for (int far = 16; far > 0; far /= 2)
      join(make_float2(__shfl_xor_sync(~0u, top, far), __shfl_xor_sync(~0u, sum, far)));
    if (threadIdx.x == 0) all = make_float2(top, sum);
  }
  __syncthreads();
  float* x = static_cast<float*>(a.values.data) + a.at.begin(head);
  for (int e = blockIdx.x * 256 + threadIdx.x; e < length; e += gridDim.x * 256)
    x[e] = all.y > 0 ? expf(x[e] - all.x) / all.y : 0;
}

template <int H, int U>
void start(Queue& queue, const PagesView& view, const Runs& a, int64_t bound) {
  const int group = a.qs.heads / view.kv_heads, row = (view.d + 127) / 128 * 128;
  launch_early(queue, "observe_runs", run_logits_kernel<H, U>,
               dim3(blocks_for(ceil_div(bound, kShare), view.segments), unsigned(view.segments)), 32 * kRunWarps,
               size_t(ceil_div(group, H) * H * row) * sizeof(float), view, a, row);
}

}  // namespace

bool observe_runs(Queue& queue, const Ragged& q, const Keys& keys, const Mods& mods, bool logits, Ragged runs) {
  constexpr const char* where = "observe_runs";
  require(keys.pages && runs.segments() == q.segments() && runs.values.type == Dtype::F32 && runs.values.rank == 1,
          where, "keys lie in pages, and runs are F32 numbers for each query head");
  const Pages& pages = *keys.pages;
  if (mods.k_map || mods.temperature || mods.weight != WeightFunction::Softmax || (mods.sink_logits && !logits))
    return false;
  if (logits && pages.plain_keys) return observe_last_runs(queue, q, keys, mods, runs);
  if (pages.plain_keys || pages.layouts.size() != 1 || pages.layouts[0].k.kind != PageType::Kind::BF16 ||
      pages.layouts[0].k.pair || pages.layouts[0].d % 8 != 0 || q.values.rank != 2 ||
      q.values.size[1] != pages.layouts[0].d || q.heads % pages.kv_heads ||
      q.sequences() * pages.kv_heads != pages.segments())
    return false;
  const PagesView view = pages_view(where, pages);
  const int64_t group = q.heads / pages.kv_heads;
  if ((group + 7) / 8 * 8 * ceil_div(view.d, 128) * 128 * 4 > 40 * 1024) return false;
  if (pages.length_bound == 0 || pages.segments() == 0) return true;
  const Scratch scratch(queue.scratch);
  const int64_t shares = ceil_div(pages.length_bound, kShare);
  Runs a{matrix(q.values),    segments(q),    mods.scale != 0 ? mods.scale : 1 / std::sqrt(float(view.d)),
         mods.softcap,        mods.window,    mods.q_pos.as<int32_t>(),
         matrix(runs.values), segments(runs), nullptr,
         int(shares)};
  if (!logits) a.parts = static_cast<float2*>(queue.scratch.take(Dtype::F32, {q.segments() * shares * 2}).data);
  if (group == 1) start<1, 4>(queue, view, a, pages.length_bound);
  else if (group == 2) start<2, 4>(queue, view, a, pages.length_bound);
  else if (group <= 4) start<4, 4>(queue, view, a, pages.length_bound);
  else start<8, 2>(queue, view, a, pages.length_bound);
  if (!logits)
    launch_early(queue, where, run_weights_kernel,
                 dim3(blocks_for(ceil_div(pages.length_bound, 1024), q.segments()), unsigned(q.segments())), 256, 0,
                 view, a);
  return true;
}

}  // namespace heed::cuda
