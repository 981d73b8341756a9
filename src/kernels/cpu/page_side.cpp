#include "kernels/cpu/page_side.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <vector>

#include "base/error.h"
#include "kernels/cpu/convert.h"

namespace heed::HEED_ISA {
namespace {

uint32_t code_at(const PageSide& side, int64_t place) {
  const int bits = side.type->bits();
  const auto* bytes = reinterpret_cast<const uint8_t*>(side.data) + place * bits / 8;
  const bool crosses = place * bits % 8 + bits > 8;
  return uint32_t(bytes[0] | (crosses ? bytes[1] << 8 : 0)) >> (place * bits % 8) & ((1u << bits) - 1);
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
    case 3:
      for (int c = 0; c < n; c += 8) {
        uint32_t word = 0;  // eight codes, or what is left of them
        const int here = std::min(8, n - c);
        std::memcpy(&word, from + c / 8 * 3, size_t(here * 3 + 7) / 8);
        for (int i = 0; i < here; ++i) codes[c + i] = uint8_t(word >> 3 * i & 7);
      }
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
        F zero = by_channel ? load_part(side.zeros() + group, count) : set(side.zero(group));
        if (side.type->codes == PageType::Codes::Polar) zero = fma(scale, set(0.5f), zero);
        store_part(out + first + c, fma(load(codes + c), scale, zero), count);
      }
      c += count;
    }
  }
}

/// Points between a middle and half a width, and numbers that are kept as they are.
void read_sparse(const PageSide& side, int entry, float* out) {
  const PageType& type = *side.type;
  const bool by_channel = type.axis == PageType::Axis::Channel;
  const int64_t groups = type.groups(side.width), own = side.group(entry, 0);
  const f16 *scales = side.scales() + own, *zeros = side.zeros() + own;
  uint8_t codes[256];
  for (int first = 0, run = by_channel ? 64 : type.group; first < side.width; first += run) {
    const int n = std::min(run, side.width - first);
    expand(side, entry, first, n, codes);
    if (by_channel)
      for (int c = 0; c < n; ++c)
        out[first + c] = float(zeros[first + c]) + type.points[codes[c]] * float(scales[first + c]);
    else
      for (int c = 0; c < n; ++c)
        out[first + c] = float(zeros[first / run]) + type.points[codes[c]] * float(scales[first / run]);
  }
  const int64_t step = by_channel ? 1 : type.group;  // channels of a group
  const int here = entry % type.group;
  for (int i = 0; i < type.outliers; ++i) {
    const int64_t at = i * groups + own;
    const uint8_t* places = side.places() + at;
    const f16* numbers = side.scales() + 2 * groups + at;
    for (int64_t c = 0, g = 0; c < side.width; c += step, ++g)
      if (!by_channel || places[g] == here) out[by_channel ? c : c + places[g]] = float(numbers[g]);
  }
}

/// x [n] → H x without its factor 1 / √n.
template <class Number>
void walsh(Number* x, int n) {
  for (int half = 1; half < n; half *= 2)
    for (int i = 0; i < n; i += 2 * half)
      for (int j = i; j < i + half; ++j) {
        const Number a = x[j], b = x[j + half];
        x[j] = a + b, x[j + half] = a - b;
      }
}

template <class Number>
void flip(Number* x, int n, uint32_t seed, int block, int round) {
  for (int word = 0; word < n / 32; ++word) {
    const uint32_t signs = sketch_signs(seed, block, round, word);
    for (int i = 0; i < 32; ++i) x[32 * word + i] = signs >> i & 1 ? -x[32 * word + i] : x[32 * word + i];
  }
}

/// Where an entry's signs lie, and of the outliers from `from` on.
uint32_t* signs_of(const PageSide& side, int entry) {
  return reinterpret_cast<uint32_t*>(side.data + entry * side.type->row_bits(side.width) / 8);
}

/// What the signs of `count` projections stand for, to [n], times n / √(π/2) · count / norm.
void open_sketch(const PageType& type, const uint32_t* signs, int count, int n, float* to) {
  std::fill_n(to, n, 0.0f);
  for (int first = 0; first < count; first += n) {
    float x[kMostSketchWidth];
    const int here = std::min(n, count - first);
    for (int i = 0; i < here; ++i) x[i] = signs[(first + i) / 32] >> i % 32 & 1 ? 1.0f : -1.0f;
    std::fill(x + here, x + n, 0.0f);
    walsh(x, n), flip(x, n, type.seed, first / n, 1), walsh(x, n), flip(x, n, type.seed, first / n, 0);
    for (int i = 0; i < n; ++i) to[i] += x[i];
  }
}

