#include "kernels/cpu/key_view.h"

#include <algorithm>
#include <limits>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/page_side.h"

namespace heed::HEED_ISA {
namespace {

/// to[c] = even[c] | odd[c] << 16; `odd` null: zeros.
void pair_rows(const char* even, const char* odd, int n, uint32_t* to) {
  const auto* a = reinterpret_cast<const uint16_t*>(even);
  if (!odd) {
    for (int c = 0; c < n; ++c) to[c] = a[c];
    return;
  }
  const auto* b = reinterpret_cast<const uint16_t*>(odd);
  for (int c = 0; c < n; ++c) to[c] = uint32_t(a[c]) | uint32_t(b[c]) << 16;
}

char* entry_page(const Pages& pages, int64_t segment, int64_t key) { return pages.page(segment, key / kPage); }

}  // namespace

KeyView KeyView::panel(const Ragged& k, const Ragged* v, int64_t k_segment, int64_t v_segment, const Mods& mods) {
  KeyView out;
  const int64_t first = k.begin(k_segment);
  out.size_ = k.length(k_segment);
  out.k_ = row_of(k.values, first);
  out.k_type_ = k.values.type;
  out.k_step_ = k.values.stride[0] * info(k.values.type).bytes;
  if (v) {
    require(v->length(v_segment) == out.size_, "attend", "a segment of v is not as long as its keys");
    out.v_ = row_of(v->values, v->begin(v_segment));
    out.v_type_ = v->values.type;
    out.v_step_ = v->values.stride[0] * info(v->values.type).bytes;
  }
  if (mods.k_pos) out.position_ = mods.k_pos.as<int32_t>() + first;
  if (mods.until) out.until_ = mods.until.as<int32_t>() + first;
  if (mods.key_bias) out.bias_ = mods.key_bias.as<float>() + first;
  if (mods.key_factor) {
    out.factor_step_ = mods.key_factor.stride[0];
    out.factor_ = mods.key_factor.as<float>() + first * out.factor_step_;
  }
  out.has_bias_ = out.bias_ != nullptr;
  return out;
}

KeyView KeyView::pages(const Pages& pages, const Read* read, Turns turns, int64_t k_segment, int64_t v_segment) {
  KeyView out;
  out.pages_ = &pages;
  out.read_ = read;
  out.turns_ = turns;
  out.k_segment_ = k_segment;
  out.v_segment_ = v_segment;
  out.size_ = pages.length.at<int32_t>(k_segment);
  require(pages.length.at<int32_t>(v_segment) == out.size_, "attend_store", "a segment of v is not as long as its keys");
  for (const PageLayout& layout : pages.layouts) out.has_bias_ |= layout.bias_at >= 0;
  return out;
}

int32_t KeyView::position(int64_t key) const {
  if (pages_) {
    const char* page = entry_page(*pages_, k_segment_, key);
    const PageLayout& layout = pages_->layout_of(k_segment_, key / kPage);
    return reinterpret_cast<const int32_t*>(page + layout.position_at)[key % kPage];
  }
  return position_ ? position_[key] : int32_t(key);
}

int64_t KeyView::window_begin(float position, int64_t window) const {
  if (pages_) return 0;
  const double first = double(position) - double(window);  // keys up to here are hidden
  if (!position_) return std::clamp<int64_t>(int64_t(std::floor(first)) + 1, 0, size_);
  return std::upper_bound(position_, position_ + size_, first, [](double a, int32_t b) { return a < double(b); }) - position_;
}

bool KeyView::gather(Walk& walk, const Lanes& lanes, const Mods& mods, Chunk& chunk) const {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const bool windowed = mods.window > 0;
  chunk.count = 0;
  chunk.masked = false;
  chunk.position_low = chunk.until_low = infinity;
  Run run;
  while (chunk.count < kChunk && walk.next(kChunk - chunk.count, run)) {
    for (int64_t i = 0; i < run.count; ++i) {
      const int64_t key = run.first + i;
      const int at = chunk.count;
      if (windowed) {
        const float p = float(position(key));
        if (lanes.position_low - p >= float(mods.window)) continue;
        chunk.position[at] = p;
        chunk.position_low = std::min(chunk.position_low, p);
      }
      if (until_) {
        const float last = float(until_[key]);
        if (last < lanes.position_low) continue;
        chunk.until[at] = last;
        chunk.until_low = std::min(chunk.until_low, last);
      }
      chunk.key[at] = int32_t(key);
      if (bias_) chunk.bias[at] = bias_[key];
      if (factor_) chunk.factor[at] = factor_ + key * factor_step_;
      chunk.bits[at] = run.bits ? run.bits + (run.bit + i) / 64 : nullptr;
      chunk.bit[at] = uint8_t((run.bit + i) % 64);
      chunk.masked |= run.bits != nullptr;
      ++chunk.count;
    }
  }
  return chunk.count > 0;
}

void KeyView::prefetch(const Chunk& chunk, const TileShape& shape) const {
  if (!pages_) return;
  for (int j = 0; j < chunk.count; ++j) {
    const int64_t key = chunk.key[j];
    const PageLayout& layout = pages_->layout_of(k_segment_, key / kPage);
    const char* page = entry_page(*pages_, k_segment_, key);
    const int64_t k_bytes = int64_t(shape.d) * layout.k.bits() / 8, v_bytes = int64_t(shape.d_v) * layout.v.bits() / 8;
    const char* k = page + layout.k_at + key % kPage * k_bytes;
    const char* v = (v_segment_ == k_segment_ ? page : entry_page(*pages_, v_segment_, key)) + layout.v_at +
                    key % kPage * v_bytes;
    for (int64_t at = 0; at < k_bytes; at += 64) __builtin_prefetch(k + at, 0, 2);
    for (int64_t at = 0; at < v_bytes; at += 64) __builtin_prefetch(v + at, 0, 2);
  }
}

void KeyView::open(Tile& tile, Chunk& chunk, bool values) const {
  if (pages_) open_pages(tile, chunk, values);
  else open_panel(tile, chunk, values);
  // Micro-kernels take whole blocks of 6, 8 or 12 keys: the last key again, up to a multiple of all three.
  for (int j = chunk.count; j % 24; ++j) chunk.k[j] = chunk.k[chunk.count - 1];
}

void KeyView::open_panel(Tile& tile, Chunk& chunk, bool values) const {
  const int d = tile.shape.d, d_v = tile.shape.d_v, count = chunk.count;
  if (tile.shape.dots) {
    for (int j = 0; j < count; ++j) chunk.k[j] = k_ + chunk.key[j] * k_step_;
    if (!values) return;
    for (int j = 0; j < count; j += 2)
      pair_rows(v_ + chunk.key[j] * v_step_, j + 1 < count ? v_ + chunk.key[j + 1] * v_step_ : nullptr, d_v,
                reinterpret_cast<uint32_t*>(tile.v_rows) + int64_t(j / 2) * d_v);
    return;
  }
  for (int j = 0; j < count; ++j)
    chunk.k[j] = widen_row(k_ + chunk.key[j] * k_step_, k_type_, d, tile.k_rows + int64_t(j) * d);
  if (!values) return;
  for (int j = 0; j < count; ++j)
    chunk.v[j] = widen_row(v_ + chunk.key[j] * v_step_, v_type_, d_v, tile.v_rows + int64_t(j) * d_v);
}

void KeyView::open_pages(Tile& tile, Chunk& chunk, bool values) const {
  const int d = tile.shape.d, d_v = tile.shape.d_v, count = chunk.count;
  auto keys_of = [&](int64_t key) {
    return PageSide::keys(pages_->layout_of(k_segment_, key / kPage), entry_page(*pages_, k_segment_, key));
  };
  auto values_of = [&](int64_t key) {
    return PageSide::values(pages_->layout_of(v_segment_, key / kPage), entry_page(*pages_, v_segment_, key));
  };
  if (has_bias_)
    for (int j = 0; j < count; ++j) {
      const PageLayout& layout = pages_->layout_of(k_segment_, chunk.key[j] / kPage);
      const char* page = entry_page(*pages_, k_segment_, chunk.key[j]);
      chunk.bias[j] = layout.bias_at < 0 ? 0 : reinterpret_cast<const float*>(page + layout.bias_at)[chunk.key[j] % kPage];
    }
  for (int j = 0; j < count; ++j) {
    const int64_t key = chunk.key[j];
    const PageSide side = keys_of(key);
    if (tile.shape.dots) {
      chunk.k[j] = side.row(int(key % kPage));
      continue;
    }
    float* to = tile.k_rows + int64_t(j) * d;
    const float* row = read_entry(side, int(key % kPage), to);
    if (turns_.rope) {
      if (row != to) std::copy_n(row, d, to);
      rotate_row(turns_, read_->place(k_segment_, key, position(key)), to);
      row = to;
    }
    chunk.k[j] = row;
  }
  if (!values) return;
  if (!tile.shape.dots) {
    for (int j = 0; j < count; ++j) {
      const int64_t key = chunk.key[j];
      chunk.v[j] = read_entry(values_of(key), int(key % kPage), tile.v_rows + int64_t(j) * d_v);
    }
    return;
  }
  for (int j = 0; j < count; j += 2)
    pair_rows(values_of(chunk.key[j]).row(int(chunk.key[j] % kPage)),
              j + 1 < count ? values_of(chunk.key[j + 1]).row(int(chunk.key[j + 1] % kPage)) : nullptr, d_v,
              reinterpret_cast<uint32_t*>(tile.v_rows) + int64_t(j / 2) * d_v);
}

}  // namespace heed::HEED_ISA
