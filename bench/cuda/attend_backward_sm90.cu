// Checks and times the Hopper kernel of attention's gradients alone: attend_backward_sm90 check | bench [part of a variant's name].
// Build: see docs/performance.md. The reference is plain kernels in f64 on the same inputs; outputs and every row outside a segment
// are NaN beforehand.
#define HEED_ATTEND_BACKWARD_SHAPES
#include "kernels/cuda/attend_backward_sm90.cu"

#include <cmath>
#include <string>

#include "measure.h"

using namespace heed::sm90;

struct Variant {
  const char* name;
  int d;
  cudaError_t (*start)(const AttendBackward&, void*, cudaStream_t);
};
#define V(D, ROWS, STAGES) {#D ": rows " #ROWS " stages " #STAGES, D, launch<BackwardShape<D, ROWS, STAGES>>}
static const Variant variants[] = {V(128, 64, 3), V(64, 128, 2), V(96, 64, 3)};

template <class T> __global__ void random_kernel(T* x, int64_t n, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint64_t z = (uint64_t(i) + seed) * 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull, z = (z ^ z >> 27) * 0x94D049BB133111EBull, z ^= z >> 31;
    const float u = (uint32_t(z) + 1.f) / 4294967297.f, w = uint32_t(z >> 32) / 4294967296.f;
    x[i] = T(sqrtf(-2 * logf(fminf(u, 1.f - 1e-7f))) * cospif(2 * w));
  }
}

/// Gradients in f64, [rows, d] each; out and lse, which the kernel gets, on the way.
struct Reference {
  AttendBackward a;
  double *lse, *dot, *d_q, *d_k, *d_v;
  float *out, *lse_f32;
  double* weights;  // a row of numbers for each block
  int64_t most;
};

struct Where {
  int segment, own;
  int64_t i, n, m, k_first, v_first;
};
__device__ Where where_is(const AttendBackward& a, int64_t row) {
  for (int s = 0; s < a.segments; ++s)
    if (row >= a.q_begin[s] && row < a.q_end[s]) {
      const int own = s / a.heads * a.kv_heads + s % a.heads / (a.heads / a.kv_heads);
      return {s,
              own,
              row - a.q_begin[s],
              a.q_end[s] - a.q_begin[s],
              a.k_end[own] - a.k_begin[own],
              a.k_begin[own],
              a.v_begin[own]};
    }
  return {-1};
}
__device__ bool visible(const AttendBackward& a, int64_t i, int64_t j, int64_t n, int64_t m) {
  return !(a.causal && j - i > m - n) && !(a.window > 0 && m - n + i - j >= a.window);
}
template <class X, class Y> __device__ double product(const X* x, const Y* y, int d) {
  double sum = 0;
  for (int c = 0; c < d; ++c) sum += double(float(x[c])) * double(float(y[c]));
  return sum;
}

__global__ void reference_forward(Reference r) {
  const AttendBackward& a = r.a;
  const int64_t row = blockIdx.x;
  const Where w = where_is(a, row);
  if (w.segment < 0) return;
  double* x = r.weights + row % 16384 * r.most;
  for (int64_t j = threadIdx.x; j < w.m; j += blockDim.x)
    x[j] = visible(a, w.i, j, w.n, w.m) ? product(a.q + row * a.q_stride, a.k + (w.k_first + j) * a.k_stride, a.d) * a.scale
                                        : -INFINITY;
  __syncthreads();
  double top = -INFINITY, sum = 0;
  for (int64_t j = 0; j < w.m; ++j) top = fmax(top, x[j]);
  for (int64_t j = 0; j < w.m; ++j) sum += x[j] > -INFINITY ? exp(x[j] - top) : 0;
  const double lse = sum > 0 ? top + log(sum) : -INFINITY;
  for (int c = threadIdx.x; c < a.d; c += blockDim.x) {
    double o = 0;
    for (int64_t j = 0; j < w.m; ++j)
      if (x[j] > -INFINITY) o += exp(x[j] - lse) * double(float(a.v[(w.v_first + j) * a.v_stride + c]));
    r.out[row * a.d + c] = float(o);
  }
  __syncthreads();
  if (threadIdx.x == 0)
    r.lse[row] = lse, r.lse_f32[row] = float(lse),
    r.dot[row] = product(r.out + row * a.d, a.d_out + row * a.d_out_stride, a.d);
}

