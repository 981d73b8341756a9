#include "kernels/cpu/decode.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "kernels/cpu/decode_codes.h"
#include "kernels/cpu/decode_entries.h"
#include "kernels/cpu/decode_pairs.h"
#include "kernels/cpu/tile_tasks.h"
#include "kernels/cpu/walk.h"
#include "kernels/cpu/workers.h"

namespace heed::HEED_ISA {
namespace {

constexpr int kRows = kDecodeRows;
// Query rows and value pairs whose sums fit the registers beside an entry.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kRowBlock = 2, kValuePairs = 2;
#else
constexpr int kRowBlock = 4, kValuePairs = 2;
#endif

/// The query rows of a KV head, and what their logits are.
struct Shared {
  int64_t segment = 0, plan_row = 0;
  int rows = 0;
  int64_t row[kRows];
  int32_t head[kRows];
  float limit[kRows], position[kRows], factor[kRows];
  float limit_low, limit_high, position_low, position_high;
  int64_t first_piece = 0, pieces = 0;
};

/// What one piece of work reads.
struct SharedRange {
  int64_t shared, begin, end;  // keys (Dense) or entries of the plan's row
};

/// An online softmax in log2: out [rows][d_v], high and sum of each row.
struct Softmax {
  float *out, *high, *sum;
  static int64_t floats(int rows, int d_v) { return int64_t(rows) * d_v + 2 * 16; }
  Softmax(float* memory, int rows, int d_v) : out(memory), high(memory + int64_t(rows) * d_v), sum(high + 16) {}
};

/// Asks for the line in which pair c of a row lies, into the second cache: two batches would not fit the first one.
template <class Row>
HEED_INLINE void prefetch(const char* row, int64_t c) {
  __builtin_prefetch(row + c * Row::bits / 8, 0, 2);
}
int64_t row_bytes(const PageType& type, int width) { return int64_t(width) * type.bits() / 8; }

/// s [R][kScoreRow] = dots of query rows q [R][step] (in Row's order) with the entries. With Fetch the keys of `next` are
/// asked for on the way, a line for each that is read: all at once they would fill the buffers that this batch's loads need
/// too.
template <class Row, int R, bool Fetch>
void dots(const Entries& e, const Entries& next, int d, int shift, const float* q, int64_t step, float* s) {
  for (int j = 0; j < e.count; j += kLanes) {
    F fours[R][kLanes / 4];
    for (int block = 0; block < kLanes / 4; ++block) {
      const char *row[4], *coming[4];
      const float *scales[4], *lows[4];
      for (int i = 0; i < 4; ++i) {
        const int at = j + 4 * block + i;
        row[i] = e.k[at], coming[i] = next.k[at];
        if constexpr (Row::quantised) {
          const int there = std::min(at, e.count - 1);
          scales[i] = e.k_scale[there], lows[i] = e.k_low[there];
        }
      }
      F sum[R][4];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 4; ++i) sum[r][i] = zero();
      for (int64_t c = 0; c < d; c += kPair) {
        const int64_t scale = Row::by_channel ? c : (c / kPair) >> shift;
        for (int i = 0; i < 4; ++i) {
          if constexpr (Fetch) prefetch<Row>(coming[i], c);
          F a, b;
          Row::load(row[i], c, Row::quantised ? scales[i] + scale : nullptr, Row::quantised ? lows[i] + scale : nullptr,
                    a, b);
          for (int r = 0; r < R; ++r) {
            sum[r][i] = fma(a, load(q + r * step + c), sum[r][i]);
            sum[r][i] = fma(b, load(q + r * step + c + kLanes), sum[r][i]);
          }
        }
      }
      for (int r = 0; r < R; ++r) fours[r][block] = sum_quads(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
    for (int r = 0; r < R; ++r) store(s + r * kScoreRow + j, sum_fours(fours[r]));
  }
}

/// out [R][d_v] = out · keep[r] + Σ p [R][kScoreRow] · values, `Pairs` pairs of vectors at once.
template <class Row, int R, int Pairs, bool Fetch>
HEED_INLINE void add_values(const Entries& e, const Entries& next, int64_t c, int shift, const float* p,
                            const float* keep, int d_v, float* out) {
  F sum[R][2 * Pairs];
  for (int r = 0; r < R; ++r)
    for (F& x : sum[r]) x = zero();
  for (int j = 0; j < e.count; ++j)
    for (int u = 0; u < Pairs; ++u) {
      const int64_t at = c + u * kPair, scale = Row::by_channel ? at : (at / kPair) >> shift;
      if constexpr (Fetch) prefetch<Row>(next.v[j], at);
      F a, b;
      Row::load(e.v[j], at, Row::quantised ? e.v_scale[j] + scale : nullptr,
                Row::quantised ? e.v_low[j] + scale : nullptr, a, b);
      for (int r = 0; r < R; ++r) {
        const F weight = set(p[r * kScoreRow + j]);
        sum[r][2 * u] = fma(weight, a, sum[r][2 * u]);
        sum[r][2 * u + 1] = fma(weight, b, sum[r][2 * u + 1]);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < Pairs; ++u) {
      float* to = out + int64_t(r) * d_v + c + u * kPair;
      F a = sum[r][2 * u], b = sum[r][2 * u + 1];
      if constexpr (Row::interleaved) interleave(a, b, a, b);
      store(to, fma(load(to), set(keep[r]), a));
      store(to + kLanes, fma(load(to + kLanes), set(keep[r]), b));
    }
}

template <class Row, int R, bool Fetch>
void values(const Entries& e, const Entries& next, int d_v, int shift, const float* p, const float* keep, float* out) {
  int64_t c = 0;
  for (; c + kValuePairs * kPair <= d_v; c += kValuePairs * kPair)
    add_values<Row, R, kValuePairs, Fetch>(e, next, c, shift, p, keep, d_v, out);
  for (; c < d_v; c += kPair) add_values<Row, R, 1, Fetch>(e, next, c, shift, p, keep, d_v, out);
}

/// Calls f.template operator()<R, Fetch>(first) for blocks of R ≤ kRowBlock rows, the first with `fetch`.
template <class Fn>
void over_rows(int rows, bool fetch, Fn&& f) {
  int r = 0;
  const auto block = [&]<int R>() {
    if (fetch && r == 0) f.template operator()<R, true>(r);
    else f.template operator()<R, false>(r);
  };
  for (; r + kRowBlock <= rows; r += kRowBlock) block.template operator()<kRowBlock>();
  switch (rows - r) {
    case 1: return block.template operator()<1>();
    case 2: return block.template operator()<2>();
    case 3: return block.template operator()<kRowBlock == 4 ? 3 : 1>();
    default: return;
  }
}

class Decode {
 public:
  Decode(Queue& queue, const Ragged& q, const Pages& pages, const Plan& plan, const Mods& mods)
      : queue_(queue), q_(q), pages_(pages), plan_(plan), mods_(mods), d_(pages.layouts[0].d), d_v_(pages.layouts[0].d_v) {
    for (const PageLayout& layout : pages.layouts)
      has_codes_ |= CodeReader::reads_keys(layout.k, d_) || CodeReader::reads_values(layout.v, d_v_);
  }

  /// Cuts the work into pieces; false when a KV head has too many rows.
  bool plan() {
    const std::vector<TileTask> tasks = tile_tasks(plan_, q_, pages_.kv_heads, pages_.kv_heads, mods_, true);
    for (const TileTask& task : tasks)
      if (task.heads * task.rows > kRows) return false;
    for (const TileTask& task : tasks)
      if (task.rows > 0) add(task);
    return true;
  }

  void run(Tensor out, Tensor lse) {
    out_ = out, lse_ = lse;
    int64_t k_scales = 0, v_scales = 0;
    for (const PageLayout& layout : pages_.layouts) {
      k_scales = std::max(k_scales, ScaleRows::floats(layout.k, d_));
      v_scales = std::max(v_scales, ScaleRows::floats(layout.v, d_v_));
      has_bias_ |= layout.bias_at >= 0;
    }
    states_ = queue_.scratch.take(Dtype::F32, {std::max<int64_t>(int64_t(pieces_.size()), 1), Softmax::floats(kRows, d_v_)});
    left_ = queue_.scratch.take(Dtype::I64, {std::max<int64_t>(int64_t(shared_.size()), 1)}).as<int64_t>();
    for (size_t i = 0; i < shared_.size(); ++i) left_[i] = shared_[i].pieces;
    const int64_t floats = 2 * kRows * d_ + 2 * (k_scales + v_scales);
    const int64_t code_bytes = has_codes_ ? CodeReader::bytes(d_, d_v_) : 0;
    parallel_with(
        queue_, code_bytes + floats * int64_t(sizeof(float)), int64_t(pieces_.size()),
        [&](char* memory, int64_t i) {
          auto* numbers = reinterpret_cast<float*>(memory + code_bytes);
          Worker worker;  // not cleared: batches are kilobytes
          worker.q = numbers, worker.q_paired = numbers + kRows * d_;
          if (has_codes_) worker.codes.emplace(memory, d_, d_v_);
          float* scales = numbers + 2 * kRows * d_;
          for (Batch& batch : worker.batch) {
            batch.k_scales.memory = scales, batch.v_scales.memory = scales + k_scales;
            scales += k_scales + v_scales;
          }
          work(worker, i);
        },
        Deal::Stretches);
  }

 private:
  struct Batch {
    Entries entries;
    ScaleRows k_scales, v_scales;

    /// Scales for reading entries as rows of f32.
    void open_keys() { open(k_scales, PageSide::keys, entries.k_scale, entries.k_low); }
    void open_values() { open(v_scales, PageSide::values, entries.v_scale, entries.v_low); }

   private:
    void open(ScaleRows& rows, PageSide (*side)(const PageLayout&, char*), const float** scale, const float** low) const {
      rows.clear();
      for (int i = 0; i < entries.parts; ++i) {
        const auto [page, first, at, count] = entries.part[i];
        rows.add(side(*entries.layout, page), first, count, scale + at, low + at);
      }
    }
  };
  struct Worker {
    float *q, *q_paired;  // [rows][d], in order and as pairs of even and odd channels
    Batch batch[2];
    std::optional<CodeReader> codes;
  };

  const int32_t* positions(int64_t segment, int64_t page) const {
    return reinterpret_cast<const int32_t*>(pages_.page(segment, page) + pages_.layout_of(segment, page).position_at);
  }

  void add(const TileTask& task) {
    const int64_t keys = pages_.length.at<int32_t>(task.k_segment);
    const Lanes lanes = lanes_of(task, q_, keys, mods_, plan_.causal);
    Shared s;
    s.segment = task.k_segment, s.plan_row = task.plan_row, s.rows = lanes.count;
    for (int r = 0; r < lanes.count; ++r) {
      s.row[r] = lanes.row[r], s.head[r] = lanes.head[r];
      s.limit[r] = lanes.limit[r], s.position[r] = lanes.position[r], s.factor[r] = lanes.factor[r];
    }
    s.limit_low = lanes.limit_low, s.limit_high = lanes.limit_high;
    s.position_low = lanes.position_low, s.position_high = lanes.position_high;
    s.first_piece = int64_t(pieces_.size());

    int64_t begin = 0, end = 0, unit = 1;
    if (plan_.form == Plan::Form::Dense) {
      end = plan_.causal ? std::clamp<int64_t>(int64_t(s.limit_high) + 1, 0, keys) : keys;
      if (mods_.window > 0 && end > 0) {
        // Positions ascend: the last page that begins outside the window is the first that may reach into it.
        int64_t low = 0, high = (end + kPage - 1) / kPage;
        while (high - low > 1) {
          const int64_t middle = (low + high) / 2;
          if (s.position_low - float(positions(s.segment, middle)[0]) >= float(mods_.window)) low = middle;
          else high = middle;
        }
        begin = low * kPage;
      }
    } else {
      end = plan_.end(s.plan_row) - plan_.begin(s.plan_row);
      unit = plan_.form == Plan::Form::Blocks ? plan_.k_tile : 1;
    }
    // Pieces follow from the shapes alone, never from the number of threads: of 32,768 numbers (64 KB in 16 bits, some 10 µs
    // of one core), twice as many codes, unless that would be more than 128 pieces to merge.
    const int64_t few = std::max<int64_t>((int64_t(has_codes_ ? 64 : 32) << 10) / (d_ + d_v_) / kPage, 1);
    const int64_t all = (end - begin) * unit, step = std::max(few, (all / 128 + kPage - 1) / kPage) * kPage / unit;
    int64_t at = begin;
    do {
      pieces_.push_back({int64_t(shared_.size()), at, std::min(at + step, end)});
      at += step;
    } while (at < end);
    s.pieces = int64_t(pieces_.size()) - s.first_piece;
    shared_.push_back(s);
  }

  /// A loop of its own, so that it runs in vectors.
  static void fill_rows(const char** to, const char* row, int64_t bytes, int count) {
    for (int i = 0; i < count; ++i, row += bytes) to[i] = row;
  }

  /// The next entries of the walk that lie in one layout.
  bool gather(const Shared& s, Walk& walk, Run& run, Batch& batch) const {
    Entries& e = batch.entries;
    e.count = e.parts = 0;
    e.position_low = kInfinity;
    while (e.count < kPage) {
      if (run.count == 0 && !walk.next(kPage, run)) break;
      const int64_t number = run.first / kPage;
      const PageLayout& layout = pages_.layout_of(s.segment, number);
      if (e.count > 0 && e.layout != &layout) break;
      e.layout = &layout;
      char* page = pages_.page(s.segment, number);
      const int first = int(run.first % kPage), count = int(std::min<int64_t>({run.count, kPage - first, kPage - e.count}));
      const int64_t k_bytes = row_bytes(layout.k, d_), v_bytes = row_bytes(layout.v, d_v_);
      const int at = e.count;
      fill_rows(e.k + at, page + layout.k_at + first * k_bytes, k_bytes, count);
      fill_rows(e.v + at, page + layout.v_at + first * v_bytes, v_bytes, count);
      for (int i = 0, key = int(run.first); i < count; ++i) e.key[at + i] = key + i;
      e.part[e.parts++] = {page, first, at, count};
      if (mods_.window > 0) {
        const auto* from = reinterpret_cast<const int32_t*>(page + layout.position_at) + first;
        for (int i = 0; i < count; ++i) {
          e.position[at + i] = from[i];
          e.position_low = std::min(e.position_low, float(from[i]));
        }
      }
      if (layout.bias_at >= 0)
        std::copy_n(reinterpret_cast<const float*>(page + layout.bias_at) + first, count, e.bias + at);
      else if (has_bias_) std::fill_n(e.bias + at, count, 0.0f);
      e.count += count;
      run.first += count;
      run.count -= count;
    }
    if (e.count == 0) return false;
    std::fill(e.k + e.count, e.k + kPage + 16, e.k[e.count - 1]);
    std::fill(e.v + e.count, e.v + kPage, e.v[e.count - 1]);
    return true;
  }

  void work(Worker& worker, int64_t i) {
    const SharedRange& piece = pieces_[size_t(i)];
    const Shared& s = shared_[size_t(piece.shared)];
    const Softmax state = state_of(i, s);
    std::fill_n(state.out, int64_t(s.rows) * d_v_, 0.0f);
    std::fill_n(state.high, 16, -kInfinity);
    std::fill_n(state.sum, 16, 0.0f);
    if (piece.begin < piece.end && !skipped(s)) attend(worker, piece, s, state);
    if (std::atomic_ref<int64_t>(left_[piece.shared]).fetch_sub(1, std::memory_order_acq_rel) == 1) finish(s);
  }

  Softmax state_of(int64_t piece, const Shared& s) const {
    return Softmax(states_.as<float>() + piece * states_.stride[0], s.rows, d_v_);
  }

  bool skipped(const Shared& s) const {
    if (!mods_.gain) return false;
    for (int r = 0; r < s.rows; ++r)
      if (mods_.gain.as<float>()[s.row[r]] != 0) return false;
    return true;
  }

  void attend(Worker& worker, const SharedRange& piece, const Shared& s, Softmax state) const {
    const bool dense = plan_.form == Plan::Form::Dense;
    const int64_t keys = pages_.length.at<int32_t>(s.segment);
    const int64_t end = plan_.causal ? std::clamp<int64_t>(int64_t(s.limit_high) + 1, 0, keys) : keys;
    Walk walk(plan_, s.plan_row, -1, dense ? piece.begin : 0, dense ? piece.end : end);
    if (!dense) walk.entries(piece.begin, piece.end);
    Run run;
    if (!gather(s, walk, run, worker.batch[0])) return;
    for (int r = 0; r < s.rows; ++r) {
      float *q = worker.q + int64_t(r) * d_, *paired = worker.q_paired + int64_t(r) * d_;
      const char* row = row_of(q_.values, s.row[r]);
      const float* from = widen_row(row, q_.values.type, d_, q);
      if (from != q) std::copy_n(from, d_, q);
      for (int c = 0; c < d_; c += kPair)
        for (int lane = 0; lane < kLanes; ++lane) {
          paired[c + lane] = q[c + 2 * lane];
          paired[c + kLanes + lane] = q[c + 2 * lane + 1];
        }
    }
    if (worker.codes) worker.codes->open(worker.q, s.rows);
    alignas(64) float scores[kRows * kScoreRow], keep[16], worth[16];
    for (int i = 0;; i ^= 1) {
      Batch& batch = worker.batch[i];
      const Entries& e = batch.entries;
      const Entries* next = gather(s, walk, run, worker.batch[i ^ 1]) ? &worker.batch[i ^ 1].entries : nullptr;
      const Entries& coming = next ? *next : e;
      const PageType &k = e.layout->k, &v = e.layout->v;
      if (!CodeReader::reads_keys(k, d_) || !worker.codes->scores(e, next, scores)) {
        if (k.quantised()) batch.open_keys();
        with_rows(k, [&]<class Row>() {
          const float* q = Row::interleaved ? worker.q_paired : worker.q;
          over_rows(s.rows, next, [&]<int R, bool Fetch>(int r) {
            dots<Row, R, Fetch>(e, coming, d_, shift(k), q + int64_t(r) * d_, d_, scores + r * kScoreRow);
          });
        });
      }
      const bool codes = CodeReader::reads_values(v, d_v_);
      weigh(s, e, codes, scores, state, keep, worth);
      if (codes) {
        worker.codes->values(e, next, scores, keep, worth, state.out);
      } else {
        if (v.quantised()) batch.open_values();
        with_rows(v, [&]<class Row>() {
          over_rows(s.rows, next, [&]<int R, bool Fetch>(int r) {
            values<Row, R, Fetch>(e, coming, d_v_, shift(v), scores + r * kScoreRow, keep + r, state.out + int64_t(r) * d_v_);
          });
        });
      }
      if (!next) return;
    }
  }

  /// log2 of how many pairs of vectors share a scale.
  static int shift(const PageType& type) {
    int out = 0;
    while (type.quantised() && kPair << out < type.group) ++out;
    return out;
  }

  /// Dots → logits in log2 of row r, −∞ where an entry is not seen; their highest, lane by lane.
  F masked(const Shared& s, const Entries& e, int r, bool causal, bool window, float* x) const {
    const F hidden = set(-kInfinity);
    F top = hidden;
    for (int j = 0; j < e.count; j += kLanes) {
      F logit = load(x + j) * set(s.factor[r]);
      if (mods_.softcap > 0) logit = set(mods_.softcap) * tanh(logit * set(1 / mods_.softcap));
      if (has_bias_) logit = logit + load(e.bias + j);
      logit = logit * set(kLog2e);
      if (causal) logit = where(less_equal(load(e.key + j), set(s.limit[r])), logit, hidden);
      if (window)
        logit = where(less(set(s.position[r]) - load(e.position + j), set(float(mods_.window))), logit, hidden);
      if (e.count - j < kLanes) logit = where(first(e.count - j), logit, hidden);
      store(x + j, logit);
      top = max(top, logit);
    }
    return top;
  }

  /// Dots → weights, of the row's highest logit so far, or `apart`: of the highest of these, zeros behind the last. keep:
  /// what each row's earlier sums are worth now; worth: what these weights are.
  void weigh(const Shared& s, const Entries& e, bool apart, float* scores, Softmax state, float* keep, float* worth) const {
    const bool causal = plan_.causal && float(e.key[e.count - 1]) > s.limit_low;
    const bool window = mods_.window > 0 && s.position_high - e.position_low >= float(mods_.window);
    const bool as_they_are = mods_.softcap <= 0 && !has_bias_ && !causal && !window && e.count % kLanes == 0;
    const F hidden = set(-kInfinity);
    const int count = e.count, rows = s.rows;
    alignas(64) float sums[16] = {}, tops[16] = {};
    // Rows are independent of each other: two loops, so that one row's sum over lanes is made while others are under way.
    for (int r = 0; r < rows; ++r) {
      float* const x = scores + r * kScoreRow;
      F top = hidden;
      if (as_they_are) {
        const F factor = set(s.factor[r] * kLog2e);
        for (int j = 0; j < count; j += kLanes) {
          const F logit = load(x + j) * factor;
          store(x + j, logit);
          top = max(top, logit);
        }
      } else {
        top = masked(s, e, r, causal, window, x);
      }
      tops[r] = hmax(top);
    }
    for (int r = 0; r < rows; ++r) {
      float* const x = scores + r * kScoreRow;
      const float high = apart ? tops[r] : std::max(state.high[r], tops[r]);
      const F shift = set(high > -kInfinity ? high : 0);
      F sum = zero();
      int j = 0;
      for (; j < count; j += kLanes) {
        const F weight = exp2(load(x + j) - shift);
        sum = sum + weight;
        store(x + j, weight);
      }
      for (; apart && j < kPage; j += kLanes) store(x + j, zero());
      sums[r] = hsum(sum);
    }
    for (int r = 0; r < s.rows; r += kLanes) {
      const F before = load(state.high + r), mine = load(tops + r), high = max(before, mine),
              shift = where(less(hidden, high), high, zero());
      const F kept = exp2(before - shift), now = apart ? exp2(mine - shift) : set(1);
      store(keep + r, kept);
      store(worth + r, now);
      store(state.high + r, high);
      store(state.sum + r, fma(load(state.sum + r), kept, now * load(sums + r)));
    }
  }

  /// The pieces of a KV head, in their order, as rows of the output.
  void finish(const Shared& s) const {
    for (int r = 0; r < s.rows; ++r) {
      float* out = out_.as<float>() + s.row[r] * out_.stride[0];
      const float gain = mods_.gain ? mods_.gain.as<float>()[s.row[r]] : 1;
      float high = -kInfinity, sum = 0;
      if (gain != 0) {
        for (int64_t i = 0; i < s.pieces; ++i) high = std::max(high, state_of(s.first_piece + i, s).high[r]);
        const bool sink = bool(mods_.sink_logits);
        const float sink_logit = sink ? mods_.sink_logits.as<float>()[s.head[r]] * kLog2e : -kInfinity;
        high = std::max(high, sink_logit);
        if (high > -kInfinity && sink) sum = std::exp2(sink_logit - high);
      }
      std::fill_n(out, d_v_, 0.0f);
      if (high > -kInfinity) {
        for (int64_t i = 0; i < s.pieces; ++i) {
          const Softmax part = state_of(s.first_piece + i, s);
          if (part.high[r] == -kInfinity) continue;
          const float share = std::exp2(part.high[r] - high);
          sum += part.sum[r] * share;
          const float* from = part.out + int64_t(r) * d_v_;
          for (int c = 0; c < d_v_; c += kLanes) store(out + c, fma(load(from + c), set(share), load(out + c)));
        }
        const F scale = set(gain / sum);
        for (int c = 0; c < d_v_; c += kLanes) store(out + c, load(out + c) * scale);
      }
      if (lse_)
        lse_.as<float>()[s.row[r] * lse_.stride[0]] = high > -kInfinity ? (high + std::log2(sum)) / kLog2e : -kInfinity;
    }
  }

  Queue& queue_;
  const Ragged& q_;
  const Pages& pages_;
  const Plan& plan_;
  const Mods& mods_;
  const int d_, d_v_;
  bool has_bias_ = false, has_codes_ = false;
  std::vector<Shared> shared_;
  std::vector<SharedRange> pieces_;
  Tensor out_, lse_, states_;
  int64_t* left_ = nullptr;
};

/// Whether a side can be read as pairs of vectors.
bool in_pairs(const PageType& type, int width) {
  if (width % kPair != 0 || type.pair || (type.quantised() && type.codes >= PageType::Codes::Table)) return false;
  if (!type.quantised() || type.axis == PageType::Axis::Channel) return true;
  const int pairs = type.group / kPair;  // that share a scale
  return type.group % kPair == 0 && (pairs & (pairs - 1)) == 0;
}

}  // namespace

bool decode(Queue& queue, const Ragged& q, const Pages& pages, const Plan& plan, const Mods& mods, Tensor out, Tensor lse) {
  if (mods.weight != WeightFunction::Softmax || mods.k_map || mods.v_map || pages.plain_keys || plan.mask || plan.parts > 1)
    return false;
  for (const PageLayout& layout : pages.layouts)
    if (layout.v_transposed || !in_pairs(layout.k, layout.d) || !in_pairs(layout.v, layout.d_v)) return false;
  const Scratch scratch(queue.scratch);
  Decode decode(queue, q, pages, plan, mods);
  if (!decode.plan()) return false;
  decode.run(out, lse);
  return true;
}

}  // namespace heed::HEED_ISA
