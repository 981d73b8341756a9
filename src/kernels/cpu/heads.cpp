// Between token-major rows and heads: split_heads with its norm and rotation, merge_heads.
#include <algorithm>

#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/parts.h"
#include "kernels/cpu/rows.h"

namespace heed::HEED_ISA {
namespace {

/// sin(2π r) for |r| ≤ 1/4; error 2e-7.
HEED_INLINE F sine(F r) {
  const F u = r * r;
  F p = fma(set(-14.3939667f), u, set(42.0097809f));
  p = fma(p, u, set(-76.704277f));
  p = fma(p, u, set(81.6052246f));
  p = fma(p, u, set(-41.3417015f));
  return fma(p, u, set(6.28318548f)) * r;
}

/// Sines and cosines of position · inv_freq for every pair. The angle is reduced to a part of a turn in f64: at position
/// 100,000 an f32 angle would be off by 0.004.
void turns(const Rope& rope, int32_t position, float* cosine, float* sines) {
  const float* inv_freq = rope.inv_freq.as<float>();
  const int half = rope.dims / 2;
  constexpr double per_turn = 0.15915494309189535;  // 1 / 2π
  for (int i = 0; i < half; ++i) {
    const double turn = double(position) * double(inv_freq[i]) * per_turn;
    sines[i] = float(turn - std::rint(turn));
  }
  over_lanes(half, [&](int64_t i, auto part) {
    const F r = part.get(sines + i), size = abs(r), quarter = set(0.25f);
    part.put(cosine + i, sine(quarter - size));
    const F folded = where(less(quarter, size), set(0.5f) - size, size);
    part.put(sines + i, sine(where(less(r, zero()), zero() - folded, folded)));
  });
}

/// How one head of one token is turned.
struct Turn {
  const float *cosine, *sine;
  int dims;
  bool neox;
};

template <class T>
void write_head(const float* x, int64_t d, float factor, const float* norm, const Turn& turn, T* out) {
  const F f = set(factor);
  const auto value = [&](int64_t i, auto part) {
    return norm ? part.get(x + i) * f * part.get(norm + i) : part.get(x + i) * f;
  };
  if (turn.neox) {
    const int half = turn.dims / 2;
    over_lanes(half, [&](int64_t i, auto part) {
      const F a = value(i, part), b = value(half + i, part), c = part.get(turn.cosine + i), s = part.get(turn.sine + i);
      part.put(out + i, a * c - b * s);
      part.put(out + half + i, a * s + b * c);
    });
  } else {
    const auto one = [&](int64_t i) { return x[i] * factor * (norm ? norm[i] : 1); };
    for (int i = 0; i < turn.dims / 2; ++i) {
      const float a = one(2 * i), b = one(2 * i + 1), c = turn.cosine[i], s = turn.sine[i];
      out[2 * i] = T(a * c - b * s);
      out[2 * i + 1] = T(a * s + b * c);
    }
  }
  over_lanes(d - turn.dims, [&](int64_t i, auto part) { part.put(out + turn.dims + i, value(turn.dims + i, part)); });
}

/// Calls token(t, s, i) for tokens begin … end: token t is the i-th of sequence s.
template <class Fn>
void over_tokens(const Tensor& first, int64_t begin, int64_t end, Fn&& token) {
  const int64_t* starts = first.as<int64_t>();
  const int64_t sequences = first.size[0] - 1;
  int64_t s = std::upper_bound(starts, starts + sequences + 1, begin) - starts - 1;
  for (int64_t t = begin; t < end; ++t) {
    while (t >= starts[s + 1]) ++s;
    token(t, s, t - starts[s]);
  }
}

template <class Fn>
void with_float(const char* where, Dtype type, Fn&& f) {
  if (type == Dtype::F32) return f(float{});
  if (type == Dtype::BF16) return f(bf16{});
  require(type == Dtype::F16, where, std::string("heads are f32, bf16 or f16, not ") + info(type).name);
  f(f16{});
}

void split(Queue& queue, const Heads& part, const Tensor& first, float eps) {
  const auto& [x, norm, rope, positions, out] = part;
  constexpr const char* where = "split_heads";
  require(x.rank == 3, where, "x is [T, heads, d], got " + x.shape());
  const int64_t tokens = x.size[0], heads = x.size[1], d = x.size[2], sequences = first.size[0] - 1;
  check_tensor(where, "x", x, {tokens, heads, d});
  check_tensor(where, "first", first, {sequences + 1}, false, Dtype::I64);
  check_tensor(where, "norm", norm, {d}, true);
  check_tensor(where, "out", out.values, {out.values.size[0], d}, false, out.values.type);
  require(out.heads == heads && out.segments() == sequences * heads, where, "out has x's heads and sequences");
  if (rope) {
    require(rope->dims > 0 && rope->dims % 2 == 0 && rope->dims <= d, where,
            "rope turns an even number of channels, at most d");
    check_tensor(where, "inv_freq", rope->inv_freq, {rope->dims / 2});
    if (positions.rank == 2) check_tensor(where, "positions", positions, {tokens, heads}, false, Dtype::I32);
    else check_tensor(where, "positions", positions, {tokens}, false, Dtype::I32);
  }
  if (sequences == 0) return;
  const int dims = rope ? rope->dims : 0;
  const int64_t start = first.at<int64_t>(0), count = first.at<int64_t>(sequences) - start;
  const Scratch give_back(queue.scratch);
  const Tensor tables = queue.scratch.take(Dtype::F32, {std::max<int64_t>(count, 0), dims});
  with_float(where, out.values.type, [&]<class T>(T) {
    over_parts(count, heads * d * 8, [&](int64_t begin, int64_t end) {
      over_tokens(first, start + begin, start + end, [&](int64_t t, int64_t s, int64_t i) {
        float* table = tables.as<float>() + (t - start) * dims;
        // One table serves all heads of a token unless each has a position of its own.
        const bool each = rope && positions.rank == 2;
        if (rope && !each) turns(*rope, positions.at<int32_t>(t), table, table + dims / 2);
        const Turn turn{table, table + dims / 2, dims, !rope || rope->neox};
        for (int64_t head = 0; head < heads; ++head) {
          const float* in = x.as<float>() + t * x.stride[0] + head * x.stride[1];
          const float factor = norm ? rms_factor(in, d, eps) : 1;
          if (each) turns(*rope, positions.at<int32_t>(t, head), table, table + dims / 2);
          write_head(in, d, factor, norm.as<float>(), turn,
                     out.values.as<T>() + (out.begin(s * heads + head) + i) * out.values.stride[0]);
        }
      });
    });
  });
}

}  // namespace

void split_heads(Queue& queue, Tensor first, float eps, std::span<const Heads> each) {
  for (const Heads& part : each) split(queue, part, first, eps);
}

void merge_heads(Queue&, const Ragged& in, Tensor first, Tensor y) {
  constexpr const char* where = "merge_heads";
  const int64_t sequences = first.size[0] - 1, heads = in.heads, d = in.values.rank > 1 ? in.values.size[1] : 1;
  check_tensor(where, "first", first, {sequences + 1}, false, Dtype::I64);
  check_tensor(where, "y", y, {y.size[0], heads * d}, false, row_type(y));
  require(in.segments() == sequences * heads, where, "in has a segment for each sequence and head");
  if (sequences == 0) return;
  const int64_t start = first.at<int64_t>(0), count = first.at<int64_t>(sequences) - start;
  const auto merge = [&]<class From, class To>(From, To) {
    over_parts(count, heads * d * 8, [&](int64_t begin, int64_t end) {
      over_tokens(first, start + begin, start + end, [&](int64_t t, int64_t s, int64_t i) {
        for (int64_t head = 0; head < heads; ++head) {
          const From* from = in.values.as<From>() + (in.begin(s * heads + head) + i) * in.values.stride[0];
          To* to = y.as<To>() + t * y.stride[0] + head * d;
          over_lanes(d, [&](int64_t c, auto part) { part.put(to + c, part.get(from + c)); });
        }
      });
    });
  };
  with_float(where, in.values.type, [&]<class From>(From from) {
    if (y.type == Dtype::BF16) merge(from, bf16{});
    else merge(from, float{});
  });
}

}  // namespace heed::HEED_ISA
