#include "lab/kernel_bench.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "attention/store.h"
#include "base/random.h"
#include "lab/progress.h"

namespace heed {
namespace {

/// Where a case's data lies: buffers are made on the host and placed.
class Place {
 public:
  explicit Place(const Kernels& kernels) : queue_(std::make_shared<Queue>(&kernels, *kernels.memory)) {}

  Buffer empty(Dtype type, std::initializer_list<int64_t> sizes) const {
    Buffer out(type, sizes, *queue_->memory);
    queue_->fill(out, 0);
    return out;
  }
  Buffer operator()(Buffer host) const {
    if (queue_->memory->device == Device::Cpu) return host;
    Buffer out(host->type, std::span(host->size.data(), size_t(host->rank)), *queue_->memory);
    queue_->upload(host, out);
    return out;
  }
  Buffer normals(Dtype type, std::initializer_list<int64_t> sizes, uint64_t seed) const {
    Buffer values(Dtype::F32, sizes), out(type, sizes);
    Random random(seed);
    for (float& x : values->span<float>()) x = float(random.uniform() * 2 - 1);
    copy(values, out);
    return (*this)(std::move(out));
  }
  /// Other queues may use what was placed from here on.
  void settle() const { queue_->memory->finish(queue_->stream); }
  const std::shared_ptr<Queue>& queue() const { return queue_; }

 private:
  std::shared_ptr<Queue> queue_;
};

/// Weights whose every byte is the same: as f16 a small number, so that no block has a scale that slows arithmetic.
Buffer weights(Dtype type, int64_t rows, int64_t columns) {
  Buffer out(type, {rows, columns});
  std::memset(out->data, 0x2a, size_t(out->bytes()));
  return out;
}

/// Segments of equal length, with their memory.
struct Heads {
  Buffer values, offsets;
  int64_t heads;
  Heads(const Place& place, Dtype type, int64_t heads, int64_t rows, int64_t width, uint64_t seed)
      : values(place.normals(type, {heads * rows, width}, seed)), heads(heads) {
    Buffer steps(Dtype::I64, {heads + 1});
    for (int64_t s = 0; s <= heads; ++s) steps->at<int64_t>(s) = s * rows;
    offsets = place(std::move(steps));
  }
  Ragged view() const {
    return {.values = values, .offsets = offsets, .ends = {}, .heads = heads, .bound = values->size[0]};
  }
  /// One number a row.
  Ragged numbers() const {
    Ragged out = view();
    out.values = values->reshape({values->numel()});
    return out;
  }
};

/// Everything that a case's closure keeps alive.
template <class... T>
auto keep(T&&... parts) {
  return std::make_shared<std::tuple<std::decay_t<T>...>>(std::forward<T>(parts)...);
}

std::string shape(std::initializer_list<std::pair<const char*, int64_t>> sizes, const char* more = "") {
  std::string out;
  for (const auto& [name, value] : sizes)
    out += (out.empty() ? "" : " ") + std::string(name) + "=" + std::to_string(value);
  return out + (*more ? std::string(" ") + more : "");
}

class Cases {
 public:
  Cases(const Kernels& kernels, const std::string& prefix) : place_(kernels), prefix_(prefix) {}

  std::vector<KernelCase> take() {
    attention();
    decode();
    products();
    rows();
    planning();
    recurrence();
    place_.settle();
    return std::move(out_);
  }

 private:
  bool wanted(const char* name) const { return std::string(name).rfind(prefix_, 0) == 0; }
  template <class F>
  void add(const char* name, std::string shape, bool compute, bool bf16, double work, F run) {
    out_.push_back({name, std::move(shape), compute, bf16, work, std::move(run)});
  }

