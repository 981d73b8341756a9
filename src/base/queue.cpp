#include "base/queue.h"

#include <algorithm>

namespace heed {

Tensor Arena::take(Dtype type, std::initializer_list<int64_t> sizes) {
  return take(type, std::span<const int64_t>(sizes.begin(), sizes.size()));
}

Tensor Arena::take(Dtype type, std::span<const int64_t> sizes) {
  Tensor out(nullptr, type, sizes, memory_->device);
  const int64_t need = (out.bytes() + 255) / 256 * 256;
  constexpr int64_t smallest = 1 << 20;
  while (at_.block < blocks_.size() && at_.used + need > blocks_[at_.block]->numel()) at_ = {at_.block + 1, 0};
  if (at_.block == blocks_.size())
    blocks_.emplace_back(Dtype::U8, std::initializer_list<int64_t>{std::max(need, smallest)}, *memory_);
  out.data = blocks_[at_.block]->as<char>() + at_.used;
  at_.used += need;
  return out;
}

int64_t Arena::bytes() const {
  int64_t total = 0;
  for (const Buffer& block : blocks_) total += block->bytes();
  return total;
}

Queue::Queue(const Kernels* run_in, const Memory& memory_in)
    : device(memory_in.device), run(run_in), memory(&memory_in), stream(memory_in.open_stream()), scratch(memory_in),
      stream_owner_(stream, memory_in.close_stream) {}

Queue::Queue(const Queue* parent)
    : device(parent->device), run(parent->run), memory(parent->memory), stream(parent->stream),
      scratch(*parent->memory), stream_owner_(parent->stream_owner_) {}

Tensor Queue::upload(const Tensor& host) {
  const Tensor to = scratch.take(host.type, std::span(host.size.data(), size_t(host.rank)));
  upload(host, to);
  return to;
}

void Queue::upload(const Tensor& host, const Tensor& to) {
  require(host.contiguous() && to.contiguous() && host.type == to.type && host.numel() == to.numel(), "Queue::upload",
          host.shape() + " to " + to.shape());
  ++uploads;
  uploaded_bytes += host.bytes();
  memory->upload(stream, host.data, to.data, host.bytes());
}

void Queue::move(const Tensor& from, const Tensor& to) {
  require(from.contiguous() && to.contiguous() && from.bytes() == to.bytes(), "Queue::move",
          from.shape() + " to " + to.shape());
  memory->move(stream, from.data, to.data, from.bytes());
}

void Queue::fill(const Tensor& to, int byte) {
  require(to.contiguous(), "Queue::fill", "a contiguous tensor is needed, got " + to.shape());
  memory->fill(stream, to.data, byte, to.bytes());
}

void Queue::read_back(const Tensor& from, void* host) {
  ++host_waits;
  require(from.contiguous(), "Queue::read_back", "a contiguous tensor is needed, got " + from.shape());
  memory->download(stream, from.data, host, from.bytes());
}

Buffer Queue::read_back(const Tensor& from) {
  Buffer out(from.type, std::span(from.size.data(), size_t(from.rank)));
  read_back(from, out->data);
  return out;
}

}  // namespace heed
