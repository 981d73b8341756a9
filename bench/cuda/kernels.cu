// How fast the CUDA kernels run, beside what the device copies and multiplies. Not built with heed; from the repository:
//   nvcc -std=c++20 -O3 --expt-relaxed-constexpr -arch=native -Isrc bench/cuda/kernels.cu build/libheed_core.a -lzip -lpthread -ldl -o /tmp/bench
// Times are medians of 15 calls by events, after 3 to warm up; weights rotate through more memory than the L2 cache holds.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "base/random.h"
#include "kernels/kernels.h"

using namespace heed;

namespace {

Queue& queue() {
  static Queue made(cuda_kernels(), *cuda_kernels()->memory);
  return made;
}
const Kernels& run() { return *cuda_kernels(); }

std::vector<Buffer> kept;

/// Random numbers on the device: bf16 or f32 normals of a repeated megabyte, or bytes.
Tensor filled(Dtype type, std::initializer_list<int64_t> sizes, double by = 1) {
  kept.emplace_back(type, sizes, *run().memory);
  const Tensor t = kept.back();
  Random random(7);
  const int64_t bytes = t.bytes(), piece = std::min<int64_t>(bytes, 1 << 20);
  std::vector<char> host(size_t(piece + 8));
  if (type == Dtype::BF16)
    for (int64_t i = 0; i < piece / 2; ++i) reinterpret_cast<bf16*>(host.data())[i] = bf16(float(by * random.normal()));
  else if (type == Dtype::F32)
    for (int64_t i = 0; i < piece / 4; ++i) reinterpret_cast<float*>(host.data())[i] = float(by * random.normal());
  else if (is_block(type))  // small codes and scales, all finite
    for (int64_t i = 0; i < piece; ++i) host[size_t(i)] = char(random.below(32));
  for (int64_t at = 0; at < bytes; at += piece)
    run().memory->upload(queue().stream, host.data(), static_cast<char*>(t.data) + at, std::min(piece, bytes - at));
  return t;
}
template <class T>
Tensor numbers(const std::vector<T>& values) {
  kept.emplace_back(DtypeOf<T>::value, std::initializer_list<int64_t>{int64_t(values.size())}, *run().memory);
  queue().upload(Tensor(const_cast<T*>(values.data()), DtypeOf<T>::value, {int64_t(values.size())}), kept.back());
  return kept.back();
}
Ragged rows(const Tensor& values, int64_t segments, int64_t heads) {
  std::vector<int64_t> offsets;
  for (int64_t s = 0; s <= segments; ++s) offsets.push_back(s * values.size[0] / segments);
  return {values, numbers(offsets), {}, heads, values.size[0]};
}

double microseconds(const std::function<void(int)>& call) {
  cudaStream_t stream = static_cast<cudaStream_t>(queue().stream);
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = 0; i < 18; ++i) {
    cudaEventRecord(begin, stream);
    call(i);
    cudaEventRecord(end, stream);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return double(times[times.size() / 2]) * 1e3;
}
void line(const std::string& what, double us, double bytes, double operations) {
  std::printf("%-46s %10.1f us %9.0f GB/s %8.1f TFLOP/s\n", what.c_str(), us, bytes / us / 1e3, operations / us / 1e6);
  std::fflush(stdout);
}

void products() {
  struct Shape {
    int64_t out, in;
  } shape{14336, 4096};
  for (Dtype type : {Dtype::Q4_0, Dtype::Q4_K, Dtype::Q6_K, Dtype::Q8_0, Dtype::BF16})
    for (int64_t tokens : {1, 8, 16, 64, 2048}) {
      std::vector<Tensor> w;
      for (int i = 0; i < 4; ++i) w.push_back(filled(type, {shape.out, shape.in}, 0.02));
      const Tensor x = filled(Dtype::F32, {tokens, shape.in}), y = filled(Dtype::F32, {tokens, shape.out});
      const double us = microseconds([&](int i) { run().matmul(queue(), w[size_t(i % 4)], x, {}, false, y); });
      line(std::string("matmul ") + info(type).name + " 4096 -> 14336, " + std::to_string(tokens) + " tokens", us,
           double(w[0].bytes() + x.bytes() + y.bytes()), 2.0 * double(shape.out * shape.in * tokens));
      kept.clear();
    }
  const Tensor w = filled(Dtype::BF16, {8192, 8192}, 0.02), x = filled(Dtype::F32, {8192, 8192}),
               y = filled(Dtype::F32, {8192, 8192});
  line("matmul bf16 8192 x 8192 x 8192", microseconds([&](int) { run().matmul(queue(), w, x, {}, false, y); }), 0,
       2.0 * 8192.0 * 8192 * 8192);
  kept.clear();
}

/// Every row of 128 reads its own window of 1024, as one interval of a tile or token by token.
Plan windows(Plan::Form form, int64_t n, int64_t heads) {
  const int tile = form == Plan::Form::Interval ? 128 : 64;
  std::vector<int64_t> rowptr = {0};
  std::vector<int32_t> index;
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t i = 0; i < n; i += tile) {
      const int32_t begin = int32_t(std::max<int64_t>(0, i - 1024)), end = int32_t(i + tile);
      if (form == Plan::Form::Interval) index.insert(index.end(), {begin, end});
      else
        for (int32_t j = begin; j < end; ++j) index.push_back(j);
      rowptr.push_back(int64_t(index.size()) / (form == Plan::Form::Interval ? 2 : 1));
    }
  Plan plan;
  plan.form = form, plan.scope = Plan::Scope::KvHead, plan.q_tile = tile;
  plan.rowptr = numbers(rowptr), plan.index = numbers(index);
  if (form == Plan::Form::Interval) plan.index = plan.index.reshape({plan.index.size[0] / 2, 2});
  return plan;
}

