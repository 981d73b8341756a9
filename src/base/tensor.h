// Views of memory. A Tensor never owns; a Buffer owns aligned memory of one device and nothing else.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "base/dtype.h"
#include "base/error.h"
#include "base/memory.h"

namespace heed {

template <class T> struct DtypeOf;
template <> struct DtypeOf<float> : std::integral_constant<Dtype, Dtype::F32> {};
template <> struct DtypeOf<double> : std::integral_constant<Dtype, Dtype::F64> {};
template <> struct DtypeOf<f16> : std::integral_constant<Dtype, Dtype::F16> {};
template <> struct DtypeOf<bf16> : std::integral_constant<Dtype, Dtype::BF16> {};
template <> struct DtypeOf<int8_t> : std::integral_constant<Dtype, Dtype::I8> {};
template <> struct DtypeOf<uint8_t> : std::integral_constant<Dtype, Dtype::U8> {};
template <> struct DtypeOf<int32_t> : std::integral_constant<Dtype, Dtype::I32> {};
template <> struct DtypeOf<int64_t> : std::integral_constant<Dtype, Dtype::I64> {};
template <> struct DtypeOf<uint64_t> : std::integral_constant<Dtype, Dtype::U64> {};

/// A strided view of at most five dimensions. Strides are in elements; for block types the last dimension is
/// contiguous and strides count elements too (a row of 64 Q4_0 values has stride 64 and takes 36 bytes).
struct Tensor {
  void* data = nullptr;
  Dtype type = Dtype::F32;
  Device device = Device::Cpu;
  int rank = 0;
  /// Of a matrix of a block type: its rows lie sixteen side by side (kernels/quant.h); parts of it begin at whole sixteens.
  bool interleaved = false;
  std::array<int64_t, 5> size{}, stride{};

  Tensor() = default;
  /// A contiguous (C order) view.
  Tensor(void* data, Dtype type, std::initializer_list<int64_t> sizes, Device device = Device::Cpu)
      : Tensor(data, type, std::span<const int64_t>(sizes.begin(), sizes.size()), device) {}
  Tensor(void* data, Dtype type, std::span<const int64_t> sizes, Device device = Device::Cpu);

  explicit operator bool() const { return data != nullptr; }
  int64_t numel() const;
  /// Bytes from the first to past the last element of a contiguous view.
  int64_t bytes() const;
  bool contiguous() const;
  std::string shape() const;  // "[3, 64]"

  /// Element [index…] as T; T must be the tensor's type.
  template <class T, class... I>
  T& at(I... index) const {
    int64_t offset = 0;
    int axis = 0;
    ((offset += int64_t(index) * stride[size_t(axis++)]), ...);
    return static_cast<T*>(data)[offset];
  }
  template <class T> T* as() const { return static_cast<T*>(data); }
  /// All elements of a contiguous view.
  template <class T> std::span<T> span() const { return {static_cast<T*>(data), size_t(numel())}; }

  Tensor slice(int axis, int64_t begin, int64_t end) const;    // keeps the axis
  Tensor select(int axis, int64_t index) const;                // drops the axis
  Tensor reshape(std::initializer_list<int64_t> sizes) const;  // of a contiguous view
};

/// Contiguous memory of one device, aligned to at least 64 bytes, not initialised. `of` and `zeros` are of the host.
/// Throws Error(Memory) saying how many bytes were asked for.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Dtype type, std::initializer_list<int64_t> sizes, const Memory& memory = cpu_memory());
  Buffer(Dtype type, std::span<const int64_t> sizes, const Memory& memory = cpu_memory());
  template <class T>
  static Buffer of(std::initializer_list<int64_t> sizes, std::span<const T> values);
  static Buffer zeros(Dtype type, std::initializer_list<int64_t> sizes);

  operator const Tensor&() const { return view_; }
  const Tensor& view() const { return view_; }
  const Tensor* operator->() const { return &view_; }
  explicit operator bool() const { return bool(view_); }

 private:
  struct Release {
    const Memory* memory;
    void operator()(void* p) const { memory->release(p); }
  };
  std::unique_ptr<void, Release> memory_;
  Tensor view_;
};

/// Segments of unequal length inside one tensor: segment s is rows offsets[s]…end(s) of values. Without `ends` the
/// segments lie end to end (ends[s] = offsets[s + 1]); with it they may leave gaps, so that a slice of every segment
/// (the last rows, say) or a count known only to the device costs no copy.
/// A segment is one (sequence, head): number sequence · heads + head.
/// offsets (I64 [segments + 1]) and ends (I64 [segments]) live on the device; the host knows only `bound`, the most
/// rows that values can have.
struct Ragged {
  Tensor values;  // [rows] or [rows, width]
  Tensor offsets;
  Tensor ends;  // optional
  int64_t heads = 1;
  int64_t bound = 0;

  int64_t segments() const { return offsets ? offsets.size[0] - 1 : 0; }
  int64_t sequences() const { return segments() / heads; }
  // The following read offsets on the host: CPU tensors only.
  int64_t begin(int64_t s) const { return offsets.at<int64_t>(s); }
  int64_t end(int64_t s) const { return ends ? ends.at<int64_t>(s) : offsets.at<int64_t>(s + 1); }
  int64_t length(int64_t s) const { return end(s) - begin(s); }
  Tensor segment(int64_t s) const { return values.slice(0, begin(s), end(s)); }
};

/// Copies `from` to `to` (same sizes, any strides), converting between plain number types.
void copy(const Tensor& from, const Tensor& to);

template <class T>
Buffer Buffer::of(std::initializer_list<int64_t> sizes, std::span<const T> values) {
  Buffer out(DtypeOf<T>::value, sizes);
  require(int64_t(values.size()) == out->numel(), "Buffer::of", "wrong number of values for " + out->shape());
  std::copy(values.begin(), values.end(), out->as<T>());
  return out;
}

}  // namespace heed
