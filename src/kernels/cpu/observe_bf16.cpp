#include "kernels/cpu/observe_bf16.h"

#include "kernels/cpu/bf16_tiles.h"

namespace heed::HEED_ISA {

#if defined(HEED_BF16_DOT)

class ObservedBf16::Tiles : Bf16Tiles {
 public:
  Tiles(Queue& queue, const Ragged& q, const Ragged& k, const Plan& plan, const Mods& mods, const Observe& how, Tensor lse)
      : Bf16Tiles(queue, q, k, nullptr, plan, mods), how_(how), lse_(lse),
        tasks_(tile_tasks(plan, q, k.heads, k.heads, mods, false, kMost)) {}

  const std::vector<TileTask>& tasks() const { return tasks_; }

  int64_t bytes(int64_t keys) const { return place(nullptr, keys).end - static_cast<char*>(nullptr); }

  void add(char* memory, const TileTask& task, int64_t low, int64_t high, float* columns) const {
    const RoundedTile::Registers registers;
    const Worker w = place(memory, high - low);
    const KeyView keys = source_.view(task, mods_);
    Queries& of = *w.queries;
    lay_out(of, task, keys.size());
    const KeyRange range = key_range(of, keys);
    const int64_t n = q_.length(task.sequence * q_.heads + task.head);
    bool packed = false;
    Walk walk(plan_, task.plan_row, -1, std::max(low, range.low), std::min(high, range.high));
    Run rest{};
    while (next_block(*w.block, walk, rest)) {
      if (!packed) {
        pack(w);
        weigh_lanes(of, n);
        std::fill_n(w.sums, (high - low) * 16, 0.0f);
        packed = true;
      }
      open(w, *w.block, task);
      for (int st = 0; st < of.groups / 2; ++st) absorb(w, st, low);
    }
    if (!packed) return;
    for (int64_t j = 0; j < high - low; ++j) {
      const F x = load(w.sums + j * 16);
      columns[j] = largest_ ? std::max(columns[j], hmax(x)) : columns[j] + hsum(x);
    }
  }

 private:
  struct Worker : Room {
    float* sums;  // of each key of the range, by lane of a group
    char* end;
  };

  Worker place(char* at, int64_t keys) const {
    Worker w{};
    const auto take = [&](auto*& to, int64_t bytes) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(at);
      at += (bytes + 63) / 64 * 64;
    };
    take(w.queries, sizeof(Queries));
    take(w.block, sizeof(Block));
    take(w.q, int64_t(kMost) * panels_.steps() * 64);
    take(w.s, 4 * kTileFloats * 4);
    take(w.k, gathered_ ? kBlockUnits * panels_.key_numbers() * 2 : 0);
    take(w.sums, keys * 64);
    w.end = at;
    return w;
  }

  /// of.high: what is taken from a logit in log2; of.sum: what a lane's weights count for.
  void weigh_lanes(Queries& of, int64_t n) const {
    for (int lane = 0; lane < of.groups * 16; ++lane) {
      const float lse = lse_.as<float>()[of.row[lane] * lse_.stride[0]] * kLog2e;
      of.high[lane] = lse == -std::numeric_limits<float>::infinity() ? -lse : lse;  // a row that sees nothing: weights of 0
      of.sum[lane] = lane >= of.count                      ? 0
                     : how_.rows == Observe::Rows::Decayed ? std::pow(how_.decay, float(n - 1 - of.query[lane]))
                                                           : 1;
    }
  }

  void absorb(const Worker& w, int st, int64_t low) const {
    const Block& block = *w.block;
    const Queries& of = *w.queries;
    const auto [begin, end] = visible_units(block, of, st);
    const uint32_t* q = w.q + int64_t(st) * panels_.steps() * 2 * kTileWords;
    for (int u = begin; u < end; ++u) {
      const Unit& unit = block.unit[u];
      unit_scores(unit.k, q, panels_.steps(), w.s);
      const Seen sees[2] = {seen(block, unit, of, 2 * st), seen(block, unit, of, 2 * st + 1)};
      if (unit.keys || !sees[0].all || !sees[1].all) add_unit<true>(w, unit, sees, st, low);
      else add_unit<false>(w, unit, sees, st, low);
    }
  }