void attention() {
  for (int64_t d : {64, 128, 256})
    for (int64_t n : {1024, 8192}) {
      const int64_t h = 32, g = 8;
      const Ragged q = rows(filled(Dtype::BF16, {h * n, d}), h, h), k = rows(filled(Dtype::BF16, {g * n, d}), g, g),
                   v = rows(filled(Dtype::BF16, {g * n, d}), g, g), columns = rows(filled(Dtype::F32, {g * n}), g, g);
      const Tensor out = filled(Dtype::F32, {h * n, d}), lse = filled(Dtype::F32, {h * n});
      const double forward = 4.0 * double(h * n * n * d) / 2;
      const std::string shape = ", 32/8 heads of " + std::to_string(d) + ", n " + std::to_string(n);
      auto attend = [&](const Plan& plan, const Mods& mods) {
        return microseconds([&](int) { run().attend(queue(), q, k, v, plan, mods, out, lse); });
      };
      Mods capped;
      capped.softcap = 50;
      line("attend with a soft cap" + shape, attend({}, capped), 0, forward);
      const double read = 4.0 * double(h * d) * (1024 + 64) * double(n);
      line("attend, intervals of 1024" + shape, attend(windows(Plan::Form::Interval, n, g), {}), 0, n > 1024 ? read : forward);
      line("attend, tokens, 1024 a tile" + shape, attend(windows(Plan::Form::Tokens, n, g), {}), 0, n > 1024 ? read : forward);
      line("attend" + shape, attend({}, {}), 0, forward);
      Observe how;
      auto observe = [&] {
        return microseconds([&](int) { run().observe(queue(), q, {&k, nullptr, nullptr}, nullptr, {}, how, columns); });
      };
      line("observe, all rows" + shape, observe(), 0, forward);
      how.lse = lse;
      line("observe, all rows, lse given" + shape, observe(), 0, forward / 2);
      const Tensor d_out = filled(Dtype::F32, {h * n, d}), d_q = filled(Dtype::F32, {h * n, d}),
                   d_k = filled(Dtype::F32, {g * n, d}), d_v = filled(Dtype::F32, {g * n, d});
      if (d <= 128 || n == 1024)
        line("attend_backward" + shape, microseconds([&](int) {
               run().attend_backward(queue(), q, k, v, {}, {}, out, lse, d_out, d_q, d_k, d_v, {}, {});
             }),
             0, 2.5 * forward);
      kept.clear();
    }
  const int64_t h = 32, g = 8, d = 128;
  const int64_t m = 16384;
  const Ragged q = rows(filled(Dtype::BF16, {h * 32, d}), h, h), k = rows(filled(Dtype::BF16, {g * m, d}), g, g),
               columns = rows(filled(Dtype::F32, {g * m}), g, g);
  line("observe, last 32 rows of 16384 keys",
       microseconds([&](int) { run().observe(queue(), q, {&k, nullptr, nullptr}, nullptr, {}, {}, columns); }),
       double(k.values.bytes()), 2.0 * 2 * double(h * 32 * m * d));
  const Tensor index = filled(Dtype::I32, {g * 1024}), count = filled(Dtype::I32, {g});
  Select how;
  how.k = 1024;
  line("select 1024 of 16384, 8 segments",
       microseconds([&](int) { run().select(queue(), columns, how, 1024, index, count); }),
       double(columns.values.bytes()), 0);
  kept.clear();
}

