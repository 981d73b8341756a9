// One small persistent pool: regions last microseconds in decode, so waiting is a short spin and then a sleep.
#pragma once
#include <cstdint>
#include <type_traits>

namespace heed {

/// Non-owning reference to a callable; it must outlive the call it is passed to.
template <class Sig> class FunctionRef;
template <class R, class... A>
class FunctionRef<R(A...)> {
 public:
  template <class F>
  FunctionRef(F&& f)  // NOLINT: implicit by design
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* o, A... a) -> R { return (*static_cast<std::remove_reference_t<F>*>(o))(a...); }) {}
  R operator()(A... a) const { return call_(object_, a...); }

 private:
  void* object_;
  R (*call_)(void*, A...);
};

/// Threads that parallel regions use, the caller included. 0 means one for each physical core this process may run on.
void set_threads(int count);
/// set_threads throws Error(Invalid) inside a region.
int threads();

/// Whether the caller runs inside a region.
bool inside_parallel();

/// Calls body(i) once for each i in [0, threads()) and returns when all have; 0 runs on the caller, each other on the worker
/// of its number or, when that one is late (a busy machine), on any that is free: nothing may wait for another i.
/// Every worker flushes denormals to zero, the caller while the region lasts. A region inside a region runs on the calling worker alone.
void parallel(FunctionRef<void(int i)> body);

/// Calls body(i) for each i in [0, count), handed out in order to whichever worker is free: the result of body(i)
/// must not depend on who runs it (design: reductions never depend on the number of threads). A single i runs on the
/// caller, with no region at all.
void parallel_for(int64_t count, FunctionRef<void(int64_t i)> body);

/// How items are shared out before the idle help the busy.
enum class Deal : uint8_t {
  Cards,      // worker w begins with items w, w + workers, …: neighbours are worked on at once and share what is cached
  Stretches,  // each worker begins with a stretch of neighbours: for items that lie one behind the other in memory
};

/// The same for a body that is told which of at most `workers` workers runs it, so that each can have memory of its own.
void parallel_for(int64_t count, int workers, FunctionRef<void(int worker, int64_t i)> body, Deal deal = Deal::Cards);

}  // namespace heed