void read_sketch(const PageSide& side, int entry, float* out) {
  const PageType& type = *side.type;
  const int n = sketch_width(side.width);
  float part[kMostSketchWidth];
  const auto factor = [&](int count, const f16& norm) {
    return float(std::sqrt(std::numbers::pi / 2 * n) / count / n) * float(norm);
  };
  const uint32_t* signs = signs_of(side, entry);
  open_sketch(type, signs, type.sketch, n, part);
  const float scale = factor(type.sketch, side.scales()[entry]);
  for (int c = 0; c < side.width; ++c) out[c] = part[c] * scale;
  if (type.outliers == 0) return;
  open_sketch(type, signs + type.sketch / 32, type.outlier_sketch, n, part);
  const float apart = factor(type.outlier_sketch, side.scales()[kPage + entry]);
  const uint8_t* channels = side.places() + entry / type.group * type.outliers;
  for (int i = 0; i < type.outliers; ++i) out[channels[i]] = part[channels[i]] * apart;
}

/// A group of entries.
void write_sketch(const PageSide& side, int entry, int entries, const float* rows, int64_t step) {
  const PageType& type = *side.type;
  const int n = sketch_width(side.width);
  double squares[kMostSketchWidth] = {};
  for (int c = 0; c < side.width; ++c)
    for (int e = 0; e < entries; ++e) squares[c] += double(rows[e * step + c]) * double(rows[e * step + c]);
  bool apart[kMostSketchWidth] = {};
  for (int i = 0; i < type.outliers; ++i) {
    const auto most = std::max_element(squares, squares + side.width) - squares;
    side.places()[entry / type.group * type.outliers + i] = uint8_t(most);
    squares[most] = -1, apart[most] = true;
  }
  for (int e = 0; e < entries; ++e) {
    uint32_t* signs = signs_of(side, entry + e);
    for (int outliers = 0; outliers < (type.outliers > 0 ? 2 : 1); ++outliers) {
      double part[kMostSketchWidth] = {}, norm = 0;
      for (int c = 0; c < side.width; ++c) {
        const double x = double(rows[e * step + c]);
        if (apart[c] == bool(outliers)) part[c] = x, norm += x * x;
      }
      side.scales()[outliers * kPage + entry + e] = f16(float(std::sqrt(norm)));
      const int count = outliers ? type.outlier_sketch : type.sketch;
      std::fill_n(signs, count / 32, 0u);
      for (int first = 0; first < count; first += n) {
        double x[kMostSketchWidth];
        std::copy_n(part, n, x);
        flip(x, n, type.seed, first / n, 0), walsh(x, n), flip(x, n, type.seed, first / n, 1), walsh(x, n);
        for (int i = 0; i < std::min(n, count - first); ++i)
          if (x[i] > 0) signs[(first + i) / 32] |= 1u << i % 32;
      }
      signs += count / 32;
    }
  }
}

/// Pairs of angle and length ↔ of two numbers, in the places of the pair's channels.
void from_polar(const PageSide& side, float* row) {
  for (int c = 0; c < side.width; ++c) {
    if (!side.type->first(c)) continue;
    float &x = row[c], &y = row[side.type->mate(c)];
    const double angle = double(x), length = double(y);
    x = float(length * std::cos(angle)), y = float(length * std::sin(angle));
  }
}

void to_polar(const PageSide& side, float* row) {
  for (int c = 0; c < side.width; ++c) {
    if (!side.type->first(c)) continue;
    float &x = row[c], &y = row[side.type->mate(c)];
    const double angle = std::atan2(double(y), double(x)), length = std::hypot(double(x), double(y));
    x = float(angle < 0 ? angle + 2 * std::numbers::pi : angle), y = float(length);
  }
}