/// p and d_s of a pair.
__device__ double2 pair_of(const Reference& r, int64_t row, int64_t k_row, int64_t v_row) {
  const AttendBackward& a = r.a;
  const double p = exp(product(a.q + row * a.q_stride, a.k + k_row * a.k_stride, a.d) * a.scale - r.lse[row]);
  return {p, p * (product(a.d_out + row * a.d_out_stride, a.v + v_row * a.v_stride, a.d) - r.dot[row]) * a.scale};
}

__global__ void reference_d_q(Reference r) {
  const AttendBackward& a = r.a;
  const int64_t row = blockIdx.x;
  const Where w = where_is(a, row);
  if (w.segment < 0) return;
  double* x = r.weights + row % 16384 * r.most;
  for (int64_t j = threadIdx.x; j < w.m; j += blockDim.x)
    x[j] = visible(a, w.i, j, w.n, w.m) ? pair_of(r, row, w.k_first + j, w.v_first + j).y : 0;
  __syncthreads();
  for (int c = threadIdx.x; c < a.d; c += blockDim.x) {
    double sum = 0;
    for (int64_t j = 0; j < w.m; ++j) sum += x[j] * double(float(a.k[(w.k_first + j) * a.k_stride + c]));
    r.d_q[row * a.d + c] = sum;
  }
}

/// Block: a key.
__global__ void reference_d_kv(Reference r) {
  const AttendBackward& a = r.a;
  const int64_t k_row = blockIdx.x;
  const int group = a.heads / a.kv_heads;
  for (int s = 0; s < a.segments / group; ++s) {
    if (k_row < a.k_begin[s] || k_row >= a.k_end[s]) continue;
    const int64_t j = k_row - a.k_begin[s], v_row = a.v_begin[s] + j, m = a.k_end[s] - a.k_begin[s];
    double *p = r.weights + k_row % 8192 * 2 * r.most, *d_s = p + r.most;
    double k_sum = 0, v_sum = 0;
    for (int h = 0; h < group; ++h) {
      const int q = s / a.kv_heads * a.heads + s % a.kv_heads * group + h;
      const int64_t first = a.q_begin[q], n = a.q_end[q] - first;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        const double2 x = visible(a, i, j, n, m) ? pair_of(r, first + i, k_row, v_row) : double2{0, 0};
        p[i] = x.x, d_s[i] = x.y;
      }
      __syncthreads();
      if (int(threadIdx.x) < a.d)
        for (int64_t i = 0; i < n; ++i) {
          k_sum += d_s[i] * double(float(a.q[(first + i) * a.q_stride + threadIdx.x]));
          v_sum += p[i] * double(a.d_out[(first + i) * a.d_out_stride + threadIdx.x]);
        }
    }
    if (int(threadIdx.x) < a.d) r.d_k[k_row * a.d + threadIdx.x] = k_sum, r.d_v[v_row * a.d + threadIdx.x] = v_sum;
  }
}

struct Case {
  std::string name;
  std::vector<int> n, m;  // by sequence
  int heads = 1, kv_heads = 1, d = 128;
  bool causal = true;
  int window = 0, gap = 0;
  bool poison = true;
  float spread = 1;  // multiplies the scale
};

