#include "attention/number_list.h"

#include <algorithm>
#include <string_view>

#include "attention/params.h"

namespace heed {
namespace {

Result<std::vector<double>> numbers_of(const std::string& text, double least) {
  std::vector<double> out;
  if (text.empty()) return out;
  if (text.size() < 2 || text.front() != '[' || text.back() != ']')
    return fail(Code::Invalid, "", "'" + text + "' is no list", "[0.1,0.4,0.2]");
  std::string_view rest = std::string_view(text).substr(1, text.size() - 2);
  while (!rest.empty()) {
    const size_t comma = std::min(rest.find(','), rest.size());
    auto x = detail::parse_number("list", std::string(rest.substr(0, comma)), false, least, 1e30);
    if (!x) return tl::unexpected(x.error());
    out.push_back(*x);
    rest.remove_prefix(std::min(rest.size(), comma + 1));
  }
  return out;
}

}  // namespace

Result<NumberList> NumberList::parse(const std::string& text) {
  auto values = numbers_of(text, 0);
  if (!values) return tl::unexpected(values.error());
  return NumberList{std::move(*values)};
}

Result<SignedList> SignedList::parse(const std::string& text) {
  auto values = numbers_of(text, -1e30);
  if (!values) return tl::unexpected(values.error());
  return SignedList{std::move(*values)};
}

}  // namespace heed
