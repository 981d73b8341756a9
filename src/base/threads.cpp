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

/// Items are dealt to workers like cards: worker w has items w, w + workers, …. A worker takes its own first and then what
/// others have not begun, so a worker that is late or has lost its core holds up only the item it is in, and a region
/// that ends without it need not wait until it has looked in. One line is written to begin a region, and each worker's
/// progress lies on a line of its own: a shared counter costs sixteen workers more than the items of a small product.
class Pool {
 public:
  using Body = FunctionRef<void(int worker, int64_t i)>;

  explicit Pool(int count) : seats_(std::make_unique<Seat[]>(size_t(count))), size_(count) {
    for (int worker = 1; worker < count; ++worker) crew_.emplace_back([this, worker] { serve(worker); });
  }
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_.store(true);
      job_.round.fetch_add(2);
    }
    wake_.notify_all();
    for (std::thread& t : crew_) t.join();
  }
  int size() const { return size_; }

  /// count < 2^20 · workers.
  void run(int64_t count, int workers, const Body& body) {
    error_ = nullptr;
    issued_ += uint64_t(count);
    const uint64_t round = job_.round.load(std::memory_order_relaxed);
    // Odd while the job is being written: who reads the same even round before and after the job has read one job.
    job_.round.store(round + 1, std::memory_order_seq_cst);
    job_.body.store(&body, std::memory_order_release);
    job_.count.store(count, std::memory_order_release);
    job_.workers.store(workers, std::memory_order_release);
    seats_[0].ticket.store(ticket(round + 2, 1), std::memory_order_relaxed);  // item 0 is the caller's
    job_.round.store(round + 2, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst)) {
      { std::lock_guard lock(mutex_); }  // a worker between its last look and its sleep holds it
      wake_.notify_all();
    }
    inside_region = true;
    item(0, 0, body);
    take_all(0, round + 2, count, workers, body);
    inside_region = false;
    for (int spin = 0; finished() != issued_; ++spin) {
      if (spin < 2000) relax();
      else std::this_thread::yield();
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct alignas(64) Seat {
    std::atomic<uint64_t> ticket{0};  // of the last region that took from it: its number, and how many were taken
    alignas(64) std::atomic<uint64_t> done{0};  // items this worker has done since the pool began
  };
  struct alignas(64) Job {
    std::atomic<uint64_t> round{0};
    std::atomic<const Body*> body{nullptr};
    std::atomic<int64_t> count{0};
    std::atomic<int> workers{0};
  };

  static constexpr int kTakenBits = 20;
  static uint64_t ticket(uint64_t round, uint64_t taken) { return round / 2 << kTakenBits | taken; }

  uint64_t finished() const {
    uint64_t sum = 0;
    for (int w = 0; w < size_; ++w) sum += seats_[size_t(w)].done.load(std::memory_order_acquire);
    return sum;
  }

  void item(int worker, int64_t i, const Body& body) {
    try {
      body(worker, i);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    std::atomic<uint64_t>& done = seats_[size_t(worker)].done;
    done.store(done.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }

  /// Takes items of one round until none is left. A region ends only when all its items were taken, and a taken ticket
  /// carries its round: whoever comes late takes nothing, and does not touch the body.
  void take_all(int worker, uint64_t round, int64_t count, int workers, const Body& body) {
    for (int step = 0; step < workers; ++step) {
      const int owner = worker + step < workers ? worker + step : worker + step - workers;
      const uint64_t share = owner < count ? uint64_t((count - owner + workers - 1) / workers) : 0;
      std::atomic<uint64_t>& seat = seats_[size_t(owner)].ticket;
      for (uint64_t seen = seat.load(std::memory_order_acquire);;) {
        const uint64_t first = ticket(round, 0), taken = seen < first ? 0 : seen - first;
        if (taken >= share) break;  // also of a later round
        if (!seat.compare_exchange_weak(seen, first + taken + 1, std::memory_order_acq_rel, std::memory_order_acquire))
          continue;
        item(worker, owner + int64_t(taken) * workers, body);
        seen = first + taken + 1;
      }
    }
  }

  void serve(int worker) {
    const Flush scope;
    inside_region = true;  // all that runs here is part of a region
    uint64_t seen = 0;
    const auto fresh = [&] {
      const uint64_t round = job_.round.load(std::memory_order_seq_cst);
      return round != seen && round % 2 == 0;
    };
    for (;;) {
      // Spinning for about 50 µs covers the gaps between a decode step's regions; then the core is given back.
      for (int spin = 0; spin < 2000 && !fresh(); ++spin) relax();
      if (!fresh()) {
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, fresh);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      const uint64_t round = job_.round.load(std::memory_order_acquire);
      if (stop_.load()) return;
      const Body* body = job_.body.load(std::memory_order_acquire);
      const int64_t count = job_.count.load(std::memory_order_acquire);
      const int workers = job_.workers.load(std::memory_order_acquire);
      if (round % 2 || job_.round.load(std::memory_order_acquire) != round) continue;
      seen = round;
      if (worker < workers) take_all(worker, round, count, workers, *body);
    }
  }

  std::unique_ptr<Seat[]> seats_;
  Job job_;
  const int size_;
  std::vector<std::thread> crew_;
  std::mutex mutex_;
  std::condition_variable wake_;
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  uint64_t issued_ = 0;
  std::exception_ptr error_;
};

std::mutex pool_mutex;  // one region at a time: two sessions on two threads take turns
std::unique_ptr<Pool> pool;
std::atomic<int> wanted{0};

int wanted_threads() {
  int count = wanted.load(std::memory_order_relaxed);
  if (count == 0) wanted.store(count = usable_cores());
  return count;
}

/// Runs items of a region by at most `workers` workers; 0 means all there are, one item each.
void run_region(int64_t count, int workers, const Pool::Body& body) {
  std::lock_guard lock(pool_mutex);
  if (!pool) pool = std::make_unique<Pool>(wanted_threads());
  if (workers == 0) count = workers = pool->size();
  const Flush scope;
  pool->run(count, std::min(workers, pool->size()), body);
}

}  // namespace

void set_threads(int count) {
  require(!inside_region, "set_threads", "called inside a parallel region");
  std::lock_guard lock(pool_mutex);
  wanted.store(count > 0 ? count : usable_cores());
  if (pool && pool->size() != wanted.load()) pool.reset();
}

int threads() { return inside_region ? 1 : wanted_threads(); }

bool inside_parallel() { return inside_region; }

void parallel(FunctionRef<void(int i)> body) {
  if (inside_region) return body(0);
  run_region(0, 0, [&](int, int64_t i) { body(int(i)); });
}

void parallel_for(int64_t count, FunctionRef<void(int64_t i)> body) {
  parallel_for(count, threads(), [&](int, int64_t i) { body(i); });
}

void parallel_for(int64_t count, int workers, FunctionRef<void(int worker, int64_t i)> body, Deal deal) {
  if (count <= 0) return;
  workers = std::min(workers, threads());
  if (inside_region || count == 1 || workers <= 1) {
    const Flush scope;
    for (int64_t i = 0; i < count; ++i) body(0, i);
    return;
  }
  if (deal == Deal::Stretches) {
    const int64_t each = (count + workers - 1) / workers;
    return parallel_for(each * workers, workers, [&](int worker, int64_t i) {
      const int64_t item = i % workers * each + i / workers;
      if (item < count) body(worker, item);
    });
  }
  // So many that their number would not fit a ticket are handed out by handfuls.
  constexpr int64_t most = 1 << 19;
  if (count <= most) return run_region(count, workers, body);
  const int64_t each = (count + most - 1) / most;
  run_region((count + each - 1) / each, workers, [&](int worker, int64_t n) {
    for (int64_t i = n * each; i < std::min(count, (n + 1) * each); ++i) body(worker, i);
  });
}

}  // namespace heed
