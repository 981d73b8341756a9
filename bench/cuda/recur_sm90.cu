// Checks and times the Hopper forms of the recurrence alone: recur_sm90 check | bench. Build: see docs/performance.md.
// The reference is a plain kernel in f64 on the same inputs; outputs are NaN beforehand.
#include "kernels/cuda/recur_sm90.cu"
#include "kernels/cuda/recur_sm90_direct.cu"
#include "kernels/cuda/recur_step.cu"

#include "recur_problem.h"

static void make(Problem& p, const Case& c, bool repeat = false) {
  make_inputs(p, c, repeat);
  const RecurView& a = p.in;
  p.out_count = std::max<int64_t>(1, p.rows) * c.d_v;
  p.to.out_stride = c.d_v;
  OK(cudaMalloc(&p.to.out, size_t(p.out_count) * 4)), p.own(p.to.out);
  OK(cudaMalloc(&p.to.state, size_t(p.state_count) * 4)), p.own(p.to.state);
  p.direct = recur_sm90_fits(a, p.bound) && recur_sm90_direct_fits(a, p.rows);
  const int64_t bytes = std::max<int64_t>(
      1, p.direct ? recur_sm90_direct_scratch(a, p.rows, p.bound) : recur_sm90_scratch(a, p.rows, p.bound));
  OK(cudaMalloc(&p.scratch, size_t(bytes))), p.own(static_cast<char*>(p.scratch));
  OK(cudaMemset(p.scratch, 0xff, size_t(bytes)));
}

static void start(Problem& p) {
  if (recur_step_fits(p.in, p.to, p.bound)) OK(recur_step(p.in, p.to, p.bound, true, 0));
  else if (p.direct) OK(recur_sm90_direct(p.in, p.to, p.rows, p.bound, p.scratch, 0));
  else OK(recur_sm90(p.in, p.to, p.rows, p.bound, p.scratch, 0));
}

/// Row after row, a block a column, a thread a channel.
__global__ void reference_kernel(RecurView a, double* out, double* state_out) {
  __shared__ double parts[8];
  const int s = blockIdx.y, v = blockIdx.x, c = threadIdx.x;
  const bool in = c < a.d;
  auto sum = [&](double x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    __syncthreads();
    if (c % 32 == 0) parts[c / 32] = x;
    __syncthreads();
    x = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) x += parts[w];
    return x;
  };
  double state = in && a.state ? double(a.state[s * a.state_stride[0] + c * a.state_stride[1] + v]) : 0, z = 0;
  for (int t = 0; t < a.qs.length(s); ++t) {
    const int64_t row = a.qs.begin(s) + t;
    const double q = in ? a.q.get(row, c) : 0, k = in ? a.k.get(row, c) : 0;
    const double decay = !in || a.decay == Decay::None ? 1 : exp(double(a.g.get(row, a.decay == Decay::Vector ? c : 0)));
    double value = a.v.get(row, v);
    double corrects = 0;
    if (a.correction == Correction::LowRank) corrects = sum(in ? a.a.get(row, c) * state : 0);
    state *= decay;
    if (a.correction == Correction::LowRank && in) state += a.b.get(row, c) * corrects;
    if (a.correction == Correction::Delta) value = a.beta[row] * (value - sum(k * state));
    state += k * value;
    z = decay * z + k;
    double x = sum(state * q);
    if (a.normalise) x /= sum(z * q);
    if (c == 0) out[row * a.d_v + v] = double(a.scale) * x;
  }
  if (in) state_out[(int64_t(s) * a.d + c) * a.d_v + v] = state;
}

