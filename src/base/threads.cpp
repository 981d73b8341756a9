#include "base/threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <fstream>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/error.h"

namespace heed {
namespace {

// An underflowing vector operation costs 70 ns instead of 1 without this (docs/performance.md). The way back matters for
// the caller alone: the arithmetic of a host program is not ours to change.
#if defined(__x86_64__)
uint64_t float_control() { return _mm_getcsr(); }
void set_float_control(uint64_t control) { _mm_setcsr(unsigned(control)); }
constexpr uint64_t flush = 0x8040;
#elif defined(__aarch64__)
uint64_t float_control() {
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  return control;
}
void set_float_control(uint64_t control) { asm volatile("msr fpcr, %0" ::"r"(control)); }
constexpr uint64_t flush = 1ull << 24;
#else
uint64_t float_control() { return 0; }
void set_float_control(uint64_t) {}
constexpr uint64_t flush = 0;
#endif

/// Flushes denormals on this thread for as long as it lives.
class Flush {
 public:
  Flush() : before_(float_control()) { set_float_control(before_ | flush); }
  ~Flush() { set_float_control(before_); }
  Flush(const Flush&) = delete;
  Flush& operator=(const Flush&) = delete;

 private:
  uint64_t before_;
};

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

/// Physical cores this process may run on: of two logical processors of one core, the second adds little to kernels
/// that keep the vector units busy, and its spinning takes from the first.
int usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return int(std::max(1u, std::thread::hardware_concurrency()));
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &set)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = "cpu " + std::to_string(cpu);
    cores.insert(siblings);
  }
  return std::max(1, int(cores.size()));
}

thread_local bool inside_region = false;

class Pool {
 public:
  explicit Pool(int count) {
    for (int worker = 1; worker < count; ++worker) crew_.emplace_back([this, worker] { serve(worker); });
  }
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& t : crew_) t.join();
  }
  int size() const { return int(crew_.size()) + 1; }

  void run(FunctionRef<void(int)> body) {
    body_ = &body;
    error_ = nullptr;
    left_.store(int(crew_.size()), std::memory_order_relaxed);
    {
      // The lock orders the new round before a worker's decision to sleep.
      std::lock_guard lock(mutex_);
      round_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load(std::memory_order_acquire)) wake_.notify_all();
    work(0);
    for (int spin = 0; left_.load(std::memory_order_acquire) != 0; ++spin) {
      if (spin < 20000) relax();
      else std::this_thread::yield();
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work(int worker) {
    inside_region = true;
    try {
      (*body_)(worker);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    inside_region = false;
  }

  void serve(int worker) {
    const Flush scope;
    uint64_t seen = 0;
    for (;;) {
      // Spinning for about 50 µs covers the gaps between a decode step's regions; then the core is given back.
      for (int spin = 0; spin < 2000 && round_.load(std::memory_order_acquire) == seen; ++spin) relax();
      if (round_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_release);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_release);
      }
      seen = round_.load(std::memory_order_acquire);
      if (stop_) return;
      work(worker);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> crew_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int> left_{0}, sleepers_{0};
  bool stop_ = false;
  const FunctionRef<void(int)>* body_ = nullptr;
  std::exception_ptr error_;
};

std::mutex pool_mutex;  // one region at a time: two sessions on two threads take turns
std::unique_ptr<Pool> pool;
int wanted = 0;

}  // namespace

void set_threads(int count) {
  require(!inside_region, "set_threads", "called inside a parallel region");
  std::lock_guard lock(pool_mutex);
  wanted = count > 0 ? count : usable_cores();
  if (pool && pool->size() != wanted) pool.reset();
}

int threads() {
  if (inside_region) return 1;
  std::lock_guard lock(pool_mutex);
  if (wanted == 0) wanted = usable_cores();
  return wanted;
}

bool inside_parallel() { return inside_region; }

void parallel(FunctionRef<void(int worker)> body) {
  if (inside_region) return body(0);
  std::lock_guard lock(pool_mutex);
  if (wanted == 0) wanted = usable_cores();
  if (!pool) pool = std::make_unique<Pool>(wanted);
  const Flush scope;
  pool->run(body);
}

void parallel_for(int64_t count, FunctionRef<void(int64_t i)> body) {
  if (count <= 0) return;
  if (count == 1 && inside_region) return body(0);
  std::atomic<int64_t> next{0};
  parallel([&](int) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  });
}

}  // namespace heed