struct Problem {
  AttendBackward a;
  void* scratch;
  std::vector<int64_t> q_begin, q_end, k_begin, k_end;
  std::vector<void*> owned;
  template <class T> T* device(int64_t count) {
    T* p;
    OK(cudaMalloc(&p, std::max<int64_t>(1, count) * sizeof(T)));
    OK(cudaMemset(p, 0xFF, std::max<int64_t>(1, count) * sizeof(T)));
    owned.push_back(p);
    return p;
  }
  ~Problem() {
    for (void* p : owned) cudaFree(p);
  }
};

static void make(Problem& p, const Case& c) {
  AttendBackward& a = p.a;
  auto layout = [&](const std::vector<int>& lengths, int heads, std::vector<int64_t>& begin, std::vector<int64_t>& end) {
    int64_t at = c.gap;
    for (int n : lengths)
      for (int h = 0; h < heads; ++h) begin.push_back(at), end.push_back(at + n), at += n + c.gap;
    begin.push_back(at);
    return std::max<int64_t>(1, at);
  };
  a.q_rows = layout(c.n, c.heads, p.q_begin, p.q_end), a.k_rows = a.v_rows = layout(c.m, c.kv_heads, p.k_begin, p.k_end);
  a.segments = int(c.n.size()) * c.heads, a.heads = c.heads, a.kv_heads = c.kv_heads, a.d = c.d;
  a.q_stride = a.k_stride = a.v_stride = a.out_stride = a.d_out_stride = a.d_q_stride = a.d_k_stride = a.d_v_stride = c.d;
  a.scale = c.spread / std::sqrt(float(c.d)), a.causal = c.causal, a.window = c.window;
  auto values = [&]<class T>(T, int64_t rows, const std::vector<int64_t>& begin, const std::vector<int64_t>& end,
                             uint64_t seed) {
    T* x = p.device<T>(rows * c.d);
    for (size_t s = 0; s < end.size(); ++s)
      if (end[s] > begin[s])
        random_kernel<<<264, 256>>>(x + begin[s] * c.d, (end[s] - begin[s]) * c.d, seed + s * 7919 * 65536);
    return x;
  };
  a.q = values(__nv_bfloat16(), a.q_rows, p.q_begin, p.q_end, 1),
  a.k = values(__nv_bfloat16(), a.k_rows, p.k_begin, p.k_end, 1ull << 40),
  a.v = values(__nv_bfloat16(), a.v_rows, p.k_begin, p.k_end, 1ull << 50);
  a.d_out = values(float(), a.q_rows, p.q_begin, p.q_end, 1ull << 60);
  auto offsets = [&](const std::vector<int64_t>& x) {
    int64_t* to = on_device(x);
    p.owned.push_back(to);
    return to;
  };
  a.q_begin = offsets(p.q_begin), a.q_end = offsets(p.q_end), a.k_begin = offsets(p.k_begin),
  a.k_end = offsets(p.k_end), a.v_begin = a.k_begin;
  a.d_q = p.device<float>(a.q_rows * c.d), a.d_k = p.device<float>(a.k_rows * c.d), a.d_v = p.device<float>(a.v_rows * c.d);
  float *out = p.device<float>(a.q_rows * c.d), *lse = p.device<float>(a.q_rows);
  a.out = out, a.lse = lse, a.out_dot = p.device<float>(a.q_rows);
  if (!c.poison) {  // any will do for timing, as long as weights stay in [0, 1]
    random_kernel<<<1056, 256>>>(out, a.q_rows * c.d, 5);
    std::vector<float> x(size_t(a.q_rows), 12.f);
    OK(cudaMemcpy(lse, x.data(), x.size() * 4, cudaMemcpyHostToDevice));
  }
  p.scratch = p.device<uint8_t>(attend_backward_scratch(a));
}

