// Who sees whom, and with which logit: what attend, its gradient and observe share on the device.
#pragma once
#include "kernels/cuda/device.cuh"

namespace heed::cuda {

struct PlanView {
  Plan::Form form;
  Plan::Scope scope;
  int q_tile, k_tile, words, parts, scope_heads;
  bool causal;
  const int64_t* rowptr;
  const int32_t* count;
  const int32_t* index;  // Interval: pairs
  const int32_t* mask;
  const uint64_t* bits;
  const int32_t* part;
  __device__ int64_t begin(int64_t row) const { return rowptr[row]; }
  __device__ int64_t end(int64_t row) const { return count ? rowptr[row] + count[row] : rowptr[row + 1]; }
};

/// `scope_heads`: of the plan's scope.
PlanView plan_view(const Plan& plan, int scope_heads);

struct ModsView {
  float scale, softcap;
  int64_t window;
  const int32_t *q_pos, *k_pos, *until, *k_map, *v_map;
  const float *key_bias, *temperature, *gain, *sink_logits;
  Matrix row_factor, key_factor;
  bool sigmoid;
};

/// Everything a kernel needs to know of one attention. v.data may be null.
struct AttentionView {
  Matrix q, k, v;
  Segments qs, ks, vs;
  int h, g, g_v, d, d_v, sequences;
  PlanView plan;
  ModsView mods;
  int64_t q_rows, n_bound, m_bound;  // rows of q.values; no sequence has more queries, no segment more keys
};

/// Checks the arguments (Error(Invalid)). plan may be null: dense, causal.
AttentionView attention_view(const char* where, const Ragged& q, const Ragged& k, const Ragged& v, const Plan* plan,
                             const Mods& mods);

/// One query row, and where its keys lie.
struct QueryRow {
  int64_t row, q_pos, k_first, v_first;
  int sequence, head, i, n, m, k_segment;
  float factor;  // of the dot product
  bool live;     // there is such a row, and its gain is not 0
};

__device__ inline int k_head(const AttentionView& a, int head) {
  return a.mods.k_map ? a.mods.k_map[head] : head * a.g / a.h;
}
__device__ inline int v_head(const AttentionView& a, int head) {
  return a.mods.v_map ? a.mods.v_map[head] : head * a.g_v / a.h;
}

__device__ inline QueryRow query_row(const AttentionView& a, int sequence, int head, int i) {
  QueryRow out;
  const int segment = sequence * a.h + head;
  out.sequence = sequence;
  out.head = head;
  out.i = i;
  out.n = a.qs.length(segment);
  out.k_segment = sequence * a.g + k_head(a, head);
  out.k_first = a.ks.begin(out.k_segment);
  out.m = a.ks.length(out.k_segment);
  out.v_first = a.v ? a.vs.begin(sequence * a.g_v + v_head(a, head)) : 0;
  out.live = i < out.n;
  out.row = a.qs.begin(segment) + (out.live ? i : 0);
  out.q_pos = out.m - out.n + i;
  out.factor = a.mods.scale;
  if (out.live) {
    if (a.mods.q_pos) out.q_pos = a.mods.q_pos[out.row];
    if (a.mods.temperature) out.factor *= a.mods.temperature[out.row];
    if (a.mods.gain && a.mods.gain[out.row] == 0) out.live = false;
  }
  return out;
}

__device__ inline bool sees(const AttentionView& a, const QueryRow& at, int key) {
  if (!at.live || key < 0 || key >= at.m) return false;
  if (a.plan.causal && key - at.i > at.m - at.n) return false;
  if (a.mods.window > 0 && at.q_pos - (a.mods.k_pos ? a.mods.k_pos[at.k_first + key] : key) >= a.mods.window)
    return false;
  return !a.mods.until || at.q_pos <= a.mods.until[at.k_first + key];
}

/// The logit of a dot product; `slope` is its derivative by the dot product.
__device__ inline float logit_of(const AttentionView& a, const QueryRow& at, int key, float dot, float* slope = nullptr) {
  float x = at.factor * dot, by = at.factor;
  if (a.mods.softcap > 0) {
    const float t = tanhf(x / a.mods.softcap);
    x = a.mods.softcap * t;
    by *= 1 - t * t;
  }
  if (a.mods.key_bias) x += a.mods.key_bias[at.k_first + key];
  if (a.mods.row_factor)
    for (int c = 0; c < a.mods.row_factor.width; ++c)
      x += a.mods.row_factor.row<float>(at.row)[c] * a.mods.key_factor.row<float>(at.k_first + key)[c];
  if (slope) *slope = by;
  return x;
}

/// log σ(x)
__device__ inline float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }
/// The logarithm of an unnormalised weight.
__device__ inline float log_weight(const AttentionView& a, float logit) {
  return a.mods.sigmoid ? log_sigmoid(logit) : logit;
}

