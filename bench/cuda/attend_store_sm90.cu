// Checks and times decode attention over pages alone: attend_store_sm90 check | bench. The reference is a plain kernel in f64; outputs
// and every page entry past a segment's end are NaN beforehand.
#include "kernels/cuda/attend_store_sm90.cu"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "measure.h"

using namespace heed::sm90;

__device__ float normal(uint64_t z) {
  z *= 0x9E3779B97F4A7C15ull;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull, z = (z ^ z >> 27) * 0x94D049BB133111EBull, z ^= z >> 31;
  return sqrtf(-2 * logf((uint32_t(z) + 1.f) / 4294967808.f)) * cospif(2 * (uint32_t(z >> 32) / 4294967296.f));
}
__global__ void random_rows(float* x, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x)
    x[i] = normal(uint64_t(i) + 12345);
}
/// One block a page: entries below `length` random, the rest NaN (whole pages too, so that a page nobody may read poisons).
__global__ void fill_pages(AttendStore a, int64_t segments, int64_t bytes, int jump) {
  for (int64_t p = blockIdx.x; p < segments * a.capacity; p += gridDim.x) {
    const int64_t segment = p / a.capacity, first = p % a.capacity * 64;
    char* page = reinterpret_cast<char*>(a.table[p]);
    if (!page) continue;
    for (int i = threadIdx.x; i < 64 * (a.d + a.d_v); i += blockDim.x) {
      const bool key = i < 64 * a.d;
      const int at = key ? i : i - 64 * a.d, entry = at / (key ? a.d : a.d_v);
      __nv_bfloat16* to = reinterpret_cast<__nv_bfloat16*>(page + (key ? a.k_at : a.v_at));
      to[at] = first + entry < a.length[segment] ? __float2bfloat16(normal(uint64_t(p) * 1000003 + uint64_t(i)))
                                                 : __float2bfloat16(NAN);
    }
    if (threadIdx.x < 64) {
      const int entry = int(first) + threadIdx.x;
      reinterpret_cast<int*>(page + a.position_at)[threadIdx.x] = entry < a.length[segment]
                                                                      ? entry + (jump > 0 ? entry / jump * 9 : 0)
                                                                      : -1;
    }
    if (a.bias_at >= 0 && threadIdx.x < 64)
      reinterpret_cast<float*>(page + a.bias_at)[threadIdx.x] = normal(uint64_t(p) * 77 + threadIdx.x);
  }
}

__global__ void reference_kernel(AttendStore a, const int* rows, const int* segment, const int64_t* plan_row,
                                 double* logits, int64_t most, double* out, double* lse_out) {
  const int row = rows[blockIdx.x], s = segment[blockIdx.x], head = s % a.heads, sequence = s / a.heads;
  const int64_t kv = int64_t(sequence) * a.kv_heads + head / (a.heads / a.kv_heads);
  const int64_t m = a.length[kv], n = a.q_end[s] - a.q_begin[s], i = row - a.q_begin[s];
  double* x = logits + blockIdx.x * most;
  auto q = [&](int c) {
    return a.q_f32 ? double(__bfloat162float(__float2bfloat16(static_cast<const float*>(a.q)[row * a.q_stride + c])))
                   : double(__bfloat162float(static_cast<const __nv_bfloat16*>(a.q)[row * a.q_stride + c]));
  };
  for (int64_t j = threadIdx.x; j < m; j += blockDim.x) {
    bool seen = !(a.causal && j - i > m - n);
    if (a.window > 0) {
      const char* own = reinterpret_cast<const char*>(a.table[kv * a.capacity + j / 64]);
      seen &= (a.q_pos ? a.q_pos[row] : m - n + i) - reinterpret_cast<const int*>(own + a.position_at)[j % 64] < a.window;
    }
    if (seen && a.k_tile > 0) {
      const int64_t p = plan_row[s], begin = a.rowptr[p], end = a.count ? begin + a.count[p] : a.rowptr[p + 1];
      seen = false;
      for (int64_t e = begin; e < end; ++e) seen |= a.index[e] == j / a.k_tile;
    }
    double dot = 0;
    const char* page = reinterpret_cast<const char*>(a.table[kv * a.capacity + j / 64]);
    if (seen)
      for (int c = 0; c < a.d; ++c)
        dot += q(c) * double(__bfloat162float(reinterpret_cast<const __nv_bfloat16*>(page + a.k_at)[j % 64 * a.d + c]));
    x[j] = seen ? dot * a.scale + (a.bias_at >= 0 ? reinterpret_cast<const float*>(page + a.bias_at)[j % 64] : 0) : -INFINITY;
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
      if (x[j] > -INFINITY) {
        const char* page = reinterpret_cast<const char*>(a.table[kv * a.capacity + j / 64]);
        o += exp(x[j] - lse) *
             double(__bfloat162float(reinterpret_cast<const __nv_bfloat16*>(page + a.v_at)[j % 64 * a.d_v + c]));
      }
    out[blockIdx.x * int64_t(a.d_v) + c] = o;
  }
  if (threadIdx.x == 0) lse_out[blockIdx.x] = lse;
}

