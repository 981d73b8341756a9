// GGUF files, versions 2 and 3: metadata and tensors of a model, read in place.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/mapped_file.h"
#include "base/tensor.h"

namespace heed {

/// A parsed file. Values, names and tensors point into the mapped file and live as long as this object (moving it is
/// fine). Everything is checked once, when opened: lengths against what remains of the file, tensors against its end.
class Gguf {
 public:
  enum class Type : uint32_t { U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64 };

  struct Value {
    Type type = Type::U8;
    Type element = Type::U8;                // of an array
    uint64_t count = 1;                     // of an array
    std::span<const std::byte> bytes;       // numbers, little-endian and unaligned; the text of a string
    std::vector<std::string_view> strings;  // of an array of strings
    std::vector<Value> values;              // of an array of arrays
  };

  /// NotFound, Io, Corrupt, or Unsupported (version 1, big-endian, a tensor type that heed does not know).
  static Result<Gguf> open(const std::string& path);
  /// The same of a file in memory, aligned to 8 bytes, that must outlive the result; `name` is what errors call it.
  static Result<Gguf> parse(std::span<const std::byte> file, std::string name = "gguf");

  const std::string& name() const { return name_; }
  uint32_t version() const { return version_; }
  uint64_t alignment() const { return alignment_; }
  std::span<const std::byte> file() const { return file_; }
  /// Memory that the file's part under this tensor takes may be put to other uses until it is touched again.
  void let_go(const Tensor& t) const { mapped_.let_go({t.as<const std::byte>(), size_t(t.bytes())}); }

  const std::map<std::string_view, Value>& metadata() const { return metadata_; }
  /// Null when the key is absent.
  const Value* find(std::string_view key) const;

  // Typed reads. An absent key is NotFound unless a value for that case is given; a value of another type, or a number
  // out of range, is Invalid. Errors name the key and the type that was expected.

  /// Any integer type, or Bool.
  Result<int64_t> integer(std::string_view key) const;
  Result<int64_t> integer(std::string_view key, int64_t absent) const;
  /// Any number type.
  Result<double> number(std::string_view key) const;
  Result<double> number(std::string_view key, double absent) const;
  Result<bool> boolean(std::string_view key) const;
  Result<bool> boolean(std::string_view key, bool absent) const;
  Result<std::string_view> string(std::string_view key) const;
  Result<std::string_view> string(std::string_view key, std::string_view absent) const;
  /// An array of any integer type or Bool. A single integer is an array of one: files write per-layer values that are
  /// all equal so.
  Result<std::vector<int64_t>> integers(std::string_view key) const;
  Result<std::vector<float>> numbers(std::string_view key) const;
  Result<std::span<const std::string_view>> strings(std::string_view key) const;

  struct Entry {
    std::string_view name;
    Tensor tensor;
  };
  /// In the order of the file. Sizes are in C order: GGUF's first dimension is the last here. The data is read-only.
  const std::vector<Entry>& tensors() const { return tensors_; }
  /// Null when there is none of that name.
  const Tensor* tensor(std::string_view name) const;
  /// The tensor, or NotFound, or Invalid when its sizes are others.
  Result<Tensor> tensor(std::string_view name, std::initializer_list<int64_t> sizes) const;

  /// Names this model in calibration files: a hash of metadata, tensor table and 192 bytes of every tensor. Takes
  /// some milliseconds; the same on every machine.
  uint64_t hash() const;

 private:
  class Parser;
  Result<const Value*> found(std::string_view key) const;

  std::string name_;
  MappedFile mapped_;
  std::span<const std::byte> file_;
  uint32_t version_ = 0;
  uint64_t alignment_ = 32;
  uint64_t data_at_ = 0;  // where metadata and tensor table end
  std::map<std::string_view, Value> metadata_;
  std::vector<Entry> tensors_;
  std::map<std::string_view, size_t> by_name_;
};

/// "u32", "string", "array".
const char* type_name(Gguf::Type type);

}  // namespace heed
