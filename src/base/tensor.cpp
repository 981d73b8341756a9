#include "base/tensor.h"

#include <cstdlib>
#include <cstring>

namespace heed {

Tensor::Tensor(void* data, Dtype type, std::span<const int64_t> sizes, Device device)
    : data(data), type(type), device(device), rank(int(sizes.size())) {
  require(sizes.size() <= size.size(), "Tensor", "more than five dimensions");
  int64_t step = 1;
  for (int axis = rank - 1; axis >= 0; --axis) {
    size[size_t(axis)] = sizes[size_t(axis)];
    stride[size_t(axis)] = step;
    step *= sizes[size_t(axis)];
  }
}

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int axis = 0; axis < rank; ++axis) count *= size[size_t(axis)];
  return count;
}

int64_t Tensor::bytes() const {
  const DtypeInfo t = info(type);
  return numel() / t.block * t.bytes;
}

bool Tensor::contiguous() const {
  int64_t step = 1;
  for (int axis = rank - 1; axis >= 0; --axis) {
    if (size[size_t(axis)] != 1 && stride[size_t(axis)] != step) return false;
    step *= size[size_t(axis)];
  }
  return true;
}

std::string Tensor::shape() const {
  std::string out = "[";
  for (int axis = 0; axis < rank; ++axis) out += (axis ? ", " : "") + std::to_string(size[size_t(axis)]);
  return out + "]";
}

namespace {
void* advance(const Tensor& t, int64_t elements) {
  const DtypeInfo i = info(t.type);
  return static_cast<char*>(t.data) + elements / i.block * i.bytes;
}
}  // namespace

Tensor Tensor::slice(int axis, int64_t begin, int64_t end) const {
  require(axis >= 0 && axis < rank && begin >= 0 && begin <= end && end <= size[size_t(axis)], "Tensor::slice", [&] {
    return std::to_string(begin) + "…" + std::to_string(end) + " of axis " + std::to_string(axis) + " of " + shape();
  });
  Tensor out = *this;
  out.data = advance(*this, begin * stride[size_t(axis)]);
  out.size[size_t(axis)] = end - begin;
  return out;
}

Tensor Tensor::select(int axis, int64_t index) const {
  Tensor out = slice(axis, index, index + 1);
  for (int a = axis; a + 1 < rank; ++a) {
    out.size[size_t(a)] = out.size[size_t(a + 1)];
    out.stride[size_t(a)] = out.stride[size_t(a + 1)];
  }
  --out.rank;
  out.size[size_t(out.rank)] = out.stride[size_t(out.rank)] = 0;  // what lies past the rank must compare equal
  return out;
}

Tensor Tensor::reshape(std::initializer_list<int64_t> sizes) const {
  Tensor out(data, type, sizes, device);
  require(contiguous() && out.numel() == numel(), "Tensor::reshape", [&] { return shape() + " to " + out.shape(); });
  return out;
}

Buffer::Buffer(Dtype type, std::initializer_list<int64_t> sizes, const Memory& memory)
    : Buffer(type, std::span<const int64_t>(sizes.begin(), sizes.size()), memory) {}

Buffer::Buffer(Dtype type, std::span<const int64_t> sizes, const Memory& memory) : memory_(nullptr, Release{&memory}) {
  const DtypeInfo i = info(type);
  int64_t count = i.bytes;
  for (int64_t n : sizes)
    if (n < 0 || __builtin_mul_overflow(count, n, &count))
      throw Error(Code::Memory, "Buffer", "a size that does not fit in memory");
  memory_.reset(memory.allocate(count / i.block));
  view_ = Tensor(memory_.get(), type, sizes, memory.device);
}

Buffer Buffer::zeros(Dtype type, std::initializer_list<int64_t> sizes) {
  Buffer out(type, sizes);
  std::memset(out->data, 0, size_t(out->bytes()));
  return out;
}

namespace {
double load(const Tensor& t, int64_t offset) {
  switch (t.type) {
    case Dtype::F32: return t.as<float>()[offset];
    case Dtype::F64: return t.as<double>()[offset];
    case Dtype::F16: return double(t.as<f16>()[offset]);
    case Dtype::BF16: return double(float(t.as<bf16>()[offset]));
    case Dtype::I8: return t.as<int8_t>()[offset];
    case Dtype::U8: return t.as<uint8_t>()[offset];
    case Dtype::I32: return t.as<int32_t>()[offset];
    case Dtype::I64: return double(t.as<int64_t>()[offset]);
    default: throw Error(Code::Unsupported, "copy", std::string("from ") + info(t.type).name);
  }
}

void store(const Tensor& t, int64_t offset, double x) {
  switch (t.type) {
    case Dtype::F32: t.as<float>()[offset] = float(x); break;
    case Dtype::F64: t.as<double>()[offset] = x; break;
    case Dtype::F16: t.as<f16>()[offset] = f16(x); break;
    case Dtype::BF16: t.as<bf16>()[offset] = bf16(float(x)); break;
    case Dtype::I8: t.as<int8_t>()[offset] = int8_t(x); break;
    case Dtype::U8: t.as<uint8_t>()[offset] = uint8_t(x); break;
    case Dtype::I32: t.as<int32_t>()[offset] = int32_t(x); break;
    case Dtype::I64: t.as<int64_t>()[offset] = int64_t(x); break;
    default: throw Error(Code::Unsupported, "copy", std::string("to ") + info(t.type).name);
  }
}
}  // namespace

void copy(const Tensor& from, const Tensor& to) {
  require(from.rank == to.rank && from.size == to.size, "copy", [&] { return from.shape() + " to " + to.shape(); });
  const int64_t count = from.numel();
  if (from.type == to.type && from.contiguous() && to.contiguous()) {
    if (count) std::memcpy(to.data, from.data, size_t(from.bytes()));
    return;
  }
  std::array<int64_t, 5> index{};
  for (int64_t i = 0; i < count; ++i) {
    int64_t a = 0, b = 0;
    for (int axis = 0; axis < from.rank; ++axis) {
      a += index[size_t(axis)] * from.stride[size_t(axis)];
      b += index[size_t(axis)] * to.stride[size_t(axis)];
    }
    store(to, b, load(from, a));
    for (int axis = from.rank - 1; axis >= 0; --axis) {
      if (++index[size_t(axis)] < from.size[size_t(axis)]) break;
      index[size_t(axis)] = 0;
    }
  }
}

}  // namespace heed
