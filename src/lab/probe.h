// What a session's attention reads, seen from outside: how much of dense attention's mass it still covers, and where.
#pragma once
#include <memory>
#include <span>
#include <vector>

#include "model/session.h"

namespace heed {

/// Dense attention of sampled decode steps in sampled layers, by true position.
class DenseMass {
 public:
  /// At most `layers` layers and `steps` of the `decoded` steps, evenly spread. Where not all layers are asked for, those
  /// with a sliding window stand back for others: a window bounds what is read, and most mechanisms leave it alone.
  DenseMass(const ModelInfo& model, int64_t length, int64_t decoded, int layers = 6, int steps = 8);
  /// The slot of a layer or a step; −1 when it is not sampled.
  int layer(int l) const { return layer_slot_[size_t(l)]; }
  int step(int64_t s) const;
  /// Probabilities over positions [length].
  std::span<float> row(int layer_slot, int step_slot, int head);
  /// What attention gave: [h · d_v].
  std::span<float> output(int layer_slot, int step_slot);
  /// The sampled layers, ascending.
  std::vector<int> layers() const;

 private:
  std::vector<int> layer_slot_;
  std::vector<int64_t> steps_;
  int heads_;
  int64_t length_, width_;
  std::vector<float> values_, outputs_;
};

/// Shares of how often each pair of (query, key) ranges was computed or read: rows × columns numbers in [0, 1].
struct Map {
  int layer = 0, head = 0;
  int rows = 0, columns = 0;
  std::vector<float> share;
};

/// Watches one session by its tap. Cheap: a few rows of a few layers, in a few of the decoded steps, so that the others
/// run as they do when nobody looks; seconds() is what it took, to be taken off timings.
class Probe {
 public:
  /// Fills `dense` when `record`, else measures against it. `maps`: also draw plans and reads.
  Probe(Session& session, std::shared_ptr<DenseMass> dense, bool record, int64_t prompt, int64_t length, bool maps);
  ~Probe();
  Probe(const Probe&) = delete;
  Probe& operator=(const Probe&) = delete;

  /// To be called before each decoded step with its number: looks on when something is sampled there.
  void before(int64_t step);

  /// Mean share of the softmax mass that the prefill's plan computes, for rows at 1/2, 3/4 and 7/8 of the prompt, under
  /// the session's own queries: e^(lse of the plan − lse of all keys).
  double prefill_mass() const;
  /// Mean share of dense attention's mass (of the dense run, same text and step) on what is read while decoding.
  double decode_mass() const;
  /// decode_mass() apart: [sampled layers][h].
  std::vector<std::vector<double>> mass_by_head() const { return by_head(head_mass_, 1); }
  /// Mean of ‖o − dense o‖ / ‖dense o‖ over sampled steps, [sampled layers][h]: what each head's output differs from the
  /// dense run's at the same step, what layers below changed included.
  std::vector<std::vector<double>> error_by_head() const { return by_head(head_error_, 0); }
  /// Most bytes that the store held between two layers of the prompt or of a step looked at.
  int64_t peak_bytes() const { return peak_; }
  double seconds() const { return seconds_; }
  const std::vector<Map>& plans() const { return plans_; }
  const std::vector<Map>& reads() const { return reads_; }

 private:
  void look(LayerView& at);
  void look_prefill(LayerView& at);
  void look_decode(LayerView& at);
  void draw_plan(LayerView& at);
  void look_output(LayerView& at, int layer, int step);
  /// The map row that decoded step `step` stands for; −1 when none.
  int64_t map_row(int64_t step) const;
  std::vector<std::vector<double>> by_head(const std::vector<double>& sums, double none) const;

  Session& session_;
  std::shared_ptr<DenseMass> dense_;
  bool record_, maps_;
  int64_t prompt_, length_;
  double prefill_sum_ = 0, decode_sum_ = 0;
  int64_t prefill_count_ = 0, decode_count_ = 0, peak_ = 0;
  double seconds_ = 0;
  std::vector<double> head_mass_, head_error_, head_count_;  // [sampled layers · h]
  std::vector<Map> plans_, reads_;
};

}  // namespace heed
