#include "attention/params.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

namespace heed {
namespace {

// Counts of entries are 32-bit; larger layer and head numbers mean a slip of the pen.
constexpr double kMostEntries = 2147483647;
constexpr int kMostIndex = 1 << 20;
constexpr size_t kMostSpans = 4096;

std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\n\r");
  if (first == std::string::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\n\r") - first + 1);
}

/// All of `text` as a finite number.
bool to_number(const std::string& text, double& x) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, x);
  return error == std::errc() && stop == end && !text.empty() && std::isfinite(x);
}

/// A layer or head number, "last" as −1.
bool to_index(const std::string& text, int& x) {
  if (text == "last") {
    x = -1;
    return true;
  }
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, x);
  return error == std::errc() && stop == end && x >= 0 && x <= kMostIndex;
}

tl::unexpected<Failure> bad_range(const std::string& text) {
  return fail(Code::Invalid, "range", "'" + text + "' names no layers or heads",
              "write 3, 0-3, 2-, -3, last or [0-3,7]");
}

}  // namespace

bool Range::holds(int index, int count) const {
  if (spans.empty()) return true;
  for (const auto& [first, last] : spans)
    if (index >= (first < 0 ? count - 1 : first) && index <= (last < 0 ? count - 1 : last)) return true;
  return false;
}

int Range::highest() const {
  int most = -1;
  for (const auto& [first, last] : spans) most = std::max({most, first, last});
  return most;
}

Result<Range> Range::parse(const std::string& raw) {
  Range range;
  range.text = trimmed(raw);
  std::string list = range.text;
  if (list.empty() || list == "all") return range;
  if (list.front() == '[') {
    if (list.back() != ']' || list.size() < 3) return bad_range(raw);
    list = list.substr(1, list.size() - 2);
  }
  for (size_t at = 0; at <= list.size();) {
    const size_t comma = std::min(list.find(',', at), list.size());
    const std::string item = trimmed(list.substr(at, comma - at));
    at = comma + 1;
    const size_t dash = item.find('-');
    std::pair<int, int> span;
    if (dash == std::string::npos) {
      if (!to_index(item, span.first)) return bad_range(raw);
      span.second = span.first;
    } else {
      const std::string from = trimmed(item.substr(0, dash)), to = trimmed(item.substr(dash + 1));
      if (from.empty() && to.empty()) return bad_range(raw);
      span = {0, -1};
      if (!from.empty() && !to_index(from, span.first)) return bad_range(raw);
      if (!to.empty() && !to_index(to, span.second)) return bad_range(raw);
      if (span.second >= 0 && (span.first > span.second || span.first < 0))
        return fail(Code::Invalid, "range", "'" + item + "' ends before it begins", "write the smaller number first");
    }
    range.spans.push_back(span);
    if (range.spans.size() > kMostSpans)
      return fail(Code::Invalid, "range", "more than 4096 spans", "join neighbours: 0-3");
  }
  return range;
}

int64_t Budget::entries(int64_t length) const {
  // The small addend undoes the rounding of a decimal fraction: 29 % of 100 is 29, not 28.
  if (fraction) return std::max<int64_t>(1, int64_t(std::floor(double(length) * amount + 1e-9)));
  return int64_t(amount);
}

Result<Budget> Budget::parse(const std::string& raw) {
  std::string text = trimmed(raw);
  Budget budget;
  const bool percent = !text.empty() && text.back() == '%';
  if (percent) text.pop_back();
  const auto [digits, error] = [&] {
    const bool whole = text.find_first_not_of("0123456789") == std::string::npos;
    return std::pair{whole, !to_number(text, budget.amount)};
  }();
  if (error)
    return fail(Code::Invalid, "budget", "'" + raw + "' is not a budget",
                "give entries (512) or a fraction of the prompt (0.1 or 10%)");
  budget.fraction = percent || !digits;
  if (percent) budget.amount /= 100;
  if (budget.fraction && !(budget.amount > 0 && budget.amount <= 1))
    return fail(Code::Invalid, "budget", "the fraction '" + raw + "' is not in (0, 1]",
                "a number of entries is written without a point: 512");
  if (!budget.fraction && !(budget.amount >= 1 && budget.amount <= kMostEntries))
    return fail(Code::Invalid, "budget", "'" + raw + "' is not a number of entries", "give at least 1");
  return budget;
}

Result<Budget> Budget::parse_kept(const std::string& raw) {
  const std::string text = trimmed(raw);
  if (!text.starts_with("seen(") || text.back() != ')') return parse(raw);
  auto budget = parse(text.substr(5, text.size() - 6));
  if (!budget) return budget;
  if (!budget->fraction)
    return fail(Code::Invalid, "budget", "'" + raw + "' is no fraction of the text so far",
                "write seen(0.1) or seen(10%)");
  budget->seen = true;
  return budget;
}

Result<When> When::parse(const std::string& raw) {
  const std::string text = trimmed(raw);
  if (text == "prompt") return When{At::Prompt, 1};
  if (text == "chunk") return When{At::Chunk, 1};
  for (const auto& [word, at] : {std::pair{"every(", At::Every}, {"decode(", At::Decode}}) {
    if (!text.starts_with(word) || text.back() != ')') continue;
    const size_t begin = std::string_view(word).size();
    const std::string number = trimmed(text.substr(begin, text.size() - begin - 1));
    int n = 0;
    const auto [stop, error] = std::from_chars(number.data(), number.data() + number.size(), n);
    if (error == std::errc() && stop == number.data() + number.size() && n >= 1) return When{at, n};
  }
  return fail(Code::Invalid, "when", "'" + raw + "' is no time to cut",
              "write prompt, chunk, every(n) or decode(n) with n ≥ 1");
}

namespace detail {

std::string number_text(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.10g", x);
  return text;
}

Result<double> parse_number(const char* name, const std::string& raw, bool integer, double low, double high) {
  const std::string text = trimmed(raw);
  double x = 0;
  if (!to_number(text, x)) return fail(Code::Invalid, name, "'" + raw + "' is not a number");
  if (integer && x != std::floor(x)) return fail(Code::Invalid, name, "'" + raw + "' is not a whole number");
  if (x < low || x > high)
    return fail(Code::Invalid, name, text + " is out of range", "give " + number_text(low) + " to " + number_text(high));
  return x;
}

}  // namespace detail
}  // namespace heed
