#include "kernels/cpu/page_side.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/convert.h"

namespace heed::HEED_ISA {
namespace {

uint32_t code_at(const PageSide& side, int64_t place) {
  const int bits = side.type->bits();
  return uint32_t(uint8_t(side.data[place * bits / 8])) >> (place * bits % 8) & ((1u << bits) - 1);
}

/// Codes [first, first + n) of an entry, one a byte.
void expand(const PageSide& side, int entry, int first, int n, uint8_t* codes) {
  const int bits = side.type->bits();
  const int64_t place = side.place(entry, first);
  if (side.transposed || place * bits % 8 != 0) {
    for (int c = 0; c < n; ++c) codes[c] = uint8_t(code_at(side, side.place(entry, first + c)));
    return;
  }
  const auto* from = reinterpret_cast<const uint8_t*>(side.data) + place * bits / 8;
  switch (bits) {
    case 8: std::copy_n(from, n, codes); break;
    case 4:
      for (int c = 0; c < n / 2; ++c) {
        codes[2 * c] = from[c] & 15;
        codes[2 * c + 1] = from[c] >> 4;
      }
      if (n % 2) codes[n - 1] = from[n / 2] & 15;
      break;
    default:
      for (int c = 0; c < n; ++c) codes[c] = from[c / 4] >> (c % 4 * 2) & 3;
  }
}

void read_quantised(const PageSide& side, int entry, float* out) {
  const bool by_channel = side.type->axis == PageType::Axis::Channel;
  uint8_t codes[64 + kLanes] = {};
  for (int first = 0; first < side.width; first += 64) {
    const int n = std::min(64, side.width - first);
    expand(side, entry, first, n, codes);
    for (int c = 0; c < n;) {
      const int64_t group = side.group(entry, first + c);
      const int left = by_channel ? n - c : std::min(n - c, side.type->group - (first + c) % side.type->group);
      const int count = std::min(left, kLanes);
      if (side.type->codes == PageType::Codes::Table) {
        const float scale = float(side.scales()[group]);
        for (int i = 0; i < count; ++i) out[first + c + i] = side.type->points[codes[c + i]] * scale;
      } else {
        const F scale = by_channel ? load_part(side.scales() + group, count) : set(float(side.scales()[group]));
        const F zero = by_channel ? load_part(side.zeros() + group, count) : set(side.zero(group));
        store_part(out + first + c, fma(load(codes + c), scale, zero), count);
      }
      c += count;
    }
  }
}

void set_code(const PageSide& side, int64_t place, uint32_t code) {
  const int bits = side.type->bits(), shift = int(place * bits % 8), mask = ((1 << bits) - 1) << shift;
  char& byte = side.data[place * bits / 8];
  byte = char((byte & ~mask) | int(code << shift));
}

/// Codes, scale and zero of `entries` × `channels` numbers that share them.
void quantise(const PageSide& side, int entry, int entries, int channel, int channels, const float* rows, int64_t step) {
  auto value = [&](int e, int c) { return rows[e * step + channel + c]; };
  const PageType& type = *side.type;
  const int most = (1 << type.bits()) - 1;
  const int64_t group = side.group(entry, channel);
  const auto keep_scale = [&](float scale) {
    side.scales()[group] = f16(scale);
    return float(side.scales()[group]);
  };
  if (type.codes != PageType::Codes::Range) {  // of channels of one entry
    float largest = value(0, 0);
    double squares = 0;
    for (int c = 0; c < channels; ++c) {
      const float x = value(0, c);
      if (std::abs(x) > std::abs(largest)) largest = x;
      squares += double(x) * double(x);
    }
    const bool table = type.codes == PageType::Codes::Table;
    const int half = 1 << (type.bits() - 1);
    const float scale = keep_scale(table              ? float(std::sqrt(squares / channels))
                                   : type.bits() == 8 ? std::abs(largest) / 127
                                                      : largest / float(-half));
    for (int c = 0; c < channels; ++c) {
      const float x = scale != 0 ? value(0, c) / scale : 0;
      uint32_t code = 0;
      if (!table) code = uint32_t(std::clamp(std::floor(x + 0.5f) + float(half), 0.0f, float(most)));
      for (int i = 1; table && i <= most; ++i)
        if (std::abs(x - type.points[size_t(i)]) < std::abs(x - type.points[code])) code = uint32_t(i);
      set_code(side, side.place(entry, channel + c), code);
    }
    return;
  }
  float low = value(0, 0), high = low;
  for (int e = 0; e < entries; ++e)
    for (int c = 0; c < channels; ++c) {
      low = std::min(low, value(e, c));
      high = std::max(high, value(e, c));
    }
  const f16 zero_kept = f16(low);
  side.zeros()[group] = zero_kept;
  const float zero = float(zero_kept), scale = keep_scale((high - low) / float(most));
  for (int e = 0; e < entries; ++e)
    for (int c = 0; c < channels; ++c) {
      const float code = scale > 0 ? std::clamp(std::nearbyint((value(e, c) - zero) / scale), 0.0f, float(most)) : 0.0f;
      set_code(side, side.place(entry + e, channel + c), uint32_t(code));
    }
}

}  // namespace

void read_codes(const PageSide& side, int entry, uint8_t* codes) { expand(side, entry, 0, side.width, codes); }

void write_codes(const PageSide& side, int entry, const uint8_t* codes) {
  for (int c = 0; c < side.width; ++c) set_code(side, side.place(entry, c), codes[c]);
}

const float* read_entry(const PageSide& side, int entry, float* out) {
  using Kind = PageType::Kind;
  const int n = side.width;
  if (side.type->quantised()) {
    read_quantised(side, entry, out);
    return out;
  }
  if (side.transposed) {
    for (int c = 0; c < n; ++c) {
      const int64_t at = side.place(entry, c);
      if (side.type->kind == Kind::F32) out[c] = reinterpret_cast<const float*>(side.data)[at];
      else if (side.type->kind == Kind::BF16) out[c] = float(reinterpret_cast<const bf16*>(side.data)[at]);
      else out[c] = float(reinterpret_cast<const f16*>(side.data)[at]);
    }
    return out;
  }
  const char* row = side.row(entry);
  if (side.type->kind == Kind::F32) return reinterpret_cast<const float*>(row);
  if (side.type->kind == Kind::BF16) convert_row(reinterpret_cast<const bf16*>(row), n, out);
  else convert_row(reinterpret_cast<const f16*>(row), n, out);
  return out;
}

void write_entries(const PageSide& side, int begin, int count, const float* rows, int64_t step) {
  using Kind = PageType::Kind;
  const int n = side.width;
  if (side.type->quantised()) {
    const int group = side.type->group;
    if (side.type->axis == PageType::Axis::Token) {
      for (int e = 0; e < count; ++e)
        for (int c = 0; c < n; c += group)
          quantise(side, begin + e, 1, c, std::min(group, n - c), rows + e * step, step);
      return;
    }
    for (int e = 0; e < count; e += group)
      for (int c = 0; c < n; ++c) quantise(side, begin + e, std::min(group, count - e), c, 1, rows + e * step, step);
    return;
  }
  for (int e = 0; e < count; ++e) {
    const float* from = rows + e * step;
    if (side.transposed) {
      for (int c = 0; c < n; ++c) {
        const int64_t at = side.place(begin + e, c);
        if (side.type->kind == Kind::F32) reinterpret_cast<float*>(side.data)[at] = from[c];
        else if (side.type->kind == Kind::BF16) reinterpret_cast<bf16*>(side.data)[at] = bf16(from[c]);
        else reinterpret_cast<f16*>(side.data)[at] = f16(from[c]);
      }
      continue;
    }
    char* row = side.row(begin + e);
    if (side.type->kind == Kind::F32) std::copy_n(from, n, reinterpret_cast<float*>(row));
    else if (side.type->kind == Kind::BF16) convert_row(from, n, reinterpret_cast<bf16*>(row));
    else convert_row(from, n, reinterpret_cast<f16*>(row));
  }
}

}  // namespace heed::HEED_ISA
