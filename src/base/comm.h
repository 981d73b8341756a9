// Messages between ranks: what sequence-parallel attention needs of a cluster, and nothing more. Ranks are threads of
// one process here (run_ranks); MPI and NCCL fit behind the same class.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/queue.h"

namespace heed {

enum class ReduceOp : uint8_t { Sum, Max };

/// What one rank has sent to others (what it keeps for itself does not count).
struct Traffic {
  int64_t elements = 0, bytes = 0;
};

/// One rank's view of a group of ranks 0 … size − 1. Tensors are contiguous and live on the group's device; those that
/// meet must agree in type and number of elements. Every rank of the group makes the collective calls in the same
/// order. Errors: Error(Invalid) for tensors or ranks that do not fit, and Error(Internal) in a rank that can no
/// longer be served because another has failed, left, or waits in a circle. Never call from inside parallel().
class Comm {
 public:
  struct Message {
    int peer = 0;
    Tensor tensor;
  };
  /// Transfers under way; finish(ticket) waits for them.
  using Ticket = int64_t;

  virtual ~Comm() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  /// The ranks that pass the same colour, ordered by (key, rank), as a group of their own. Collective.
  virtual std::unique_ptr<Comm> split(int colour, int key) = 0;

  /// Starts sends and receives that run side by side; messages between two ranks arrive in the order they were started.
  /// Until finish(), what is sent may not change and what is received may not be read.
  Ticket start(std::span<const Message> sends, std::span<const Message> receives);
  virtual void finish(Ticket) = 0;

  /// One step around the ring: sends to rank + step, receives from rank − step (modulo size).
  Ticket start_ring(const Tensor& send, const Tensor& receive, int step = 1);
  void ring(const Tensor& send, const Tensor& receive, int step = 1) { finish(start_ring(send, receive, step)); }

  /// out [size, …]: entry r is rank r's `in`. Counted as size − 1 copies of `in`.
  void all_gather(const Tensor& in, const Tensor& out);
  /// in, out [size, …]: out's entry r is what rank r has in its entry for this rank.
  void all_to_all(const Tensor& in, const Tensor& out);
  /// In place; every rank gets the same bits (Sum adds in rank order). F32, F64, I32, I64. A NaN anywhere gives NaN.
  /// Counted as reduce-scatter and all-gather: about 2 · (size − 1) / size of the elements.
  void all_reduce(const Tensor& inout, ReduceOp op);
  /// Returns when every rank has called it.
  virtual void barrier();

  const Traffic& sent() const { return sent_; }

 protected:
  /// A backend must give post(); the collectives have defaults made of post() and finish(), for a library's own.
  virtual Ticket post(std::span<const Message> sends, std::span<const Message> receives) = 0;
  virtual void gather_all(const Tensor& in, const Tensor& out);
  virtual void exchange_all(const Tensor& in, const Tensor& out);
  virtual void reduce_all(const Tensor& inout, ReduceOp op);
  void count(int64_t elements, Dtype type);

 private:
  Traffic sent_;
};

/// Runs fn on `count` ranks, each a thread, and returns when all have. When one throws, the others' transfers fail and
/// the first exception is thrown again here. Ranks on one device share the stream of `on`, in which messages are carried;
/// without it they lie in host memory.
void run_ranks(int count, const std::function<void(Comm&)>& fn, const Queue* on = nullptr);

}  // namespace heed
