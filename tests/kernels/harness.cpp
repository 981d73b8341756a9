#include "kernels/harness.h"

#include <cstdlib>
#include <cstring>

namespace heed::test {

Poisoned::Poisoned(Dtype type, std::vector<int64_t> sizes, int64_t shift, int64_t pad)
    : sizes_(std::move(sizes)), shift_(shift), pad_(sizes_.size() > 1 ? pad : 0) {
  view_ = Tensor(nullptr, type, std::span<const int64_t>(sizes_));
  if (pad_ > 0) {
    int64_t step = 1;
    for (int axis = view_.rank - 1; axis >= 0; --axis) {
      view_.stride[size_t(axis)] = step;
      step *= view_.size[size_t(axis)];
      if (axis == view_.rank - 1) step += pad_;
    }
  }
  int64_t elements = 1;
  for (int axis = 0; axis < view_.rank; ++axis)
    elements += std::max<int64_t>(0, view_.size[size_t(axis)] - 1) * view_.stride[size_t(axis)];
  // A guard is at least one row and one vector wide, and keeps the 64-byte alignment of what follows.
  const int64_t size = info(type).bytes,
                guard = (std::max<int64_t>(256, 2 * elements / std::max<int64_t>(1, sizes_.empty() ? 1 : sizes_[0])) + 63) /
                        64 * 64;
  memory_ = Buffer(Dtype::U8, {(elements + shift_ + 2 * guard) * size});
  std::memset(memory_->data, 0xff, size_t(memory_->bytes()));
  view_.data = static_cast<char*>(memory_->data) + (guard + shift_) * size;
}

int64_t Poisoned::strays() const {
  std::vector<uint8_t> inside(bytes().size(), 0);
  const int64_t size = info(view_.type).bytes;
  const int64_t start = static_cast<const char*>(view_.data) - static_cast<const char*>(memory_->data);
  each(view_, [&](auto index) {
    int64_t at = 0;
    for (size_t axis = 0; axis < index.size(); ++axis) at += index[axis] * view_.stride[axis];
    std::fill_n(inside.begin() + start + at * size, size, uint8_t(1));
  });
  int64_t count = 0;
  for (size_t i = 0; i < inside.size(); ++i) count += !inside[i] && bytes()[i] != 0xff;
  return count;
}

namespace {
int64_t element(const Tensor& t, std::span<const int64_t> index) {
  int64_t at = 0;
  for (size_t axis = 0; axis < index.size(); ++axis) at += index[axis] * t.stride[axis];
  return at;
}

bool poisoned(const Tensor& t, std::span<const int64_t> index) {
  const int64_t size = info(t.type).bytes;
  const uint8_t* at = static_cast<const uint8_t*>(t.data) + element(t, index) * size;
  return std::all_of(at, at + size, [](uint8_t byte) { return byte == 0xff; });
}
}  // namespace

double number(const Tensor& t, std::span<const int64_t> index) {
  const int64_t at = element(t, index);
  switch (t.type) {
    case Dtype::F32: return double(t.as<float>()[at]);
    case Dtype::F64: return t.as<double>()[at];
    case Dtype::F16: return double(t.as<f16>()[at]);
    case Dtype::BF16: return double(float(t.as<bf16>()[at]));
    case Dtype::U8: return t.as<uint8_t>()[at];
    case Dtype::I32: return t.as<int32_t>()[at];
    case Dtype::I64: return double(t.as<int64_t>()[at]);
    default: throw Error(Code::Internal, "harness", info(t.type).name);
  }
}

void set(const Tensor& t, std::span<const int64_t> index, double x) {
  const int64_t at = element(t, index);
  switch (t.type) {
    case Dtype::F32: t.as<float>()[at] = float(x); break;
    case Dtype::F64: t.as<double>()[at] = x; break;
    case Dtype::F16: t.as<f16>()[at] = f16(x); break;
    case Dtype::BF16: t.as<bf16>()[at] = bf16(float(x)); break;
    case Dtype::U8: t.as<uint8_t>()[at] = uint8_t(x); break;
    case Dtype::I32: t.as<int32_t>()[at] = int32_t(x); break;
    case Dtype::I64: t.as<int64_t>()[at] = int64_t(x); break;
    default: throw Error(Code::Internal, "harness", info(t.type).name);
  }
}

RaggedData ragged(Random& random, Dtype type, const std::vector<int64_t>& lengths, int64_t heads, int64_t width,
                  Layout layout) {
  RaggedData out;
  const int64_t segments = int64_t(lengths.size());
  out.offsets = Buffer(Dtype::I64, {segments + 1});
  if (layout.gaps) out.ends = Buffer(Dtype::I64, {segments});
  int64_t at = layout.gaps ? random.below(3) : 0;
  for (int64_t s = 0; s < segments; ++s) {
    out.offsets->at<int64_t>(s) = at;
    at += lengths[size_t(s)];
    if (layout.gaps) {
      out.ends->at<int64_t>(s) = at;
      at += random.below(4);
    }
  }
  out.offsets->at<int64_t>(segments) = at;
  std::vector<int64_t> sizes{at};
  if (width > 0) sizes.push_back(width);
  out.values = Poisoned(type, sizes, layout.shift, layout.pad);
  out.view = {out.values, out.offsets, out.ends, heads, at};
  return out;
}

RaggedData normal_ragged(Random& random, Dtype type, const std::vector<int64_t>& lengths, int64_t heads, int64_t width,
                         Layout layout, double deviation) {
  RaggedData out = ragged(random, type, lengths, heads, width, layout);
  for (int64_t s = 0; s < out.view.segments(); ++s)
    each(out.view.segment(s), [&](auto index) { set(out.view.segment(s), index, deviation * random.normal()); });
  return out;
}

void expect_close(const char* what, const Poisoned& expected, const Poisoned& got, double bound) {
  EXPECT_EQ(got.strays(), 0) << what << ": bytes outside the result were written";
  int64_t wrong = 0;
  double worst = -1;
  std::string first, at_worst;
  each(expected.view(), [&](auto index) {
    const bool untouched = poisoned(expected.view(), index);
    const double a = number(expected.view(), index), b = number(got.view(), index);
    bool fine;
    if (untouched) {
      fine = poisoned(got.view(), index);
    } else if (std::isinf(a) || std::isinf(b)) {
      fine = a == b;
    } else {
      fine = std::abs(a - b) <= bound;
    }
    if (fine) return;
    std::string text = "at";
    for (int64_t i : index) text.append(" ").append(std::to_string(i));
    text += ": " + (untouched ? std::string("left alone") : std::to_string(a)) + " but got " + std::to_string(b);
    if (!wrong++) first = text;
    if (std::abs(a - b) > worst) {
      worst = std::abs(a - b);
      at_worst = text;
    }
  });
  EXPECT_EQ(wrong, 0) << what << " " << expected->shape() << ": beyond " << bound << "; first " << first << "; worst "
                      << at_worst;
}

double largest(const Tensor& t) {
  double out = 0;
  each(t, [&](auto index) {
    const double x = std::abs(number(t, index));
    if (std::isfinite(x)) out = std::max(out, x);
  });
  return out;
}

double longest_row(const Tensor& t) {
  double out = 0;
  for (int64_t r = 0; r < t.size[0]; ++r) {
    double squares = 0;
    each(t.select(0, r), [&](auto index) {
      const double x = number(t.select(0, r), index);
      squares += x * x;
    });
    if (std::isfinite(squares)) out = std::max(out, squares);
  }
  return std::sqrt(out);
}

}  // namespace heed::test
