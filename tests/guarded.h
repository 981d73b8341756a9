// A backend whose memory the host cannot touch, without a device: it wraps a CPU table, and its memory is closed to the
// process (mprotect) whenever none of its kernels or memory functions runs. A host access to "device" memory stops the
// test at the line that made it; host memory handed to a kernel throws. It records, too: calls with copies of their
// arguments.
#pragma once
#include <sys/mman.h>

#include <bit>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/kernels.h"

namespace heed::test {

/// One reservation of address space that allocations are cut from, open while anything runs.
class GuardedSpace {
 public:
  static GuardedSpace& one() {
    static GuardedSpace space;
    return space;
  }
  void enter() {
    const std::lock_guard lock(mutex_);
    if (running_++ == 0) protect(0, used_, PROT_READ | PROT_WRITE);
  }
  void leave() {
    const std::lock_guard lock(mutex_);
    if (--running_ == 0) protect(0, used_, PROT_NONE);
  }
  void* take(int64_t bytes, bool filled = true) {
    const std::lock_guard lock(mutex_);
    // Few sizes, so that what is given back is taken again: opening and closing takes as long as the space is wide.
    const auto size = int64_t(std::bit_ceil(uint64_t(std::max(bytes, kUnit))));
    char* at;
    if (auto& idle = idle_[size]; !idle.empty()) {
      at = idle.back();
      idle.pop_back();
    } else {
      if (used_ + size > kSpace) throw Error(Code::Memory, "guarded", "no address space left");
      at = base_ + used_;
      used_ += size;
    }
    sizes_[at] = size;
    protect(at - base_, size, PROT_READ | PROT_WRITE);
    if (filled)
      std::memset(at, 0xff, size_t((bytes + kUnit - 1) / kUnit * kUnit));  // NaN, and numbers that no kernel takes for its own
    if (running_ == 0) protect(at - base_, size, PROT_NONE);
    return at;
  }
  void give(void* p) noexcept {
    const std::lock_guard lock(mutex_);
    const auto found = sizes_.find(static_cast<char*>(p));
    if (found == sizes_.end()) return;
    madvise(p, size_t(found->second), MADV_DONTNEED);
    idle_[found->second].push_back(found->first);
    sizes_.erase(found);
  }
  bool holds(const void* p) const { return p >= base_ && p < base_ + kSpace; }