/// The plan's first row of (sequence, head of the scope).
__device__ inline int64_t plan_row(const AttentionView& a, int sequence, int head, int i) {
  int64_t first = 0;
  for (int s = 0; s < sequence; ++s)
    first += int64_t(a.plan.scope_heads) * ((a.qs.length(s * a.h) + a.plan.q_tile - 1) / a.plan.q_tile);
  const int tiles = (a.qs.length(sequence * a.h) + a.plan.q_tile - 1) / a.plan.q_tile;
  return first + int64_t(head * a.plan.scope_heads / a.h) * tiles + i / a.plan.q_tile;
}

/// The part in which a plan row names `key` for the row of its tile, or −1.
__device__ inline int named_in(const PlanView& plan, int64_t row, int tile_row, int key) {
  if (plan.form == Plan::Form::Dense) return 0;
  const int64_t begin = plan.begin(row);
  int64_t low = begin, high = plan.end(row);
  const int wanted = plan.form == Plan::Form::Blocks ? key / plan.k_tile : key;
  const int width = plan.form == Plan::Form::Interval ? 2 : 1;
  while (low < high) {  // the first entry past `wanted`
    const int64_t middle = (low + high) / 2;
    if (plan.index[middle * width] <= wanted) low = middle + 1;
    else high = middle;
  }
  if (--low < begin) return -1;
  if (plan.form == Plan::Form::Interval ? key >= plan.index[2 * low + 1] : plan.index[low] != wanted) return -1;
  if (plan.mask && plan.mask[low] >= 0) {
    const int in = key % plan.k_tile;
    if (!(plan.bits[(int64_t(plan.mask[low]) * plan.q_tile + tile_row) * plan.words + in / 64] >> (in % 64) & 1))
      return -1;
  }
  return plan.part ? plan.part[low] : 0;
}

/// The keys that the rows of one plan tile read, in stages of at most `Keys`: the same cursor in every thread of a block.
/// Key j of a stage is key(j); −1 where there is none.
template <int Keys>
class KeyStages {
 public:
  /// `limit`: keys at or past it are seen by no row. `from`: those before it neither. `part` < 0: entries of every part.
  __device__ KeyStages(const PlanView& plan, int64_t row, int from, int limit, int part)
      : plan_(plan), limit_(limit), from_(from), part_(part) {
    if (plan.form == Plan::Form::Dense) {
      at_ = from / Keys * Keys;
      entry_ = 0;
      end_ = 1;
    } else {
      entry_ = plan.begin(row);
      end_ = plan.end(row);
      whole_ = plan.form == Plan::Form::Tokens ? 1 : plan.k_tile;
    }
  }
  /// Leaves share `i` of `shares` of the entries. Dense has none: there the caller divides the range of keys.
  __device__ void keep_share(int i, int shares) {
    if (plan_.form == Plan::Form::Dense) return;
    const int64_t first = entry_, count = end_ - entry_;
    entry_ = first + count * i / shares;
    end_ = first + count * (i + 1) / shares;
  }
  /// Goes to the next stage; false when there is none. Afterwards key(j), entry(j) describe it.
  __device__ bool next() {
    if (plan_.form == Plan::Form::Dense) {
      first_ = at_;
      at_ += Keys;
      return first_ < limit_;
    }
    const bool interval = plan_.form == Plan::Form::Interval;
    const bool packs = !interval && whole_ < Keys;  // several entries a stage
    if (packs) {
      first_entry_ = entry_;
      entry_ += Keys / whole_;
      return first_entry_ < end_ && start(first_entry_) < limit_;
    }
    while (entry_ < end_) {
      const int begin = start(entry_), finish = interval ? plan_.index[2 * entry_ + 1] : begin + whole_;
      if (begin >= limit_) return false;  // entries ascend
      if (at_ < begin) at_ = begin;
      if (interval && at_ < from_) at_ = min(from_, finish);
      if ((part_ >= 0 && plan_.part && plan_.part[entry_] != part_) || at_ >= finish) {
        ++entry_;
        at_ = 0;
        continue;
      }
      first_ = at_;
      first_entry_ = entry_;
      stop_ = finish;
      at_ += Keys;
      if (at_ >= finish) {
        ++entry_;
        at_ = 0;
      }
      return true;
    }
    return false;
  }
  __device__ int64_t entry(int j) const {
    const bool packs = plan_.form != Plan::Form::Dense && plan_.form != Plan::Form::Interval && whole_ < Keys;
    return packs ? first_entry_ + j / whole_ : first_entry_;
  }
  __device__ int key(int j) const {
    if (plan_.form == Plan::Form::Dense) return first_ + j < limit_ ? first_ + j : -1;
    if (plan_.form != Plan::Form::Interval && whole_ < Keys) {
      const int64_t e = first_entry_ + j / whole_;
      if (j / whole_ >= Keys / whole_ || e >= end_ || (part_ >= 0 && plan_.part && plan_.part[e] != part_)) return -1;
      const int key = start(e) + j % whole_;
      return key < limit_ ? key : -1;
    }
    return first_ + j < stop_ && first_ + j < limit_ ? first_ + j : -1;
  }

