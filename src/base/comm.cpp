#include "base/comm.h"

#include <cmath>
#include <cstring>

#include "base/threads.h"

namespace heed {
namespace {

void check(const Tensor& t, const char* where) {  // of what the collectives look at
  require(t.contiguous() && t.device == Device::Cpu, where,
          "a contiguous tensor in host memory is needed, got " + t.shape());
}

/// Entry `rank` of a tensor whose first dimension counts ranks.
Tensor entry(const Tensor& t, int rank) { return t.select(0, rank); }

/// The elements that `rank` of `size` reduces.
Tensor share(const Tensor& t, int rank, int size) {
  const int64_t n = t.numel();
  return t.reshape({n}).slice(0, n * rank / size, n * (rank + 1) / size);
}

template <class T>
void fold(std::span<T> into, std::span<const T> from, ReduceOp op) {
  for (size_t i = 0; i < into.size(); ++i) {
    if (op == ReduceOp::Sum) into[i] += from[i];
    else if (from[i] > into[i] || from[i] != from[i]) into[i] = from[i];
  }
}

void fold(const Tensor& into, const Tensor& from, ReduceOp op) {
  const auto run = [&]<class T>(T) { fold<T>(into.span<T>(), from.span<const T>(), op); };
  switch (into.type) {
    case Dtype::F32: return run(float{});
    case Dtype::F64: return run(double{});
    case Dtype::I32: return run(int32_t{});
    default: return run(int64_t{});
  }
}

}  // namespace

void Comm::count(int64_t elements, Dtype type) {
  sent_.elements += elements;
  sent_.bytes += elements / info(type).block * info(type).bytes;
}

Comm::Ticket Comm::start(std::span<const Message> sends, std::span<const Message> receives) {
  require(!inside_parallel(), "Comm::start",
          "called inside a parallel region, which would keep the other ranks out of theirs");
  for (const std::span<const Message> list : {sends, receives})
    for (const Message& m : list) {
      require(m.tensor.contiguous(), "Comm::start", "a contiguous tensor is needed, got " + m.tensor.shape());
      require(m.peer >= 0 && m.peer < size(), "Comm::start",
              "no rank " + std::to_string(m.peer) + " in a group of " + std::to_string(size()));
    }
  for (const Message& m : sends)
    if (m.peer != rank()) count(m.tensor.numel(), m.tensor.type);
  return post(sends, receives);
}

Comm::Ticket Comm::start_ring(const Tensor& send, const Tensor& receive, int step) {
  const int shift = (step % size() + size()) % size();
  const Message out{(rank() + shift) % size(), send}, in{(rank() + size() - shift) % size(), receive};
  return start({&out, 1}, {&in, 1});
}

void Comm::all_gather(const Tensor& in, const Tensor& out) {
  check(in, "Comm::all_gather");
  check(out, "Comm::all_gather");
  require(out.rank > 0 && out.size[0] == size() && out.type == in.type && out.numel() == in.numel() * size(),
          "Comm::all_gather", in.shape() + " to " + out.shape() + " on " + std::to_string(size()) + " ranks");
  count(in.numel() * (size() - 1), in.type);
  gather_all(in, out);
}

void Comm::all_to_all(const Tensor& in, const Tensor& out) {
  check(in, "Comm::all_to_all");
  check(out, "Comm::all_to_all");
  require(in.rank > 0 && out.rank > 0 && in.size[0] == size() && out.size[0] == size() && in.type == out.type &&
              in.numel() == out.numel(),
          "Comm::all_to_all", in.shape() + " to " + out.shape() + " on " + std::to_string(size()) + " ranks");
  count(in.numel() / size() * (size() - 1), in.type);
  exchange_all(in, out);
}

void Comm::all_reduce(const Tensor& inout, ReduceOp op) {
  check(inout, "Comm::all_reduce");
  const Dtype t = inout.type;
  if (t != Dtype::F32 && t != Dtype::F64 && t != Dtype::I32 && t != Dtype::I64)
    throw Error(Code::Unsupported, "Comm::all_reduce", std::string("of ") + info(t).name,
                "convert to f32, f64, i32 or i64");
  const int64_t own = share(inout, rank(), size()).numel();
  count(inout.numel() - own + own * (size() - 1), inout.type);
  reduce_all(inout, op);
}

void Comm::gather_all(const Tensor& in, const Tensor& out) {
  std::vector<Message> sends, receives;
  for (int r = 0; r < size(); ++r) {
    sends.push_back({r, in});
    receives.push_back({r, entry(out, r)});
  }
  finish(post(sends, receives));
}

void Comm::exchange_all(const Tensor& in, const Tensor& out) {
  std::vector<Message> sends, receives;
  for (int r = 0; r < size(); ++r) {
    sends.push_back({r, entry(in, r)});
    receives.push_back({r, entry(out, r)});
  }
  finish(post(sends, receives));
}

void Comm::reduce_all(const Tensor& inout, ReduceOp op) {
  const Tensor mine = share(inout, rank(), size());
  const Buffer parts(inout.type, {size(), mine.numel()});
  std::vector<Message> sends, receives;
  for (int r = 0; r < size(); ++r) {
    sends.push_back({r, share(inout, r, size())});
    receives.push_back({r, entry(parts, r)});
  }
  finish(post(sends, receives));
  // In rank order, so that the sum does not depend on who came first.
  for (int r = 1; r < size(); ++r) fold(entry(parts, 0), entry(parts, r), op);
  sends.clear();
  receives.clear();
  for (int r = 0; r < size(); ++r) {
    sends.push_back({r, entry(parts, 0)});
    receives.push_back({r, share(inout, r, size())});
  }
  finish(post(sends, receives));
}

void Comm::barrier() {
  uint8_t here = 0;
  std::vector<uint8_t> all(static_cast<size_t>(size()));
  gather_all(Tensor(&here, Dtype::U8, {1}), Tensor(all.data(), Dtype::U8, {size(), 1}));
}

}  // namespace heed
