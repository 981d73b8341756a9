// observe over keys of bf16, for tiles of many queries.
#pragma once
#include <memory>

#include "kernels/cpu/tile_tasks.h"

namespace heed::HEED_ISA {

/// What the queries of a task pay to each key, summed (or the largest), by the products of bf16_products.h.
class ObservedBf16 {
 public:
  /// Whether this call is worth it. The plan has one part.
  static bool takes(const Ragged& q, const Keys& keys, const Plan& plan, const Mods& mods, const Observe& how);
  /// lse: row, of the keys that count.
  ObservedBf16(Queue& queue, const Ragged& q, const Ragged& k, const Plan& plan, const Mods& mods, const Observe& how,
               Tensor lse);
  ~ObservedBf16();

  const std::vector<TileTask>& tasks() const;
  /// Bytes of a worker; `keys` of a range at most.
  int64_t bytes(int64_t keys) const;
  /// Folds a task's weights of keys low ≤ key < high into columns[key − low]; low is a multiple of 32.
  void add(char* memory, const TileTask& task, int64_t low, int64_t high, float* columns) const;

 private:
  class Tiles;
  std::unique_ptr<Tiles> tiles_;
};

}  // namespace heed::HEED_ISA
