// Attention at prefill sizes beside the limits of the machine, measured in the same process:
//
//     bench_attend [dense|plans|few|matmul|all] [threads] [longest]
//
// Useful operations count 4 · d for each pair of query and key that is seen; `of peak` is their rate over that of products of
// random data alone: tiles where the machine has them, else the faster of vdpbf16ps and f32 multiply-adds.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <functional>
#include <string>
#include <vector>

#include "base/random.h"
#include "base/threads.h"
#include "kernels/kernels.h"

namespace {

using namespace heed;

/// With one thread the process's own processor time, which neighbours disturb least.
double now() {
  if (threads() == 1) return double(std::clock()) / CLOCKS_PER_SEC;
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double best_of(double least_seconds, const std::function<void()>& run) {
  run();
  double best = 1e300;
  const double begin = now();
  int runs = 0;
  do {
    const double start = now();
    run();
    best = std::min(best, now() - start);
  } while (++runs < 3 || now() - begin < least_seconds);
  return best;
}

Buffer normals(Dtype type, int64_t rows, int64_t width, uint64_t seed) {
  Buffer out(type, {rows, width});
  parallel_for(rows, [&](int64_t r) {
    Random random(seed * 1000003 + uint64_t(r));
    for (int64_t c = 0; c < width; ++c) {
      const float x = float(random.normal());
      if (type == Dtype::BF16) out->as<bf16>()[r * width + c] = bf16(x);
      else out->as<float>()[r * width + c] = x;
    }
  });
  return out;
}

struct Heads {
  Buffer values, offsets;
  Ragged view;
  Heads(Dtype type, int64_t heads, int64_t rows, int64_t width, uint64_t seed)
      : values(normals(type, heads * rows, width, seed)), offsets(Dtype::I64, {heads + 1}) {
    for (int64_t s = 0; s <= heads; ++s) offsets->at<int64_t>(s) = s * rows;
    view = {.values = values, .offsets = offsets, .ends = {}, .heads = heads, .bound = heads * rows};
  }
};

/// Products of tiles of random data in the first cache: four sums, two tiles of each side a step.
void tile_loop(const char* data, int64_t rounds) {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
  for (int64_t i = 0; i < rounds; ++i) {
    const char* at = data + i % 7 * 4096;
    asm volatile(
        "tileloadd (%0,%1,1), %%tmm4\n\ttileloadd 1024(%0,%1,1), %%tmm6\n\ttileloadd 2048(%0,%1,1), %%tmm7\n\t"
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\ttileloadd 3072(%0,%1,1), %%tmm5\n\t"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(at),
        "r"(int64_t(64))
        : "memory");
  }
  asm volatile("tilerelease" ::: "memory");
}

__attribute__((target("avx512f,avx512bf16"))) void dot_loop(int64_t rounds) {
  __m512 sum[12] = {};
  __m512i ones = _mm512_set1_epi16(0x3f00);
  asm volatile("" : "+v"(ones));
  for (int64_t i = 0; i < rounds; ++i) {
    for (auto& s : sum) s = _mm512_dpbf16_ps(s, (__m512bh)ones, (__m512bh)ones);
    for (auto& s : sum) asm volatile("" : "+v"(s));
  }
}

__attribute__((target("avx512f"))) void fma_loop(int64_t rounds) {
  __m512 sum[12] = {}, a = _mm512_set1_ps(0.5f);
  asm volatile("" : "+v"(a));
  for (int64_t i = 0; i < rounds; ++i) {
    for (auto& s : sum) s = _mm512_fmadd_ps(a, a, s);
    for (auto& s : sum) asm volatile("" : "+v"(s));
  }
}

struct Peaks {
  double tiles = 0, dots = 0, f32 = 0;
  double best() const { return tiles > 0 ? tiles : std::max(dots, f32); }
};

Peaks peaks(bool amx) {
  Peaks out;
  const int64_t rounds = 400000;
  if (amx) {
    const Buffer data = normals(Dtype::BF16, 32, 512, 9);
    out.tiles = 4.0 * 16 * 16 * 32 * 2 * double(rounds) * threads() * 1e-9 /
                best_of(0.3, [&] { parallel([&](int) { tile_loop(static_cast<const char*>(data->data), rounds); }); });
  }
  if (__builtin_cpu_supports("avx512bf16"))
    out.dots = 12.0 * 64 * double(rounds) * threads() * 1e-9 /
               best_of(0.2, [&] { parallel([&](int) { dot_loop(rounds); }); });
  if (__builtin_cpu_supports("avx512f"))
    out.f32 = 12.0 * 32 * double(rounds) * threads() * 1e-9 /
              best_of(0.2, [&] { parallel([&](int) { fma_loop(rounds); }); });
  return out;
}

/// Block plans of every query tile: itself and random earlier blocks up to the density.
struct Blocks {
  Buffer rowptr, index;
  Plan plan;
  double pairs = 0;  // of all heads
  Blocks(int64_t heads, int64_t n, int q_tile, int k_tile, double density, Plan::Form form, Plan::Scope scope) {
    Random random(7);
    std::vector<int64_t> ptr{0};
    std::vector<int32_t> at;
    const double share = density;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t first = 0; first < n; first += q_tile) {
        const int64_t last_block = (std::min(n, first + q_tile) - 1) / k_tile;
        const int64_t own = first / k_tile, wanted = std::max<int64_t>(0, int64_t(share * double(own) + random.uniform()));
        std::vector<int32_t> chosen;
        if (own > 0) {
          std::vector<int32_t> all(static_cast<size_t>(own));
          for (size_t i = 0; i < all.size(); ++i) all[i] = int32_t(i);
          for (int64_t i = 0; i < std::min(wanted, own); ++i) {
            std::swap(all[size_t(i)], all[size_t(i + random.below(own - i))]);
            chosen.push_back(all[size_t(i)]);
          }
        }
        std::sort(chosen.begin(), chosen.end());
        for (int64_t b = own; b <= last_block; ++b) chosen.push_back(int32_t(b));
        for (int32_t b : chosen) {
          if (form == Plan::Form::Interval) at.insert(at.end(), {b * k_tile, (b + 1) * k_tile});
          else at.push_back(b);
          for (int64_t i = first; i < std::min(n, first + q_tile); ++i)
            pairs += double(std::clamp<int64_t>(i + 1 - int64_t(b) * k_tile, 0, k_tile));
        }
        ptr.push_back(int64_t(form == Plan::Form::Interval ? at.size() / 2 : at.size()));
      }
    rowptr = Buffer::of<int64_t>({int64_t(ptr.size())}, ptr);
    index = form == Plan::Form::Interval ? Buffer::of<int32_t>({int64_t(at.size() / 2), 2}, at)
                                         : Buffer::of<int32_t>({int64_t(at.size())}, at);
    plan.form = form;
    plan.scope = scope;
    plan.q_tile = q_tile;
    plan.k_tile = k_tile;
    plan.rowptr = rowptr;
    plan.index = index;
    plan.nnz_bound = int64_t(at.size());
  }
};

struct Problem {
  int64_t h, g, n, d;
  Heads q, k, v;
  Buffer out, lse;
  Problem(int64_t h, int64_t g, int64_t n, int64_t d, Dtype q_type = Dtype::F32, Dtype kv = Dtype::BF16)
      : h(h), g(g), n(n), d(d), q(q_type, h, n, d, 1), k(kv, g, n, d, 2), v(kv, g, n, d, 3),
        out(Dtype::F32, {h * n, d}), lse(Dtype::F32, {h * n}) {}
  double seconds(const Kernels& run, const Plan& plan, const Mods& mods = {}, double least = 0.2) {
    Queue queue;
    queue.run = &run;
    return best_of(least, [&] {
      const Scratch scratch(queue.scratch);
      run.attend(queue, q.view, k.view, v.view, plan, mods, out, lse);
    });
  }
};

double causal_work(const Problem& p) { return 4.0 * double(p.h) * double(p.d) * double(p.n) * double(p.n + 1) / 2; }

void dense(const Kernels& run, const Peaks& peak, int64_t most) {
  std::printf("dense, %d threads, GFLOP/s useful (of the peak)\n", threads());
  for (int64_t d : {64, 128, 256})
    for (int64_t n : {int64_t(1024), int64_t(4096), int64_t(16384)}) {
      if (n > most) continue;
      Problem p(8, 2, n, d);
      Plan causal, full;
      full.causal = false;
      const double c = causal_work(p) / p.seconds(run, causal) * 1e-9, f = 2 * causal_work(p) / p.seconds(run, full) * 1e-9;
      std::printf("  d %3d n %6d  full %7.0f (%.3f)  causal %7.0f (%.3f)\n", int(d), int(n), f, f / peak.best(), c,
                  c / peak.best());
    }
  for (int64_t d : {80, 96, 192}) {
    Problem p(8, 2, 2048, d);
    const double c = causal_work(p) / p.seconds(run, {}) * 1e-9;
    std::printf("  d %3d n   2048  causal %7.0f (%.3f)\n", int(d), c, c / peak.best());
  }
  Problem p(8, 2, 4096, 64, Dtype::F32, Dtype::F32);
  const double c = causal_work(p) / p.seconds(run, {}) * 1e-9;
  std::printf("  f32 keys: d 64 n 4096 causal %.0f (%.3f of f32)\n", c, c / peak.f32);
}

void plans(const Kernels& run, int64_t most) {
  std::printf("plans, causal, %d threads: time dense / time, and that times the density of pairs (1 is ideal)\n", threads());
  for (int64_t d : {64, 128}) {
    for (int64_t n : {most / 2, most}) {
      Problem p(4, 1, n, d);
      const double whole = p.seconds(run, {}), pairs = double(p.h) * double(n) * double(n + 1) / 2;
      const auto show = [&](const char* name, int q_tile, int k_tile, Plan::Form form, Plan::Scope scope) {
        std::printf("  d %3d n %5d %-28s", int(d), int(n), name);
        for (double density : {0.5, 0.2, 0.1, 0.05}) {
          const bool each = scope == Plan::Scope::QueryHead;
          const Blocks b(each ? p.h : p.g, n, q_tile, k_tile, density, form, scope);
          const double ratio = whole / p.seconds(run, b.plan, {}, 0.1), real = b.pairs * double(each ? 1 : p.h / p.g) / pairs;
          std::printf("  %.3f: %5.2fx %.2f", real, ratio, ratio * real);
        }
        std::printf("\n");
      };
      show("blocks 128 x 128", 128, 128, Plan::Form::Blocks, Plan::Scope::QueryHead);
      show("blocks 64 x 64", 64, 64, Plan::Form::Blocks, Plan::Scope::QueryHead);
      show("blocks 64 x 64 by KV head", 64, 64, Plan::Form::Blocks, Plan::Scope::KvHead);
      show("intervals 128 x 128", 128, 128, Plan::Form::Interval, Plan::Scope::QueryHead);
      show("blocks 1 x 512", 1, 512, Plan::Form::Blocks, Plan::Scope::QueryHead);
      Mods window;
      window.window = 1024;
      const double seen = double(p.h) * (double(n) * 1024 - 1024.0 * 1023 / 2),
                   ratio = whole / p.seconds(run, {}, window, 0.1);
      std::printf("  d %3d n %5d window 1024                   %.3f: %5.2fx %.2f\n", int(d), int(n), seen / pairs,
                  ratio, ratio * seen / pairs);
    }
  }
}

void observing(const Kernels& run) {
  std::printf("observe, share of a dense causal prefill (%d threads)\n", threads());
  for (int64_t d : {64, 128}) {
    Problem p(8, 2, 8192, d);
    Heads columns(Dtype::F32, p.g, p.n, 1, 3);
    columns.view.values = columns.values->reshape({p.g * p.n});
    const double whole = p.seconds(run, {});
    Queue queue;
    queue.run = &run;
    for (int64_t rows : {int64_t(32), p.n}) {
      Ragged last = p.q.view;
      Buffer first(Dtype::I64, {p.h + 1}), end(Dtype::I64, {p.h});
      for (int64_t s = 0; s < p.h; ++s)
        first->at<int64_t>(s) = s * p.n + p.n - rows, end->at<int64_t>(s) = (s + 1) * p.n;
      first->at<int64_t>(p.h) = p.h * p.n;
      last.offsets = first;
      last.ends = end;
      double took[2];
      for (bool known : {false, true})
        took[known] = best_of(0.2, [&] {
          const Scratch scratch(queue.scratch);
          Observe how{.rows = Observe::Rows::Sum};
          if (known) how.lse = p.lse;  // as seconds() left it
          run.observe(queue, last, {.panel = &p.k.view, .pages = nullptr, .read = nullptr}, nullptr, Mods(), how,
                      columns.view);
        });
      std::printf("  d %3d n %d rows %5d: %.2f %%, with lse %.2f %%\n", int(d), int(p.n), int(rows),
                  100 * took[0] / whole, 100 * took[1] / whole);
    }
  }
}

void products(const Kernels& run, const Peaks& peak) {
  std::printf("matmul, %d threads, GFLOP/s (of the peak)\n", threads());
  struct Size {
    int64_t tokens, in, out;
  };
  for (const Size& s : {Size{256, 2048, 2048},
                        {512, 576, 1536},
                        {512, 1536, 576},
                        {512, 640, 2048},
                        {512, 4096, 4096},
                        {2048, 4096, 4096},
                        {8192, 2048, 2048}})
    for (Dtype type : {Dtype::BF16, Dtype::Q4_K, Dtype::Q8_0}) {
      Buffer w(type, {s.out, s.in});
      if (s.in % 256 && type == Dtype::Q4_K) continue;
      if (type == Dtype::BF16) w = normals(type, s.out, s.in, 4);
      else {
        Random random(5);
        auto* bytes = static_cast<uint8_t*>(w->data);
        for (int64_t i = 0; i < w->bytes(); ++i) bytes[i] = uint8_t(random.below(48));
      }
      const Buffer x = normals(Dtype::F32, s.tokens, s.in, 6), y(Dtype::F32, {s.tokens, s.out});
      Queue queue;
      queue.run = &run;
      const double rate = 2.0 * double(s.tokens) * double(s.in) * double(s.out) * 1e-9 / best_of(0.1, [&] {
                            const Scratch scratch(queue.scratch);
                            run.matmul(queue, w, x, {}, false, y);
                          });
      std::printf("  T %5d in %5d out %5d %-5s %7.0f (%.3f)\n", int(s.tokens), int(s.in), int(s.out), info(type).name,
                  rate, rate / peak.best());
    }
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string what = argc > 1 ? argv[1] : "all";
  set_threads(argc > 2 ? std::atoi(argv[2]) : 0);
  const int64_t most = argc > 3 ? std::atoll(argv[3]) : 16384;
  const Kernels& run = *cpu_kernels().front();
  const Peaks peak = peaks(run.name == "amx");
  std::printf("%s, %d threads: tiles %.0f, bf16 dots %.0f, f32 %.0f GFLOP/s\n", run.name.c_str(), threads(), peak.tiles,
              peak.dots, peak.f32);
  if (what == "dense" || what == "all") dense(run, peak, most);
  if (what == "plans" || what == "all") plans(run, most);
  if (what == "observe" || what == "all") observing(run);
  if (what == "matmul" || what == "all") products(run, peak);
}
