// Checks and times the gradient of the recurrence on Hopper alone: recur_backward_sm90 check | bench. Build: see
// docs/performance.md. The reference is a plain kernel in f64 on the same inputs; outputs are NaN beforehand.
#include "kernels/cuda/recur_backward_sm90.cu"

#include "recur_problem.h"

/// One of the gradients: rows of the inputs' rows, or a state of each segment.
struct Gradient {
  const char* name;
  int64_t count = 0;
  int width = 1;
  bool of_states = false;
  float* got = nullptr;
  double* want = nullptr;
};

struct BackwardProblem : Problem {
  RecurBackward grads{};
  std::vector<Gradient> all;
  int64_t bytes = 0;
};

static void make(BackwardProblem& p, const Case& c, bool last_state, bool repeat = false) {
  make_inputs(p, c, repeat);
  Random random(seed++);
  auto normal = [&](double by) {
    return [&, by](std::vector<float>& row) {
      for (float& x : row) x = float(by * random.normal());
    };
  };
  p.grads.d_out = Matrix{numbers(p, Dtype::F32, c.d_v, normal(1)), c.d_v, c.d_v, Dtype::F32};
  std::copy_n(p.in.state_stride, 3, p.grads.state_stride), std::copy_n(p.in.state_stride, 3, p.grads.d_state_stride);
  if (last_state) {
    std::vector<float> state(static_cast<size_t>(p.state_count));
    for (float& x : state) x = float(0.3 * random.normal());
    p.grads.d_state = p.own(on_device(state));
  }
  auto gradient = [&](const char* name, bool wanted, int width, bool of_states = false) {
    Gradient g{name, of_states ? p.state_count : p.rows * width, width, of_states};
    if (!wanted) return static_cast<float*>(nullptr);
    const size_t count = size_t(std::max<int64_t>(1, g.count));
    OK(cudaMalloc(&g.got, count * 4)), p.own(g.got);
    OK(cudaMemset(g.got, 0xff, count * 4));
    p.all.push_back(g);
    return g.got;
  };
  auto rows = [&](float* data, int width) { return data ? Matrix{data, width, width, Dtype::F32} : Matrix{}; };
  p.grads.q = rows(gradient("q", true, c.d), c.d), p.grads.k = rows(gradient("k", true, c.d), c.d);
  p.grads.v = rows(gradient("v", true, c.d_v), c.d_v), p.grads.g = rows(gradient("g", c.decay != Decay::None, 1), 1);
  p.grads.beta = gradient("beta", c.correction == Correction::Delta, 1);
  p.grads.state = gradient("state", true, c.d, true);
  if (!recur_backward_sm90_fits(p.in, p.grads, p.rows, p.bound)) printf("%s does not fit\n", c.text().c_str()), exit(1);
  p.bytes = recur_backward_sm90_scratch(p.in, p.rows);
  OK(cudaMalloc(&p.scratch, size_t(p.bytes))), p.own(static_cast<char*>(p.scratch));
  OK(cudaMemset(p.scratch, 0xff, size_t(p.bytes)));
}

static void start(BackwardProblem& p) { OK(recur_backward_sm90(p.in, p.grads, p.rows, p.bound, p.scratch, 0)); }

struct Wanted {
  double *q, *k, *v, *g, *beta, *state, *states;  // states: [rows + 1, d, d_v] for each segment, then one to walk back
};