void set_code(const PageSide& side, int64_t place, uint32_t code) {
  const int bits = side.type->bits(), shift = int(place * bits % 8), mask = ((1 << bits) - 1) << shift;
  for (int i = 0; i < (shift + bits > 8 ? 2 : 1); ++i) {
    char& byte = side.data[place * bits / 8 + i];
    byte = char((byte & ~(mask >> 8 * i)) | int(code << shift) >> 8 * i);
  }
}

constexpr int kBlock = 16;  // channels that share a length

void read_blocks(const PageSide& side, int entry, float* out) {
  float x[28], y[28];  // of every angle there is: 16 of level 1, 4 of each other
  for (int i = 0; i < 28; ++i) {
    const double angle = i < 16 ? (i + 0.5) * std::numbers::pi / 8 : double(side.type->points[size_t(i - 16)]);
    x[i] = float(std::cos(angle)), y[i] = float(std::sin(angle));
  }
  for (int first = 0; first < side.width; first += kBlock) {
    uint64_t word = 0;
    for (int i = 0; i < kBlock; ++i) word |= uint64_t(code_at(side, side.place(entry, first + i))) << 3 * i;
    float* block = out + first;
    block[0] = float(side.scales()[side.group(entry, first)]);
    const auto open = [&](int count, int begin, int bits, int points) {
      for (int i = count - 1; i >= 0; --i) {
        const int at = points + int(word >> (begin + i * bits) & ((1u << bits) - 1));
        const float length = block[i];
        block[2 * i] = length * x[at], block[2 * i + 1] = length * y[at];
      }
    };
    open(1, 44, 2, 24), open(2, 40, 2, 20), open(4, 32, 2, 16), open(8, 0, 4, 0);
  }
}

void write_blocks(const PageSide& side, int entry, const float* row) {
  for (int first = 0; first < side.width; first += kBlock) {
    double lengths[kBlock];
    std::copy_n(row + first, kBlock, lengths);
    uint64_t word = 0;
    for (int count = kBlock / 2, at = 0, level = 0; count > 0; count /= 2, ++level)
      for (int i = 0; i < count; ++i) {
        const double angle = std::atan2(lengths[2 * i + 1], lengths[2 * i]);
        uint64_t code = 0;
        if (level == 0) {
          const double turns = (angle < 0 ? angle + 2 * std::numbers::pi : angle) * 8 / std::numbers::pi;
          code = uint64_t(std::min(15.0, std::floor(turns)));
        } else {
          const float* points = side.type->points.data() + 4 * (level - 1);
          for (uint64_t p = 1; p < 4; ++p)
            if (std::abs(angle - double(points[p])) < std::abs(angle - double(points[code]))) code = p;
        }
        word |= code << at, at += level == 0 ? 4 : 2;
        lengths[i] = std::hypot(lengths[2 * i], lengths[2 * i + 1]);
      }
    for (int i = 0; i < kBlock; ++i) set_code(side, side.place(entry, first + i), uint32_t(word >> 3 * i & 7));
    side.scales()[side.group(entry, first)] = f16(float(lengths[0]));
  }
}

uint32_t nearest(const PageType& type, float x) {
  uint32_t code = 0;
  for (uint32_t i = 1; i < 1u << type.bits(); ++i)
    if (std::abs(x - type.points[i]) < std::abs(x - type.points[code])) code = i;
  return code;
}