/// Prints one line; returns whether gradients are those of the reference, and nothing outside segments was written.
static bool check(const Case& c, const Variant& v) {
  Problem p;
  make(p, c);
  AttendBackward& a = p.a;
  if (!attend_backward_fits(a)) return printf("FAIL %s: does not fit\n", c.name.c_str()), false;
  Reference r{a};
  r.most = 1;
  for (size_t i = 0; i < c.n.size(); ++i) r.most = std::max<int64_t>({r.most, c.n[i], c.m[i]});
  r.lse = p.device<double>(a.q_rows), r.dot = p.device<double>(a.q_rows), r.d_q = p.device<double>(a.q_rows * c.d);
  r.d_k = p.device<double>(a.k_rows * c.d), r.d_v = p.device<double>(a.v_rows * c.d);
  r.out = const_cast<float*>(a.out), r.lse_f32 = const_cast<float*>(a.lse), r.weights = p.device<double>(16384 * r.most);
  auto in_parts = [&](void (*kernel)(Reference), int64_t rows, int64_t most) {
    if (rows > most) printf("too many rows\n"), exit(1);
    kernel<<<unsigned(rows), 128>>>(r);
    OK(cudaDeviceSynchronize());
  };
  in_parts(reference_forward, a.q_rows, 1 << 20), in_parts(reference_d_q, a.q_rows, 1 << 20),
      in_parts(reference_d_kv, a.k_rows, 1 << 20);
  OK(v.start(a, p.scratch, 0));
  OK(cudaDeviceSynchronize());
  double relative[3];
  size_t bad = 0, strays = 0;
  auto compare = [&](const float* got, const double* want, int64_t rows, const std::vector<int64_t>& begin,
                     const std::vector<int64_t>& end) {
    std::vector<float> g(size_t(rows * c.d));
    std::vector<double> w(g.size());
    OK(cudaMemcpy(g.data(), got, g.size() * 4, cudaMemcpyDeviceToHost)),
        OK(cudaMemcpy(w.data(), want, w.size() * 8, cudaMemcpyDeviceToHost));
    std::vector<char> inside(size_t(rows), 0);
    for (size_t s = 0; s < end.size(); ++s)
      for (int64_t i = begin[s]; i < end[s]; ++i) inside[size_t(i)] = 1;
    double error = 0, norm = 0;
    for (size_t i = 0; i < g.size(); ++i) {
      if (!inside[i / size_t(c.d)]) {
        strays += !std::isnan(g[i]);
        continue;
      }
      bad += !(std::abs(g[i] - w[i]) <= 0.04 * c.spread + 0.03 * std::abs(w[i]));
      error += (g[i] - w[i]) * (g[i] - w[i]), norm += w[i] * w[i];
    }
    return std::sqrt(norm > 0 ? error / norm : error);
  };
  relative[0] = compare(a.d_q, r.d_q, a.q_rows, p.q_begin, p.q_end),
  relative[1] = compare(a.d_k, r.d_k, a.k_rows, p.k_begin, p.k_end),
  relative[2] = compare(a.d_v, r.d_v, a.v_rows, p.k_begin, p.k_end);
  bool fine = bad == 0 && strays == 0;
  for (double x : relative) fine &= x < 1e-2 || c.n == std::vector<int>{1};  // one token: all that is left is rounding
  printf("%s %-32s %-28s d_q %.1e d_k %.1e d_v %.1e bad %zu stray %zu\n", fine ? "ok  " : "FAIL", c.name.c_str(),
         v.name, relative[0], relative[1], relative[2], bad, strays);
  return fine;
}

