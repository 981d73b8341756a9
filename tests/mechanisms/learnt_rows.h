// Learnt rows for restorekv, at random.
#pragma once
#include <gtest/gtest.h>

#include "base/npy.h"
#include "base/random.h"

namespace heed::test {

/// A file of eight rows and of small changes of the feed-forward matrices: for all models of these sizes. The same in every
/// process, which may all write it.
inline std::string learnt_rows(int64_t layers, int64_t hidden, int64_t inner) {
  Random random(5);
  const auto draw = [&](std::initializer_list<int64_t> sizes, double deviation) {
    Buffer out(Dtype::F32, sizes);
    for (float& x : out->span<float>()) x = float(deviation * random.normal());
    return out;
  };
  const Buffer rows = draw({8, hidden}, 0.1), gate_a = draw({layers, 4, hidden}, 0.04),
               gate_b = draw({layers, inner, 4}, 0.1), down_a = draw({layers, 3, inner}, 0.04),
               down_b = draw({layers, hidden, 3}, 0.02);
  const std::string path = testing::TempDir() + "learnt_rows_" + std::to_string(layers) + "_" + std::to_string(hidden) +
                           ".npz";
  value_or_throw(write_npz(
      path, {{"embeddings", rows}, {"gate.a", gate_a}, {"gate.b", gate_b}, {"down.a", down_a}, {"down.b", down_b}}));
  return path;
}

}  // namespace heed::test
