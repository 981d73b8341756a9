// What decoding one token costs its kernels, beside the machine's read bandwidth and the cost of a parallel region, all
// measured in the same process:
//
//     bench_decode [threads] [megabytes of K and V, in bf16] [q8: only what is named so] [d, 128]
//
// attend_store reads pages for groups of 1, 3, 4 and 8 query heads, in order and in random order; matmul multiplies one
// token with matrices too large for the caches. Best of several runs, as GB/s of pages (and millions of entries a second) or
// weights.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/random.h"
#include "base/threads.h"
#include "kernels/kernels.h"

namespace {

using namespace heed;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class Fn>
double best(int rounds, Fn&& run) {
  double least = 1e9;
  for (int r = 0; r < rounds; ++r) {
    const double start = now();
    run();
    least = std::min(least, now() - start);
  }
  return least;
}

/// GB/s of summing memory with every thread.
double read_rate(const Buffer& memory) {
  const auto* words = static_cast<const uint64_t*>(memory->data);
  const int64_t parts = 256, each = memory->bytes() / 8 / parts;
  std::vector<uint64_t> sums(parts * 8);
  const double seconds = best(8, [&] {
    const auto add = [&](int, int64_t p) {
      uint64_t sum[8] = {};
      const uint64_t* from = words + p * each;
      for (int64_t i = 0; i + 8 <= each; i += 8)
        for (int k = 0; k < 8; ++k) sum[k] += from[i + k];
      for (int k = 1; k < 8; ++k) sum[0] += sum[k];
      sums[size_t(p * 8)] = sum[0];
    };
    parallel_for(parts, threads(), add, Deal::Stretches);
  });
  return double(memory->bytes()) / seconds * 1e-9;
}

struct Stored {
  PageLayout layout;
  Buffer memory, table, layouts, length;
  std::vector<Column> columns;
  Pages pages;
  double bytes = 0;

