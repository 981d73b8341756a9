// The npy format itself, apart from where its bytes come from.
#pragma once
#include <cstdint>
#include <string>

#include "base/error.h"
#include "base/tensor.h"
#include "base/threads.h"

namespace heed {

/// Reads exactly that many bytes, or returns false.
using ReadBytes = FunctionRef<bool(void* to, size_t bytes)>;

/// An array from a stream of `size` bytes. Throws Error.
Buffer read_npy_stream(ReadBytes read, uint64_t size, const std::string& name);

/// All that comes before the data of such an array. Throws Error.
std::string npy_header(const Tensor& tensor);

}  // namespace heed
