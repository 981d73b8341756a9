#include "kernels/reference/page.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <numbers>
#include <numeric>
#include <tuple>

namespace heed::reference {

uint32_t PageSide::code(int entry, int channel) const {
  const int bits = type_.bits();
  const int64_t at = place(entry, channel);
  if (bits >= 8) {
    uint32_t value = 0;
    std::memcpy(&value, data_ + at * (bits / 8), size_t(bits / 8));
    return value;
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(data_) + at * bits / 8;
  const bool crosses = at * bits % 8 + bits > 8;
  return uint32_t(bytes[0] | (crosses ? bytes[1] << 8 : 0)) >> (at * bits % 8) & ((1u << bits) - 1);
}

void PageSide::set_code(int entry, int channel, uint32_t code) const {
  const int bits = type_.bits();
  const int64_t at = place(entry, channel);
  if (bits >= 8) {
    std::memcpy(data_ + at * (bits / 8), &code, size_t(bits / 8));
    return;
  }
  const int shift = int(at * bits % 8), mask = ((1 << bits) - 1) << shift;
  for (int i = 0; i < (shift + bits > 8 ? 2 : 1); ++i) {
    char& byte = data_[at * bits / 8 + i];
    byte = char((byte & ~(mask >> 8 * i)) | int(code << shift) >> 8 * i);
  }
}

int64_t PageSide::group_of(int entry, int channel) const {
  if (type_.axis == PageType::Axis::Channel) return int64_t(entry / type_.group) * width_ + channel;
  return int64_t(entry) * ((width_ + type_.group - 1) / type_.group) + channel / type_.group;
}

f16* PageSide::scale(int64_t group) const {
  return reinterpret_cast<f16*>(data_ + kPage * type_.row_bits(width_) / 8) + group;
}

bool PageSide::apart(int entry, int channel) const {
  const uint8_t* first = places() + entry / type_.group * type_.outliers;
  return std::find(first, first + type_.outliers, channel) != first + type_.outliers;
}

uint32_t* PageSide::signs(int entry, bool outliers) const {
  return reinterpret_cast<uint32_t*>(data_ + entry * type_.row_bits(width_) / 8) + (outliers ? type_.sketch / 32 : 0);
}

namespace {

/// The rows of a block of projections, [n][n], from their definition.
const std::vector<double>& projections(uint32_t seed, int n, int block) {
  static std::mutex busy;
  static std::map<std::tuple<uint32_t, int, int>, std::vector<double>> known;
  const std::lock_guard lock(busy);
  std::vector<double>& rows = known[{seed, n, block}];
  if (!rows.empty()) return rows;
  const auto sign = [&](int round, int i) { return sketch_signs(seed, block, round, i / 32) >> i % 32 & 1 ? -1 : 1; };
  const auto h = [](int i, int j) { return std::popcount(unsigned(i & j)) % 2 ? -1 : 1; };
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < n; ++c) {
      int sum = 0;
      for (int j = 0; j < n; ++j) sum += h(i, j) * sign(1, j) * h(j, c);
      rows.push_back(double(sum * sign(0, c)) / n);
    }
  return rows;
}

}  // namespace

float PageSide::sketched(int entry, int channel) const {
  const bool outlier = apart(entry, channel);
  const int n = sketch_width(width_), count = outlier ? type_.outlier_sketch : type_.sketch;
  const uint32_t* bits = signs(entry, outlier);
  double sum = 0;
  for (int first = 0; first < count; first += n) {
    const std::vector<double>& rows = projections(type_.seed, n, first / n);
    for (int i = first; i < std::min(first + n, count); ++i)
      sum += (bits[i / 32] >> i % 32 & 1 ? 1 : -1) * rows[size_t((i - first) * n + channel)];
  }
  const double norm = double(float(*scale(outlier ? kPage + entry : entry)));
  return float(std::sqrt(std::numbers::pi / 2 * n) / count * norm * sum);
}

void PageSide::sketch(int begin, int count, const std::vector<double>& values) const {
  const auto value = [&](int e, int c) { return double(float(values[size_t(int64_t(e - begin) * width_ + c)])); };
  const int n = sketch_width(width_);
  for (int first = begin; first < begin + count; first += type_.group) {
    const int end = std::min(first + type_.group, begin + count);
    std::vector<double> squares(size_t(width_), 0.0);
    for (int c = 0; c < width_; ++c)
      for (int e = first; e < end; ++e) squares[size_t(c)] += value(e, c) * value(e, c);
    for (int i = 0; i < type_.outliers; ++i) {
      const auto most = std::max_element(squares.begin(), squares.end());
      places()[first / type_.group * type_.outliers + i] = uint8_t(most - squares.begin());
      *most = -1;
    }
    for (int e = first; e < end; ++e)
      for (const bool outliers : {false, true}) {
        std::vector<double> part(size_t(n), 0.0);
        double norm = 0;
        for (int c = 0; c < width_; ++c)
          if (apart(e, c) == outliers) part[size_t(c)] = value(e, c), norm += value(e, c) * value(e, c);
        if (!outliers || type_.outliers > 0) *scale(outliers ? kPage + e : e) = f16(float(std::sqrt(norm)));
        const int bits = outliers ? type_.outlier_sketch : type_.sketch;
        uint32_t* to = signs(e, outliers);
        std::fill_n(to, bits / 32, 0u);
        for (int i = 0; i < bits; i += n) {
          const std::vector<double>& rows = projections(type_.seed, n, i / n);
          for (int j = i; j < std::min(i + n, bits); ++j)
            if (std::inner_product(part.begin(), part.end(), rows.begin() + (j - i) * n, 0.0) > 0)
              to[j / 32] |= 1u << j % 32;
        }
      }
  }
}

float& PageSide::norm(int layer, int entry) const {
  return reinterpret_cast<float*>(data_ + type_.norms_at(width_))[layer * kPage + entry];
}

float PageSide::get(int entry, int channel) const {
  if (type_.pair) {
    const int own = type_.pair == 2 ? spare(entry) : 0;
    return number(own > 0 ? kPage + own - 1 : entry, channel) * norm(type_.pair - 1, entry);
  }
  if (type_.sketched()) return sketched(entry, channel);
  if (type_.sphere()) return float(block(entry, channel / 16 * 16)[size_t(channel % 16)]);
  if (type_.codes != PageType::Codes::Polar || !type_.quantised()) return number(entry, channel);
  const bool first = type_.first(channel);
  const int mate = type_.mate(channel);
  const double angle = double(number(entry, first ? channel : mate)),
               length = double(number(entry, first ? mate : channel));
  return float(length * (first ? std::cos(angle) : std::sin(angle)));
}

std::array<double, 16> PageSide::block(int entry, int first) const {
  uint64_t word = 0;
  for (int i = 0; i < 16; ++i) word |= uint64_t(code(entry, first + i)) << 3 * i;
  std::array<double, 16> out{double(float(*scale(group_of(entry, first))))};
  for (int level = 4, at = 46; level > 0; --level) {
    const int count = 16 >> level;  // lengths so far
    const int bits = level == 1 ? 4 : 2;
    at -= count * bits;
    for (int i = count - 1; i >= 0; --i) {
      const auto code = size_t(word >> (at + i * bits) & ((1u << bits) - 1));
      const double angle = level == 1 ? (double(code) + 0.5) * std::numbers::pi / 8
                                      : double(type_.points[4 * size_t(level - 2) + code]);
      const double length = out[size_t(i)];
      out[size_t(2 * i)] = length * std::cos(angle), out[size_t(2 * i + 1)] = length * std::sin(angle);
    }
  }
  return out;
}

void PageSide::put_block(int entry, int first, const double* values) const {
  std::vector<double> lengths(values, values + 16);
  uint64_t word = 0;
  for (int level = 1, at = 0; level <= 4; ++level) {
    const int bits = level == 1 ? 4 : 2;
    for (size_t i = 0; i < lengths.size() / 2; ++i, at += bits) {
      const double angle = std::atan2(lengths[2 * i + 1], lengths[2 * i]);
      uint64_t code = 0;
      if (level == 1)
        code = uint64_t(std::clamp(
            std::floor((angle < 0 ? angle + 2 * std::numbers::pi : angle) * 8 / std::numbers::pi), 0.0, 15.0));
      else
        for (uint64_t p = 1; p < 4; ++p) {
          const float* points = type_.points.data() + 4 * (level - 2);
          if (std::abs(angle - double(points[p])) < std::abs(angle - double(points[code]))) code = p;
        }
      word |= code << at;
      lengths[i] = std::hypot(lengths[2 * i], lengths[2 * i + 1]);
    }
    lengths.resize(lengths.size() / 2);
  }
  for (int i = 0; i < 16; ++i) set_code(entry, first + i, uint32_t(word >> 3 * i & 7));
  *scale(group_of(entry, first)) = f16(float(lengths[0]));
}

float PageSide::number(int entry, int channel) const {
  const uint32_t value = code(entry, channel);
  switch (type_.kind) {
    case PageType::Kind::F32: return std::bit_cast<float>(value);
    case PageType::Kind::BF16: return std::bit_cast<float>(value << 16);
    case PageType::Kind::F16: return float(std::bit_cast<f16>(uint16_t(value)));
    default: break;
  }
  const int64_t group = group_of(entry, channel);
  const int place = type_.axis == PageType::Axis::Token ? channel % type_.group : entry % type_.group;
  for (int i = 0; type_.sparse() && i < type_.outliers; ++i)
    if (places()[i * type_.groups(width_) + group] == place) return float(*outlier(i, group));
  return (type_.zeros() ? float(*zero(group)) : 0) + type_.point(value) * float(*scale(group));
}

void PageSide::quantise(const Group& group, int begin, const std::vector<double>& values) const {
  auto value = [&](int e, int c) {
    return float(values[size_t(int64_t(group.first_entry - begin + e) * width_ + group.first_channel + c)]);
  };
  const int size = group.entries * group.channels;
  std::vector<bool> left_out(size_t(size), false);
  if (type_.outliers > 0 && type_.sparse()) {
    double mean = 0;
    for (int i = 0; i < size; ++i) mean += double(value(i / group.channels, i % group.channels)) / size;
    for (int i = 0, best = 0; i < type_.outliers; ++i) {
      const auto away = [&](int j) { return std::abs(double(value(j / group.channels, j % group.channels)) - mean); };
      int farthest = -1;
      for (int j = 0; j < size; ++j)
        if (!left_out[size_t(j)] && (farthest < 0 || away(j) > away(farthest))) farthest = j;
      if (farthest >= 0) best = farthest;  // a group of few keeps one again
      left_out[size_t(best)] = true;
      *outlier(i, group.index) = f16(value(best / group.channels, best % group.channels));
      places()[i * type_.groups(width_) + group.index] = uint8_t(best);
    }
  }
  float low = float(infinity), high = -low, largest = 0;
  double squares = 0;
  for (int e = 0; e < group.entries; ++e)
    for (int c = 0; c < group.channels; ++c) {
      if (left_out[size_t(e * group.channels + c)]) continue;
      const float x = value(e, c);
      low = std::min(low, x);
      high = std::max(high, x);
      if (std::abs(x) > std::abs(largest)) largest = x;
      squares += double(x) * double(x);
    }
  if (low > high) low = high = 0;  // nothing but outliers
  const int bits = type_.bits(), most = (1 << bits) - 1, half = 1 << (bits - 1);
  float z = 0, s = 0;
  switch (type_.codes) {
    case PageType::Codes::Range:
      *zero(group.index) = f16(low);
      z = float(*zero(group.index)), s = (high - low) / float(most);
      break;
    case PageType::Codes::Signed: s = bits == 8 ? std::abs(largest) / 127 : largest / float(-half); break;
    case PageType::Codes::Polar:
      *zero(group.index) = f16(low);
      z = float(*zero(group.index)), s = (high - low) / float(most + 1);
      break;
    case PageType::Codes::Sphere: break;  // put_block
    case PageType::Codes::Sketch: break;  // sketch
    case PageType::Codes::Sparse:
      *zero(group.index) = f16((low + high) / 2);
      z = float(*zero(group.index)), s = (high - low) / 2;
      break;
    case PageType::Codes::Table: s = float(std::sqrt(squares / double(group.entries * group.channels))); break;
  }
  *scale(group.index) = f16(s);
  s = float(*scale(group.index));
  for (int e = 0; e < group.entries; ++e)
    for (int c = 0; c < group.channels; ++c) {
      const float x = s != 0 ? (value(e, c) - z) / s : 0;
      float code = 0;
      if (type_.codes == PageType::Codes::Range) code = std::clamp(std::nearbyint(x), 0.0f, float(most));
      if (type_.codes == PageType::Codes::Polar) code = std::clamp(std::floor(x), 0.0f, float(most));
      if (type_.codes == PageType::Codes::Signed)
        code = std::clamp(std::floor(x + 0.5f) + float(half), 0.0f, float(most));
      if (type_.codes == PageType::Codes::Table || type_.sparse())
        for (uint32_t i = 1; i <= uint32_t(most); ++i)
          if (std::abs(x - type_.points[i]) < std::abs(x - type_.points[size_t(code)])) code = float(i);
      set_code(group.first_entry + e, group.first_channel + c, uint32_t(code));
    }
}

void PageSide::put_row(int row, int channel, float x) const {
  uint32_t code = std::bit_cast<uint32_t>(x);
  if (type_.kind == PageType::Kind::BF16) code = bf16(x).bits;
  if (type_.kind == PageType::Kind::F16) code = std::bit_cast<uint16_t>(f16(x));
  set_code(row, channel, code);
}

void PageSide::put(int begin, int count, const std::vector<double>& given) const {
  require(!type_.pair, "page_write", "a page of two layers is not written to", "turn it into one of its own first");
  if (!type_.quantised()) {
    for (int e = 0; e < count; ++e)
      for (int c = 0; c < width_; ++c) put_row(begin + e, c, float(given[size_t(int64_t(e) * width_ + c)]));
    return;
  }
  std::vector<double> values = given;
  for (int64_t e = 0; type_.codes == PageType::Codes::Polar && e < count; ++e)
    for (int c = 0; c < width_; ++c) {
      if (!type_.first(c)) continue;
      double &x = values[size_t(e * width_ + c)], &y = values[size_t(e * width_ + type_.mate(c))];
      const double angle = std::atan2(y, x), length = std::hypot(x, y);
      x = angle < 0 ? angle + 2 * std::numbers::pi : angle, y = length;
    }
  if (type_.sphere()) {
    for (int e = 0; e < count; ++e)
      for (int c = 0; c < width_; c += 16) put_block(begin + e, c, values.data() + int64_t(e) * width_ + c);
    return;
  }
  if (type_.axis == PageType::Axis::Token) {
    for (int e = begin; e < begin + count; ++e)
      for (int c = 0; c < width_; c += type_.group)
        quantise({e, 1, c, std::min(type_.group, width_ - c), group_of(e, c)}, begin, values);
    return;
  }
  require(
      begin % type_.group == 0, "page_write",
      [&] {
        return "entry " + std::to_string(begin) + " is inside a group of " + std::to_string(type_.group) + " entries";
      },
      "write whole groups");
  if (type_.sketched()) return sketch(begin, count, values);
  for (int e = begin; e < begin + count; e += type_.group)
    for (int c = 0; c < width_; ++c)
      quantise({e, std::min(type_.group, begin + count - e), c, 1, group_of(e, c)}, begin, values);
}

PageSide::Raw PageSide::raw(int entry) const {
  Raw out;
  for (int c = 0; c < width_; ++c) out.codes.push_back(code(entry, c));
  const int64_t groups = type_.groups(width_);
  for (int c = 0; type_.quantised() && c < width_; c += type_.group) {
    const int64_t group = group_of(entry, c);
    for (int i = 0; i < type_.halves(); ++i) out.halves.push_back(std::bit_cast<uint16_t>(*scale(i * groups + group)));
    for (int i = 0; type_.sparse() && i < type_.outliers; ++i) out.places.push_back(places()[i * groups + group]);
  }
  return out;
}

void PageSide::put_raw(int entry, const Raw& raw) const {
  for (int c = 0; c < width_; ++c) set_code(entry, c, raw.codes[size_t(c)]);
  const int64_t groups = type_.groups(width_);
  auto half = raw.halves.begin();
  auto place = raw.places.begin();
  for (int c = 0; type_.quantised() && c < width_; c += type_.group) {
    const int64_t group = group_of(entry, c);
    for (int i = 0; i < type_.halves(); ++i) *scale(i * groups + group) = std::bit_cast<f16>(*half++);
    for (int i = 0; type_.sparse() && i < type_.outliers; ++i) places()[i * groups + group] = *place++;
  }
}

void Page::refresh(int begin, int end, int held) const {
  for (size_t i = 0; columns && i < columns->size(); ++i) {
    const Column& c = (*columns)[i];
    if (c.keeps == Column::Keeps::User) continue;
    for (int block = begin / c.block; block * c.block < end; ++block) {
      const int first = block * c.block, last = std::min(first + c.block, held);
      for (int channel = 0; channel < layout.d && first < last; ++channel) {
        double low = infinity, high = -infinity, sum = 0;
        for (int e = first; e < last; ++e) {
          const double x = double(k().get(e, channel));
          low = std::min(low, x);
          high = std::max(high, x);
          sum += x;
        }
        store(this->block(int(i), block), channel,
              c.keeps == Column::Keeps::KeyMin   ? low
              : c.keeps == Column::Keeps::KeyMax ? high
                                                 : sum / (last - first));
      }
    }
  }
}

}  // namespace heed::reference