  void attention() {
    if (!wanted("attend")) return;
    for (const auto& [type, d] : {std::pair{Dtype::BF16, 64}, {Dtype::BF16, 128}, {Dtype::F32, 64}}) {
      const int64_t h = 8, g = 2, n = 1024;
      auto data = keep(Heads(place_, type, h, n, d, 1), Heads(place_, type, g, n, d, 2), Heads(place_, type, g, n, d, 3),
                       place_.empty(Dtype::F32, {h * n, d}), place_.empty(Dtype::F32, {h * n}));
      add("attend", shape({{"h", h}, {"g", g}, {"n", n}, {"d", d}}, (std::string("causal ") + info(type).name).c_str()),
          true, type == Dtype::BF16, 4.0 * double(h) * double(d) * double(n) * double(n + 1) / 2, [data](Queue& queue) {
            const auto& [q, k, v, out, lse] = *data;
            queue.run->attend(queue, q.view(), k.view(), v.view(), Plan(), Mods(), out, lse);
          });
    }
  }

  void decode() {
    if (!wanted("attend_store")) return;
    using Kind = PageType::Kind;
    for (const auto& [kind, name] : {std::pair{Kind::BF16, "bf16"}, {Kind::Q8, "q8"}, {Kind::Q4, "q4"}}) {
      const int64_t h = 16, g = 4, m = 8192, d = 128;
      StoreOptions options;
      options.k.kind = options.v.kind = kind;
      const StoreShape one{int(g), int(d), int(d)};
      const auto& queue = place_.queue();
      auto store = std::make_shared<Store>(*queue, std::span(&one, 1), options);
      const Heads k(place_, Dtype::BF16, g, m, d, 1), v(place_, Dtype::BF16, g, m, d, 2);
      Buffer positions(Dtype::I32, {g * m});
      for (int64_t i = 0; i < g * m; ++i) positions->at<int32_t>(i) = int32_t(i % m);
      store->layer(0).append(*queue, k.view(), v.view(), place_(std::move(positions)), std::vector<int64_t>{m});
      auto data = keep(Heads(place_, Dtype::F32, h, 1, d, 3), place_.empty(Dtype::F32, {h, d}),
                       place_.empty(Dtype::F32, {h}));
      add("attend_store", shape({{"h", h}, {"g", g}, {"m", m}, {"d", d}}, name), false, false, double(store->bytes()),
          [data, queue, store](Queue& at) {
            const auto& [q, out, lse] = *data;
            at.run->attend_store(at, q.view(), store->layer(0).pages(), Read(), Mods(), out, lse);
          });
    }
  }

  void products() {
    if (!wanted("matmul")) return;
    const int64_t in = 2048, width = 2048;
    for (const Dtype type : {Dtype::F32, Dtype::BF16, Dtype::Q8_0, Dtype::Q4_K, Dtype::Q6_K})
      for (const int64_t count : {int64_t(256), int64_t(1)}) {
        auto data = keep(place_(weights(type, width, in)), place_.normals(Dtype::F32, {count, in}, 1),
                         place_.empty(Dtype::F32, {count, width}));
        const double work = count > 1 ? 2.0 * double(count) * double(in) * double(width)
                                      : double(std::get<0>(*data)->bytes());
        add("matmul", shape({{"T", count}, {"in", in}, {"out", width}}, info(type).name), count > 1, type != Dtype::F32,
            work, [data](Queue& queue) {
              const auto& [w, x, y] = *data;
              queue.run->matmul(queue, w, x, {}, false, y);
            });
      }
  }

