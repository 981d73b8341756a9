#include "model/random_weights.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "base/error.h"
#include "base/random.h"
#include "base/threads.h"
#include "kernels/quant.h"

namespace heed {
namespace {

constexpr double kDeviation = 0.02;
constexpr int64_t kPiece = 1 << 16;  // elements or blocks with a seed of their own

template <class Body>
void each_piece(int64_t count, uint64_t seed, Body body) {
  parallel_for((count + kPiece - 1) / kPiece, [&](int64_t piece) {
    Random random(seed * 0x2545f4914f6cdd1dull + uint64_t(piece));
    body(random, piece * kPiece, std::min(count, (piece + 1) * kPiece));
  });
}

template <class T>
void normal(const Tensor& weights, uint64_t seed) {
  T* out = weights.as<T>();
  each_piece(weights.numel(), seed, [&](Random& random, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = T(float(kDeviation * random.normal()));
  });
}

/// Random codes, and scales under which values have the deviation: `spread` is that of code · run's scale.
template <class Block>
void codes(const Tensor& weights, uint64_t seed, double spread, double mean) {
  Block* out = static_cast<Block*>(weights.data);
  each_piece(weights.numel() / info(weights.type).block, seed, [&](Random& random, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto* bytes = reinterpret_cast<unsigned char*>(&out[i]);
      for (size_t b = 0; b < sizeof(Block); b += 8) {
        const uint64_t word = random.next();
        std::memcpy(bytes + b, &word, std::min<size_t>(8, sizeof(Block) - b));
      }
      const double d = kDeviation / spread;
      out[i].d = f16(float(d));
      if constexpr (requires { out[i].m; }) out[i].m = f16(float(-d * mean));
      if constexpr (requires { out[i].dmin; }) out[i].dmin = f16(float(d * mean));
    }
  });
}

}  // namespace

void fill_random(const Tensor& weights, uint64_t seed) {
  // Uniform codes of b bits deviate by 2^b / √12; runs of K types have scales of their own, uniform too.
  switch (weights.type) {
    case Dtype::F32: return normal<float>(weights, seed);
    case Dtype::F16: return normal<f16>(weights, seed);
    case Dtype::BF16: return normal<bf16>(weights, seed);
    case Dtype::Q4_0: return codes<BlockQ4_0>(weights, seed, 4.6, 0);
    case Dtype::Q4_1: return codes<BlockQ4_1>(weights, seed, 4.6, 7.5);
    case Dtype::Q5_0: return codes<BlockQ5_0>(weights, seed, 9.2, 0);
    case Dtype::Q5_1: return codes<BlockQ5_1>(weights, seed, 9.2, 15.5);
    case Dtype::Q8_0: return codes<BlockQ8_0>(weights, seed, 74, 0);
    case Dtype::IQ4_NL: return codes<BlockIQ4_NL>(weights, seed, 69, 0);
    case Dtype::Q2_K: return codes<BlockQ2_K>(weights, seed, 16, 1.5);
    case Dtype::Q3_K: return codes<BlockQ3_K>(weights, seed, 42, 0);
    case Dtype::Q4_K: return codes<BlockQ4_K>(weights, seed, 325, 7.5);
    case Dtype::Q5_K: return codes<BlockQ5_K>(weights, seed, 650, 15.5);
    case Dtype::Q6_K: return codes<BlockQ6_K>(weights, seed, 1365, 0);
    default: break;
  }
  throw Error(Code::Unsupported, "random weights", std::string("there are none of type ") + info(weights.type).name,
              "f32, f16, bf16 or one of GGUF's quantised types");
}

}  // namespace heed
