// Plans known from shapes alone: static masks, run by the kernels as whole blocks and bit masks.
#pragma once
#include <functional>

#include "attention/mechanism.h"

namespace heed {

/// Takes a half-open range of keys.
using AddKeys = std::function<void(int64_t begin, int64_t end)>;
/// Names the keys that the query at key number i of m reads; ranges may overlap and reach past what exists. Of what lies
/// behind the query nothing is read.
using Pattern = std::function<void(int64_t i, int64_t m, const AddKeys& add)>;

/// The plan that reads what `pattern` names, for all heads alike, as blocks of 64 keys for Kernels::plan_rows queries, with bit masks where they
/// are cut.
/// Key numbers count the entries that the queries see, so behind an eviction a pattern is one of what is left.
Plan pattern_plan(LayerView&, const Pattern& pattern);
/// Likewise with a pattern for each query head.
Plan pattern_plan(LayerView&, const std::function<const Pattern&(int64_t head)>& of_head);

/// Tokens laid out as rows of a map behind `text` tokens, which see all and are seen by all.
struct TokenMap {
  int64_t text, width;
  int64_t rows(int64_t m) const { return (m - text + width - 1) / width; }
  int64_t row(int64_t i) const { return (i - text) / width; }
  int64_t column(int64_t i) const { return (i - text) % width; }
  /// Columns x0 … x1 − 1 of a row; what lies outside the map is cut off.
  void add(const AddKeys&, int64_t y, int64_t x0, int64_t x1) const;
};

/// Tiles of `tile` new queries that see all the keys of their own tile and no others, later ones too. For queries without
/// the first and the last so many: a row for each tile of those.
Plan own_tiles(LayerView&, int tile, int64_t first = 0, int64_t last = 0);

}  // namespace heed
