#include "kernels/check.h"
#include "kernels/reference/reference.h"

namespace heed::reference {

namespace {

void split(const Heads& part, const Tensor& first, float eps) {
  const auto& [x, norm, rope, positions, out] = part;
  constexpr const char* where = "split_heads";
  require(x.rank == 3, where, "x is [T, heads, d], got " + x.shape());
  const int64_t tokens = x.size[0], heads = x.size[1], d = x.size[2], sequences = first.size[0] - 1;
  check_tensor(where, "x", x, {tokens, heads, d});
  check_tensor(where, "first", first, {sequences + 1}, false, Dtype::I64);
  check_tensor(where, "norm", norm, {d}, true);
  require(out.heads == heads && out.segments() == sequences * heads && width(out.values) == d, where,
          "out has x's heads, sequences and width");
  if (rope) {
    require(rope->dims > 0 && rope->dims % 2 == 0 && rope->dims <= d, where,
            "rope turns an even number of channels, at most d");
    check_tensor(where, "inv_freq", rope->inv_freq, {rope->dims / 2});
    if (positions.rank == 2) check_tensor(where, "positions", positions, {tokens, heads}, false, Dtype::I32);
    else check_tensor(where, "positions", positions, {tokens}, false, Dtype::I32);
  }
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t t = first.at<int64_t>(s); t < first.at<int64_t>(s + 1); ++t)
      for (int64_t head = 0; head < heads; ++head) {
        std::vector<double> values = row(x.select(0, t), head);
        if (norm) {
          double squares = 0;
          for (double value : values) squares += value * value;
          const double factor = 1 / std::sqrt(squares / double(d) + double(eps));
          for (int64_t c = 0; c < d; ++c) values[size_t(c)] *= factor * number(norm, c);
        }
        if (rope)
          rotate(*rope, positions.rank == 2 ? positions.at<int32_t>(t, head) : positions.at<int32_t>(t), values.data());
        set_row(out.values, out.begin(s * heads + head) + t - first.at<int64_t>(s), values);
      }
}

}  // namespace

void split_heads(Queue&, Tensor first, float eps, std::span<const Heads> each) {
  for (const Heads& part : each) split(part, first, eps);
}

void merge_heads(Queue&, const Ragged& in, Tensor first, Tensor y) {
  constexpr const char* where = "merge_heads";
  const int64_t sequences = first.size[0] - 1, heads = in.heads, d_v = width(in.values);
  check_tensor(where, "first", first, {sequences + 1}, false, Dtype::I64);
  check_tensor(where, "y", y, {y.size[0], heads * d_v}, false, row_type(y));
  require(in.segments() == sequences * heads, where, "in has a segment for each sequence and head");
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t t = first.at<int64_t>(s); t < first.at<int64_t>(s + 1); ++t)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t c = 0; c < d_v; ++c)
          store(y, offset(y, t, head * d_v + c),
                number(in.values, in.begin(s * heads + head) + t - first.at<int64_t>(s), c));
}

}  // namespace heed::reference