  void rows() {
    const int64_t count = 512, width = 2048;
    const double bytes = double(count * width) * 4;
    if (wanted("rms_norm")) {
      auto data = keep(place_.normals(Dtype::F32, {count, width}, 1), place_.normals(Dtype::F32, {width}, 2),
                       place_.empty(Dtype::F32, {count, width}));
      add("rms_norm", shape({{"T", count}, {"width", width}}), false, false, 2 * bytes, [data](Queue& queue) {
        const auto& [x, w, y] = *data;
        queue.run->rms_norm(queue, x, w, 1e-5f, y);
      });
    }
    if (wanted("glu")) {
      auto data = keep(place_.normals(Dtype::F32, {count, width}, 1), place_.normals(Dtype::F32, {count, width}, 2),
                       place_.empty(Dtype::F32, {count, width}));
      add("glu", shape({{"T", count}, {"width", width}}, "silu"), false, false, 3 * bytes, [data](Queue& queue) {
        const auto& [gate, up, y] = *data;
        queue.run->glu(queue, gate, up, Activation::Silu, y);
      });
    }
    if (wanted("merge")) {
      const int64_t parts = 8;
      auto data = keep(place_.normals(Dtype::F32, {parts, 256, 128}, 1), place_.normals(Dtype::F32, {parts, 256}, 2),
                       place_.empty(Dtype::F32, {256, 128}), place_.empty(Dtype::F32, {256}));
      add("merge", shape({{"parts", parts}, {"rows", 256}, {"d", 128}}), false, false,
          double(parts + 1) * 256 * 128 * 4, [data](Queue& queue) {
            const auto& [outs, lse, out, total] = *data;
            queue.run->merge(queue, outs, lse, out, total);
          });
    }
  }

  void planning() {
    const int64_t h = 8, g = 2, m = 8192, d = 64;
    if (wanted("observe")) {
      const int64_t n = 32;
      auto data = keep(Heads(place_, Dtype::F32, h, n, d, 1), Heads(place_, Dtype::BF16, g, m, d, 2),
                       Heads(place_, Dtype::F32, g, m, 1, 3));
      add("observe", shape({{"h", h}, {"n", n}, {"m", m}, {"d", d}}, "mean"), true, false, 2.0 * double(h * n * m * d),
          [data](Queue& queue) {
            const auto& [q, k, columns] = *data;
            const Ragged keys = k.view();
            queue.run->observe(queue, q.view(), {.panel = &keys, .pages = nullptr, .read = nullptr}, nullptr, Mods(),
                               Observe(), columns.numbers());
          });
    }
    if (wanted("pool")) {
      auto data = keep(Heads(place_, Dtype::BF16, g, m, d, 1), Heads(place_, Dtype::F32, g, m / 64, d, 2));
      add("pool", shape({{"g", g}, {"m", m}, {"d", d}, {"block", 64}}, "mean bf16"), false, false,
          double(g * m * d) * 2, [data](Queue& queue) {
            const auto& [x, out] = *data;
            queue.run->pool(queue, x.view(), PoolKind::Mean, 64, out.view());
          });
    }
    if (wanted("proxy")) {
      const int64_t blocks = 128;
      Buffer sizes(Dtype::I64, {h});
      for (int64_t& size : sizes->span<int64_t>()) size = blocks;
      auto data = keep(Heads(place_, Dtype::F32, h, blocks, d, 1), Heads(place_, Dtype::F32, g, blocks, d, 2),
                       Heads(place_, Dtype::F32, h, blocks * blocks, 1, 3), place_(std::move(sizes)));
      add("proxy", shape({{"h", h}, {"rows", blocks}, {"cols", blocks}, {"d", d}}), true, false,
          double(h) * double(blocks) * double(blocks + 1) * double(d), [data](Queue& queue) {
            const auto& [q, k, cells, sizes] = *data;
            queue.run->proxy(queue, q.view(), k.view(), Proxy{.softmax = true, .q_tile = 64, .k_tile = 64},
                             {.cells = cells.numbers(), .rows = sizes, .cols = sizes});
          });
    }
    if (wanted("select")) {
      const int64_t k = 1024;
      auto data = keep(Heads(place_, Dtype::F32, h, m, 1, 1), place_.empty(Dtype::I32, {h * k}),
                       place_.empty(Dtype::I32, {h}));
      add("select", shape({{"h", h}, {"m", m}, {"k", k}}, "top-k"), false, false, double(h * m) * 4, [data](Queue& queue) {
        const auto& [scores, index, count] = *data;
        Select top;
        top.k = k;
        queue.run->select(queue, scores.numbers(), top, k, index, count);
      });
    }
  }

