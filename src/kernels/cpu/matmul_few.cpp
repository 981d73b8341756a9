// Products with a few tokens (decode).
#include "kernels/cpu/parts.h"
#include "kernels/cpu/quants.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/weights.h"

namespace heed::HEED_ISA {
namespace {

/// Columns done at once, at most: the scales of a part are gathered before its codes are read, and where that reaches far ahead
/// the prefetcher loses the stream. From memory, one thread, Q8_0 (AMD Zen 4): 14 to 17 GB/s with 2048, 33 to 37 with 512.
/// Blocks of 256 bring their scales along.
template <Dtype D>
constexpr int64_t kPart = info(D).block == 32 ? 768 : 2048;

/// Activations of one token in 8 bits: value = scale · code. Sums hold scale · Σ codes. Both have one number for each
/// group of the weights' format (a scale belongs to 32 activations), and a vector of zeros at the end.
struct Rounded {
  const int8_t* codes;
  const float *scale, *sum;
};

template <int Group>
void round_to_8_bits(const float* x, int64_t width, int8_t* codes, float* scale, float* sum) {
  constexpr int n = 32 / kLanes, groups = 32 / Group;
  for (int64_t b = 0; b < width / 32; ++b) {
    F v[n], peak = zero();
    for (int i = 0; i < n; ++i) {
      v[i] = load(x + 32 * b + i * kLanes);
      peak = max(peak, abs(v[i]));
    }
    const float largest = hmax(peak), d = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
    F part[groups];
    for (int g = 0; g < groups; ++g) part[g] = zero();
    for (int i = 0; i < n; ++i) {
      v[i] = round(v[i] * set(inverse));
      part[i * groups / n] = part[i * groups / n] + v[i];
      store_rounded(codes + 32 * b + i * kLanes, v[i]);
    }
    for (int g = 0; g < groups; ++g) {
      scale[b * groups + g] = d;
      sum[b * groups + g] = d * hsum(part[g]);
    }
  }
  store(scale + width / Group, zero());
  store(sum + width / Group, zero());
}

/// Columns of a part: even parts, since a short last one would gather its scales one by one.
template <Dtype D>
int64_t part_of(int64_t width) {
  const int64_t parts = (width + kPart<D> - 1) / kPart<D>;
  return ((width + parts - 1) / parts + 255) / 256 * 256;
}

/// Row · token, `part` columns (a multiple of 256, at most kPart<D>) at a time. For rows as files hold them, which are few once
/// weights lie side by side: one token at a time, so that this is compiled once for a format.
template <Dtype D>
float row_times_token(const char* row, int64_t width, int64_t part, const Rounded& x) {
  using Q = Quant<D>;
  using Block = typename Q::Block;
  constexpr int per_block = info(D).block, units = per_block / 32, groups = per_block / Q::group;
  constexpr int chains = 4;  // a single chain of sums would wait for its own latency
  constexpr int shift = Q::offset + (Q::is_signed ? kSignedBias : 0);
  float scale[kPart<D> / Q::group + 16], low[kPart<D> / Q::group + 16], both[kPart<D> / Q::group + 16];
  Acc acc[chains], lows = no_sum();
  for (Acc& a : acc) a = no_sum();
  const Block* blocks = reinterpret_cast<const Block*>(row);
  for (int64_t begin = 0; begin < width; begin += part) {
    const int64_t n = std::min(part, width - begin) / per_block, n_groups = n * groups, g0 = begin / Q::group;
    // Scales of kSums groups from g on, the first `done` of which have been here before.
    const auto prepare = [&](int64_t g, Acc s, Acc l, int done) {
      store_sums(both + g, s * load_sums(x.scale + g0 + g));
      if constexpr (Q::has_low || shift != 0) {
        const Acc sum = without_first(load_sums(x.sum + g0 + g), done);
        lows = add_product(lows, Q::has_low ? l : s, sum);
      }
    };
    if (units == 1 && n >= kSums) {
      for (int64_t ready = 0; ready < n; ready += kSums) {
        const int64_t from = std::min(ready, n - kSums);
        const Block* at = blocks + from;
        Acc s, l = no_sum();
        if constexpr (units == 1 && Q::has_low) load_strided_pairs<sizeof(Block)>(at, s, l);
        else s = load_strided<sizeof(Block)>(&at->d);
        prepare(from, s, l, int(ready - from));
      }
    } else {
      for (int64_t b = 0; b < n; ++b) Q::scales(blocks[b], scale + b * groups, low + b * groups);
      store(scale + n_groups, zero());
      store(low + n_groups, zero());
      for (int64_t g = 0; g < n_groups; g += kSums)
        prepare(g, load_sums(scale + g), Q::has_low ? load_sums(low + g) : no_sum(), 0);
    }
    const auto unit = [&]<int i, int chain>(int64_t b) {
      const Codes w = Q::template codes<i>(blocks[b]);
      const Sums s = dot<Q::is_signed>(w, load_codes(x.codes + begin + b * per_block + 32 * i));
      Acc& sum = acc[chain % chains];
      sum = accumulate<Q::group>(sum, s, both + b * groups + i * (32 / Q::group));
    };
    int64_t b = 0;
    if constexpr (units == 1) {
      for (; b + 4 <= n; b += 4) {
        unit.template operator()<0, 0>(b);
        unit.template operator()<0, 1>(b + 1);
        unit.template operator()<0, 2>(b + 2);
        unit.template operator()<0, 3>(b + 3);
      }
    }
    for (; b < n; ++b) {
      [&]<int... i>(std::integer_sequence<int, i...>) {
        (unit.template operator()<i, i>(b), ...);
      }(std::make_integer_sequence<int, units>());
    }
    blocks += n;
  }
  Acc sum = acc[0];
  for (int c = 1; c < chains; ++c) sum = sum + acc[c];
  if constexpr (Q::has_low) sum = sum + lows;
  float result = total(sum);
  if constexpr (!Q::has_low && shift != 0) result -= float(shift) * total(lows);
  return result;
}

/// Sixteen rows side by side · tokens: a scale of every row in one vector, and nothing to add up across lanes. Where
/// row_times_token is bound by its own work on scales and sums, this is bound by memory (docs/performance.md).
template <Dtype D, int Tokens>
void sixteen_times_tokens(const char* rows, int64_t width, const Rounded* x, F (*result)[kSideBySide / kLanes]) {
  using Q = Quant<D>;
  constexpr int per_block = info(D).block, groups = per_block / Q::group, parts = kSideBySide / kLanes;
  constexpr int shift = Q::offset + (Q::is_signed ? kSignedBias : 0);
  F acc[Tokens][parts], lows[Tokens][parts];
  for (int t = 0; t < Tokens; ++t)
    for (int p = 0; p < parts; ++p) acc[t][p] = lows[t][p] = zero();
  for (int64_t b = 0; b < width / per_block; ++b, rows += kSideBySide * info(D).bytes)
    for (int p = 0; p < parts; ++p) {
      const Sixteen<D> column(rows, p);
      F scale[groups], low[groups];
      Q::scales(column, scale, low);
      const auto unit = [&]<int i>() {
        const RowCodes codes = Q::template codes<i>(column);
        for (int t = 0; t < Tokens; ++t) {
          const int8_t* in = x[t].codes + b * per_block + 32 * i;
          constexpr int here = 32 / Q::group;
          for (int h = 0; h < here; ++h) {
            const int g = i * here + h;
            const int64_t at = b * groups + g;
            const Ints sum = dot_words<Q::group / 4, Q::top, Q::is_signed>(codes.word + 4 * h, in + 16 * h);
            acc[t][p] = fma(to_float(sum), scale[g] * set(x[t].scale[at]), acc[t][p]);
            if constexpr (Q::has_low || shift != 0)
              lows[t][p] = fma(Q::has_low ? low[g] : scale[g], set(x[t].sum[at]), lows[t][p]);
          }
        }
      };
      [&]<int... i>(std::integer_sequence<int, i...>) {
        (unit.template operator()<i>(), ...);
      }(std::make_integer_sequence<int, per_block / 32>());
    }
  for (int t = 0; t < Tokens; ++t)
    for (int p = 0; p < parts; ++p) {
      result[t][p] = acc[t][p];
      if constexpr (Q::has_low) result[t][p] = acc[t][p] + lows[t][p];
      else if constexpr (shift != 0) result[t][p] = acc[t][p] - set(float(shift)) * lows[t][p];
    }
}

template <class T, int Tokens>
void plain_row_times_tokens(const char* row, int64_t width, const float* const* x, float* result) {
  constexpr int chains = Tokens == 1 ? 4 : 2;
  const T* w = reinterpret_cast<const T*>(row);
  F acc[Tokens][chains];
  for (auto& a : acc)
    for (F& c : a) c = zero();
  int64_t i = 0;
  for (; i + chains * kLanes <= width; i += chains * kLanes)
    for (int c = 0; c < chains; ++c) {
      const F v = load(w + i + c * kLanes);
      for (int t = 0; t < Tokens; ++t) acc[t][c] = fma(v, load(x[t] + i + c * kLanes), acc[t][c]);
    }
  for (; i < width; i += kLanes) {
    const int n = int(std::min<int64_t>(kLanes, width - i));
    const F v = load_part(w + i, n);
    for (int t = 0; t < Tokens; ++t) acc[t][0] = fma(v, load_part(x[t] + i, n), acc[t][0]);
  }
  for (int t = 0; t < Tokens; ++t) {
    F sum = acc[t][0];
    for (int c = 1; c < chains; ++c) sum = sum + acc[t][c];
    result[t] = hsum(sum);
  }
}

/// Splits the tokens into fours, a pair and one, and calls f.operator()<how many>(first).
template <class Fn>
HEED_INLINE void over_tokens(int64_t tokens, Fn&& f) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) f.template operator()<4>(t);
  if (t + 2 <= tokens) {
    f.template operator()<2>(t);
    t += 2;
  }
  if (t < tokens) f.template operator()<1>(t);
}