void pages() {
  for (auto [kind, name] :
       {std::pair{PageType::Kind::BF16, "bf16"}, {PageType::Kind::Q8, "q8"}, {PageType::Kind::Q4, "q4"}}) {
    const int64_t h = 32, g = 8, d = 128, sequences = 8, m = 16384, segments = g * sequences, each = m / kPage;
    PageType type;
    type.kind = kind;
    Pages p;
    p.layouts = {page_layout(int(d), int(d), type, type, false, false, {})};
    const Tensor block = filled(Dtype::U8, {segments * each * p.layouts[0].bytes});
    std::vector<uint64_t> table;
    for (int64_t i = 0; i < segments * each; ++i)
      table.push_back(reinterpret_cast<uint64_t>(block.data) + uint64_t(i * p.layouts[0].bytes));
    p.table = numbers(table).reshape({segments, each});
    p.layout = numbers(std::vector<uint8_t>(size_t(segments * each), 0)).reshape({segments, each});
    p.length = numbers(std::vector<int32_t>(size_t(segments), int32_t(m)));
    p.kv_heads = g;
    p.length_bound = m;
    {
      const Ragged k = rows(filled(Dtype::BF16, {segments * m, d}), segments, g);
      const Tensor positions = filled(Dtype::I32, {segments * m}),
                   first = numbers(std::vector<int32_t>(size_t(segments), 0));
      line(std::string("page_write ") + name + ", 64 segments of 16384",
           microseconds([&](int) { run().page_write(queue(), p, k, k, positions, first); }),
           double(2 * k.values.bytes()) + double(block.bytes()), 0);
    }
    const Ragged q = rows(filled(Dtype::BF16, {h * sequences, d}), h * sequences, h);
    const Tensor out = filled(Dtype::F32, {h * sequences, d}), lse = filled(Dtype::F32, {h * sequences});
    line(std::string("attend_store ") + name + ", 8 sequences of 16384",
         microseconds([&](int) { run().attend_store(queue(), q, p, {}, {}, out, lse); }), double(block.bytes()),
         4.0 * double(h * sequences * m * d));
    kept.clear();
  }
}

void recurrences() {
  const int64_t heads = 32, n = 4096, d = 128;
  RecurInputs in;
  in.q = rows(filled(Dtype::BF16, {heads * n, d}), heads, 1);
  in.k = rows(filled(Dtype::BF16, {heads * n, d}, 0.09), heads, 1);
  in.v = rows(filled(Dtype::BF16, {heads * n, d}), heads, 1);
  in.beta = filled(Dtype::F32, {heads * n}, 0.3);
  const Tensor out = filled(Dtype::F32, {heads * n, d}), state = filled(Dtype::F32, {heads, d, d});
  Recur how;
  line("recur, 32 heads of 128 x 128, 4096 rows",
       microseconds([&](int) { run().recur(queue(), in, how, out, state, {}); }), 0, 4.0 * double(heads * n * d * d));
  how.correction = Recur::Correction::Delta;
  line("recur with the delta rule, the same", microseconds([&](int) { run().recur(queue(), in, how, out, state, {}); }),
       0, 6.0 * double(heads * n * d * d));
  kept.clear();
}

}  // namespace

int main(int argc, char** argv) {
  std::printf("%s\n", cuda_state().c_str());
  if (!cuda_kernels()) return 1;
  const std::string only = argc > 1 ? argv[1] : "";  // one group: products, attention, pages, recurrences
  {
    const Tensor a = filled(Dtype::U8, {1 << 30}), b = filled(Dtype::U8, {1 << 30});
    line("copy of 1 GiB on the device",
         microseconds([&](int) { run().memory->move(queue().stream, a.data, b.data, a.bytes()); }),
         2.0 * double(a.bytes()), 0);
    kept.clear();
  }
  if (only.empty() || only == "products") products();
  if (only.empty() || only == "attention") attention();
  if (only.empty() || only == "pages") pages();
  if (only.empty() || only == "recurrences") recurrences();
}
