#include "kernels/pages.h"

#include <utility>

#include "base/error.h"

namespace heed {
namespace {

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

void check_side(const PageType& type, int width, const char* side) {
  require(width > 0, "page_layout", std::string(side) + " have no width");
  if (!type.quantised()) return;
  require(type.group > 0, "page_layout", std::string(side) + ": a group needs at least one number");
  require(type.codes == PageType::Codes::Range || type.axis == PageType::Axis::Token, "page_layout",
          std::string(side) + ": groups of entries have asymmetric codes");
  require(type.codes != PageType::Codes::Table || type.bits() <= 4, "page_layout",
          std::string(side) + ": a table of points has at most 4 bits");
  if (type.axis == PageType::Axis::Channel)
    require(kPage % type.group == 0, "page_layout",
            std::string(side) + ": a group of " + std::to_string(type.group) + " entries does not divide a page of 64",
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
  }
  return 0;
}

int64_t PageType::groups(int width) const {
  if (!quantised()) return 0;
  return axis == Axis::Token ? int64_t(kPage) * ((width + group - 1) / group) : int64_t(kPage / group) * width;
}

int64_t PageType::bytes(int width) const {
  return round_up(int64_t(kPage) * width * bits() / 8 + (zeros() ? 2 : 1) * groups(width) * int64_t(sizeof(f16)));
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
  if (bias) out.bias_at = place(kPage * int64_t(sizeof(float)));
  for (const Column& column : columns) {
    require(column.block > 0 && kPage % column.block == 0, "page_layout",
            "column '" + column.name + "': blocks of " + std::to_string(column.block) + " do not divide a page of 64");
    const bool user = column.keeps == Column::Keeps::User;
    require(!user || (column.width > 0 && column.block == 1), "page_layout",
            "column '" + column.name + "': one written by a mechanism has a width and blocks of 1");
    out.column_at.push_back(place(int64_t(kPage / column.block) * (user ? column.width : d) * int64_t(sizeof(float))));
  }
  out.bytes = at;
  return out;
}

}  // namespace heed