static bool check(const Case& c) {
  Problem p;
  make(p, c);
  OK(cudaMemset(p.to.out, 0xff, size_t(p.out_count) * 4)), OK(cudaMemset(p.to.state, 0xff, size_t(p.state_count) * 4));
  start(p);
  OK(cudaDeviceSynchronize());
  double *want_out, *want_state;
  OK(cudaMalloc(&want_out, size_t(p.out_count) * 8)), p.own(want_out);
  OK(cudaMalloc(&want_state, size_t(p.state_count) * 8)), p.own(want_state);
  reference_kernel<<<dim3(unsigned(c.d_v), unsigned(c.lengths.size())), unsigned((c.d + 31) / 32 * 32)>>>(
      p.in, want_out, want_state);
  OK(cudaDeviceSynchronize());
  std::vector<float> out(static_cast<size_t>(p.out_count)), state(static_cast<size_t>(p.state_count));
  std::vector<double> want(out.size()), want_last(state.size());
  OK(cudaMemcpy(out.data(), p.to.out, out.size() * 4, cudaMemcpyDeviceToHost)),
      OK(cudaMemcpy(state.data(), p.to.state, state.size() * 4, cudaMemcpyDeviceToHost)),
      OK(cudaMemcpy(want.data(), want_out, want.size() * 8, cudaMemcpyDeviceToHost)),
      OK(cudaMemcpy(want_last.data(), want_state, want_last.size() * 8, cudaMemcpyDeviceToHost));
  std::vector<char> inside(static_cast<size_t>(p.rows), 0);
  for (size_t s = 0; s < p.begin.size(); ++s)
    for (int64_t r = p.begin[s]; r < p.end[s]; ++r) inside[size_t(r)] = 1;
  size_t strays = 0;
  double error = 0, norm = 0, worst[2] = {}, largest[2] = {1, 1};
  bool nan = false;
  auto compare = [&](int which, double w, double g) {
    if (std::isnan(g)) nan = true;
    error += (g - w) * (g - w), norm += w * w;
    worst[which] = std::max(worst[which], std::abs(g - w)), largest[which] = std::max(largest[which], std::abs(w));
  };
  for (size_t r = 0; r < inside.size(); ++r)
    for (size_t i = r * size_t(c.d_v); i < (r + 1) * size_t(c.d_v); ++i)
      if (inside[r]) compare(0, want[i], out[i]);
      else strays += !std::isnan(out[i]);
  for (size_t i = 0; i < state.size(); ++i) compare(1, want_last[i], state[i]);
  const double bound = 0x1p-18 * (1 + std::sqrt(double(p.bound)));  // as the tests have it for f32
  const bool fine = !nan && strays == 0 && worst[0] <= bound * largest[0] && worst[1] <= bound * largest[1];
  printf("%s %-62s rel %.1e, of the largest: out %.1e state %.1e%s\n", fine ? "ok  " : "FAIL", c.text().c_str(),
         std::sqrt(error / std::max(norm, 1e-30)), worst[0] / largest[0], worst[1] / largest[1],
         nan      ? " NaN"
         : strays ? " stray"
                  : "");
  return fine;
}

