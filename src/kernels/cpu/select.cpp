// Selection without sorting: scores become integers of the same order, three histograms of 11, 11 and 10 bits find the
// lowest score taken, and one pass in index order writes what lies above it and as many of its equals as fit.
#include <bit>
#include <cstring>

#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/padded_rows.h"

namespace heed::HEED_ISA {
namespace {

using Key = uint32_t;
constexpr Key kForced = 0xff800000u;  // the key of +∞
constexpr int kBins = 2048;

/// 0 for −∞ and NaN, which are never chosen; otherwise ordered as scores are, −0 equal to +0. Masks, no branches: loops over
/// it become vector code.
Key key_of(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  bits = magnitude == 0 ? 0 : bits;
  const Key key = bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
  const Key number = magnitude > 0x7f800000u ? 0 : key;
  return bits == 0xff800000u ? 0 : number;
}

/// Keys of n scores; returns how many are not 0.
int64_t make_keys(const uint32_t* __restrict scores, int64_t n, Key* __restrict keys) {
  int64_t there = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key key = key_of(scores[i]);
    keys[i] = key;
    there += key != 0;
  }
  return there;
}

float score_of(Key key) { return std::bit_cast<float>(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

/// What is taken: every key above `lowest`, and the first `ties` keys equal to it.
struct Cut {
  Key lowest = 0;
  int64_t ties = 0, above = 0;
  int64_t count() const { return above + ties; }
};

/// The digits of a key from the top: 11, 11 and 10 bits.
struct Digit {
  int shift, bits;
  Key of(Key key) const { return key >> shift & ((1u << bits) - 1); }
  int highest() const { return (1 << bits) - 1; }
};
constexpr Digit kDigits[] = {{21, 11}, {10, 11}, {0, 10}};

/// Scores of a layer share a few exponents, so neighbours want the same bin: with four tables in turn an increment need not
/// wait for the one before it.
constexpr int kWays = 4;
struct Bins {
  int32_t count[kWays][kBins];
  double sum[kWays][kBins];
};

/// How many keys have each digit and, with Sums, what their scores add up to (+∞ and keys of 0 add nothing), in way 0.
template <bool Sums>
void tally(const Key* keys, int64_t n, Digit digit, Bins& bins) {
  const int ways = n < 4 * kBins ? 1 : kWays;
  std::memset(bins.count, 0, size_t(ways) * sizeof bins.count[0]);
  if (Sums) std::memset(bins.sum, 0, size_t(ways) * sizeof bins.sum[0]);
  const auto add = [&](int way, Key key) {
    const Key d = digit.of(key);
    ++bins.count[way][d];
    if (Sums) bins.sum[way][d] += key - 1 < kForced - 1 ? double(score_of(key)) : 0.0;
  };
  int64_t i = 0;
  if (ways > 1)
    for (; i + kWays <= n; i += kWays)
      for (int way = 0; way < kWays; ++way) add(way, keys[i + way]);
  for (; i < n; ++i) add(0, keys[i]);
  for (int way = 1; way < ways; ++way)
    for (int d = 0; d < kBins; ++d) {
      bins.count[0][d] += bins.count[way][d];
      if (Sums) bins.sum[0][d] += bins.sum[way][d];
    }
}

/// The keys that have this digit, in order, into `to` (which may be `keys`); returns how many.
int64_t keep(const Key* keys, int64_t n, Digit digit, Key wanted, Key* to) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key key = keys[i];
    to[kept] = key;
    kept += digit.of(key) == wanted;
  }
  return kept;
}

/// The `wanted` largest of keys that are not 0 (there must be so many). `spare` holds n keys.
Cut largest(const Key* keys, int64_t n, int64_t wanted, Bins& bins, Key* spare) {
  Cut cut;
  if (wanted <= 0) {
    cut.lowest = ~Key(0);
    return cut;
  }
  for (const Digit digit : kDigits) {
    tally<false>(keys, n, digit, bins);
    int bin = digit.highest();
    while (cut.above + bins.count[0][bin] < wanted) cut.above += bins.count[0][bin--];
    cut.lowest |= Key(bin) << digit.shift;
    n = keep(keys, n, digit, Key(bin), spare);
    keys = spare;
  }
  cut.ties = wanted - cut.above;
  return cut;
}

/// The largest, in order, until their share of the total of scores below +∞ and what is held reaches p; +∞ is taken
/// without counting.
Cut largest_share(const Key* keys, int64_t n, float p, double held, bool crossing, Bins& bins, Key* spare) {
  Cut cut;
  n = std::remove_copy(keys, keys + n, spare, Key(0)) - spare;
  if (n == 0) return cut;
  keys = spare;
  double before = held, limit = 0;
  for (const Digit digit : kDigits) {
    tally<true>(keys, n, digit, bins);
    const int32_t* count = bins.count[0];
    const double* sum = bins.sum[0];
    if (digit.shift == kDigits[0].shift) {
      double total = held;
      for (int bin = digit.highest(); bin >= 0; --bin) total += sum[bin];
      limit = double(p) * total;
    }
    // Down to the first bin in which something is not taken, or to the last there is: the digits below decide inside it.
    int bin = digit.highest(), last = -1;
    for (; bin >= 0; --bin) {
      if (count[bin] == 0) continue;
      const bool forced = digit.shift == 0 && (cut.lowest | Key(bin)) >= kForced;
      if (last >= 0) {
        before += sum[last];
        cut.above += count[last];
      }
      last = bin;
      if (!forced && (before + sum[bin] > limit || (crossing && before >= limit))) break;
    }
    cut.lowest |= Key(last) << digit.shift;
    n = keep(keys, n, digit, Key(last), spare);
  }
  // Equal scores, one after another.
  const double score = cut.lowest < kForced ? double(score_of(cut.lowest)) : 0;
  while (cut.ties < n) {
    if (cut.lowest < kForced && (crossing ? before >= limit : before + score > limit)) break;
    before += score;
    ++cut.ties;
  }
  return cut;
}

Cut at_least_score(const Key* keys, int64_t n, Key lowest) {
  Cut cut{std::max<Key>(lowest, 1), 0, 0};
  for (int64_t i = 0; i < n; ++i) {
    cut.above += keys[i] > cut.lowest;
    cut.ties += keys[i] == cut.lowest;
  }
  return cut;
}

void write(const Key* keys, int64_t n, const Cut& cut, int32_t* index) {
  constexpr int64_t step = 32;
  int64_t ties = cut.ties, written = 0;
  const int64_t count = cut.count();
  for (int64_t first = 0; first < n && written < count; first += step) {
    const int64_t last = std::min(n, first + step);
    Key most = 0;
    for (int64_t i = first; i < last; ++i) most = std::max(most, keys[i]);
    if (most < cut.lowest) continue;
    for (int64_t i = first; i < last; ++i) {
      bool taken = keys[i] > cut.lowest;
      if (keys[i] == cut.lowest && ties > 0) {
        taken = true;
        --ties;
      }
      if (taken) index[written++] = int32_t(i);
    }
  }
}

}  // namespace

