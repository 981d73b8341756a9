// Checks and times the Hopper attention kernel alone: attend_sm90 check | bench [variants]. Build: see docs/performance.md.
// The reference is a plain kernel in f64 on the same bf16 inputs; outputs and every row outside a segment are NaN beforehand.
#define HEED_ATTEND_SHAPES
#include "kernels/cuda/attend_sm90.cu"

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "measure.h"

namespace heed::sm90 {
cudaError_t attend_launch(const Attend& a, void* memory, cudaStream_t stream);
}
using namespace heed::sm90;

using Start = cudaError_t (*)(const Attend&, void*, cudaStream_t);
struct Variant {
  const char* name;
  int d, dv;
  bool plan;
  Start start;
};
#define V(D, DV, N, G, ST, PLAN, TURNS, QS) \
  {#N " groups " #G " stages " #ST " turns " #TURNS " q " #QS, D, DV, PLAN, launch<Shape<D, DV, N, G, ST, PLAN, TURNS, QS>>}
static const Variant variants[] = {
#include "variants.h"
};

__global__ void random_kernel(__nv_bfloat16* x, int64_t n, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t z = (uint64_t(i) + seed) * 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull, z = (z ^ z >> 27) * 0x94D049BB133111EBull, z ^= z >> 31;
    const float u = (uint32_t(z) + 1.f) / 4294967297.f, w = uint32_t(z >> 32) / 4294967296.f;
    x[i] = __float2bfloat16(sqrtf(-2 * logf(fminf(u, 1.f - 1e-7f))) * cospif(2 * w));
  }
}

struct Reference {
  Attend a;
  const int* rows;            // rows of q.values to compute
  const int* segment;         // and their segments
  const int64_t* plan_start;  // by segment
  double* logits;             // [rows, most keys]
  int64_t most;
  double *out, *lse;
};

__global__ void reference_kernel(Reference r) {
  const Attend& a = r.a;
  const int row = r.rows[blockIdx.x], s = r.segment[blockIdx.x], head = s % a.heads, seq = s / a.heads;
  const int own = head / (a.heads / a.kv_heads);
  const int64_t ks = int64_t(seq) * a.kv_heads + (a.k_map ? a.k_map[head] : own),
                vs = int64_t(seq) * a.kv_heads + (a.v_map ? a.v_map[head] : own);
  const int64_t n = a.q_end[s] - a.q_begin[s], m = a.k_end[ks] - a.k_begin[ks], i = row - a.q_begin[s];
  double* x = r.logits + blockIdx.x * r.most;
  for (int64_t j = threadIdx.x; j < m; j += blockDim.x) {
    bool seen = !(a.causal && j - i > m - n) &&
                !(a.window > 0 &&
                  (a.q_pos ? a.q_pos[row] : m - n + i) - (a.k_pos ? a.k_pos[a.k_begin[ks] + j] : j) >= a.window);
    if (seen && a.k_tile > 0) {
      const int64_t p = r.plan_start[s] + i / a.q_tile, begin = a.rowptr[p],
                    end = a.count ? begin + a.count[p] : a.rowptr[p + 1];
      seen = false;
      for (int64_t e = begin; e < end; ++e)
        if (a.index[e] == j / a.k_tile) {
          const int mask = a.mask ? a.mask[e] : -1, words = (a.k_tile + 63) / 64;
          seen = mask < 0 || (a.bits[(int64_t(mask) * a.q_tile + i % a.q_tile) * words + j % a.k_tile / 64] >> (j % 64) & 1);
        }
    }
    double dot = 0;
    if (seen)
      for (int c = 0; c < a.d; ++c)
        dot += double(__bfloat162float(a.q[row * a.q_stride + c])) *
               double(__bfloat162float(a.k[(a.k_begin[ks] + j) * a.k_stride + c]));
    x[j] = seen ? dot * a.scale : -INFINITY;
  }
  __syncthreads();
  double top = -INFINITY, sum = 0;
  for (int64_t j = 0; j < m; ++j) top = fmax(top, x[j]);
  if (top > -INFINITY)
    for (int64_t j = 0; j < m; ++j) sum += exp(x[j] - top);
  double lse = top > -INFINITY ? top + log(sum) : -INFINITY;
  if (a.sink) lse = lse > -INFINITY ? lse + log1p(exp(a.sink[head] - lse)) : double(a.sink[head]);
  for (int c = threadIdx.x; c < a.d_v; c += blockDim.x) {
    double o = 0;
    for (int64_t j = 0; j < m; ++j)
      if (x[j] > -INFINITY) o += exp(x[j] - lse) * double(__bfloat162float(a.v[(a.v_begin[vs] + j) * a.v_stride + c]));
    r.out[blockIdx.x * int64_t(a.d_v) + c] = o;
  }
  if (threadIdx.x == 0) r.lse[blockIdx.x] = lse;
}