/// For bench/peers/torch_cuda.py: [batch, heads, n, d] tensors end to end.
extern "C" int heed_attend_backward(int variant, const void* q, const void* k, const void* v, const float* out,
                                    const float* lse, const float* d_out, const int64_t* q_offsets, const int64_t* k_offsets,
                                    int batch, int heads, int kv_heads, int n, int m, int d, int causal, float* d_q,
                                    float* d_k, float* d_v, void* scratch, int64_t scratch_bytes, void* stream) {
  AttendBackward a;
  a.q = static_cast<const __nv_bfloat16*>(q), a.k = static_cast<const __nv_bfloat16*>(k),
  a.v = static_cast<const __nv_bfloat16*>(v);
  a.out = out, a.lse = lse, a.d_out = d_out, a.d_q = d_q, a.d_k = d_k, a.d_v = d_v;
  a.q_rows = int64_t(batch) * heads * n, a.k_rows = a.v_rows = int64_t(batch) * kv_heads * m;
  a.q_stride = a.k_stride = a.v_stride = a.out_stride = a.d_out_stride = a.d_q_stride = a.d_k_stride = a.d_v_stride = d;
  a.q_begin = q_offsets, a.q_end = q_offsets + 1, a.k_begin = a.v_begin = k_offsets, a.k_end = k_offsets + 1;
  a.segments = batch * heads, a.heads = heads, a.kv_heads = kv_heads, a.d = d, a.scale = 1 / std::sqrt(float(d)),
  a.causal = causal;
  if (!attend_backward_fits(a) || attend_backward_scratch(a) > scratch_bytes) return -1;
  int at = 0;
  for (const Variant& x : variants)
    if (x.d == d && at++ == variant) return int(x.start(a, scratch, static_cast<cudaStream_t>(stream)));
  return -2;
}

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IONBF, 0);
  const std::string what = argc > 1 ? argv[1] : "check", which = argc > 2 ? argv[2] : "";
  bool fine = true;
  for (const Variant& v : variants) {
    if (std::string(v.name).find(which) == std::string::npos) continue;
    if (what == "check") {
      std::vector<Case> cases = {
          {"one tile", {64}, {128}},
          {"one square", {128}, {128}},
          {"full, several tiles", {512}, {512}, 1, 1, 128, false},
          {"odd", {333}, {333}, 2, 2},
          {"one token", {1}, {1}},
          {"n < m", {77}, {1000}, 2, 1},
          {"n > m, rows that see nothing", {300}, {70}, 2, 1},
          {"full", {200}, {515}, 3, 1, 128, false},
          {"unequal, empty, gaps", {0, 5, 260, 1, 700}, {0, 300, 260, 0, 833}, 8, 1, 128, true, 0, 37},
          {"full, unequal, gaps", {0, 5, 260, 1, 700}, {3, 300, 260, 0, 833}, 3, 3, 128, false, 0, 5},
          {"window", {900}, {900}, 2, 2, 128, true, 300},
          {"window, short", {700}, {811}, 2, 2, 128, true, 7},
          {"window, full", {500}, {711}, 6, 2, 128, false, 129},
          {"long", {2100}, {2100}, 4, 2},
          {"large scores", {700}, {700}, 2, 1, 128, true, 0, 0, true, 6},
      };
      for (Case c : cases) c.d = v.d, fine &= check(c, v);
      for (int d : {v.d - 24, v.d - 8}) fine &= check({"narrower", {0, 200}, {5, 300}, 3, 1, d}, v);
      continue;
    }
    printf("%-28s", v.name);
    auto time = [&](const char* name, int n, bool causal, int heads, int kv) {
      Case c{"", {}, {}, heads, kv, v.d, causal};
      c.n.assign(size_t(std::max(1, 16384 / n)), n), c.m = c.n, c.poison = false;
      Problem p;
      make(p, c);
      const float ms = median_ms([&] { OK(v.start(p.a, p.scratch, 0)); }, 9);
      printf(" | %s %dk %.3f ms %.0f", name, n / 1024, ms,
             10. * v.d * c.n.size() * heads * n * double(n) / (causal ? 2 : 1) / ms / 1e9);
    };
    for (int n : {4096, 16384}) time("causal", n, true, 16, 16), time("full", n, false, 16, 16);
    time("32/8 causal", 8192, true, 32, 8);
    printf("\n");
  }
  if (what == "check") printf(fine ? "all ok\n" : "FAILED\n");
  return fine ? 0 : 1;
}
