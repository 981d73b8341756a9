#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/padded_rows.h"

namespace heed::HEED_ISA {
namespace {

/// Rows [first, last) of out = fn(x, y), y being one number (by == nullptr: 1) or a row.
template <class Fn>
void map_rows(const Tensor& x, const Tensor& y, const Tensor& out, int64_t first, int64_t last, Fn fn) {
  const int64_t width = width_of(x);
  const bool each = y && width_of(y) == width;
  for (int64_t r = first; r < last; ++r) {
    const float* from = x.as<float>() + r * x.stride[0];
    const float* by = y ? y.as<float>() + r * y.stride[0] : nullptr;
    float* to = out.as<float>() + r * out.stride[0];
    if (each) {
      for (int64_t c = 0; c < width; ++c) to[c] = fn(from[c], by[c]);
    } else {
      const float one = by ? *by : 1.0f;
      for (int64_t c = 0; c < width; ++c) to[c] = fn(from[c], one);
    }
  }
}

void combine_rows(const Tensor& x, const Tensor& y, Combine how, float f, const Tensor& out, int64_t first, int64_t last) {
  const auto run = [&](auto fn) { map_rows(x, y, out, first, last, fn); };
  switch (how) {
    case Combine::Add: return run([f](float a, float b) { return a + f * b; });
    case Combine::Multiply: return run([f](float a, float b) { return f * a * b; });
    case Combine::Divide: return run([f](float a, float b) { return b == 0 ? 0.0f : f * a / b; });
    case Combine::Max: return run([f](float a, float b) { return std::max(a, f * b); });
    case Combine::Exp: return run([f](float a, float b) { return std::exp(f * a) * b; });
    case Combine::Log: return run([f](float a, float b) { return f * std::log(a) * b; });
    case Combine::Power: return run([f](float a, float b) { return std::pow(a, f) * b; });
    case Combine::AtLeast: return run([f](float a, float b) { return a >= f * b ? 1.0f : 0.0f; });
    case Combine::Finite: return run([f](float a, float b) { return std::isfinite(a) ? a : f * b; });
    case Combine::Forced: return run([f](float a, float b) { return a == INFINITY ? a : f * b; });
  }
}

/// Channels [c, c + count) of the statistic over `rows(visit)`, which calls visit(row) for each row of the group.
template <class RowsOf>
void fold(const Tensor& x, Spread::Of of, RowsOf&& rows, int64_t width, float* to, float* mean) {
  int64_t count = 0;
  rows([&](int64_t r) {
    const float* from = x.as<float>() + r * x.stride[0];
    if (count++ == 0) std::copy_n(from, width, to);
    else if (of == Spread::Of::Min)
      for (int64_t c = 0; c < width; ++c) to[c] = std::min(to[c], from[c]);
    else if (of == Spread::Of::Max)
      for (int64_t c = 0; c < width; ++c) to[c] = std::max(to[c], from[c]);
    else
      for (int64_t c = 0; c < width; ++c) to[c] += from[c];
  });
  if (of == Spread::Of::Mean || of == Spread::Of::Deviation)
    for (int64_t c = 0; c < width; ++c) to[c] /= float(count);
  if (of != Spread::Of::Deviation) return;
  std::copy_n(to, width, mean);
  std::fill_n(to, width, 0.0f);
  rows([&](int64_t r) {
    const float* from = x.as<float>() + r * x.stride[0];
    for (int64_t c = 0; c < width; ++c) to[c] += (from[c] - mean[c]) * (from[c] - mean[c]);
  });
  for (int64_t c = 0; c < width; ++c) to[c] = count > 1 ? std::sqrt(to[c] / float(count - 1)) : 0.0f;
}

/// The statistic of one group to all its rows.
template <class RowsOf>
void fold_and_write(const Tensor& x, Spread::Of of, RowsOf&& rows, int64_t width, float* scratch, const Tensor& out) {
  fold(x, of, rows, width, scratch, scratch + width);
  rows([&](int64_t r) { std::copy_n(scratch, width, out.as<float>() + r * out.stride[0]); });
}

void spread_block(const Ragged& x, const Spread& how, int64_t begin, int64_t end, int64_t segment_end, int64_t width,
                  float* scratch, const Tensor& out) {
  const Tensor& v = x.values;
  if (how.of == Spread::Of::Rank) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < width; ++c) {
        const float self = v.as<float>()[r * v.stride[0] + c];
        int64_t after = 0;
        for (int64_t i = begin; i < end; ++i) {
          const float other = v.as<float>()[i * v.stride[0] + c];
          after += self > other || (self == other && i > r);
        }
        out.as<float>()[r * out.stride[0] + c] = float(after);
      }
    return;
  }
  const int64_t block = how.block, from = begin + how.ahead * block, last = how.ahead > 0 ? from + block : end;
  if (last > segment_end) std::fill_n(scratch, width, NAN);
  else
    fold(
        v, how.of,
        [&](auto visit) {
          for (int64_t r = from; r < last; ++r) visit(r);
        },
        width, scratch, scratch + width);
  for (int64_t r = begin; r < end; ++r) std::copy_n(scratch, width, out.as<float>() + r * out.stride[0]);
}

}  // namespace