void select(Queue& queue, const Ragged& scores, const Select& how, int64_t capacity, Tensor index, Tensor count) {
  constexpr const char* where = "select";
  const int64_t segments = scores.segments();
  require(scores.values.type == Dtype::F32 && scores.values.rank == 1 && scores.values.contiguous(), where,
          "scores are F32 [rows]");
  require(capacity >= 0, where, "a negative capacity");
  check_tensor(where, "index", index, {segments * capacity}, false, Dtype::I32);
  check_tensor(where, "count", count, {segments}, false, Dtype::I32);
  check_tensor(where, "k of each segment", how.count, {segments}, true, Dtype::I32);
  check_tensor(where, "weight held already", how.held, {segments}, true, Dtype::F32);
  int64_t longest = 0;
  for (int64_t s = 0; s < segments; ++s) longest = std::max(longest, scores.length(s));
  constexpr int64_t bins_floats = int64_t(sizeof(Bins) / sizeof(float));
  for_each(queue, segments, bins_floats + 2 * padded(longest), [&](int64_t s, float* scratch) {
    Bins& bins = *reinterpret_cast<Bins*>(scratch);
    Key *keys = reinterpret_cast<Key*>(scratch + bins_floats), *spare = keys + padded(longest);
    const int64_t n = scores.length(s);
    const int64_t there = make_keys(scores.values.as<const uint32_t>() + scores.begin(s), n, keys);
    const int64_t most = std::min(there, capacity);
    Cut cut;
    int64_t wanted = -1;  // so many of the largest, when the rule comes down to that
    switch (how.by) {
      case Select::By::TopK: wanted = how.count ? how.count.at<int32_t>(s) : how.k; break;
      case Select::By::TopP:
        cut = largest_share(keys, n, how.p, how.held ? double(how.held.at<float>(s)) : 0, how.crossing, bins, spare);
        if (cut.count() < how.at_least) wanted = how.at_least;
        break;
      case Select::By::Threshold:
        if (!std::isnan(how.p)) cut = at_least_score(keys, n, key_of(std::bit_cast<uint32_t>(how.p)));
        if (cut.count() < how.at_least) wanted = how.at_least;
        break;
    }
    if (how.by == Select::By::TopK || wanted >= 0) wanted = std::clamp<int64_t>(wanted, 0, most);
    else if (cut.count() > most) wanted = most;
    if (wanted >= 0) cut = largest(keys, n, wanted, bins, spare);
    write(keys, n, cut, index.as<int32_t>() + s * capacity);
    count.at<int32_t>(s) = int32_t(cut.count());
  });
}

}  // namespace heed::HEED_ISA