void quantise_sparse(const PageSide& side, int entry, int entries, int channel, int channels, const float* rows,
                     int64_t step) {
  const PageType& type = *side.type;
  const int64_t group = side.group(entry, channel), groups = type.groups(side.width);
  const int size = entries * channels;  // one of them is 1
  const auto value = [&](int i) { return channels > 1 ? rows[channel + i] : rows[i * step + channel]; };
  double away[256], mean = 0;  // −1: left out
  for (int i = 0; i < size; ++i) mean += double(value(i)) / size;
  for (int i = 0; i < size; ++i) away[i] = std::abs(double(value(i)) - mean);
  for (int i = 0; i < type.outliers; ++i) {
    const auto best = std::max_element(away, away + size) - away;
    side.scales()[(2 + i) * groups + group] = f16(value(int(best)));
    side.places()[i * groups + group] = uint8_t(best);
    away[best] = -1;
  }
  float low = kInfinity, high = -kInfinity;
  for (int i = 0; i < size; ++i)
    if (type.outliers == 0 || away[i] >= 0) low = std::min(low, value(i)), high = std::max(high, value(i));
  if (low > high) low = high = 0;
  side.zeros()[group] = f16((low + high) / 2), side.scales()[group] = f16((high - low) / 2);
  const float zero = float(side.zeros()[group]), scale = float(side.scales()[group]);
  for (int i = 0; i < size; ++i) {
    const int64_t place = channels > 1 ? side.place(entry, channel + i) : side.place(entry + i, channel);
    set_code(side, place, nearest(type, scale != 0 ? (value(i) - zero) / scale : 0));
  }
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
  if (!type.zeros()) {  // of channels of one entry
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
      const uint32_t code = table ? nearest(type, x)
                                  : uint32_t(std::clamp(std::floor(x + 0.5f) + float(half), 0.0f, float(most)));
      set_code(side, side.place(entry, channel + c), code);
    }
    return;
  }
  if (type.codes == PageType::Codes::Sparse)
    return quantise_sparse(side, entry, entries, channel, channels, rows, step);
  const bool polar = type.codes == PageType::Codes::Polar;
  float low = value(0, 0), high = low;
  for (int e = 0; e < entries; ++e)
    for (int c = 0; c < channels; ++c) {
      low = std::min(low, value(e, c));
      high = std::max(high, value(e, c));
    }
  const f16 zero_kept = f16(low);
  side.zeros()[group] = zero_kept;
  const float zero = float(zero_kept), scale = keep_scale((high - low) / float(polar ? most + 1 : most));
  for (int e = 0; e < entries; ++e)
    for (int c = 0; c < channels; ++c) {
      const float x = scale > 0 ? (value(e, c) - zero) / scale : 0.0f;
      const float code = std::clamp(polar ? std::floor(x) : std::nearbyint(x), 0.0f, float(most));
      set_code(side, side.place(entry + e, channel + c), uint32_t(code));
    }
}

/// Of a page of two layers: a direction times the norm that this layer has.
const float* read_shared(const PageSide& side, int entry, float* out) {
  PageType plain = *side.type;
  plain.pair = 0;
  const auto* norms = reinterpret_cast<const float*>(side.data + side.type->norms_at(side.width));
  const int spare = side.type->pair == 2 ? reinterpret_cast<const uint8_t*>(norms + 2 * kPage)[entry] : 0;
  // Spare rows lie row by row whatever the side's order.
  const PageSide rows{side.data, &plain, side.width, side.transposed && spare == 0};
  const float* row = read_entry(rows, spare > 0 ? kPage + spare - 1 : entry, out);
  const float norm = norms[(side.type->pair - 1) * kPage + entry];
  for (int c = 0; c < side.width; ++c) out[c] = row[c] * norm;
  return out;
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
    if (side.type->sphere()) return read_blocks(side, entry, out), out;
    if (side.type->sparse()) return read_sparse(side, entry, out), out;
    if (side.type->sketched()) return read_sketch(side, entry, out), out;
    read_quantised(side, entry, out);
    if (side.type->codes == PageType::Codes::Polar) from_polar(side, out);
    return out;
  }
  if (side.type->pair) return read_shared(side, entry, out);
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
  require(!side.type->pair, "page_write", "a page of two layers is not written to", "turn it into one of its own first");
  const int n = side.width;
  if (side.type->quantised()) {
    const int group = side.type->group;
    if (side.type->sketched()) {
      for (int e = 0; e < count; e += group)
        write_sketch(side, begin + e, std::min(group, count - e), rows + e * step, step);
      return;
    }
    if (side.type->sphere()) {
      for (int e = 0; e < count; ++e) write_blocks(side, begin + e, rows + e * step);
      return;
    }
    if (side.type->axis == PageType::Axis::Token) {
      for (int e = 0; e < count; ++e)
        for (int c = 0; c < n; c += group)
          quantise(side, begin + e, 1, c, std::min(group, n - c), rows + e * step, step);
      return;
    }
    std::vector<float> turned;
    if (side.type->codes == PageType::Codes::Polar) {
      for (int e = 0; e < count; ++e) {
        turned.insert(turned.end(), rows + e * step, rows + e * step + n);
        to_polar(side, turned.data() + int64_t(e) * n);
      }
      rows = turned.data(), step = n;
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
