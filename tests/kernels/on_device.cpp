#include "kernels/on_device.h"

#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <memory>

namespace heed::test {
namespace {

constexpr int64_t kGuard = 4096;

const Kernels& gpu() { return *cuda_kernels(); }

/// The device's side of one call.
class Visit {
 public:
  Visit() : memory_(*gpu().memory), queue(&gpu(), *gpu().memory) {}
  ~Visit() {
    for (auto& [host, copy] : copies_) memory_.release(copy.device);
  }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;

  /// Bytes of host memory, once however often they are named; what lies at their address may be a part of others.
  char* carry(void* host, int64_t bytes) {
    char* at = static_cast<char*>(host);
    for (auto& [first, copy] : copies_)
      if (at >= first && at + bytes <= first + copy.bytes) return copy.device + kGuard + lead(first) + (at - first);
    Copy copy{static_cast<char*>(memory_.allocate(bytes + 2 * kGuard + 256)), bytes};
    memory_.fill(queue.stream, copy.device, 0xff, bytes + 2 * kGuard + 256);
    memory_.upload(queue.stream, host, copy.device + kGuard + lead(at), bytes);
    copies_.emplace(at, copy);
    return copy.device + kGuard + lead(at);
  }

  /// A tensor's twin on the device, at the same offset from a 256-byte line.
  Tensor operator()(Tensor t) {
    if (!t) return t;
    t.data = carry(t.data, extent(t));
    t.device = Device::Cuda;
    return t;
  }
  Ragged operator()(Ragged r) {
    r.values = (*this)(r.values);
    r.offsets = (*this)(r.offsets);
    r.ends = (*this)(r.ends);
    return r;
  }
  Grids operator()(Grids g) { return {(*this)(g.cells), (*this)(g.rows), (*this)(g.cols)}; }
  Plan operator()(Plan p) {
    for (Tensor* t : {&p.rowptr, &p.count, &p.index, &p.mask, &p.bits, &p.part}) *t = (*this)(*t);
    return p;
  }
  Mods operator()(Mods m) {
    for (Tensor* t : {&m.q_pos, &m.k_pos, &m.key_bias, &m.row_factor, &m.key_factor, &m.temperature, &m.gain,
                      &m.sink_logits, &m.until, &m.k_map, &m.v_map})
      *t = (*this)(*t);
    return m;
  }
  Norm operator()(const Norm* norm) { return norm ? Norm{(*this)(norm->weight), norm->eps} : Norm(); }
  const Rope* operator()(const Rope* rope) {
    if (!rope) return nullptr;
    ropes_.push_back(std::make_unique<Rope>(*rope));
    ropes_.back()->inv_freq = (*this)(rope->inv_freq);
    return ropes_.back().get();
  }
  Read operator()(Read r) {
    r.plan = (*this)(r.plan);
    r.rope = (*this)(r.rope);
    r.places = (*this)(r.places);
    return r;
  }
  /// Pages, and their table with the addresses of the copies.
  Pages operator()(const Pages& p) {
    Pages out = p;
    out.layout = (*this)(p.layout);
    out.length = (*this)(p.length);
    Buffer table(Dtype::U64, {p.table.size[0], p.table.size[1]});
    for (int64_t s = 0; s < p.table.size[0]; ++s)
      for (int64_t i = 0; i < p.table.size[1]; ++i) {
        const uint64_t host = p.table.at<uint64_t>(s, i);
        table->at<uint64_t>(
            s, i) = host ? reinterpret_cast<uint64_t>(carry(reinterpret_cast<char*>(host), p.layout_of(s, i).bytes)) : 0;
      }
    tables_.push_back(std::move(table));
    out.table = (*this)(tables_.back().view());
    return out;
  }
  RecurInputs operator()(RecurInputs in) {
    for (Ragged* r : {&in.q, &in.k, &in.v}) *r = (*this)(*r);
    for (Tensor* t : {&in.g, &in.beta, &in.a, &in.b, &in.state, &in.z}) *t = (*this)(*t);
    return in;
  }

  /// Copies everything back. Call it once the kernel has been started.
  void leave() {
    for (auto& [host, copy] : copies_) {
      std::vector<uint8_t> all(size_t(copy.bytes + 2 * kGuard + 256));
      memory_.download(queue.stream, copy.device, all.data(), int64_t(all.size()));
      const int64_t first = kGuard + lead(host);
      int64_t strays = 0;
      for (int64_t i = 0; i < int64_t(all.size()); ++i)
        if (i < first || i >= first + copy.bytes) strays += all[size_t(i)] != 0xff;
      EXPECT_EQ(strays, 0) << "bytes outside a tensor of " << copy.bytes << " bytes were written on the device";
      if (std::memcmp(host, all.data() + first, size_t(copy.bytes)) != 0)
        std::memcpy(host, all.data() + first, size_t(copy.bytes));
    }
    EXPECT_EQ(queue.host_waits, 0) << "a kernel waited";
  }

