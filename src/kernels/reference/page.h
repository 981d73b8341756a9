// One page, number by number.
#pragma once
#include <array>

#include "kernels/reference/reference.h"

namespace heed::reference {

/// The keys or the values of one page.
class PageSide {
 public:
  PageSide(char* data, const PageType& type, int width, bool transposed)
      : data_(data), type_(type), width_(width), transposed_(transposed) {}

  float get(int entry, int channel) const;
  /// Of a page of two layers: a row's number, an entry's norm for either (0, 1), which spare row the second has of it.
  void put_row(int row, int channel, float x) const;
  float& norm(int layer, int entry) const;
  uint8_t& spare(int entry) const { return reinterpret_cast<uint8_t*>(&norm(2, 0))[entry]; }
  /// Entries begin … begin + count take values [count, width]. With groups of entries (Channel), begin starts a group.
  void put(int begin, int count, const std::vector<double>& values) const;
  /// Everything kept for one entry, codes with their scales: what moves raw. Not for groups of entries.
  struct Raw {
    std::vector<uint32_t> codes;
    std::vector<uint16_t> halves;  // scale, zero, outliers of each group
    std::vector<uint8_t> places;
  };
  Raw raw(int entry) const;
  void put_raw(int entry, const Raw& raw) const;
  bool moves_raw() const { return !type_.pair && (!type_.quantised() || type_.axis == PageType::Axis::Token); }
  const PageType& type() const { return type_; }

 private:
  struct Group {
    int first_entry, entries, first_channel, channels;
    int64_t index;
  };
  int64_t place(int entry, int channel) const {
    if (entry >= kPage) return int64_t(entry) * width_ + channel;
    return transposed_ ? int64_t(channel) * kPage + entry : int64_t(entry) * width_ + channel;
  }
  int64_t group_of(int entry, int channel) const;
  uint32_t code(int entry, int channel) const;
  void set_code(int entry, int channel, uint32_t code) const;
  std::array<double, 16> block(int entry, int first) const;  // of Sphere
  void put_block(int entry, int first, const double* values) const;
  float number(int entry, int channel) const;  // as its place holds it
  f16* scale(int64_t group) const;
  f16* zero(int64_t group) const { return scale(group) + type_.groups(width_); }  // where they are kept
  f16* outlier(int i, int64_t group) const { return scale(group) + (2 + i) * type_.groups(width_); }  // of Sparse
  uint8_t* places() const { return reinterpret_cast<uint8_t*>(scale(type_.halves() * type_.groups(width_))); }
  /// Sketch: whether a channel is one of its group's outliers; the signs of an entry's two parts, a word each 32.
  bool apart(int entry, int channel) const;
  uint32_t* signs(int entry, bool outliers) const;
  float sketched(int entry, int channel) const;
  void sketch(int begin, int count, const std::vector<double>& values) const;
  void quantise(const Group& group, int begin, const std::vector<double>& values) const;

  char* data_;
  PageType type_;
  int width_;
  bool transposed_;
};

/// One page of a segment.
struct Page {
  const PageLayout& layout;
  const std::vector<Column>* columns;
  char* data;

  Page(const Pages& pages, int64_t segment, int64_t p)
      : layout(pages.layout_of(segment, p)), columns(pages.columns), data(pages.page(segment, p)) {}
  PageSide k() const { return {data + layout.k_at, layout.k, layout.d, false}; }
  PageSide v() const { return {data + layout.v_at, layout.v, layout.d_v, layout.v_transposed}; }
  int32_t& position(int entry) const { return reinterpret_cast<int32_t*>(data + layout.position_at)[entry]; }
  bool has_bias() const { return layout.bias_at >= 0; }
  float& bias(int entry) const { return reinterpret_cast<float*>(data + layout.bias_at)[entry]; }
  /// The numbers of entry `i` of a User column.
  float* column(int column, int i) const {
    return reinterpret_cast<float*>(data + layout.column_at[size_t(column)]) + int64_t(i) * (*columns)[size_t(column)].width;
  }
  /// Those of block `i` of a column that the store keeps, [1, d].
  Tensor block(int column, int i) const {
    const Dtype type = column_type(layout.k, (*columns)[size_t(column)].keeps);
    return Tensor(data + layout.column_at[size_t(column)] + int64_t(i) * layout.d * info(type).bytes, type, {1, layout.d});
  }
  /// Makes the block columns of entries begin … end anew, of the page's first `held` entries.
  void refresh(int begin, int end, int held) const;
};

/// What a store holds, as a panel: keys turned for reading, positions, biases (absent when no layout has them).
struct Unpacked {
  Buffer k_values, v_values, offsets, positions, bias;
  Ragged k, v;
  Unpacked(const char* where, const Pages& pages, const Read* read);
};

}  // namespace heed::reference