static uint64_t state = 88172645463325252ull;
static uint32_t next_random() {
  return state ^= state << 13, state ^= state >> 7, state ^= state << 17, uint32_t(state >> 32);
}

struct Case {
  std::string name;
  std::vector<int> n, m;  // query rows and entries by sequence
  int heads = 8, kv_heads = 2, d = 128;
  bool ragged = false;  // KV heads of a sequence hold unequal numbers of entries
  bool f32 = true, causal = true, bias = false, sink = false, counts = false;
  int k_tile = 0, plan_heads = 1;
  double density = 1;
  int window = 0, jump = 0;  // positions jump by 10 instead of 1 at every `jump` entries
};

struct Problem {
  AttendStore a;
  void* scratch = nullptr;
  int64_t rows = 0;
  double bytes = 0;
  std::vector<int> row, segment;
  std::vector<int64_t> plan_row;
  std::vector<void*> owned;
  ~Problem() {
    for (void* p : owned) cudaFree(p);
  }
};

static void make(Problem& p, const Case& c) {
  AttendStore& a = p.a;
  auto own = [&](auto* x) {
    p.owned.push_back((void*)x);
    return x;
  };
  const int sequences = int(c.n.size());
  a.sequences = sequences, a.heads = c.heads, a.kv_heads = c.kv_heads, a.d = a.d_v = c.d,
  a.scale = 1 / std::sqrt(float(c.d)), a.causal = c.causal;
  std::vector<int64_t> begin, end;
  for (int s = 0; s < sequences; ++s)
    for (int h = 0; h < c.heads; ++h) {
      p.rows += 1;  // a gap
      begin.push_back(p.rows), end.push_back(p.rows + c.n[size_t(s)]);
      for (int i = 0; i < c.n[size_t(s)]; ++i) p.row.push_back(int(p.rows) + i), p.segment.push_back(s * c.heads + h);
      p.rows += c.n[size_t(s)];
    }
  a.q_begin = own(on_device(begin)), a.q_end = own(on_device(end));
  float* q;
  OK(cudaMalloc(&q, (p.rows + 1) * c.d * 4)), own(q);
  random_rows<<<264, 256>>>(q, (p.rows + 1) * c.d / (c.f32 ? 1 : 2));
  if (!c.f32) {  // bf16 rows made of the high halves
    std::vector<float> f(size_t(p.rows * c.d));
    std::vector<__nv_bfloat16> b(f.size());
    for (size_t i = 0; i < f.size(); ++i) b[i] = __float2bfloat16(float(int(next_random() % 2001) - 1000) / 500.f);
    OK(cudaMemcpy(q, b.data(), b.size() * 2, cudaMemcpyHostToDevice));
  }
  a.q = q, a.q_f32 = c.f32, a.q_stride = c.d;
  std::vector<int> length;
  int most = 1;
  for (int s = 0; s < sequences; ++s)
    for (int h = 0; h < c.kv_heads; ++h)
      length.push_back(c.ragged ? c.m[size_t(s)] * (h + 1) / c.kv_heads : c.m[size_t(s)]),
          most = std::max(most, length.back());
  a.length = own(on_device(length)), a.capacity = (most + 63) / 64;
  const int64_t page = 128 * c.d * 2 + 64 * 4 + (c.bias ? 256 : 0);
  a.k_at = 0, a.v_at = 64 * c.d * 2, a.position_at = 128 * c.d * 2, a.bias_at = c.bias ? 128 * c.d * 2 + 256 : -1;
  std::vector<uint64_t> table(length.size() * size_t(a.capacity), 0);
  std::vector<size_t> order;
  for (size_t s = 0; s < length.size(); ++s)
    for (int64_t i = 0; i * 64 < length[s]; ++i) order.push_back(s * size_t(a.capacity) + size_t(i));
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  char* pool;
  OK(cudaMalloc(&pool, std::max<int64_t>(1, int64_t(order.size()) * page))), own(pool);
  for (size_t i = 0; i < order.size(); ++i) table[order[i]] = reinterpret_cast<uint64_t>(pool + int64_t(i) * page);
  a.table = own(on_device(table));
  fill_pages<<<2112, 256>>>(a, int64_t(length.size()), page, c.jump);
  a.window = c.window;
  if (c.jump > 0) {
    std::vector<int> q_pos(size_t(p.rows + 1), -1);
    for (size_t i = 0; i < p.row.size(); ++i) {
      const int s = p.segment[i], m = c.m[size_t(s / c.heads)], n = c.n[size_t(s / c.heads)],
                own = m - n + (p.row[i] - int(begin[size_t(s)]));
      q_pos[size_t(p.row[i])] = own + own / c.jump * 9;
    }
    a.q_pos = own(on_device(q_pos));
  }
  if (c.sink) {
    std::vector<float> s;
    for (int h = 0; h < c.heads; ++h) s.push_back(float(h) - 1.5f);
    a.sink = own(on_device(s));
  }
  p.plan_row.assign(size_t(sequences * c.heads), 0);
  for (int x : length) p.bytes += 4. * c.d * x;
  if (c.k_tile > 0) {
    p.bytes = 0;
    a.k_tile = c.k_tile, a.plan_heads = c.plan_heads;
    std::vector<int64_t> rowptr{0};
    std::vector<int> index, count;
    for (int s = 0; s < sequences; ++s) {
      if (c.n[size_t(s)] == 0) continue;
      for (int h = 0; h < c.heads; ++h)
        p.plan_row[size_t(s * c.heads + h)] = int64_t(rowptr.size()) - 1 + h * c.plan_heads / c.heads;
      for (int h = 0; h < c.plan_heads; ++h) {
        for (int b = 0; b <= (c.m[size_t(s)] + c.k_tile - 1) / c.k_tile; ++b)
          if (next_random() < c.density * 4294967296.) index.push_back(b);
        count.push_back(int(int64_t(index.size()) - rowptr.back()));
        p.bytes += double(count.back()) * c.k_tile * 4 * c.d * std::max(1, c.kv_heads / c.plan_heads);
        if (c.counts) index.resize(index.size() + 3, 1 << 20);
        rowptr.push_back(int64_t(index.size()));
      }
    }
    a.rowptr = own(on_device(rowptr)), a.index = own(on_device(index));
    if (c.counts) a.count = own(on_device(count));
  }
  p.rows += 1;
  OK(cudaMalloc(&a.out, p.rows * c.d * 4)), own(a.out), OK(cudaMalloc(&a.lse, p.rows * 4)), own(a.lse);
  a.out_stride = c.d;
  OK(cudaMalloc(&p.scratch, attend_store_scratch(a))), p.owned.push_back(p.scratch);
  OK(cudaMemset(p.scratch, 0xFF, attend_store_scratch(a)));
}

