// npy files that lie; what is read must be written and read again the same.
#include "base/npy.h"

#include <cstdlib>
#include <cstring>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace heed;
  const auto array = parse_npy(std::as_bytes(std::span(data, size)));
  if (!array) return 0;
  const Tensor& first = *array;
  if (size_t(first.bytes()) > size) std::abort();
  const auto written = npy_bytes(first);
  if (!written) std::abort();
  const auto again = parse_npy(std::as_bytes(std::span(*written)));
  if (!again) std::abort();
  const Tensor& second = *again;
  if (second.shape() != first.shape() || second.type != first.type) std::abort();
  if (first.bytes() > 0 && std::memcmp(first.data, second.data, size_t(first.bytes())) != 0) std::abort();
  return 0;
}
