#include "kernels/pages.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace heed {
namespace {

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

void check_side(const PageType& type, int width, const char* side) {
  require(width > 0, "page_layout", [&] { return std::string(side) + " have no width"; });
  if (!type.quantised()) return;
  require(!type.pair, "page_layout", [&] { return std::string(side) + ": what two layers hold is not quantised"; });
  require(type.codes != PageType::Codes::Polar || (type.axis == PageType::Axis::Channel && width % 2 == 0 &&
                                                   type.turned >= 0 && type.turned <= width && type.turned % 2 == 0),
          "page_layout",
          [&] { return std::string(side) + ": pairs of channels have groups of entries and an even width"; });
  require(type.group > 0, "page_layout", [&] { return std::string(side) + ": a group needs at least one number"; });
  require(!type.sphere() || (type.kind == PageType::Kind::Q3 && type.group == 16 && width % 16 == 0), "page_layout",
          [&] { return std::string(side) + ": blocks of angles have 3 bits and 16 channels, and make the width"; });
  require(type.kind != PageType::Kind::Q3 || type.sphere() || type.sparse(), "page_layout",
          [&] { return std::string(side) + ": 3 bits are blocks of angles, or codes of a table with outliers"; });
  require(type.sketched() == (type.kind == PageType::Kind::Q1), "page_layout",
          [&] { return std::string(side) + ": 1 bit is a sketch's"; });
  require(type.zeros() || type.sketched() == (type.axis == PageType::Axis::Channel), "page_layout",
          [&] { return std::string(side) + ": groups of entries have asymmetric codes or sketches"; });
  require((type.codes != PageType::Codes::Table && !type.sparse()) || type.bits() <= 4, "page_layout",
          [&] { return std::string(side) + ": a table of points has at most 4 bits"; });
  require(!type.sparse() ||
              (type.group <= 256 &&
               4 * type.outliers <= (type.axis == PageType::Axis::Token ? std::min(type.group, width) : type.group)),
          "page_layout",
          [&] { return std::string(side) + ": at most a quarter of a group of at most 256 numbers are outliers"; });
  const auto projections = [](int n) { return n >= 32 && n <= 4096 && n % 32 == 0; };
  require(!type.sketched() || (width <= kMostSketchWidth && type.outliers < width && projections(type.sketch) &&
                               (type.outliers > 0 ? projections(type.outlier_sketch) : type.outlier_sketch == 0)),
          "page_layout",
          [&] { return std::string(side) + ": a sketch has 32, 64, … 4096 signs, of at most 256 channels"; });
  if (type.axis == PageType::Axis::Channel)
    require(
        kPage % type.group == 0, "page_layout",
        [&] {
          return std::string(side) + ": a group of " + std::to_string(type.group) +
                 " entries does not divide a page of 64";
        },
        "use 16, 32 or 64");
}

}  // namespace

int PageType::bits() const {
  switch (kind) {
    case Kind::F32: return 32;
    case Kind::BF16:
    case Kind::F16: return 16;
    case Kind::Q8: return 8;
    case Kind::Q4: return 4;
    case Kind::Q2: return 2;
    case Kind::Q3: return 3;
    case Kind::Q1: return 1;
  }
  return 0;
}

int64_t PageType::groups(int width) const {
  if (!quantised()) return 0;
  if (sketched()) return int64_t(kPage) * (outliers > 0 ? 2 : 1);
  return axis == Axis::Token ? int64_t(kPage) * ((width + group - 1) / group) : int64_t(kPage / group) * width;
}

int64_t PageType::places(int width) const {
  return sparse() ? outliers * groups(width) : sketched() ? int64_t(kPage / group) * outliers : 0;
}

int64_t PageType::bytes(int width) const {
  if (pair) return round_up(norms_at(width) + 2 * kPage * int64_t(sizeof(float)) + kPage);
  return round_up(kPage * row_bits(width) / 8 + halves() * groups(width) * int64_t(sizeof(f16)) + places(width));
}

Dtype column_type(const PageType& keys, Column::Keeps keeps) {
  const bool bounds = keeps == Column::Keeps::KeyMin || keeps == Column::Keeps::KeyMax;
  if (!bounds || keys.pair) return Dtype::F32;
  return keys.kind == PageType::Kind::BF16 ? Dtype::BF16 : keys.kind == PageType::Kind::F16 ? Dtype::F16 : Dtype::F32;
}

PageLayout page_layout(int d, int d_v, PageType k, PageType v, bool v_transposed, bool bias,
                       const std::vector<Column>& columns) {
  check_side(k, d, "keys");
  check_side(v, d_v, "values");
  PageLayout out;
  out.d = d;
  out.d_v = d_v;
  out.k = k;
  out.v = v;
  out.v_transposed = v_transposed;
  int64_t at = 0;
  auto place = [&](int64_t bytes) { return std::exchange(at, at + round_up(bytes)); };
  out.k_at = place(k.bytes(d));
  out.v_at = place(v.bytes(d_v));
  out.position_at = place(kPage * int64_t(sizeof(int32_t)));
  require(k.pair == v.pair, "page_layout", "two layers hold keys and values of a page, or neither");
  out.lists = k.pair ? 2 : 1;
  for (int list = 1; list <= out.lists; ++list) {  // what lies beside entries is each layer's own
    const bool own = !k.pair || list == k.pair;
    const int64_t bias_at = bias ? place(kPage * int64_t(sizeof(float))) : -1;
    if (own) out.bias_at = bias_at;
    for (const Column& column : columns) {
      require(column.block > 0 && kPage % column.block == 0, "page_layout", [&] {
        return "column '" + column.name + "': blocks of " + std::to_string(column.block) + " do not divide a page of 64";
      });
      const bool user = column.keeps == Column::Keeps::User;
      require(!user || (column.width > 0 && column.block == 1), "page_layout",
              [&] { return "column '" + column.name + "': one written by a mechanism has a width and blocks of 1"; });
      const int64_t column_at = place(int64_t(kPage / column.block) * (user ? column.width : d) *
                                      info(column_type(k, column.keeps)).bytes);
      if (own) out.column_at.push_back(column_at);
    }
  }
  out.bytes = at;
  return out;
}

}  // namespace heed