using Start = cudaError_t (*)(const AttendStore&, void*, cudaStream_t);

static bool check(const Case& c, Start start) {
  Problem p;
  make(p, c);
  AttendStore& a = p.a;
  if (!attend_store_fits(a)) return printf("FAIL %s: does not fit\n", c.name.c_str()), false;
  OK(cudaMemset(a.out, 0xFF, p.rows * c.d * 4)), OK(cudaMemset(a.lse, 0xFF, p.rows * 4));
  OK(start(a, p.scratch, 0));
  OK(cudaDeviceSynchronize());
  std::vector<float> out(size_t(p.rows * c.d)), lse(size_t(p.rows));
  OK(cudaMemcpy(out.data(), a.out, out.size() * 4, cudaMemcpyDeviceToHost)),
      OK(cudaMemcpy(lse.data(), a.lse, lse.size() * 4, cudaMemcpyDeviceToHost));
  std::vector<char> inside(size_t(p.rows), 0);
  for (int r : p.row) inside[size_t(r)] = 1;
  size_t strays = 0, bad = 0;
  for (size_t r = 0; r < inside.size(); ++r)
    if (!inside[r])
      for (int i = 0; i < c.d; ++i) strays += !std::isnan(out[r * size_t(c.d) + size_t(i)]);
  const size_t rows = p.row.size();
  double *logits, *o, *l;
  const int64_t most = a.capacity * 64;
  OK(cudaMalloc(&logits, rows * size_t(most) * 8)), OK(cudaMalloc(&o, rows * size_t(c.d) * 8)),
      OK(cudaMalloc(&l, rows * 8));
  int *row = on_device(p.row), *segment = on_device(p.segment);
  int64_t* plan_row = on_device(p.plan_row);
  reference_kernel<<<unsigned(rows), 256>>>(a, row, segment, plan_row, logits, most, o, l);
  OK(cudaDeviceSynchronize());
  std::vector<double> want(rows * size_t(c.d)), want_lse(rows);
  OK(cudaMemcpy(want.data(), o, want.size() * 8, cudaMemcpyDeviceToHost)),
      OK(cudaMemcpy(want_lse.data(), l, want_lse.size() * 8, cudaMemcpyDeviceToHost));
  double error = 0, norm = 0, worst = 0, lse_error = 0;
  for (size_t i = 0; i < rows; ++i) {
    for (int j = 0; j < c.d; ++j) {
      const double w = want[i * size_t(c.d) + size_t(j)], g = out[size_t(p.row[i]) * size_t(c.d) + size_t(j)];
      if (!(std::abs(g - w) <= 0.03)) ++bad;
      error += (g - w) * (g - w), norm += w * w, worst = std::max(worst, std::abs(g - w));
    }
    const double g = lse[size_t(p.row[i])], w = want_lse[i];
    if (std::isinf(w) || std::isinf(g) ? g != w : !(std::abs(g - w) < 1e-3)) ++bad;
    else if (!std::isinf(w)) lse_error = std::max(lse_error, std::abs(g - w));
  }
  for (void* x : {(void*)logits, (void*)o, (void*)l, (void*)row, (void*)segment, (void*)plan_row}) cudaFree(x);
  const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  const bool fine = relative < 6e-3 && bad == 0 && strays == 0;
  printf("%s %-50s d %d: rel %.1e max %.1e lse %.1e bad %zu stray %zu\n", fine ? "ok  " : "FAIL", c.name.c_str(), c.d,
         relative, worst, lse_error, bad, strays);
  return fine;
}

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IONBF, 0);
  const std::string what = argc > 1 ? argv[1] : "check";
  bool fine = true;
  if (what == "check") {
    for (int d : {128, 64, 256}) {
      std::vector<Case> cases = {
          {"one page", {1}, {64}},
          {"one entry", {1}, {1}, 3, 3},
          {"odd, group 1", {1, 1}, {333, 70}, 2, 2},
          {"odd, group 3", {1, 1, 1}, {1000, 65, 63}, 9, 3},
          {"group 8, long", {1}, {20011}, 16, 2},
          {"empty store, no rows, several rows", {1, 0, 3, 2, 9}, {0, 100, 500, 1, 77}, 8, 2},
          {"ragged heads", {1, 1, 1, 1}, {5000, 31, 800, 2222}, 8, 4, 128, true},
          {"not causal, several rows", {3, 5}, {70, 600}, 12, 4, 128, false, true, false},
          {"bf16 queries, bias, sink", {1, 2}, {900, 2000}, 8, 2, 128, true, false, true, true, true},
          {"more rows than entries", {7}, {3}, 4, 1},
          {"many", std::vector<int>(100, 1), std::vector<int>(100, 150), 4, 2},
      };
      for (int jump : {0, 11, 1000}) {
        Case c{"window, positions jump every " + std::to_string(jump), {1, 2, 1}, {3000, 777, 20}};
        c.window = 300, c.jump = jump, cases.push_back(c);
      }
      for (int k_tile : {1, 8, 16, 32, 64})
        for (int plan_heads : {8, 2, 1}) {
          Case c{"blocks of " + std::to_string(k_tile) + ", " + std::to_string(plan_heads) + " lists",
                 {1, 0, 1, 2},
                 {3000, 10, 0, 777}};
          c.bias = k_tile == 1, c.k_tile = k_tile, c.plan_heads = plan_heads, c.density = plan_heads == 2 ? 0.05 : 0.5,
          c.counts = plan_heads != 1;
          cases.push_back(c);
        }
      for (Case& c : cases) c.d = d, fine &= check(c, attend_store_launch);
    }
    printf(fine ? "all ok\n" : "FAILED\n");
    return fine ? 0 : 1;
  }
  char *from, *to;
  OK(cudaMalloc(&from, 1 << 30)), OK(cudaMalloc(&to, 1 << 30)), OK(cudaMemset(from, 1, 1 << 30));
  const double copy = 2. * (1 << 30) /
                      median_ms([&] { OK(cudaMemcpyAsync(to, from, 1 << 30, cudaMemcpyDeviceToDevice)); }) / 1e9;
  printf("copy, read and write: %.2f TB/s\n", copy);
  struct Variant {
    const char* name;
    Start start;
  };
  const Variant variants[] = {{"6 warps 2", launch_store<128, 128, 6, 2, false>},
                              {"12 warps 1", launch_store<128, 128, 12, 1, false>},
                              {"8 warps 1", launch_store<128, 128, 8, 1, false>}};
  for (const Variant& v : variants) {
    printf("%-12s", v.name);
    for (auto [sequences, m] : {std::pair{1, 131072}, {8, 32768}, {32, 8192}, {1, 8192}}) {
      Case c{"", std::vector<int>(size_t(sequences), 1), std::vector<int>(size_t(sequences), m), 32, 8};
      Problem p;
      make(p, c);
      const float ms = median_ms([&] { OK(v.start(p.a, p.scratch, 0)); });
      printf(" | %d x %d %.4f ms %.2f TB/s (%.2f)", sequences, m, ms, p.bytes / ms / 1e9, p.bytes / ms / 1e9 / copy);
    }
    for (int k_tile : {16, 64}) {
      Case c{"", std::vector<int>(8, 1), std::vector<int>(8, 131072), 32, 8};
      c.k_tile = k_tile, c.plan_heads = 8, c.density = 0.05;
      Problem p;
      make(p, c);
      const float ms = median_ms([&] { OK(v.start(p.a, p.scratch, 0)); });
      printf(" | 8 x 131072, 5%% in blocks of %d %.4f ms %.2f TB/s (%.2f)", k_tile, ms, p.bytes / ms / 1e9,
             p.bytes / ms / 1e9 / copy);
    }
    printf("\n");
  }
  for (int plan_heads : {32, 8})
    for (auto [sequences, m] : {std::pair{1, 32768}, {1, 131072}, {8, 131072}}) {
      printf("%d x %d, 5%% in %d lists", sequences, m, plan_heads);
      for (int k_tile : {1, 4, 16}) {
        Case c{"", std::vector<int>(size_t(sequences), 1), std::vector<int>(size_t(sequences), m), 32, 8};
        c.k_tile = k_tile, c.plan_heads = plan_heads, c.density = 0.05;
        Problem p;
        make(p, c);
        const float ms = median_ms([&] { OK(attend_store_launch(p.a, p.scratch, 0)); });
        printf(" | blocks of %d: %.4f ms, %.2f TB/s", k_tile, ms, p.bytes / ms / 1e9);
      }
      printf("\n");
    }
}