 private:
  struct Copy {
    char* device;
    int64_t bytes;
  };
  static int64_t lead(const char* host) { return int64_t(reinterpret_cast<uint64_t>(host) % 256); }
  static int64_t extent(const Tensor& t) {
    const DtypeInfo kind = info(t.type);
    int64_t elements = kind.block;
    for (int axis = 0; axis < t.rank; ++axis) {
      if (t.size[size_t(axis)] == 0) return 0;
      elements += (t.size[size_t(axis)] - 1) * t.stride[size_t(axis)];
    }
    return elements / kind.block * kind.bytes;
  }
  const Memory& memory_;
  std::map<char*, Copy> copies_;
  std::vector<std::unique_ptr<Rope>> ropes_;
  std::vector<Buffer> tables_;

 public:
  Queue queue;  // last: its scratch is given back first
};

Kernels coat() {
  Kernels t{};
  t.name = "cuda";
  t.v_transposed = gpu().v_transposed;
  t.attend = [](Queue&, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods,
                Tensor out, Tensor lse) {
    Visit on;
    gpu().attend(on.queue, on(q), on(k), on(v), on(plan), on(mods), on(out), on(lse));
    on.leave();
  };
  t.attend_backward = [](Queue&, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods,
                         Tensor out, Tensor lse, Tensor d_out, Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_key_bias,
                         Tensor d_gain) {
    Visit on;
    gpu().attend_backward(on.queue, on(q), on(k), on(v), on(plan), on(mods), on(out), on(lse), on(d_out), on(d_q),
                          on(d_k), on(d_v), on(d_key_bias), on(d_gain));
    on.leave();
  };
  t.attend_store = [](Queue&, const Ragged& q, const Pages& pages, const Read& read, const Mods& mods, Tensor out,
                      Tensor lse) {
    Visit on;
    gpu().attend_store(on.queue, on(q), on(pages), on(read), on(mods), on(out), on(lse));
    on.leave();
  };
  t.merge = [](Queue&, Tensor outs, Tensor weights, Tensor out, Tensor lse) {
    Visit on;
    gpu().merge(on.queue, on(outs), on(weights), on(out), on(lse));
    on.leave();
  };
  struct KeysOn {
    Ragged panel;
    Pages pages;
    Read read;
    Plan plan;
    Keys keys;
    KeysOn(Visit& on, const Keys& from, const Plan* given) {
      if (from.panel) panel = on(*from.panel);
      if (from.pages) pages = on(*from.pages);
      if (from.read) read = on(*from.read);
      if (given) plan = on(*given);
      keys = {from.panel ? &panel : nullptr, from.pages ? &pages : nullptr, from.read ? &read : nullptr};
    }
  };
  t.observe = [](Queue&, const Ragged& q, const Keys& keys, const Plan* plan, const Mods& mods, const Observe& how,
                 Ragged columns) {
    Visit on;
    const KeysOn from(on, keys, plan);
    Observe there = how;
    there.lse = on(how.lse);
    gpu().observe(on.queue, on(q), from.keys, plan ? &from.plan : nullptr, on(mods), there, on(columns));
    on.leave();
  };
  t.observe_rows = [](Queue&, const Ragged& q, const Keys& keys, const Plan* plan, const Mods& mods, const RowStats& stats) {
    Visit on;
    const KeysOn from(on, keys, plan);
    const RowStats to{on(stats.entropy), on(stats.distance), on(stats.argmax), on(stats.peak),
                      on(stats.lse),     on(stats.span),     on(stats.spans)};
    gpu().observe_rows(on.queue, on(q), from.keys, plan ? &from.plan : nullptr, on(mods), to);
    on.leave();
  };
  t.pool = [](Queue&, const Ragged& x, PoolKind kind, int block, Ragged out) {
    Visit on;
    gpu().pool(on.queue, on(x), kind, block, on(out));
    on.leave();
  };
  t.smooth = [](Queue&, const Ragged& x, PoolKind kind, int width, Tensor out) {
    Visit on;
    gpu().smooth(on.queue, on(x), kind, width, on(out));
    on.leave();
  };
  t.proxy = [](Queue&, const Ragged& q, const Ragged& k, const Proxy& how, Grids out) {
    Visit on;
    gpu().proxy(on.queue, on(q), on(k), how, on(out));
    on.leave();
  };
  t.reduce = [](Queue&, const Grids& in, const Reduce& how, Grids out) {
    Visit on;
    gpu().reduce(on.queue, on(in), how, on(out));
    on.leave();
  };
  t.select = [](Queue&, const Ragged& scores, const Select& how, int64_t capacity, Tensor index, Tensor count) {
    Visit on;
    Select there = how;
    there.count = on(how.count);
    there.held = on(how.held);
    gpu().select(on.queue, on(scores), there, capacity, on(index), on(count));
    on.leave();
  };
  t.recur = [](Queue&, const RecurInputs& in, const Recur& how, Tensor out, Tensor state, Tensor z) {
    Visit on;
    gpu().recur(on.queue, on(in), how, on(out), on(state), on(z));
    on.leave();
  };
  t.recur_backward = [](Queue&, const RecurInputs& in, const Recur& how, Tensor d_out, Tensor d_state, const RecurGrads& g) {
    Visit on;
    const RecurGrads to{on(g.q), on(g.k), on(g.v), on(g.g), on(g.beta), on(g.a), on(g.b), on(g.state)};
    gpu().recur_backward(on.queue, on(in), how, on(d_out), on(d_state), to);
    on.leave();
  };
  t.scan = [](Queue&, const Ragged& x, Tensor a, ScanKind kind, Tensor out) {
    Visit on;
    gpu().scan(on.queue, on(x), on(a), kind, on(out));
    on.leave();
  };
  t.page_write = [](Queue&, const Pages& pages, const Ragged& k, const Ragged& v, Tensor positions, Tensor first) {
    Visit on;
    gpu().page_write(on.queue, on(pages), on(k), on(v), on(positions), on(first));
    on.leave();
  };
  t.page_read = [](Queue&, const Pages& pages, const Read* read, const Ragged& k, const Ragged& v, Tensor positions) {
    Visit on;
    const Read there = read ? on(*read) : Read();
    gpu().page_read(on.queue, on(pages), read ? &there : nullptr, on(k), on(v), on(positions));
    on.leave();
  };
  t.page_move = [](Queue&, const Pages& from, const Pages& to, Tensor index, Tensor count, int64_t capacity) {
    Visit on;
    gpu().page_move(on.queue, on(from), on(to), on(index), on(count), capacity);
    on.leave();
  };
  t.column_read = [](Queue&, const Pages& pages, int column, Ragged values) {
    Visit on;
    gpu().column_read(on.queue, on(pages), column, on(values));
    on.leave();
  };
  t.column_write = [](Queue&, const Pages& pages, int column, const Ragged& values) {
    Visit on;
    gpu().column_write(on.queue, on(pages), column, on(values));
    on.leave();
  };
  t.page_score = [](Queue&, const Ragged& q, const Pages& pages, int low, int high, Ragged scores) {
    Visit on;
    gpu().page_score(on.queue, on(q), on(pages), low, high, on(scores));
    on.leave();
  };
  t.page_choose = [](Queue&, const Ragged& q, const Pages& pages, const PageChoice& how, int64_t capacity, Tensor index,
                     Tensor count, Tensor rowptr) {
    Visit on;
    gpu().page_choose(on.queue, on(q), on(pages), how, capacity, on(index), on(count), on(rowptr));
    on.leave();
  };
  t.matmul = [](Queue&, Tensor w, Tensor x, Tensor bias, bool accumulate, Tensor y) {
    Visit on;
    gpu().matmul(on.queue, on(w), on(x), on(bias), accumulate, on(y));
    on.leave();
  };
  t.matmul_each = [](Queue&, std::span<const Linear> each, Tensor x, const Norm* norm) {
    Visit on;
    std::vector<Linear> there;
    for (const Linear& linear : each) there.push_back({on(linear.w), on(linear.bias), on(linear.y), linear.add});
    const Norm by = on(norm);
    gpu().matmul_each(on.queue, there, on(x), norm ? &by : nullptr);
    on.leave();
  };
  t.matmul_glu = [](Queue&, Tensor gate, Tensor up, Tensor x, const Norm* norm, Activation activation, Tensor y) {
    Visit on;
    const Norm by = on(norm);
    gpu().matmul_glu(on.queue, on(gate), on(up), on(x), norm ? &by : nullptr, activation, on(y));
    on.leave();
  };
  t.combine = [](Queue&, Tensor x, Tensor y, Combine how, float factor, Tensor out) {
    Visit on;
    gpu().combine(on.queue, on(x), on(y), how, factor, on(out));
    on.leave();
  };
  t.spread = [](Queue&, const Ragged& x, const Spread& how, Tensor out) {
    Visit on;
    gpu().spread(on.queue, on(x), how, on(out));
    on.leave();
  };
  t.embed = [](Queue&, Tensor w, Tensor ids, float scale, Tensor y) {
    Visit on;
    gpu().embed(on.queue, on(w), on(ids), scale, on(y));
    on.leave();
  };
  t.rms_norm = [](Queue&, Tensor x, Tensor weight, float eps, Tensor y) {
    Visit on;
    gpu().rms_norm(on.queue, on(x), on(weight), eps, on(y));
    on.leave();
  };
  t.split_heads = [](Queue&, Tensor first, float eps, std::span<const Heads> each) {
    Visit on;
    std::vector<Heads> there;
    for (const Heads& h : each) there.push_back({on(h.x), on(h.norm), on(h.rope), on(h.positions), on(h.out)});
    gpu().split_heads(on.queue, on(first), eps, there);
    on.leave();
  };
  t.merge_heads = [](Queue&, const Ragged& in, Tensor first, Tensor y) {
    Visit on;
    gpu().merge_heads(on.queue, on(in), on(first), on(y));
    on.leave();
  };
  t.glu = [](Queue&, Tensor gate, Tensor up, Activation activation, Tensor y) {
    Visit on;
    gpu().glu(on.queue, on(gate), on(up), activation, on(y));
    on.leave();
  };
  t.add = [](Queue&, Tensor x, Tensor y) {
    Visit on;
    gpu().add(on.queue, on(x), on(y));
    on.leave();
  };
  t.dequantise = [](Queue&, Tensor w, Tensor y) {
    Visit on;
    gpu().dequantise(on.queue, on(w), on(y));
    on.leave();
  };
  t.compute = [](Queue&, const Numbers& what, const Ragged* over, Tensor out) {
    Visit on;
    Numbers there = what;
    for (int i = 0; i < what.count; ++i) {
      Numbers::Step& step = there.steps[size_t(i)];
      if (step.data) step.data = on.carry(const_cast<void*>(step.data), step.size * info(step.type).bytes);
    }
    const Ragged rows = over ? on(*over) : Ragged();
    gpu().compute(on.queue, there, over ? &rows : nullptr, on(out));
    on.leave();
  };
  t.offsets = [](Queue&, Tensor lengths, Tensor out) {
    Visit on;
    gpu().offsets(on.queue, on(lengths), on(out));
    on.leave();
  };
  t.tile_blocks = [](Queue&, Tensor index, Tensor count, int64_t capacity, Tensor first, int split, Plan out) {
    Visit on;
    gpu().tile_blocks(on.queue, on(index), on(count), capacity, on(first), split, on(out));
    on.leave();
  };
  t.unite = [](Queue&, const Ragged& q, const Ragged& k, const KeySets& sets, const Plan& out) {
    Visit on;
    KeySets there = sets;
    there.sinks = on(sets.sinks), there.local = on(sets.local);
    for (KeyLists* lists : {&there.keys, &there.distances, &there.blocks})
      lists->index = on(lists->index), lists->count = on(lists->count);
    gpu().unite(on.queue, on(q), on(k), there, on(out));
    on.leave();
  };
  if (gpu().observe_runs)
    t.observe_runs = [](Queue&, const Ragged& q, const Keys& keys, const Mods& mods, bool logits, Ragged runs) {
      Visit on;
      const KeysOn from(on, keys, nullptr);
      const bool done = gpu().observe_runs(on.queue, on(q), from.keys, on(mods), logits, on(runs));
      on.leave();
      return done;
    };
  if (gpu().proxy_reduce)
    t.proxy_reduce = [](Queue&, const Ragged& q, const Ragged& k, const Proxy& how, const Reduce& by, Grids out) {
      Visit on;
      const bool done = gpu().proxy_reduce(on.queue, on(q), on(k), how, by, on(out));
      on.leave();
      return done;
    };
  t.count_pairs = [](Queue&, const Plan& plan, const Ragged& q, const Keys& keys, const Mods& mods, Tensor pairs) {
    Visit on;
    const KeysOn from(on, keys, &plan);
    gpu().count_pairs(on.queue, from.plan, on(q), from.keys, on(mods), on(pairs));
    on.leave();
  };
  return t;
}

}  // namespace

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> out = cpu_kernels();
  if (cuda_kernels()) {
    static const Kernels table = coat();
    out.push_back(&table);
  }
  return out;
}

}  // namespace heed::test