/// Row after row in f64, a block a segment, a thread of 512 a quarter of a column or a warp a channel.
__global__ void reference_kernel(RecurView a, RecurBackward b, Wanted to) {
  __shared__ double q[128], k[128], v[128], out[128], known[128], left[128], partial[4][128], sums[16];
  const int s = blockIdx.x, n = a.qs.length(s), d = a.d, d_v = a.d_v, size = d * d_v, tid = threadIdx.x,
            warp = tid / 32, lane = tid % 32;
  const bool delta = a.correction == Correction::Delta;
  double* states = to.states + (a.qs.begin(s) + 2 * s) * int64_t(size);
  double* grad = states + int64_t(n + 1) * size;
  double decay = 1, beta = 1;
  auto take = [&](int t) {
    __syncthreads();
    const int64_t row = a.qs.begin(s) + t;
    if (tid < d) q[tid] = a.q.get(row, tid), k[tid] = a.k.get(row, tid);
    if (tid < d_v) v[tid] = a.v.get(row, tid), out[tid] = b.d_out.get(row, tid);
    decay = a.decay == Decay::Scalar ? exp(double(a.g.get(row))) : 1;
    beta = delta ? a.beta[row] : 1;
    __syncthreads();
  };
  auto through = [&](const double* m, double* sum) {  // k^T m
    const int c = tid % 128;
    double x = 0;
    if (c < d_v)
      for (int i = tid / 128; i < d; i += 4) x += k[i] * m[i * d_v + c];
    partial[tid / 128][c] = x;
    __syncthreads();
    if (tid < d_v) sum[tid] = partial[0][tid] + partial[1][tid] + partial[2][tid] + partial[3][tid];
    __syncthreads();
  };
  auto total = [&](double x) {
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    x = 0;
    for (double y : sums) x += y;
    return x;
  };
  for (int e = tid; e < size; e += 512) {
    states[e] = a.state_at(s, e / d_v, e % d_v);
    grad[e] = b.d_state ? b.d_state[int64_t(s) * size + e] : 0;
  }
  for (int t = 0; t < n; ++t) {
    take(t);
    double *from = states + int64_t(t) * size, *next = from + size;
    if (delta) through(from, known);
    for (int e = tid; e < size; e += 512)
      next[e] = decay * from[e] + beta * k[e / d_v] * (v[e % d_v] - (delta ? decay * known[e % d_v] : 0));
  }
  for (int t = n - 1; t >= 0; --t) {
    take(t);
    const int64_t row = a.qs.begin(s) + t;
    const double *from = states + int64_t(t) * size, *next = from + size;
    for (int e = tid; e < size; e += 512) grad[e] += double(a.scale) * q[e / d_v] * out[e % d_v];
    if (tid < 128) known[tid] = 0;
    __syncthreads();
    if (delta) through(from, known);
    through(grad, left);
    for (int i = warp; i < d; i += 16) {
      double d_q = 0, d_k = 0;
      for (int c = lane; c < d_v; c += 32) {
        d_q += next[i * d_v + c] * out[c];
        d_k += beta * grad[i * d_v + c] * (v[c] - decay * known[c]);
        if (delta) d_k -= decay * from[i * d_v + c] * beta * left[c];
      }
      d_q = warp_sum(d_q), d_k = warp_sum(d_k);
      if (lane == 0) to.q[row * d + i] = double(a.scale) * d_q, to.k[row * d + i] = d_k;
    }
    double d_g = 0;
    __syncthreads();
    for (int e = tid; e < size; e += 512) {
      grad[e] = decay * (grad[e] - (delta ? k[e / d_v] * beta * left[e % d_v] : 0));
      d_g += grad[e] * from[e];
    }
    d_g = total(d_g);
    const double d_beta = total(tid < d_v ? left[tid] * (v[tid] - decay * known[tid]) : 0);
    if (tid < d_v) to.v[row * d_v + tid] = beta * left[tid];
    if (tid == 0) {
      if (to.g) to.g[row] = d_g;
      if (to.beta) to.beta[row] = d_beta;
    }
  }
  __syncthreads();
  for (int e = tid; e < size; e += 512) to.state[int64_t(s) * size + e] = grad[e];
}