struct Case {
  std::string name;
  std::vector<int> n, m;  // by sequence
  int heads = 1, kv_heads = 1, d = 128, dv = 128;
  bool causal = true;
  int window = 0, gap = 0;
  int q_tile = 0, k_tile = 0, plan_heads = 1;
  double density = 1;
  bool bits = false, counts = false, sink = false, maps = false, positions = false;
  bool poison = true;
  float spread = 1;  // multiplies the scale, so that the running maximum moves
};

struct Problem {
  Attend a;
  void* scratch;
  int64_t out_count;
  std::vector<int64_t> q_begin, q_end, plan_start;
  double pairs = 0;  // query–key pairs computed by whole blocks or by the causal triangle
  std::vector<void*> owned;
  ~Problem() {
    for (void* p : owned) cudaFree(p);
  }
};

static uint64_t state = 88172645463325252ull;
static uint32_t next_random() {
  return state ^= state << 13, state ^= state >> 7, state ^= state << 17, uint32_t(state >> 32);
}

static void make(Problem& p, const Case& c) {
  Attend& a = p.a;
  auto layout = [&](const std::vector<int>& lengths, int heads, std::vector<int64_t>& begin, std::vector<int64_t>& end) {
    int64_t at = c.gap;
    for (int n : lengths)
      for (int h = 0; h < heads; ++h) begin.push_back(at), end.push_back(at + n), at += n + c.gap;
    begin.push_back(at);
    return at;
  };
  std::vector<int64_t> kb, ke, vb, ve;
  a.q_rows = layout(c.n, c.heads, p.q_begin, p.q_end), a.k_rows = layout(c.m, c.kv_heads, kb, ke),
  a.v_rows = layout(c.m, c.kv_heads, vb, ve);
  a.q_rows = std::max<int64_t>(1, a.q_rows), a.k_rows = std::max<int64_t>(1, a.k_rows),
  a.v_rows = std::max<int64_t>(1, a.v_rows);
  a.segments = int(c.n.size()) * c.heads, a.heads = c.heads, a.kv_heads = a.v_heads = c.kv_heads, a.d = c.d, a.d_v = c.dv;
  a.q_stride = a.k_stride = c.d, a.v_stride = c.dv, a.out_stride = c.dv;
  a.scale = c.spread / std::sqrt(float(c.d)), a.causal = c.causal, a.window = c.window;
  auto own = [&](auto* x) {
    p.owned.push_back((void*)x);
    return x;
  };
  auto values = [&](int64_t rows, int width, const std::vector<int64_t>& begin, const std::vector<int64_t>& end,
                    uint64_t seed) {
    __nv_bfloat16* x;
    OK(cudaMalloc(&x, rows * width * 2));
    if (c.poison) OK(cudaMemset(x, 0xFF, rows * width * 2));
    if (c.poison)
      for (size_t s = 0; s < end.size(); ++s) {
        if (end[s] > begin[s])
          random_kernel<<<264, 256>>>(x + begin[s] * width, (end[s] - begin[s]) * width, seed + s * 7919);
      }
    else random_kernel<<<1056, 256>>>(x, rows * width, seed);
    return own(x);
  };
  a.q = values(a.q_rows, c.d, p.q_begin, p.q_end, 1), a.k = values(a.k_rows, c.d, kb, ke, 1ull << 40),
  a.v = values(a.v_rows, c.dv, vb, ve, 1ull << 50);
  a.q_begin = own(on_device(p.q_begin)), a.q_end = own(on_device(p.q_end));
  a.k_begin = own(on_device(kb)), a.k_end = own(on_device(ke)), a.v_begin = own(on_device(vb));
  if (c.maps) {
    std::vector<int> k, v;
    for (int h = 0; h < c.heads; ++h) k.push_back((h * 5 + 1) % c.kv_heads), v.push_back((h * 3 + 2) % c.kv_heads);
    a.k_map = own(on_device(k)), a.v_map = own(on_device(v));
  }
  if (c.sink) {
    std::vector<float> s;
    for (int h = 0; h < c.heads; ++h) s.push_back(float(h) - 1.5f);
    a.sink = own(on_device(s));
  }
  if (c.positions) {  // keys have been lost: positions jump, queries go on behind the last
    std::vector<int> q_pos(size_t(a.q_rows), -1), k_pos(size_t(a.k_rows), -1);
    for (int s = 0; s < a.segments; ++s) {
      const size_t kv = size_t(s / c.heads * c.kv_heads + s % c.heads / (c.heads / c.kv_heads));
      int at = 3;
      for (int64_t j = kb[kv]; j < ke[kv]; ++j) k_pos[size_t(j)] = at, at += 1 + (j % 5 == 0) * int(j % 13);
      for (int64_t i = p.q_begin[size_t(s)], n = p.q_end[size_t(s)]; i < n; ++i) {
        const int64_t own = ke[kv] - n + i;
        q_pos[size_t(i)] = own >= kb[kv] ? k_pos[size_t(own)] : 0;
      }
    }
    a.q_pos = own(on_device(q_pos)), a.k_pos = own(on_device(k_pos));
  }
  p.plan_start.assign(size_t(a.segments), 0);
  if (c.k_tile > 0) {
    a.q_tile = c.q_tile, a.k_tile = c.k_tile, a.plan_heads = c.plan_heads;
    std::vector<int64_t> rowptr{0};
    std::vector<int> count, index, mask;
    std::vector<uint64_t> bits;
    const int words = (c.k_tile + 63) / 64;
    for (size_t q = 0; q < c.n.size(); ++q) {
      const int64_t start = int64_t(rowptr.size()) - 1, tiles = (c.n[q] + c.q_tile - 1) / c.q_tile;
      for (int h = 0; h < c.heads; ++h)
        p.plan_start[q * size_t(c.heads) + size_t(h)] = start + h * c.plan_heads / c.heads * tiles;
      for (int h = 0; h < c.plan_heads; ++h)
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t last = c.causal ? std::min<int64_t>(c.m[q] - 1, (t + 1) * c.q_tile - 1 + c.m[q] - c.n[q])
                                        : c.m[q] - 1;
          const int64_t blocks = c.poison   ? (c.m[q] + c.k_tile - 1) / c.k_tile + 1
                                 : last < 0 ? 0
                                            : last / c.k_tile + 1;  // poison: also such as nobody sees
          for (int64_t b = 0; b < blocks; ++b) {
            const bool diagonal = !c.poison && b == blocks - 1;
            if (!diagonal && next_random() >= c.density * 4294967296.) continue;
            index.push_back(int(b));
            const bool some = c.bits && next_random() % 2;
            mask.push_back(some ? int(bits.size() / size_t(c.q_tile * words)) : -1);
            if (some)
              for (int i = 0; i < c.q_tile * words; ++i) bits.push_back(uint64_t(next_random()) << 32 | next_random());
            if (last >= b * c.k_tile) p.pairs += double(c.q_tile) * c.k_tile * (c.heads / c.plan_heads);
          }
          count.push_back(int(int64_t(index.size()) - rowptr.back()));
          if (c.counts) index.resize(index.size() + 3, 1 << 20), mask.resize(index.size(), -1);  // counted out
          rowptr.push_back(int64_t(index.size()));
        }
    }
    a.rowptr = own(on_device(rowptr)), a.index = own(on_device(index));
    if (c.counts) a.count = own(on_device(count));
    if (c.bits) a.mask = own(on_device(mask)), a.bits = own(on_device(bits));
  } else {
    for (size_t q = 0; q < c.n.size(); ++q)
      p.pairs += double(c.heads) * c.n[q] * (c.causal ? c.m[q] - c.n[q] / 2. : c.m[q]);
    if (c.window > 0) p.pairs = double(c.heads) * c.n[0] * c.window - double(c.heads) * c.window * c.window / 2;
  }
  p.out_count = a.q_rows * c.dv;
  OK(cudaMalloc(&a.out, p.out_count * 4)), own(a.out);
  OK(cudaMalloc(&a.lse, a.q_rows * 4)), own(a.lse);
  OK(cudaMalloc(&p.scratch, attend_scratch(a))), p.owned.push_back(p.scratch);
  OK(cudaMemset(p.scratch, 0xFF, attend_scratch(a)));
}