 private:
  static constexpr int64_t kUnit = 4096, kSpace = int64_t(1) << 34;
  GuardedSpace() {
    void* p = mmap(nullptr, size_t(kSpace), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw Error(Code::Memory, "guarded", "no address space");
    base_ = static_cast<char*>(p);
  }
  void protect(int64_t at, int64_t bytes, int how) {
    if (bytes > 0) mprotect(base_ + at, size_t(bytes), how);
  }

  std::mutex mutex_;
  char* base_ = nullptr;
  int64_t used_ = 0;
  int running_ = 0;
  std::map<char*, int64_t> sizes_;
  std::map<int64_t, std::vector<char*>> idle_;
};

/// Opens the space; tells whether the caller is the outermost on its thread, whose arguments are to be checked.
struct GuardedRegion {
  GuardedRegion() : outermost(depth()++ == 0) { GuardedSpace::one().enter(); }
  ~GuardedRegion() {
    GuardedSpace::one().leave();
    --depth();
  }
  static int& depth() {
    thread_local int depth = 0;
    return depth;
  }
  bool outermost;
};

namespace guarded_detail {

inline void on_device(const void* p) {
  if (p && !GuardedSpace::one().holds(p)) throw Error(Code::Internal, "guarded", "a kernel was handed host memory");
}
template <class T> void check(const T&) {}  // numbers, options
inline void check(const Tensor& t) {
  if (t.numel() > 0) on_device(t.data);
}
inline void check(const Ragged& r) { check(r.values), check(r.offsets), check(r.ends); }
inline void check(const Ragged* const& r) {
  if (r) check(*r);
}
inline void check(const Plan& p) {
  for (const Tensor* t : {&p.rowptr, &p.count, &p.index, &p.mask, &p.bits, &p.part}) check(*t);
}
inline void check(const Plan* const& p) {
  if (p) check(*p);
}
inline void check(const Mods& m) {
  for (const Tensor* t : {&m.q_pos, &m.k_pos, &m.key_bias, &m.row_factor, &m.key_factor, &m.temperature, &m.gain,
                          &m.sink_logits, &m.until, &m.k_map, &m.v_map})
    check(*t);
}
inline void check(const Rope* const& r) {
  if (r) check(r->inv_freq);
}
inline void check(const Read& r) { check(r.plan), check(r.rope), check(r.places); }
inline void check(const Read* const& r) {
  if (r) check(*r);
}
inline void check(const PageSupply& s) { check(s.free), check(s.top), check(s.base); }
inline void check(const Pages& p) {
  check(p.table), check(p.layout), check(p.length);
  for (const PageSupply& s : p.supply) check(s);
}
inline void check(const Keys& k) {
  if (k.panel) check(*k.panel);
  if (k.pages) check(*k.pages);
  if (k.read) check(*k.read);
}
inline void check(const RowStats& s) {
  for (const Tensor* t : {&s.entropy, &s.distance, &s.argmax, &s.peak, &s.lse, &s.span, &s.spans}) check(*t);
}
inline void check(const Grids& g) { check(g.cells), check(g.rows), check(g.cols); }
inline void check(const Select& s) { check(s.count), check(s.held); }
inline void check(const Numbers& n) {
  for (int i = 0; i < n.count; ++i)
    if (n.steps[size_t(i)].size > 0) on_device(n.steps[size_t(i)].data);
}
inline void check(const RecurInputs& i) {
  check(i.q), check(i.k), check(i.v);
  for (const Tensor* t : {&i.g, &i.beta, &i.a, &i.b, &i.state, &i.z}) check(*t);
}
inline void check(const RecurGrads& g) {
  for (const Tensor* t : {&g.q, &g.k, &g.v, &g.g, &g.beta, &g.a, &g.b, &g.state}) check(*t);
}

inline void check(const std::span<const Heads>& each) {
  for (const Heads& h : each) check(h.x), check(h.norm), check(h.rope), check(h.positions), check(h.out);
}
inline void check(const std::span<const Linear>& each) {
  for (const Linear& l : each) check(l.w), check(l.bias), check(l.y);
}

inline const Kernels& inner() { return *cpu_kernels().front(); }

using Recorded = std::vector<std::function<void()>>;
/// The recording under way on this thread.
inline Recorded*& recording() {
  thread_local Recorded* now = nullptr;
  return now;
}

/// An argument that outlives its call, with what it points to; get() gives it back as it was.
template <class T> struct Kept {
  explicit Kept(const T& x) : value(x) {}
  const T& get() const { return value; }
  T value;
};
template <class T> struct Kept<const T*> {
  explicit Kept(const T* x) {
    if (x) value = *x;
  }
  const T* get() const { return value ? &*value : nullptr; }
  std::optional<T> value;
};
template <class T> struct Kept<std::span<const T>> {
  explicit Kept(std::span<const T> x) : value(x.begin(), x.end()) {}
  std::span<const T> get() const { return value; }
  std::vector<T> value;
};
template <> struct Kept<Keys> {
  explicit Kept(const Keys& x) : panel(x.panel), pages(x.pages), read(x.read) {}
  Keys get() const { return {panel.get(), pages.get(), read.get()}; }
  Kept<const Ragged*> panel;
  Kept<const Pages*> pages;
  Kept<const Read*> read;
};

template <auto Member> struct Guarded;
template <class... A, void (*Kernels::*Member)(Queue&, A...)>
struct Guarded<Member> {
  static void run(Queue& queue, A... arguments) {
    const GuardedRegion region;
    if (recording() && region.outermost) {
      (check(arguments), ...);
      auto kept = std::make_shared<std::tuple<Kept<std::remove_cvref_t<A>>...>>(arguments...);
      recording()->push_back([&queue, kept, at = queue.scratch.mark()] {
        const Arena::Mark now = queue.scratch.mark();
        queue.scratch.rewind(at);  // what the kernel takes lies behind what was taken before it
        std::apply([&](const auto&... each) { Guarded::run(queue, each.get()...); }, *kept);
        queue.scratch.rewind(now);
      });
      return;
    }
    if (region.outermost) (check(arguments), ...);
    ++queue.launches;
    (inner().*Member)(queue, arguments...);
  }
};

}  // namespace guarded_detail

/// How often recordings were replayed.
inline int64_t& replays() {
  static int64_t count = 0;
  return count;
}

inline const Memory& guarded_memory() {
  using guarded_detail::on_device;
  static const Memory memory = [] {
    Memory m = cpu_memory();
    m.device = Device::Cuda;
    m.allocate = [](int64_t bytes) { return GuardedSpace::one().take(bytes); };
    m.release = [](void* p) noexcept { GuardedSpace::one().give(p); };
    m.reserve = [](int64_t bytes) { return GuardedSpace::one().take(bytes, false); };
    m.unreserve = [](void* p, int64_t) noexcept { GuardedSpace::one().give(p); };
    m.commit = [](void* at, int64_t bytes) {
      const GuardedRegion region;
      std::memset(at, 0xff, size_t(bytes));
    };
    m.decommit = [](void* at, int64_t bytes) noexcept { madvise(at, size_t(bytes), MADV_DONTNEED); };
    m.upload = [](void*, const void* from, void* to, int64_t bytes) {
      const GuardedRegion region;
      if (bytes > 0) on_device(to), std::memcpy(to, from, size_t(bytes));
    };
    m.download = [](void*, const void* from, void* to, int64_t bytes) {
      const GuardedRegion region;
      if (bytes > 0) on_device(from), std::memcpy(to, from, size_t(bytes));
    };
    m.move = [](void* stream, const void* from, void* to, int64_t bytes) {
      const GuardedRegion region;
      if (auto* now = guarded_detail::recording(); now && region.outermost)
        return now->push_back([=] { guarded_memory().move(stream, from, to, bytes); });
      if (bytes > 0) on_device(from), on_device(to), std::memcpy(to, from, size_t(bytes));
    };
    m.fill = [](void* stream, void* to, int byte, int64_t bytes) {
      const GuardedRegion region;
      if (auto* now = guarded_detail::recording(); now && region.outermost)
        return now->push_back([=] { guarded_memory().fill(stream, to, byte, bytes); });
      if (bytes > 0) on_device(to), std::memset(to, byte, size_t(bytes));
    };
    using guarded_detail::Recorded;
    m.begin_recording = [](void*) { guarded_detail::recording() = new Recorded; };
    m.end_recording = [](void*) { return static_cast<void*>(std::exchange(guarded_detail::recording(), nullptr)); };
    m.replay = [](void*, void* recording) {
      ++replays();
      for (const auto& call : *static_cast<Recorded*>(recording)) call();
    };
    m.drop_recording = [](void* recording) noexcept { delete static_cast<Recorded*>(recording); };
    return m;
  }();
  return memory;
}

/// The table "guarded", around the machine's best CPU table; known to kernels_named from the first call on.
inline const Kernels& guarded_kernels() {
  using guarded_detail::Guarded;
  static const Kernels table = [] {
    Kernels t = guarded_detail::inner();
    t.name = "guarded";
    t.memory = &guarded_memory();
#define HEED_GUARD(NAME) t.NAME = Guarded<&Kernels::NAME>::run
    HEED_GUARD(attend), HEED_GUARD(attend_backward), HEED_GUARD(attend_store), HEED_GUARD(merge), HEED_GUARD(observe),
        HEED_GUARD(observe_rows);
    HEED_GUARD(pool), HEED_GUARD(smooth), HEED_GUARD(proxy), HEED_GUARD(reduce), HEED_GUARD(select),
        HEED_GUARD(compute), HEED_GUARD(offsets);
    HEED_GUARD(tile_blocks), HEED_GUARD(unite), HEED_GUARD(count_pairs), HEED_GUARD(recur), HEED_GUARD(recur_backward),
        HEED_GUARD(scan);
    HEED_GUARD(page_write), HEED_GUARD(page_read), HEED_GUARD(page_move), HEED_GUARD(column_read), HEED_GUARD(column_write);
    HEED_GUARD(page_supply), HEED_GUARD(page_grow), HEED_GUARD(page_own), HEED_GUARD(page_shrink),
        HEED_GUARD(page_hold), HEED_GUARD(page_convert), HEED_GUARD(page_pair);
    HEED_GUARD(page_score), HEED_GUARD(page_choose), HEED_GUARD(matmul), HEED_GUARD(embed), HEED_GUARD(rms_norm),
        HEED_GUARD(split_heads), HEED_GUARD(merge_heads);
    HEED_GUARD(combine), HEED_GUARD(spread), HEED_GUARD(matmul_each), HEED_GUARD(matmul_glu);
    HEED_GUARD(glu), HEED_GUARD(add), HEED_GUARD(dequantise);
#undef HEED_GUARD
    return t;
  }();
  static const bool added = (add_kernels(table), true);
  (void)added;
  return table;
}

}  // namespace heed::test