static bool check(const Case& c, bool last_state) {
  BackwardProblem p;
  make(p, c, last_state);
  start(p);
  OK(cudaDeviceSynchronize());
  Wanted want{};
  double** places[] = {&want.q, &want.k, &want.v, &want.g, &want.beta, &want.state};
  const char* names[] = {"q", "k", "v", "g", "beta", "state"};
  for (Gradient& g : p.all) {
    OK(cudaMalloc(&g.want, size_t(std::max<int64_t>(1, g.count)) * 8)), p.own(g.want);
    for (int i = 0; i < 6; ++i)
      if (std::string(names[i]) == g.name) *places[i] = g.want;
  }
  const int64_t states = p.rows + 2 * int64_t(c.lengths.size());
  OK(cudaMalloc(&want.states, size_t(states * c.d * c.d_v) * 8)), p.own(want.states);
  reference_kernel<<<unsigned(c.lengths.size()), 512>>>(p.in, p.grads, want);
  OK(cudaDeviceSynchronize());
  std::vector<char> inside(static_cast<size_t>(p.rows), 0);
  for (size_t s = 0; s < p.begin.size(); ++s)
    for (int64_t r = p.begin[s]; r < p.end[s]; ++r) inside[size_t(r)] = 1;
  bool fine = true;
  std::string said;
  for (const Gradient& g : p.all) {
    std::vector<float> got(static_cast<size_t>(g.count));
    std::vector<double> wanted(got.size());
    OK(cudaMemcpy(got.data(), g.got, got.size() * 4, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(wanted.data(), g.want, wanted.size() * 8, cudaMemcpyDeviceToHost));
    double error = 0, norm = 0, worst = 0, largest = 1e-3;
    size_t strays = 0, nans = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      if (!g.of_states && !inside[i / size_t(g.width)]) {
        strays += !std::isnan(got[i]);
        continue;
      }
      nans += std::isnan(got[i]);
      error += (got[i] - wanted[i]) * (got[i] - wanted[i]), norm += wanted[i] * wanted[i];
      worst = std::max(worst, std::abs(got[i] - wanted[i])), largest = std::max(largest, std::abs(wanted[i]));
    }
    const double bound = 2 * (0x1p-7 + 0x1p-18 * std::sqrt(double(p.bound)));  // as the tests have it for bf16
    const double relative = std::sqrt(error / std::max(norm, 1e-30));
    const bool good = strays == 0 && nans == 0 && worst <= bound * largest && (relative < 0.01 || norm < 1e-20);
    char text[128];
    snprintf(text, sizeof text, " %s%s %.1e/%.1e%s", good ? "" : "!", g.name, relative, worst / largest,
             nans     ? " NaN"
             : strays ? " stray"
                      : "");
    said += text, fine &= good;
  }
  printf("%s %-48s%s\n", fine ? "ok  " : "FAIL", c.text().c_str(), said.c_str());
  return fine;
}

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IONBF, 0);
  const std::string what = argc > 1 ? argv[1] : "check";
  const bool few = argc > 2;  // under a checker
  cudaDeviceProp device;
  OK(cudaGetDeviceProperties(&device, 0));
  printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  if (what == "check") {
    printf("error of the norm / largest error of the largest number\n");
    bool fine = true;
    for (Correction correction : {Correction::None, Correction::Delta})
      for (Decay decay : {Decay::None, Decay::Scalar}) {
        auto run = [&](const char* name, std::vector<int> lengths, int d, int d_v, double strongest = 1, bool given = true) {
          Case c;
          c.name = name, c.decay = decay, c.correction = correction, c.lengths = std::move(lengths), c.d = d, c.d_v = d_v;
          c.strongest = strongest, c.from_state = given, c.gap = d == 64 ? 3 : 0;
          fine &= check(c, given);
        };
        run("one chunk", {64}, 128, 128);
        run("one block", {128}, 128, 128, 1, false);
        run("unequal, empty", {0, 1, 63, 130, 300, 64}, 128, 128);
        if (few) continue;
        run("long", {1500, 1030, 0, 7}, 128, 128);
        run("unequal, gaps", {65, 0, 400, 200}, 64, 64);
        run("odd widths", {100, 600}, 80, 96);
        run("odd widths", {333, 129}, 40, 16);
        if (decay != Decay::None) run("strong", {1111, 300}, 128, 64, 300);
        if (decay != Decay::None) run("strong", {511, 300}, 128, 64, INFINITY);
      }
    printf(fine ? "all ok\n" : "FAILED\n");
    return fine ? 0 : 1;
  }
  for (auto [segments, n] : {std::pair{16, 32768}, std::pair{128, 4096}, std::pair{32, 4096}})
    for (Correction correction : {Correction::None, Correction::Delta})
      for (Decay decay : {Decay::None, Decay::Scalar}) {
        Case c;
        c.decay = decay, c.correction = correction, c.lengths.assign(size_t(segments), n), c.from_state = false;
        c.name = std::to_string(segments) + " x " + std::to_string(n);
        BackwardProblem p;
        make(p, c, false, true);
        printf("%-50s %.3f ms, %.2f GB of scratch; steps", c.text().c_str(), median_ms([&] { start(p); }, 9),
               1e-9 * double(p.bytes));
        Back a;
        if (!backward_job(a, p.in, p.grads, p.rows, p.scratch)) return 1;
        for (int step = 0; step < 3; ++step)
          printf(" %.3f", median_ms([&] { OK(backward_step(a, step, p.rows, p.bound, 0)); }, 7));
        printf("\n");
      }
}
