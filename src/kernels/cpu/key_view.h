// The keys and values that one query head reads: a segment of a panel, or of a store's pages.
#pragma once
#include "kernels/cpu/rotate.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/walk.h"

namespace heed::HEED_ISA {

class KeyView {
 public:
  /// v may be null where no values are read.
  static KeyView panel(const Ragged& k, const Ragged* v, int64_t k_segment, int64_t v_segment, const Mods& mods);
  static KeyView pages(const Pages& pages, const Read* read, Turns turns, int64_t k_segment, int64_t v_segment);

  int64_t size() const { return size_; }
  bool has_bias() const { return has_bias_; }
  bool has_until() const { return until_ != nullptr; }
  int32_t position(int64_t key) const;
  /// The first key that a window of `window` shows to a query at `position`; 0 where positions are not known to ascend.
  int64_t window_begin(float position, int64_t window) const;

  /// Takes up to kChunk keys of the walk that some lane may see (by window and until): key, position, until, bias, factor,
  /// bits. False when the walk has ended.
  bool gather(Walk& walk, const Lanes& lanes, const Mods& mods, Chunk& chunk) const;
  /// Asks the caches for the keys and values of a chunk that is to be opened after the next one. Pages only: a decode step
  /// reads each entry once, and waits for memory without it.
  void prefetch(const Chunk& chunk, const TileShape& shape) const;
  /// Points chunk.k (and chunk.v, or tile.v_rows as pairs) at the keys gathered, converting what is not in the form that
  /// tile multiplies.
  void open(Tile& tile, Chunk& chunk, bool values) const;

 private:
  void open_panel(Tile& tile, Chunk& chunk, bool values) const;
  void open_pages(Tile& tile, Chunk& chunk, bool values) const;

  int64_t size_ = 0;
  bool has_bias_ = false;
  // A panel.
  const char *k_ = nullptr, *v_ = nullptr;
  Dtype k_type_ = Dtype::F32, v_type_ = Dtype::F32;
  int64_t k_step_ = 0, v_step_ = 0;  // bytes
  const int32_t *position_ = nullptr, *until_ = nullptr;
  const float *bias_ = nullptr, *factor_ = nullptr;
  int64_t factor_step_ = 0;
  // Pages.
  const Pages* pages_ = nullptr;
  const Read* read_ = nullptr;
  Turns turns_;
  int64_t k_segment_ = 0, v_segment_ = 0;
};

}  // namespace heed::HEED_ISA