  Stored(int64_t kv_heads, int64_t entries, int d, PageType k, PageType v, bool shuffled) {
    layout = page_layout(d, d, k, v, false, false, columns);
    const int64_t each = (entries + kPage - 1) / kPage, count = kv_heads * each, step = layout.bytes + 64;
    memory = Buffer(Dtype::U8, {count * step});
    table = Buffer(Dtype::U64, {kv_heads, each});
    layouts = Buffer::zeros(Dtype::U8, {kv_heads, each});
    length = Buffer(Dtype::I32, {kv_heads});
    // Halves of 0.25 to 0.5: sensible in bf16, as codes and as scales.
    for (int64_t i = 0, n = memory->bytes() / 2; i < n; ++i)
      memory->as<uint16_t>()[i] = uint16_t(0x3e00 | ((i * 2654435761u) >> 20 & 0x7f));
    std::vector<int64_t> place(static_cast<size_t>(count));
    for (int64_t p = 0; p < count; ++p) place[size_t(p)] = p;
    Random random(1);
    for (int64_t p = count; shuffled && p > 1; --p) std::swap(place[size_t(p - 1)], place[size_t(random.below(p))]);
    for (int64_t p = 0; p < count; ++p)
      table->as<uint64_t>()[p] = reinterpret_cast<uint64_t>(memory->as<char>() + place[size_t(p)] * step);
    for (int64_t g = 0; g < kv_heads; ++g) length->as<int32_t>()[g] = int32_t(entries);
    pages.table = table, pages.layout = layouts, pages.length = length;
    pages.kv_heads = kv_heads, pages.length_bound = entries;
    pages.layouts = {layout};
    pages.columns = &columns;
    bytes = double(kv_heads * entries) / kPage * double(k.bytes(d) + v.bytes(d));
  }
};

PageType signed_codes(PageType::Kind kind) {
  PageType out;
  out.kind = kind, out.codes = PageType::Codes::Signed;
  return out;
}

void attention(const Kernels& run, int64_t megabytes, const std::string& only, int d) {
  using Kind = PageType::Kind;
  const int64_t kv_heads = 4, entries = (megabytes << 20) / (4 * d * kv_heads) / kPage * kPage;
  const struct {
    const char* name;
    PageType k, v;
    bool shuffled;
  } kinds[] = {{"bf16", {}, {}, false},
               {"bf16, random pages", {}, {}, true},
               {"q8", {.kind = Kind::Q8}, {.kind = Kind::Q8}, false},
               {"q4", {.kind = Kind::Q4}, {.kind = Kind::Q4}, false},
               {"kv-q8", signed_codes(Kind::Q8), signed_codes(Kind::Q8), false},
               {"kv-q4", signed_codes(Kind::Q4), signed_codes(Kind::Q4), false},
               {"kivi", {.kind = Kind::Q2, .axis = PageType::Axis::Channel}, {.kind = Kind::Q2}, false},
               {"kivi(bits=4)", {.kind = Kind::Q4, .axis = PageType::Axis::Channel}, {.kind = Kind::Q4}, false}};
  for (const auto& kind : kinds) {
    if (!only.empty() && only != kind.name) continue;
    const Stored store(kv_heads, entries, d, kind.k, kind.v, kind.shuffled);
    std::printf("attend_store, %ld entries x %ld heads, %-18s", long(entries), long(kv_heads), kind.name);
    for (int64_t group : {1, 3, 4, 8}) {
      const int64_t h = kv_heads * group;
      Queue queue;
      queue.run = &run;
      Buffer q(Dtype::F32, {h, d}), out(Dtype::F32, {h, d}), lse(Dtype::F32, {h}), offsets(Dtype::I64, {h + 1});
      for (int64_t i = 0; i < h * d; ++i) q->as<float>()[i] = float(i % 7) - 3;
      for (int64_t i = 0; i <= h; ++i) offsets->as<int64_t>()[i] = i;
      const Ragged rows{.values = q, .offsets = offsets, .ends = {}, .heads = h, .bound = h};
      const double seconds = best(8, [&] { run.attend_store(queue, rows, store.pages, Read(), Mods(), out, lse); });
      std::printf("  g%ld %5.1f (%5.1f)", long(group), store.bytes / seconds * 1e-9,
                  double(kv_heads * entries) / seconds * 1e-6);
    }
    std::printf("  GB/s (M entries/s)\n");
  }
}

void products(const Kernels& run, const Buffer& memory, const std::string& only) {
  for (int64_t i = 0, n = memory->bytes() / 2; i < n; ++i)
    memory->as<uint16_t>()[i] = uint16_t(0x1c00 | ((i * 2654435761u) >> 20 & 0xff));
  for (Dtype type : {Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q8_0, Dtype::Q4_K, Dtype::Q6_K, Dtype::F16, Dtype::BF16}) {
    if (!only.empty() && only != info(type).name) continue;
    for (bool interleaved : {false, true}) {
      const DtypeInfo kind = info(type);
      if (interleaved && !is_block(type)) continue;
      std::printf("matmul, one token, %-5s%s", kind.name, interleaved ? ", interleaved" : "             ");
      for (int64_t width : {576, 1536, 4096}) {
        if (width % kind.block) {
          std::printf("  %4ld      -", long(width));
          continue;
        }
        const int64_t row = width / kind.block * kind.bytes, rows = memory->bytes() / row;
        Buffer x(Dtype::F32, {1, width}), y(Dtype::F32, {1, rows});
        for (int64_t i = 0; i < width; ++i) x->as<float>()[i] = float(i % 13) - 6;
        Queue queue;
        queue.run = &run;
        Tensor w(memory->data, type, {rows, width});
        w.interleaved = interleaved;
        const double seconds = best(5, [&] { run.matmul(queue, w, x, {}, false, y); });
        std::printf("  %4ld %6.1f", long(width), double(rows * row) / seconds * 1e-9);
      }
      std::printf("  GB/s\n");
    }
  }
}

/// Products of a small model's layer, whose weights are in the caches: what is left is regions and balance.
void small(const Kernels& run) {
  const int64_t width = 576, out = 1536;
  const DtypeInfo kind = info(Dtype::Q4_1);
  Buffer w(Dtype::U8, {2 * out * width / kind.block * kind.bytes}), x(Dtype::F32, {1, width}), y(Dtype::F32, {1, out});
  std::memset(w->data, 0x1c, size_t(w->bytes()));
  for (int64_t i = 0; i < width; ++i) x->as<float>()[i] = float(i % 13) - 6;
  Tensor gate(w->data, Dtype::Q4_1, {out, width}), up(w->as<char>() + w->bytes() / 2, Dtype::Q4_1, {out, width});
  gate.interleaved = up.interleaved = run.interleave != nullptr;
  Queue queue;
  queue.run = &run;
  const double region = best(20, [] {
    for (int i = 0; i < 1000; ++i) parallel([](int) {});
  });
  const double product = best(20, [&] {
    for (int i = 0; i < 100; ++i) run.matmul(queue, gate.slice(0, 0, width), x, {}, false, y.view().slice(1, 0, width));
  });
  const double both = best(20, [&] {
    for (int i = 0; i < 100; ++i) run.matmul_glu(queue, gate, up, x, nullptr, Activation::Silu, y);
  });
  std::printf("an empty region %.2f us; Q4_1 576 x 576 %.2f us; gate and up, 1536 x 576 each, %.2f us\n", region * 1e3,
              product * 1e4, both * 1e4);
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  set_threads(argc > 1 ? std::atoi(argv[1]) : 0);
  const int64_t megabytes = argc > 2 ? std::atoi(argv[2]) : 256;
  const Kernels& run = *cpu_kernels().front();
  Buffer memory(Dtype::U8, {megabytes << 20});
  std::memset(memory->data, 1, size_t(memory->bytes()));
  std::printf("%s, %d threads, reading %ld MB: %.1f GB/s\n", run.name.c_str(), threads(), long(megabytes), read_rate(memory));
  small(run);
  const std::string only = argc > 3 ? argv[3] : "";
  attention(run, megabytes, only, argc > 4 ? std::atoi(argv[4]) : 128);
  products(run, memory, only);
}