  void recurrence() {
    const int64_t h = 8, n = 2048, d = 64;
    if (wanted("recur")) {
      auto data = keep(Heads(place_, Dtype::F32, h, n, d, 1), Heads(place_, Dtype::F32, h, n, d, 2),
                       Heads(place_, Dtype::F32, h, n, d, 3), place_.empty(Dtype::F32, {h * n}),
                       place_.empty(Dtype::F32, {h * n, d}), place_.empty(Dtype::F32, {h, d, d}));
      add("recur", shape({{"h", h}, {"n", n}, {"d", d}}, "scalar decay"), true, false, 4.0 * double(h * n * d * d),
          [data](Queue& queue) {
            const auto& [q, k, v, decay, out, state] = *data;
            RecurInputs in;
            in.q = q.view(), in.k = k.view(), in.v = v.view(), in.g = decay;
            queue.run->recur(queue, in, Recur{.decay = Recur::Decay::Scalar}, out, state, {});
          });
    }
    if (wanted("scan")) {
      auto data = keep(Heads(place_, Dtype::F32, h, n, d, 1), place_.normals(Dtype::F32, {h * n, d}, 2),
                       place_.empty(Dtype::F32, {h * n, d}));
      add("scan", shape({{"h", h}, {"n", n}, {"width", d}}, "linear"), false, false, double(h * n * d) * 12,
          [data](Queue& queue) {
            const auto& [x, a, out] = *data;
            queue.run->scan(queue, x.view(), a, ScanKind::Linear, out);
          });
    }
  }

  Place place_;
  std::string prefix_;
  std::vector<KernelCase> out_;
};

}  // namespace

std::vector<KernelCase> kernel_cases(const Kernels& kernels, const std::string& prefix) {
  return Cases(kernels, prefix).take();
}

double time_kernel(const KernelCase& c, const Kernels& kernels, bool record) {
  Queue queue(&kernels, *kernels.memory);
  const auto step = [&] {
    Scratch scope(queue.scratch);
    c.run(queue);
  };
  step();
  queue.memory->finish(queue.stream);
  // A device is given many runs at once, recorded where it can, so that the host's part is not what is timed.
  const bool device = queue.memory->device != Device::Cpu;
  const int64_t together = device ? 20 : 1;
  const Recording recording = device && record ? queue.record([&] {
    for (int64_t i = 0; i < together; ++i) step();
  })
                                               : Recording();
  const auto several = [&] {
    if (recording) return queue.replay(recording);
    for (int64_t i = 0; i < together; ++i) step();
  };
  several();
  double best = 1e300;
  for (int stretch = 0; stretch < 3; ++stretch) {
    int64_t runs = 0;
    queue.memory->finish(queue.stream);
    const double begin = now();
    do {
      several(), runs += together;
      queue.memory->finish(queue.stream);
    } while (now() - begin < 0.05);
    best = std::min(best, (now() - begin) / double(runs));
  }
  return best;
}

DeviceLimits device_limits(const Kernels& kernels) {
  const Place place(kernels);
  const int64_t bytes = int64_t(1) << 30, n = 8192;
  const auto memory = keep(place.empty(Dtype::U8, {bytes}), place.empty(Dtype::U8, {bytes}));
  const auto move = [&](Queue& queue) { queue.move(std::get<0>(*memory), std::get<1>(*memory)); };
  const auto matrices = keep(place.normals(Dtype::BF16, {n, n}, 1), place.normals(Dtype::F32, {n, n}, 2),
                             place.empty(Dtype::F32, {n, n}));
  const auto product = [&](Queue& queue) {
    const auto& [w, x, y] = *matrices;
    queue.run->matmul(queue, w, x, {}, false, y);
  };
  place.settle();
  const double work = 2.0 * double(n) * double(n) * double(n);
  return {2e-9 * double(bytes) / time_kernel({"copy", "", false, false, double(bytes), move}, kernels, false),
          1e-9 * work / time_kernel({"matmul", "", true, true, work, product}, kernels)};
}

}  // namespace heed
