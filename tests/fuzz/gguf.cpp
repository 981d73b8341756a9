// GGUF files that lie: parsing either refuses or gives views that lie inside the file.
#include "model/gguf.h"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace heed;
  const auto file = Gguf::parse(std::as_bytes(std::span(data, size)));
  if (!file) {
    if (file.error().what.empty()) std::abort();
    return 0;
  }
  for (const auto& entry : file->tensors()) {
    const auto* begin = static_cast<const uint8_t*>(entry.tensor.data);
    if (begin < data || entry.tensor.bytes() > data + size - begin) std::abort();
    if (file->tensor(entry.name) == nullptr) std::abort();
  }
  for (const auto& [key, value] : file->metadata()) {
    (void)file->integer(key);
    (void)file->number(key);
    (void)file->boolean(key);
    (void)file->string(key);
    (void)file->integers(key);
    (void)file->numbers(key);
    (void)file->strings(key);
  }
  (void)file->hash();
  return 0;
}
