#include "kernels/reference/reference.h"

#include <algorithm>

namespace heed::reference {

double load(const Tensor& t, int64_t offset) {
  switch (t.type) {
    case Dtype::F32: return double(t.as<float>()[offset]);
    case Dtype::F64: return t.as<double>()[offset];
    case Dtype::F16: return double(t.as<f16>()[offset]);
    case Dtype::BF16: return double(float(t.as<bf16>()[offset]));
    case Dtype::I8: return t.as<int8_t>()[offset];
    case Dtype::U8: return t.as<uint8_t>()[offset];
    case Dtype::I32: return t.as<int32_t>()[offset];
    case Dtype::I64: return double(t.as<int64_t>()[offset]);
    default: throw Error(Code::Invalid, "reference", std::string("numbers of type ") + info(t.type).name);
  }
}

void store(const Tensor& t, int64_t offset, double x) {
  switch (t.type) {
    case Dtype::F32: t.as<float>()[offset] = float(x); break;
    case Dtype::F64: t.as<double>()[offset] = x; break;
    case Dtype::F16: t.as<f16>()[offset] = f16(x); break;
    case Dtype::BF16: t.as<bf16>()[offset] = bf16(float(x)); break;
    case Dtype::I32: t.as<int32_t>()[offset] = int32_t(x); break;
    default: throw Error(Code::Invalid, "reference", std::string("results of type ") + info(t.type).name);
  }
}

std::vector<double> row(const Tensor& t, int64_t r) {
  std::vector<double> out(size_t(width(t)));
  for (size_t c = 0; c < out.size(); ++c) out[c] = number(t, r, int64_t(c));
  return out;
}

void set_row(const Tensor& t, int64_t r, const std::vector<double>& x) {
  for (size_t c = 0; c < x.size(); ++c) store(t, offset(t, r, int64_t(c)), x[c]);
}

double log_sum_exp(const std::vector<double>& x) {
  const double top = x.empty() ? -infinity : *std::max_element(x.begin(), x.end());
  if (top == -infinity) return -infinity;
  double sum = 0;
  for (double value : x) sum += std::exp(value - top);
  return top + std::log(sum);
}

void rotate(const Rope& rope, int64_t position, double* x) {
  const int half = rope.dims / 2;
  for (int i = 0; i < half; ++i) {
    double& a = x[rope.neox ? i : 2 * i];
    double& b = x[rope.neox ? i + half : 2 * i + 1];
    const double angle = double(position) * number(rope.inv_freq, i);
    const double turned = a * std::cos(angle) - b * std::sin(angle);
    b = a * std::sin(angle) + b * std::cos(angle);
    a = turned;
  }
}

}  // namespace heed::reference