/// The rows of x as products read them: rounded, for each group size that one of the products has.
class Inputs {
 public:
  Inputs(Arena& scratch, std::span<const Product> products) : tokens_(products[0].tokens()) {
    for (const Product& p : products) with_quant(p.w.type, [&]<Dtype D>() { round<Quant<D>::group>(scratch, p); });
  }

  /// Rows begin … end of a product.
  void multiply(const Product& p, int64_t begin, int64_t end) const {
    if (with_quant(p.w.type, [&]<Dtype D>() { multiply_quant<D>(p, begin, end); })) return;
    if (p.w.type == Dtype::F32) return multiply_plain<float>(p, begin, end);
    if (p.w.type == Dtype::F16) return multiply_plain<f16>(p, begin, end);
    multiply_plain<bf16>(p, begin, end);
  }

 private:
  template <int group>
  void round(Arena& scratch, const Product& p) {
    if (rounded_[group == 32]) return;
    const int64_t width = p.w.width, groups = width / group + 16;
    const Tensor codes = scratch.take(Dtype::I8, {tokens_, width}), scale = scratch.take(Dtype::F32, {tokens_, groups}),
                 sum = scratch.take(Dtype::F32, {tokens_, groups}),
                 rows = scratch.take(Dtype::U8, {tokens_ * int64_t(sizeof(Rounded))});
    Rounded* x = rounded_[group == 32] = rows.as<Rounded>();
    for (int64_t t = 0; t < tokens_; ++t) {
      x[t] = {codes.as<int8_t>() + t * width, scale.as<float>() + t * groups, sum.as<float>() + t * groups};
      round_to_8_bits<group>(p.x_row(t), width, codes.as<int8_t>() + t * width, scale.as<float>() + t * groups,
                             sum.as<float>() + t * groups);
    }
  }

