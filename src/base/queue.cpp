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
  if (!recording_) return memory->upload(stream, host.data, to.data, host.bytes());
  const std::span sizes(host.size.data(), size_t(host.rank));
  Buffer copy(host.type, sizes);
  std::copy_n(static_cast<const char*>(host.data), host.bytes(), copy->as<char>());
  const Tensor constant = recording_->constants.emplace_back(host.type, sizes, *memory);
  recording_->waiting.emplace_back(std::move(copy), constant);
  move(constant, to);
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

Recording Queue::record(const std::function<void()>& enqueue) {
  if (!can_record() || recording_) return {};
  Uploads uploads;
  Recording out;
  bool whole = true;
  memory->begin_recording(stream);
  recording_ = &uploads;
  try {
    enqueue();
  } catch (const Error&) { whole = false; } catch (...) {
    recording_ = nullptr;
    memory->drop_recording(memory->end_recording(stream));
    throw;
  }
  recording_ = nullptr;
  std::shared_ptr<void> work(memory->end_recording(stream), memory->drop_recording);
  if (!whole || !work) return {};
  for (const auto& [host, to] : uploads.waiting) memory->upload(stream, host->data, to.data, host->bytes());
  out.work_ = std::move(work), out.constants_ = std::move(uploads.constants);
  return out;
}

void Queue::varies() const {
  if (recording_) throw Error(Code::Unsupported, "recording", "the host takes part in this work");
}

void Queue::read_back(const Tensor& from, void* host) {
  varies();
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
