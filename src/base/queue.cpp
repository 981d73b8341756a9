#include "base/queue.h"

#include <algorithm>
#include <cstring>

namespace heed {

Tensor Arena::take(Dtype type, std::initializer_list<int64_t> sizes) {
  return take(type, std::span<const int64_t>(sizes.begin(), sizes.size()));
}

Tensor Arena::take(Dtype type, std::span<const int64_t> sizes) {
  Tensor out(nullptr, type, sizes);
  const int64_t need = (out.bytes() + 63) / 64 * 64;
  constexpr int64_t smallest = 1 << 20;
  while (at_.block < blocks_.size() && at_.used + need > blocks_[at_.block]->numel()) at_ = {at_.block + 1, 0};
  if (at_.block == blocks_.size()) blocks_.emplace_back(Dtype::U8, std::initializer_list<int64_t>{std::max(need, smallest)});
  out.data = blocks_[at_.block]->as<char>() + at_.used;
  at_.used += need;
  return out;
}

int64_t Arena::bytes() const {
  int64_t total = 0;
  for (const Buffer& block : blocks_) total += block->bytes();
  return total;
}

void Queue::read_back(const Tensor& from, void* host) {
  ++host_waits;
  require(from.contiguous(), "Queue::read_back", "a contiguous tensor is needed, got " + from.shape());
  std::memcpy(host, from.data, size_t(from.bytes()));
}

}  // namespace heed
