// Random weights against their exact values: mean and spread of every type, the same on any number of threads.
#include "model/random_weights.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/threads.h"
#include "kernels/kernels.h"

namespace heed {
namespace {

TEST(RandomWeights, HaveTheSpreadPromisedInEveryType) {
  for (Dtype type : {Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1,
                     Dtype::Q8_0, Dtype::IQ4_NL, Dtype::Q2_K, Dtype::Q3_K, Dtype::Q4_K, Dtype::Q5_K, Dtype::Q6_K}) {
    const Buffer weights(type, {64, 1024});
    fill_random(weights, 5);
    Queue queue(&reference_kernels(), *reference_kernels().memory);
    const Buffer values(Dtype::F32, {64, 1024});
    queue.run->dequantise(queue, weights, values);
    double sum = 0, squares = 0;
    for (float x : values->span<float>()) sum += x, squares += double(x) * x;
    const double mean = sum / (64 * 1024), deviation = std::sqrt(squares / (64 * 1024) - mean * mean);
    EXPECT_NEAR(mean, 0, 0.004) << info(type).name;
    EXPECT_GT(deviation, 0.012) << info(type).name;
    EXPECT_LT(deviation, 0.03) << info(type).name;
  }
}

TEST(RandomWeights, HangOnTheSeedAlone) {
  const int before = threads();
  const auto bytes = [](int workers, uint64_t seed) {
    set_threads(workers);
    const Buffer weights(Dtype::Q6_K, {96, 1024});
    fill_random(weights, seed);
    return std::string(static_cast<const char*>(weights->data), size_t(weights->bytes()));
  };
  EXPECT_EQ(bytes(1, 3), bytes(3, 3));
  EXPECT_NE(bytes(1, 3), bytes(1, 4));
  set_threads(before);
  const Buffer numbers(Dtype::I32, {8});
  EXPECT_THROW(fill_random(numbers, 1), Error);
}

}  // namespace
}  // namespace heed