 private:
  __device__ int start(int64_t entry) const {
    if (plan_.form == Plan::Form::Interval) return plan_.index[2 * entry];
    // A block past every segment's end, which may not fit an int times k_tile.
    return int(min(int64_t(plan_.index[entry]) * whole_, int64_t(1) << 30));
  }
  const PlanView& plan_;
  int limit_, from_, part_, first_ = 0, at_ = 0, stop_ = 0, whole_ = 1;
  int64_t entry_, end_, first_entry_ = 0;
};

/// Whether a block's mask shows key `key` of `entry` to the row of its tile.
__device__ inline bool mask_shows(const PlanView& plan, int64_t entry, int tile_row, int key) {
  if (!plan.mask || plan.mask[entry] < 0) return true;
  const int in = key % plan.k_tile;
  return plan.bits[(int64_t(plan.mask[entry]) * plan.q_tile + tile_row) * plan.words + in / 64] >> (in % 64) & 1;
}

/// How query rows are dealt to blocks: those that share keys and a plan row go together. A block takes `rows` of them,
/// numbered i · pack + head within a plan tile, so that neighbouring queries of a group meet.
struct RowTiles {
  int pack;    // query heads of a block
  int chunks;  // blocks of a plan tile (Dense: of all rows)
  dim3 grid;   // x: plan tile and chunk; y: sequence and pack
};
RowTiles row_tiles(const AttentionView& a, int rows);

/// The plan's row that the block's queries have; 0 when it is dense.
__device__ inline int64_t block_plan_row(const AttentionView& a, const RowTiles& t) {
  const int packs = a.h / t.pack, head = blockIdx.y % packs * t.pack, sequence = blockIdx.y / packs;
  const bool planned = a.plan.form != Plan::Form::Dense;
  return planned ? plan_row(a, sequence, head, blockIdx.x / t.chunks * a.plan.q_tile) : 0;
}

/// Row r of the block (blockIdx.x, blockIdx.y).
__device__ inline QueryRow tile_row(const AttentionView& a, const RowTiles& t, int rows, int r) {
  const int packs = a.h / t.pack, sequence = blockIdx.y / packs, pack = blockIdx.y % packs;
  const bool dense = a.plan.form == Plan::Form::Dense;
  const int tile = dense ? 0 : blockIdx.x / t.chunks, chunk = dense ? blockIdx.x : blockIdx.x % t.chunks;
  const int in_tile = chunk * rows + r, i = in_tile / t.pack, head = pack * t.pack + in_tile % t.pack;
  if (!dense && i >= a.plan.q_tile) {
    QueryRow none = query_row(a, sequence, head, 0);
    none.live = false;
    none.i = none.n;
    return none;
  }
  return query_row(a, sequence, head, tile * a.plan.q_tile * !dense + i);
}

}  // namespace heed::cuda