  template <bool Masked>
  void add_unit(const Worker& w, const Unit& unit, const Seen* sees, int st, int64_t low) const {
    const Queries& of = *w.queries;
    __m512i words[2];
    F factor[2], shift[2], weight[2];
    for (int g = 0; g < 2; ++g) {
      const int at = (2 * st + g) * 16;
      words[g] = sees[g].all ? _mm512_set1_epi32(-1) : sees[g].words;
      factor[g] = load(of.factor + at), shift[g] = zero() - load(of.high + at), weight[g] = load(of.sum + at);
    }
    for (int j = 0; j < (unit.keys ? unit.fill : kUnit); ++j) {
      const float* s = w.s + j / 16 * 2 * kTileFloats + j % 16 * 16;
      const int64_t key = unit.keys ? unit.keys[j] : unit.first + j;
      F x[2];
      for (int g = 0; g < 2; ++g) {
        x[g] = exp2<4>(fma(load(s + g * kTileFloats), factor[g], shift[g]));
        if constexpr (Masked) {
          x[g] = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(words[g], _mm512_set1_epi32(1)), x[g]);
          words[g] = _mm512_srli_epi32(words[g], 1);
        }
      }
      float* to = w.sums + (key - low) * 16;
      store(to, largest_ ? max(load(to), max(x[0], x[1])) : fma(x[0], weight[0], fma(x[1], weight[1], load(to))));
    }
  }

  Observe how_;
  Tensor lse_;
  std::vector<TileTask> tasks_;
  const bool largest_ = how_.rows == Observe::Rows::Max;
};

bool ObservedBf16::takes(const Ragged& q, const Keys& keys, const Plan& plan, const Mods& mods, const Observe& how) {
  using Rows = Observe::Rows;
  if (!keys.panel || keys.panel->values.type != Dtype::BF16 || how.logits) return false;
  if (mods.weight != WeightFunction::Softmax || mods.softcap > 0 || mods.key_bias || mods.row_factor) return false;
  if (how.rows != Rows::Sum && how.rows != Rows::Mean && how.rows != Rows::Decayed && how.rows != Rows::Max)
    return false;
  const int64_t n = longest(q);
  return n >= 16 && (plan.form == Plan::Form::Dense || plan.q_tile >= 16);
}

ObservedBf16::ObservedBf16(Queue& queue, const Ragged& q, const Ragged& k, const Plan& plan, const Mods& mods,
                           const Observe& how, Tensor lse)
    : tiles_(std::make_unique<Tiles>(queue, q, k, plan, mods, how, lse)) {}
const std::vector<TileTask>& ObservedBf16::tasks() const { return tiles_->tasks(); }
int64_t ObservedBf16::bytes(int64_t keys) const { return tiles_->bytes(keys); }
void ObservedBf16::add(char* memory, const TileTask& task, int64_t low, int64_t high, float* columns) const {
  tiles_->add(memory, task, low, high, columns);
}

#else

class ObservedBf16::Tiles {};
bool ObservedBf16::takes(const Ragged&, const Keys&, const Plan&, const Mods&, const Observe&) { return false; }
ObservedBf16::ObservedBf16(Queue&, const Ragged&, const Ragged&, const Plan&, const Mods&, const Observe&, Tensor) {}
const std::vector<TileTask>& ObservedBf16::tasks() const {
  static const std::vector<TileTask> none;
  return none;
}
int64_t ObservedBf16::bytes(int64_t) const { return 0; }
void ObservedBf16::add(char*, const TileTask&, int64_t, int64_t, float*) const {}

#endif

ObservedBf16::~ObservedBf16() = default;

}  // namespace heed::HEED_ISA
