#include "lab/machine.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include "base/threads.h"
#include "lab/progress.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace heed {
namespace {

// Ten accumulators hide the latency of a multiply-add (4 cycles, two a cycle) on every core so far. They have names, since an
// array of them stays in memory when little is optimised. The empty asm keeps the compiler from seeing that the results are not
// needed.
constexpr int kChains = 10;
constexpr int64_t kRounds = 2'000'000;

#if defined(__x86_64__)
/// name(rounds): ten sums, each of which takes step(sum) each round; `a` is as if another each time, so that no product leaves
/// the loop.
#define HEED_CHAIN(sum, step) \
  asm volatile("" : "+v"(a)); \
  sum = step(sum)
#define HEED_CHAINS(name, isa, Sum, Operand, of_a, of_b, step)                                                            \
  __attribute__((target(isa))) void name(int64_t rounds) {                                                                \
    Operand a = of_a, b = of_b;                                                                                           \
    asm volatile("" : "+v"(b));                                                                                           \
    Sum s0 = {}, s1 = {}, s2 = {}, s3 = {}, s4 = {}, s5 = {}, s6 = {}, s7 = {}, s8 = {}, s9 = {};                         \
    for (int64_t round = 0; round < rounds; ++round) {                                                                    \
      HEED_CHAIN(s0, step);                                                                                               \
      HEED_CHAIN(s1, step);                                                                                               \
      HEED_CHAIN(s2, step);                                                                                               \
      HEED_CHAIN(s3, step);                                                                                               \
      HEED_CHAIN(s4, step);                                                                                               \
      HEED_CHAIN(s5, step);                                                                                               \
      HEED_CHAIN(s6, step);                                                                                               \
      HEED_CHAIN(s7, step);                                                                                               \
      HEED_CHAIN(s8, step);                                                                                               \
      HEED_CHAIN(s9, step);                                                                                               \
      asm volatile(""                                                                                                     \
                   : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7), "+v"(s8), "+v"(s9)); \
    }                                                                                                                     \
  }
#define HEED_STEP(x) _mm256_fmadd_ps(a, b, x)
HEED_CHAINS(chains_avx2, "avx2,fma", __m256, __m256, _mm256_set1_ps(0.5f), _mm256_set1_ps(0.25f), HEED_STEP)
#undef HEED_STEP
#define HEED_STEP(x) _mm256_add_epi32(x, _mm256_madd_epi16(a, b))
HEED_CHAINS(chains_avx2_int16, "avx2", __m256i, __m256i, _mm256_set1_epi16(3), _mm256_set1_epi16(5), HEED_STEP)
#undef HEED_STEP
#define HEED_STEP(x) _mm512_fmadd_ps(a, b, x)
HEED_CHAINS(chains_avx512, "avx512f", __m512, __m512, _mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f), HEED_STEP)
#undef HEED_STEP
#define HEED_STEP(x) _mm512_dpbf16_ps(x, (__m512bh)a, (__m512bh)b)
HEED_CHAINS(chains_bf16, "avx512f,avx512bf16", __m512, __m512i, _mm512_set1_epi16(0x3f00), a, HEED_STEP)
#undef HEED_STEP
#define HEED_STEP(x) _mm512_dpwssd_epi32(x, a, b)
HEED_CHAINS(chains_int16, "avx512f,avx512vnni", __m512i, __m512i, _mm512_set1_epi16(3), _mm512_set1_epi16(5), HEED_STEP)
#undef HEED_STEP
#undef HEED_CHAINS
#undef HEED_CHAIN
#elif defined(__aarch64__)
void chains_neon(int64_t rounds) {
  typedef float Four __attribute__((vector_size(16)));
  Four sum[kChains] = {}, a = {0.5f, 0.5f, 0.5f, 0.5f}, b = a;
  for (int64_t round = 0; round < rounds; ++round) {
    for (int c = 0; c < kChains; ++c) sum[c] += a * b;
    for (int c = 0; c < kChains; ++c) asm volatile("" : "+w"(sum[c]));
  }
}
#endif

double best_gflops(void (*chains)(int64_t), double flops_a_step) {
  double best = 0;
  for (int round = 0; round < 3; ++round) {
    const double begin = now();
    parallel([&](int) { chains(kRounds); });
    best = std::max(best, double(kRounds) * kChains * flops_a_step * threads() / (now() - begin) * 1e-9);
  }
  return best;
}

double read_rate() {
  // Four times the last-level cache of a large server core complex, and small enough for any machine that runs models.
  const int64_t bytes = int64_t(256) << 20;
  const Buffer memory = Buffer::zeros(Dtype::U64, {bytes / 8});
  const uint64_t* data = memory->as<uint64_t>();
  const int64_t parts = threads() * 8, each = bytes / 8 / parts;
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const double begin = now();
    const auto read = [&](int, int64_t p) {
      uint64_t sum[8] = {};
      for (int64_t i = p * each; i + 8 <= (p + 1) * each; i += 8)
        for (int j = 0; j < 8; ++j) sum[j] |= data[i + j];
      for (uint64_t s : sum) asm volatile("" : : "r"(s) : "memory");
    };
    parallel_for(parts, threads(), read, Deal::Stretches);
    best = std::max(best, double(bytes) / (now() - begin) * 1e-9);
  }
  return best;
}

}  // namespace

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0 && line.find(": ") != std::string::npos)
      return line.substr(line.find(": ") + 2);
  return "unknown";
}

int64_t memory_bytes() { return int64_t(sysconf(_SC_PHYS_PAGES)) * int64_t(sysconf(_SC_PAGESIZE)); }

int64_t parameters(const Model& model) {
  int64_t sum = 0;
  const auto add = [&](const Tensor& t) { sum += t ? t.numel() : 0; };
  for (const LayerWeights& w : model.layers())
    for (const Tensor& t : {w.attn_norm, w.attn_post_norm, w.ffn_norm, w.ffn_post_norm, w.q, w.k, w.v, w.o, w.q_bias,
                            w.k_bias, w.v_bias, w.o_bias, w.q_norm, w.k_norm, w.gate, w.up, w.down})
      add(t);
  add(model.embedding());
  add(model.final_norm());
  if (model.output().data != model.embedding().data) add(model.output());
  return sum;
}

double MachineLimits::peak(const std::string& name) const {
  for (const Peak& p : peaks)
    if (p.name == name) return p.gflops;
  return 0;
}

MachineLimits machine_limits() {
  MachineLimits out;
  out.read_gb_s = read_rate();
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    out.peaks.push_back({"avx2 f32", best_gflops(chains_avx2, 16)});
    out.peaks.push_back({"avx2 int16", best_gflops(chains_avx2_int16, 32)});
  }
  if (__builtin_cpu_supports("avx512f")) out.peaks.push_back({"avx512 f32", best_gflops(chains_avx512, 32)});
  if (__builtin_cpu_supports("avx512bf16")) out.peaks.push_back({"avx512 bf16", best_gflops(chains_bf16, 64)});
  if (__builtin_cpu_supports("avx512vnni")) out.peaks.push_back({"avx512 int16", best_gflops(chains_int16, 64)});
#elif defined(__aarch64__)
  out.peaks.push_back({"neon f32", best_gflops(chains_neon, 8)});
#endif
  return out;
}

}  // namespace heed
