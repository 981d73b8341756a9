#include <algorithm>

#include "kernels/check.h"
#include "kernels/reference/reference.h"

namespace heed::reference {
namespace {

double combined(double x, double y, Combine how, double factor) {
  switch (how) {
    case Combine::Add: return x + factor * y;
    case Combine::Multiply: return factor * x * y;
    case Combine::Divide: return y == 0 ? 0 : factor * x / y;
    case Combine::Max: return std::max(x, factor * y);
    case Combine::Exp: return std::exp(factor * x) * y;
    case Combine::Log: return factor * std::log(x) * y;
    case Combine::Power: return std::pow(x, factor) * y;
    case Combine::AtLeast: return x >= factor * y ? 1 : 0;
    case Combine::Finite: return std::isfinite(x) ? x : factor * y;
    case Combine::Forced: return x == infinity ? x : factor * y;
  }
  return 0;
}

double statistic(const std::vector<double>& x, size_t self, Spread::Of of) {
  double sum = 0, squares = 0, after = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    sum += x[i];
    after += x[self] > x[i] || (x[self] == x[i] && i > self);
  }
  const double mean = sum / double(x.size());
  for (double v : x) squares += (v - mean) * (v - mean);
  switch (of) {
    case Spread::Of::Sum: return sum;
    case Spread::Of::Mean: return mean;
    case Spread::Of::Min: return *std::min_element(x.begin(), x.end());
    case Spread::Of::Max: return *std::max_element(x.begin(), x.end());
    case Spread::Of::Deviation: return x.size() > 1 ? std::sqrt(squares / double(x.size() - 1)) : 0;
    case Spread::Of::Rank: return after;
  }
  return 0;
}

}  // namespace

void combine(Queue&, Tensor x, Tensor y, Combine how, float factor, Tensor out) {
  check_combine("combine", x, y, out);
  for (int64_t r = 0; r < x.size[0]; ++r)
    for (int64_t c = 0; c < width(x); ++c)
      store(out, offset(out, r, c), combined(number(x, r, c), y ? number(y, r, width(y) > 1 ? c : 0) : 1, how, factor));
}

void spread(Queue&, const Ragged& x, const Spread& how, Tensor out) {
  check_spread("spread", x, how, out);
  const int64_t w = width(x.values);
  // Writes the statistic of the rows `of` to the rows `to`, which are the same unless the group lies ahead.
  auto write = [&](const std::vector<int64_t>& of, const std::vector<int64_t>& to) {
    for (int64_t c = 0; c < w; ++c) {
      std::vector<double> group;
      for (int64_t r : of) group.push_back(number(x.values, r, c));
      for (size_t i = 0; i < to.size(); ++i)
        store(out, offset(out, to[i], c), group.empty() ? NAN : statistic(group, std::min(i, group.size() - 1), how.of));
    }
  };
  auto range = [](int64_t begin, int64_t end) {
    std::vector<int64_t> rows;
    for (int64_t r = begin; r < end; ++r) rows.push_back(r);
    return rows;
  };
  if (how.over == Spread::Over::Block) {
    for (int64_t s = 0; s < x.segments(); ++s) {
      const int64_t end = x.end(s), begin = std::min(end, x.begin(s) + how.first),
                    block = how.block > 0 ? how.block : std::max<int64_t>(1, end - begin);
      write({}, range(x.begin(s), begin));
      for (int64_t b = begin; b < end; b += block) {
        const int64_t from = b + how.ahead * block, to = from + block;
        write(how.ahead == 0 ? range(b, std::min(end, b + block))
              : to <= end    ? range(from, to)
                             : range(0, 0),
              range(b, std::min(end, b + block)));
      }
    }
    return;
  }
  for (int64_t s = 0; s < x.segments(); s += x.heads) {
    std::vector<int64_t> all;
    int64_t longest = 0;
    for (int64_t head = s; head < s + x.heads; ++head) {
      longest = std::max(longest, x.length(head));
      for (int64_t r = x.begin(head); r < x.end(head); ++r) all.push_back(r);
    }
    if (how.over == Spread::Over::Layer) {
      write(all, all);
      continue;
    }
    for (int64_t i = 0; i < longest; ++i) {
      std::vector<int64_t> rows;
      for (int64_t head = s; head < s + x.heads; ++head)
        if (i < x.length(head)) rows.push_back(x.begin(head) + i);
      write(rows, rows);
    }
  }
}

}  // namespace heed::reference