void combine(Queue& queue, Tensor x, Tensor y, Combine how, float factor, Tensor out) {
  check_combine("combine", x, y, out);
  // Numbers without rows of their own are one long row: no loop over rows of one.
  if (x.rank == 1) {
    const int64_t n = x.size[0];
    x = x.reshape({1, n}), out = out.reshape({1, n});
    if (y) y = y.reshape({1, n});
    constexpr int64_t piece = 4096;
    for_each(queue, (n + piece - 1) / piece, 0, [&](int64_t i, float*) {
      const int64_t a = i * piece, b = std::min(n, a + piece);
      combine_rows(x.slice(1, a, b), y ? y.slice(1, a, b) : y, how, factor, out.slice(1, a, b), 0, 1);
    });
    return;
  }
  const int64_t batch = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, width_of(x)));
  for_each(queue, (x.size[0] + batch - 1) / batch, 0, [&](int64_t i, float*) {
    combine_rows(x, y, how, factor, out, i * batch, std::min(x.size[0], (i + 1) * batch));
  });
}

void spread(Queue& queue, const Ragged& x, const Spread& how, Tensor out) {
  check_spread("spread", x, how, out);
  const int64_t width = width_of(x.values);
  if (how.over == Spread::Over::Block) {
    Pieces pieces;
    for (int64_t s = 0; s < x.segments(); ++s) {
      const int64_t rows = std::max<int64_t>(0, x.length(s) - how.first);
      pieces.add(how.block > 0 ? (rows + how.block - 1) / how.block : rows > 0);
      for (int64_t r = x.begin(s); r < std::min(x.begin(s) + how.first, x.end(s)); ++r)
        std::fill_n(out.as<float>() + r * out.stride[0], width, NAN);
    }
    for_each(queue, pieces.count(), 2 * width, [&](int64_t i, float* scratch) {
      const auto [s, b] = pieces[i];
      const int64_t begin = x.begin(s) + how.first + b * how.block,
                    end = how.block > 0 ? std::min(x.end(s), begin + how.block) : x.end(s);
      spread_block(x, how, begin, end, x.end(s), width, scratch, out);
    });
    return;
  }
  if (how.over == Spread::Over::Layer) {
    for_each(queue, x.sequences(), 2 * width, [&](int64_t i, float* scratch) {
      bool any = false;
      for (int64_t s = i * x.heads; s < (i + 1) * x.heads; ++s) any |= x.length(s) > 0;
      if (!any) return;
      fold_and_write(
          x.values, how.of,
          [&](auto visit) {
            for (int64_t s = i * x.heads; s < (i + 1) * x.heads; ++s)
              for (int64_t r = x.begin(s); r < x.end(s); ++r) visit(r);
          },
          width, scratch, out);
    });
    return;
  }
  constexpr int64_t batch = 256;
  Pieces pieces;
  for (int64_t i = 0; i < x.sequences(); ++i) {
    int64_t longest = 0;
    for (int64_t s = i * x.heads; s < (i + 1) * x.heads; ++s) longest = std::max(longest, x.length(s));
    pieces.add((longest + batch - 1) / batch);
  }
  for_each(queue, pieces.count(), 2 * width, [&](int64_t i, float* scratch) {
    const auto [sequence, piece] = pieces[i];
    const int64_t head = sequence * x.heads;
    for (int64_t row = piece * batch; row < (piece + 1) * batch; ++row) {
      bool any = false;
      for (int64_t s = head; s < head + x.heads; ++s) any |= row < x.length(s);
      if (!any) return;
      fold_and_write(
          x.values, how.of,
          [&](auto visit) {
            for (int64_t s = head; s < head + x.heads; ++s)
              if (row < x.length(s)) visit(x.begin(s) + row);
          },
          width, scratch, out);
    }
  });
}

}  // namespace heed::HEED_ISA