/// Runs `start` and compares up to `most` rows with the reference. Prints one line; returns whether it holds.
static bool check(const Case& c, const char* variant, Start start, size_t most_rows) {
  Problem p;
  make(p, c);
  Attend& a = p.a;
  if (!attend_fits(a)) return printf("FAIL %s: does not fit\n", c.name.c_str()), false;
  OK(cudaMemset(a.out, 0xFF, p.out_count * 4)), OK(cudaMemset(a.lse, 0xFF, a.q_rows * 4));
  OK(start(a, p.scratch, 0));
  OK(cudaDeviceSynchronize());
  std::vector<float> out(size_t(p.out_count)), lse(size_t(a.q_rows));
  OK(cudaMemcpy(out.data(), a.out, out.size() * 4, cudaMemcpyDeviceToHost)),
      OK(cudaMemcpy(lse.data(), a.lse, lse.size() * 4, cudaMemcpyDeviceToHost));
  std::vector<int> rows, segments;
  std::vector<char> inside(size_t(a.q_rows), 0);
  for (int s = 0; s < a.segments; ++s)
    for (int64_t r = p.q_begin[size_t(s)]; r < p.q_end[size_t(s)]; ++r)
      rows.push_back(int(r)), segments.push_back(s), inside[size_t(r)] = 1;
  size_t strays = 0;
  for (size_t r = 0; r < inside.size(); ++r)
    if (!inside[r])
      for (int i = 0; i < c.dv; ++i) strays += !std::isnan(out[r * size_t(c.dv) + size_t(i)]);
  if (rows.size() > most_rows) {
    std::vector<int> few, of;
    for (size_t i = 0; i < most_rows; ++i) {
      const size_t r = i < 64 ? i : i < 128 ? rows.size() - 1 - (i - 64) : next_random() % rows.size();
      few.push_back(rows[r]), of.push_back(segments[r]);
    }
    rows = few, segments = of;
  }
  double error = 0, norm = 0, lse_error = 0, worst = 0;
  size_t bad = 0;
  if (!rows.empty()) {
    Reference r{a, on_device(rows), on_device(segments), on_device(p.plan_start)};
    r.most = 1;
    for (int m : c.m) r.most = std::max<int64_t>(r.most, m);
    OK(cudaMalloc(&r.logits, rows.size() * size_t(r.most) * 8)), OK(cudaMalloc(&r.out, rows.size() * size_t(c.dv) * 8)),
        OK(cudaMalloc(&r.lse, rows.size() * 8));
    reference_kernel<<<unsigned(rows.size()), 256>>>(r);
    OK(cudaDeviceSynchronize());
    std::vector<double> want(rows.size() * size_t(c.dv)), want_lse(rows.size());
    OK(cudaMemcpy(want.data(), r.out, want.size() * 8, cudaMemcpyDeviceToHost)),
        OK(cudaMemcpy(want_lse.data(), r.lse, want_lse.size() * 8, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < rows.size(); ++i) {
      for (int j = 0; j < c.dv; ++j) {
        const double w = want[i * size_t(c.dv) + size_t(j)], g = out[size_t(rows[i]) * size_t(c.dv) + size_t(j)];
        if (!(std::abs(g - w) <= 0.03)) ++bad;
        error += (g - w) * (g - w), norm += w * w, worst = std::max(worst, std::abs(g - w));
      }
      const double g = lse[size_t(rows[i])], w = want_lse[i];
      if (std::isinf(w) || std::isinf(g) ? g != w : !(std::abs(g - w) < 1e-3)) ++bad;
      else if (!std::isinf(w)) lse_error = std::max(lse_error, std::abs(g - w));
    }
    for (const void* x : {(const void*)r.rows, (const void*)r.segment, (const void*)r.plan_start, (const void*)r.logits,
                          (const void*)r.out, (const void*)r.lse})
      cudaFree((void*)x);
  }
  const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  const bool fine = relative < 6e-3 && bad == 0 && strays == 0;
  printf("%s %-44s %-44s rel %.1e max %.1e lse %.1e bad %zu stray %zu\n", fine ? "ok  " : "FAIL", c.name.c_str(),
         variant, relative, worst, lse_error, bad, strays);
  return fine;
}

static Case sized(int n, int d, int dv, bool causal, int heads = 16, int kv = 16, int tokens = 16384) {
  Case c;
  const int batch = std::max(1, tokens / n);
  c.n.assign(size_t(batch), n), c.m = c.n, c.heads = heads, c.kv_heads = kv, c.d = d, c.dv = dv, c.causal = causal,
                                c.poison = false;
  return c;
}

/// For bench/peers/torch_cuda.py, which alternates this with PyTorch's kernels: [batch, heads, n, width] tensors end to end.
extern "C" int heed_attend(int variant, const void* q, const void* k, const void* v, const int64_t* q_offsets,
                           const int64_t* k_offsets, int batch, int heads, int kv_heads, int n, int m, int d, int d_v,
                           int causal, int window, void* out, void* lse, void* scratch, int64_t scratch_bytes, void* stream) {
  Attend a;
  a.q = static_cast<const __nv_bfloat16*>(q), a.k = static_cast<const __nv_bfloat16*>(k),
  a.v = static_cast<const __nv_bfloat16*>(v);
  a.q_rows = int64_t(batch) * heads * n, a.k_rows = a.v_rows = int64_t(batch) * kv_heads * m;
  a.q_stride = a.k_stride = d, a.v_stride = d_v, a.out_stride = d_v;
  a.q_begin = q_offsets, a.q_end = q_offsets + 1, a.k_begin = a.v_begin = k_offsets, a.k_end = k_offsets + 1;
  a.segments = batch * heads, a.heads = heads, a.kv_heads = a.v_heads = kv_heads, a.d = d, a.d_v = d_v,
  a.scale = 1 / std::sqrt(float(d)), a.causal = causal, a.window = window;
  a.out = static_cast<float*>(out), a.lse = static_cast<float*>(lse);
  if (!attend_fits(a) || attend_scratch(a) > scratch_bytes) return -1;
  int at = 0;
  for (const Variant& x : variants)
    if (!x.plan && x.d == d && x.dv == d_v && at++ == variant)
      return int(x.start(a, scratch, static_cast<cudaStream_t>(stream)));
  return -2;
}

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IONBF, 0);
  const std::string what = argc > 1 ? argv[1] : "check", which = argc > 2 ? argv[2] : "";
  cudaDeviceProp device;
  OK(cudaGetDeviceProperties(&device, 0));
  printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  bool fine = true;
  if (what == "check") {
    std::vector<Case> cases = {
        {"one tile", {128}, {128}},
        {"odd", {333}, {333}, 2, 2},
        {"n < m", {77}, {1000}, 2, 1},
        {"n > m, rows that see nothing", {300}, {70}, 2, 1},
        {"full", {200}, {515}, 3, 1, 128, 128, false},
        {"one token", {1}, {1}},
        {"unequal, empty, gaps", {0, 5, 260, 1, 1000}, {0, 700, 260, 0, 1333}, 8, 1, 128, 128, true, 0, 37},
        {"full, unequal, gaps", {0, 5, 260, 1, 1000}, {3, 700, 260, 0, 1333}, 3, 3, 128, 128, false, 0, 5},
        {"window", {1500}, {1500}, 2, 2, 128, 128, true, 300},
        {"window, short", {700}, {1111}, 2, 2, 128, 128, true, 7},
        {"window, full", {700}, {1111}, 2, 2, 128, 128, false, 129},
        {"long", {4100}, {4100}, 4, 2},
        {"window of positions", {700, 1, 1300}, {1111, 50, 1300}, 4, 2, 128, 128, true, 400, 3},
    };
    Case s = cases[6];
    s.name = "sink, maps", s.sink = true, s.maps = true, s.heads = 6, s.kv_heads = 3, cases.push_back(s);
    cases[12].positions = true;
    s = cases[11], s.name = "moving maximum", s.spread = 12, cases.push_back(s);
    std::vector<Case> plans;
    for (int k_tile : {128, 64, 256})
      for (int density = 0; density < 3; ++density) {
        Case c = {"plan", {900, 0, 333}, {1500, 10, 333}, 4, 2};
        c.q_tile = k_tile == 256 ? 256 : 128, c.k_tile = k_tile,
        c.density = density == 0   ? 0.1
                    : density == 1 ? 0.4
                                   : 1,
        c.gap = 11;
        c.plan_heads = density == 0   ? 4
                       : density == 1 ? 2
                                      : 1,
        c.counts = density != 1, c.bits = k_tile <= 128 && density > 0, c.causal = density != 1;
        c.name = "plan " + std::to_string(k_tile) + " at " + std::to_string(c.density).substr(0, 3) +
                 (c.bits ? " bits" : "") + (c.counts ? " counts" : "");
        plans.push_back(c);
        if (density == 2) c.window = 200, c.name += " window", plans.push_back(c);
      }
    for (const Variant& v : variants) {
      if (!which.empty() && std::string(v.name).find(which) == std::string::npos) continue;
      for (Case c : v.plan ? plans : cases) {
        c.d = v.d, c.dv = v.dv;
        fine &= check(c, (std::to_string(v.d) + "/" + std::to_string(v.dv) + ": " + v.name).c_str(), v.start, 3000);
      }
    }
    printf(fine ? "all ok\n" : "FAILED\n");
    return fine ? 0 : 1;
  }
  const int repeats = argc > 3 ? atoi(argv[3]) : 15;
  auto time = [&](const Case& c, const Variant& v) {
    Problem p;
    make(p, c);
    const float ms = median_ms([&] { OK(v.start(p.a, p.scratch, 0)); }, repeats);
    return std::pair<float, double>(ms, p.pairs * 2 * (c.d + c.dv) / ms / 1e9);
  };
  for (const Variant& v : variants) {
    if (!which.empty() && (std::to_string(v.d) + "/" + std::to_string(v.dv) + ": " + v.name).find(which) == std::string::npos)
      continue;
    printf("%3d/%-3d %-44s", v.d, v.dv, v.name);
    if (v.plan) {
      for (int k_tile : {128, 64})
        for (double density : {1.0, 0.5, 0.21, 0.11, 0.06}) {
          Case c = sized(32768, v.d, v.dv, true);
          c.q_tile = 128, c.k_tile = k_tile, c.density = density, c.plan_heads = 16;
          const auto [ms, rate] = time(c, v);
          printf(" | %d@%.2f %.3f ms %.0f", k_tile, density, ms, rate);
        }
    } else {
      for (bool causal : {true, false})
        for (int n : {4096, 16384, 32768}) {
          if (!causal && n == 32768) continue;
          const auto [ms, rate] = time(sized(n, v.d, v.dv, causal), v);
          printf(" | %s %dk %.3f ms %.0f", causal ? "causal" : "full", n / 1024, ms, rate);
        }
      Case c = sized(32768, v.d, v.dv, true);
      c.window = 1024;
      const auto [ms, rate] = time(c, v);
      printf(" | window %.3f ms %.0f", ms, rate);
      const auto [ms8, rate8] = time(sized(16384, v.d, v.dv, true, 32, 8), v);
      printf(" | gqa 32/8 16k %.3f ms %.0f", ms8, rate8);
    }
    printf("\n");
  }
}