/// Times of the steps: inverses, what parts make of states, outputs; where operands are copied: prepare, first scan, join, second scan.
static void steps(Problem& p) {
  if (p.direct) {
    Direct a;
    if (!direct_job(a, p.in, p.to, p.rows, p.bound, p.scratch)) return;
    for (int step = 0; step < 3; ++step)
      printf(" %.3f", median_ms([&] { OK(direct_step<128>(a, step, p.bound, 0)); }, 7));
    return;
  }
  const Sizes size = sizes(p.in, p.rows, p.bound);
  Job a{p.in,    p.to,       static_cast<uint8_t*>(p.scratch), size.packet, size.parts, size.slices, nullptr,
        nullptr, lined(p.in)};
  a.local = reinterpret_cast<float*>(a.packets + size.packets);
  a.transit = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(a.local) + size.local);
  with_form(p.in, [&](auto form) {
    using F = decltype(form);
    for (int step = 0; step < 4; ++step)
      if (a.parts > 1 || step == 0 || step == 3)
        printf(" %.3f", median_ms([&] { OK(run_step<F>(step, a, p.bound, 0)); }, 7));
    return 0;
  });
}

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IONBF, 0);
  const std::string what = argc > 1 ? argv[1] : "check";
  const bool few = argc > 2;  // under a checker
  cudaDeviceProp device;
  OK(cudaGetDeviceProperties(&device, 0));
  printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  if (what == "check") {
    bool fine = true;
    std::vector<Case> cases;
    for (Correction correction : {Correction::None, Correction::Delta})
      for (Decay decay : {Decay::None, Decay::Scalar, Decay::Vector})
        for (Dtype type : {Dtype::BF16, Dtype::F32}) {
          auto add = [&](const char* name, std::vector<int> lengths, int d, int d_v, double strongest = 1, bool state = true) {
            Case c;
            c.name = name, c.decay = decay, c.correction = correction, c.type = type, c.lengths = std::move(lengths),
            c.d = d, c.d_v = d_v;
            c.strongest = strongest, c.from_state = state, c.gap = d == 64 ? 3 : 0;
            cases.push_back(c);
          };
          add("one chunk", {64}, 128, 128);
          add("unequal, empty", {0, 1, 63, 130, 700, 64}, 128, 128);
          if (few) continue;
          add("parts", {1500, 1030, 0, 7}, 128, 128, 1, false);
          add("many parts", {6000, 3300}, 128, 128);
          add("unequal, gaps", {65, 0, 1200, 200}, 64, 64);
          add("odd widths", {100, 600}, 96, 200);
          add("odd widths", {333}, 33, 7);
          if (decay != Decay::None) add("parts", {1111, 300}, 128, 64, 300);
          if (decay != Decay::None) add("parts", {1111, 300}, 128, 64, INFINITY);
          if (type == Dtype::F32) add("f16 too", {1100}, 80, 96), cases.back().type = Dtype::F16;
        }
    for (Correction correction : {Correction::None, Correction::Delta, Correction::LowRank})
      for (Decay decay : {Decay::None, Decay::Scalar, Decay::Vector})
        for (bool normalise : {false, true}) {
          Case c;
          c.name = "steps", c.decay = decay, c.correction = correction, c.normalise = normalise,
          c.lengths = {1, 0, 7, 15, 1};
          c.d = normalise ? 64 : decay == Decay::Scalar ? 256 : 128, c.d_v = normalise ? 100 : 256;
          cases.push_back(c);
        }
    for (const Case& c : cases) fine &= check(c);
    printf(fine ? "all ok\n" : "FAILED\n");
    return fine ? 0 : 1;
  }
  {
    char *from, *to;
    const size_t bytes = size_t(1) << 30;
    OK(cudaMalloc(&from, bytes)), OK(cudaMalloc(&to, bytes));
    const float ms = median_ms([&] { OK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice)); });
    printf("copy of 1 GiB: %.3f ms, %.0f GB/s\n", ms, 2e-6 * double(bytes) / ms);
    OK(cudaFree(from)), OK(cudaFree(to));
  }
  for (auto [segments, n] : {std::pair{16, 32768}, std::pair{128, 4096}, std::pair{32, 4096}})
    for (Dtype type : {Dtype::BF16, Dtype::F32})
      for (Correction correction : {Correction::None, Correction::Delta})
        for (Decay decay : {Decay::None, Decay::Scalar, Decay::Vector}) {
          if (type == Dtype::F32 && segments != 16) continue;
          Case c;
          c.decay = decay, c.correction = correction, c.type = type, c.lengths.assign(size_t(segments), n),
          c.from_state = false;
          if (argc > 2 && !c.text().starts_with(argv[2])) continue;
          c.name = std::to_string(segments) + " x " + std::to_string(n);
          Problem p;
          make(p, c, true);
          printf("%-50s %.3f ms; steps", c.text().c_str(), median_ms([&] { start(p); }, 9));
          steps(p);
          printf("\n");
        }
  for (Correction correction : {Correction::None, Correction::Delta, Correction::LowRank}) {
    Case c;
    c.decay = Decay::Scalar, c.correction = correction, c.lengths.assign(128 * 32, 1), c.name = "one step of 128 x 32";
    Problem p;
    make(p, c, true);
    const float ms = median_ms([&] { start(p); });
    printf("%-50s %.3f ms, %.0f GB/s of states\n", c.text().c_str(), ms, 8e-6 * double(p.state_count) / ms);
  }
}