  template <Dtype D>
  void multiply_quant(const Product& p, int64_t begin, int64_t end) const {
    const Rounded* x = rounded_[Quant<D>::group == 32];
    const int64_t part = part_of<D>(p.w.width);
    int64_t r = begin;
    for (; r < std::min(end, p.w.side_by_side); r += kSideBySide)
      over_tokens(tokens_, [&]<int n>(int64_t t) {
        F result[n][kSideBySide / kLanes];
        sixteen_times_tokens<D, n>(p.w.at(r, 0), p.w.width, x + t, result);
        for (int i = 0; i < n; ++i)
          for (int v = 0; v < kSideBySide / kLanes; ++v) p.put(t + i, r + v * kLanes, result[i][v]);
      });
    for (; r < end; ++r)
      for (int64_t t = 0; t < tokens_; ++t) p.put(t, r, row_times_token<D>(p.w.at(r, 0), p.w.width, part, x[t]));
  }

  template <class T>
  void multiply_plain(const Product& p, int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < end; ++r)
      over_tokens(tokens_, [&]<int n>(int64_t t) {
        const float* x[n];
        float result[n];
        for (int i = 0; i < n; ++i) x[i] = p.x_row(t + i);
        plain_row_times_tokens<T, n>(p.w.at(r, 0), p.w.width, x, result);
        for (int i = 0; i < n; ++i) p.put(t + i, r, result[i]);
      });
  }

  int64_t tokens_;
  Rounded* rounded_[2] = {};  // by groups of 16 and of 32
};

/// Rows that are dealt to workers as one.
int64_t together(const Product& p) { return p.w.side_by_side > 0 ? kSideBySide : 1; }

}  // namespace

void multiply_few(Arena& arena, std::span<const Product> products) {
  const Scratch give_back(arena);
  const Inputs inputs(arena, products);
  int64_t units = 0, bytes = 0;
  for (const Product& p : products) units += ceil_div(p.w.rows, together(p)), bytes += p.w.rows * p.w.row_bytes;
  over_parts(units, bytes / std::max<int64_t>(units, 1), [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // of a product's units among all
    for (const Product& p : products) {
      const int64_t n = together(p), count = ceil_div(p.w.rows, n), a = std::max(begin, first),
                    b = std::min(end, first + count);
      if (a < b) inputs.multiply(p, (a - first) * n, std::min((b - first) * n, p.w.rows));
      first += count;
    }
  });
}

void multiply_few(Arena& arena, const Product& gate, const Product& up, Activation activation) {
  const Scratch give_back(arena);
  const Product both[] = {gate, up};
  const Inputs inputs(arena, both);
  const int64_t n = std::max(together(gate), together(up));
  over_parts(ceil_div(gate.w.rows, n), n * (gate.w.row_bytes + up.w.row_bytes), [&](int64_t first, int64_t last) {
    const int64_t begin = first * n, end = std::min(last * n, gate.w.rows);
    for (const Product& p : both) inputs.multiply(p, begin, end);
    for (int64_t t = 0; t < gate.tokens(); ++t)
      glu_row(gate.y_row(t) + begin, up.y_row(t) + begin, end - begin, activation, gate.y_row(t) + begin);
  });
}

}  // namespace heed::HEED_ISA
