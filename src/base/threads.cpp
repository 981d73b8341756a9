#include "base/threads.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace heed {
namespace {

// An underflowing vector operation costs 70 ns instead of 1 without this (docs/performance.md).
void flush_denormals() {
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040);
#elif defined(__aarch64__)
  uint64_t fpcr;
  asm volatile("mrs %0, fpcr" : "=r"(fpcr));
  asm volatile("msr fpcr, %0" ::"r"(fpcr | (1ull << 24)));
#endif
}

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

int usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
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
    flush_denormals();
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

void parallel(FunctionRef<void(int worker)> body) {
  if (inside_region) return body(0);
  std::lock_guard lock(pool_mutex);
  if (wanted == 0) wanted = usable_cores();
  if (!pool) pool = std::make_unique<Pool>(wanted);
  flush_denormals();
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
