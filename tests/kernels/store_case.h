// Random stores: pages of several layouts, in any order in memory, poisoned and guarded.
#pragma once
#include <memory>

#include "kernels/harness.h"

namespace heed::test {

/// Which page types a store may have.
enum class Kinds {
  Plain,  // no quantised ones
  Alike,  // plain, and one layout for all pages
  Bf16,   // that of a model's cache: GPUs have kernels of their own for it
  Codes,  // whole numbers with a scale, and with a zero or without
  Sketches,
  Any,
};

struct StoreCase {
  int64_t sequences, g, d, d_v;
  std::vector<Column> columns;
  Pages pages;
  std::vector<int64_t> lengths;  // entries written

  /// An empty store for segments of up to these lengths.
  StoreCase(Random& random, std::vector<int64_t> lengths, int64_t g, int64_t d, int64_t d_v, Kinds kinds, bool v_transposed);
  StoreCase(const StoreCase&) = delete;
  /// The same table of pages with contents of its own.
  std::unique_ptr<StoreCase> copy() const;
  void set_lengths(const std::vector<int64_t>& to) const;
  /// Bytes between pages that are no longer poison.
  int64_t strays() const;
  /// Every entry gets a random logit bias where the layout has room for one.
  void randomise_bias(Random& random) const;
  std::string text() const;

 private:
  StoreCase() = default;
  void hand_out();
  Buffer memory_, table_, layout_, length_;
  std::vector<int64_t> at_;  // of each page in memory_, −1 for none
};

/// What a store's segments can be asked for, read back by the oracle: keys, values, positions, biases, columns.
struct Contents {
  RaggedData k, v;
  Poisoned positions, bias;
  std::vector<Poisoned> columns;  // [segment, entry or block, width], NaN beyond each segment's length
  explicit Contents(const StoreCase& store);
};

}  // namespace heed::test
