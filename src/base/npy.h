// NumPy's files: one array (npy), and several by name (npz, a zip archive of npy files).
#pragma once
#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/tensor.h"

namespace heed {

// Number types: f2, f4, f8, i1, i4, i8, u1, u8 (as Dtype F16 … U64), little-endian; bool is read as U8. C order, at most
// five dimensions. Anything else well formed is Unsupported with what to convert; a file that contradicts itself or
// ends early is Corrupt. Errors name the file (and the array inside an npz).

Result<Buffer> read_npy(const std::string& path);
/// The same of a file in memory; `name` is what errors call it.
Result<Buffer> parse_npy(std::span<const std::byte> file, const std::string& name = "npy");

/// The bytes of an npy file (format 1.0, as numpy writes it). Unsupported for BF16 and block types.
Result<std::string> npy_bytes(const Tensor& tensor);
/// Writes beside `path` and renames: the file is old or new, never half.
Result<void> write_npy(const std::string& path, const Tensor& tensor);

/// Arrays by name, without ".npy". Entries that are no npy files are left out, as numpy hands them over raw.
Result<std::map<std::string, Buffer>> read_npz(const std::string& path);
Result<std::map<std::string, Buffer>> parse_npz(std::span<const std::byte> file, const std::string& name = "npz");

/// Any strides; in the order given, names unique. The same arrays give the same bytes at any time. Atomic as write_npy.
Result<void> write_npz(const std::string& path, const std::vector<std::pair<std::string, Tensor>>& arrays,
                       bool compress = false);

}  // namespace heed
