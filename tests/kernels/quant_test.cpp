// dequantise_row against the gguf package (tests/data/make/quant.py).
#include "kernels/quant.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <vector>

#include "base/error.h"

namespace heed {
namespace {

std::vector<char> bytes(const std::string& name) {
  std::ifstream in(HEED_TEST_DATA "/quant/" + name, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

class Quant : public testing::TestWithParam<Dtype> {};

TEST_P(Quant, EqualsTheGgufPackage) {
  const DtypeInfo type = info(GetParam());
  const std::vector<char> blocks = bytes(std::string(type.name) + ".blocks");
  const std::vector<char> raw = bytes(std::string(type.name) + ".values");
  ASSERT_GE(blocks.size(), size_t(3 * type.bytes));
  std::vector<float> want(raw.size() / sizeof(float));
  std::memcpy(want.data(), raw.data(), raw.size());
  ASSERT_EQ(want.size(), blocks.size() / size_t(type.bytes) * size_t(type.block));

  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> got(want.size() + 1, nan);
  dequantise_row(GetParam(), blocks.data(), int64_t(want.size()), got.data());
  // Where the compiler fuses the product and the sum (64-bit Arm), one rounding is saved: hence the two steps.
  for (size_t i = 0; i < want.size(); ++i) EXPECT_FLOAT_EQ(got[i], want[i]) << type.name << " value " << i;
  EXPECT_TRUE(std::isnan(got.back()));

  // One block alone, and none.
  std::vector<float> one(size_t(type.block), nan);
  dequantise_row(GetParam(), blocks.data() + type.bytes, type.block, one.data());
  for (int i = 0; i < type.block; ++i) EXPECT_EQ(one[size_t(i)], got[size_t(type.block + i)]);
  dequantise_row(GetParam(), nullptr, 0, nullptr);
  EXPECT_THROW(dequantise_row(GetParam(), blocks.data(), type.block - 1, got.data()), Error);
}

INSTANTIATE_TEST_SUITE_P(Formats, Quant,
                         testing::Values(Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::Q8_0, Dtype::Q2_K,
                                         Dtype::Q3_K, Dtype::Q4_K, Dtype::Q5_K, Dtype::Q6_K, Dtype::IQ4_NL),
                         [](const auto& param) { return std::string(heed::info(param.param).name); });

TEST(QuantPlain, NumbersConvert) {
  float out[3];
  const int8_t i8[] = {-128, 0, 127};
  dequantise_row(Dtype::I8, i8, 3, out);
  EXPECT_EQ(out[0], -128);
  EXPECT_EQ(out[2], 127);
  const bf16 halves[] = {bf16(1.5f), bf16(-2.0f), bf16(0.0f)};
  dequantise_row(Dtype::BF16, halves, 3, out);
  EXPECT_EQ(out[0], 1.5f);
  EXPECT_EQ(out[1], -2.0f);
  const double f64[] = {0.1, 1e300, -3};
  dequantise_row(Dtype::F64, f64, 3, out);
  EXPECT_EQ(out[0], 0.1f);
  EXPECT_EQ(out[2], -3.0f);
  const f16 f[] = {f16(0.5), f16(65504), f16(-0.25)};
  dequantise_row(Dtype::F16, f, 3, out);
  EXPECT_EQ(out[1], 65504.0f);
}

}  // namespace
}  // namespace heed
