#include "lab/probe.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/on_host.h"
#include "attention/plans.h"
#include "lab/progress.h"

namespace heed {
namespace {

constexpr int kRows = 16;   // query rows looked at in one place of a prefill
constexpr int kCells = 64;  // rows and columns of a map
constexpr int kMapHeads = 4;

/// What a decoding step reads of the store, as the host sees it.
class Reads {
 public:
  explicit Reads(LayerView& at)
      : host_(at.queue), plan_(host_(at.read.plan)), q_(host_.segments(at.q)),
        keys_(host_.segments(
            {.values = {}, .offsets = at.store->offsets(at.queue), .ends = {}, .heads = at.model.g, .bound = at.store->entries()})) {
  }
  /// Calls visit(first entry, past the last) for what query head `head` of sequence 0 reads.
  template <class F>
  void each(int head, F visit) const {
    each_interval(plan_, q_, keys_, Mods(), 0, head, [&](int64_t, int64_t begin, int64_t end) { visit(begin, end); });
  }

 private:
  OnHost host_;
  Plan plan_;
  Ragged q_, keys_;
};

}  // namespace

DenseMass::DenseMass(const ModelInfo& model, int64_t length, int64_t decoded, int layers, int steps)
    : layer_slot_(size_t(model.layers), -1), heads_(model.h), length_(length), width_(int64_t(model.h) * model.d_v) {
  std::vector<int> from;
  for (int l = 0; l < model.layers; ++l)
    if (layers >= model.layers || model.window(l) == 0) from.push_back(l);
  for (int l = 0; from.empty() && l < model.layers; ++l) from.push_back(l);
  const int all = int(from.size());
  layers = std::min(layers, all);
  for (int i = 0; i < layers; ++i) layer_slot_[size_t(from[size_t((2 * i + 1) * all / (2 * layers))])] = i;
  steps = int(std::min<int64_t>(steps, decoded));
  for (int i = 0; i < steps; ++i) steps_.push_back((2 * i + 1) * decoded / (2 * steps));
  values_.assign(size_t(layers) * size_t(steps) * size_t(heads_) * size_t(length), 0.0f);
  outputs_.assign(size_t(layers) * size_t(steps) * size_t(width_), 0.0f);
}

std::span<float> DenseMass::output(int layer_slot, int step_slot) {
  return {outputs_.data() + (size_t(layer_slot) * steps_.size() + size_t(step_slot)) * size_t(width_), size_t(width_)};
}

std::vector<int> DenseMass::layers() const {
  std::vector<int> out;
  for (size_t l = 0; l < layer_slot_.size(); ++l)
    if (layer_slot_[l] >= 0) out.push_back(int(l));
  return out;
}

int DenseMass::step(int64_t s) const {
  const auto found = std::find(steps_.begin(), steps_.end(), s);
  return found == steps_.end() ? -1 : int(found - steps_.begin());
}

std::span<float> DenseMass::row(int layer_slot, int step_slot, int head) {
  const size_t at = (size_t(layer_slot) * steps_.size() + size_t(step_slot)) * size_t(heads_) + size_t(head);
  return {values_.data() + at * size_t(length_), size_t(length_)};
}

Probe::Probe(Session& session, std::shared_ptr<DenseMass> dense, bool record, int64_t prompt, int64_t length, bool maps)
    : session_(session), dense_(std::move(dense)), record_(record), maps_(maps), prompt_(prompt), length_(length) {
  head_mass_.assign(dense_->layers().size() * size_t(session.model().info().h), 0.0);
  head_error_ = head_count_ = head_mass_;
  session.tap([this](LayerView& at) { look(at); });
}

Probe::~Probe() { session_.tap({}); }

void Probe::before(int64_t step) {
  // A page more at most is held between two steps that are looked at for their bytes alone.
  const bool wanted = dense_->step(step) >= 0 || map_row(step) >= 0 || step % kPage == 0;
  session_.tap(wanted ? Tap([this](LayerView& at) { look(at); }) : Tap());
}

int64_t Probe::map_row(int64_t step) const {
  if (!maps_) return -1;
  const int64_t decoded = std::max<int64_t>(1, length_ - prompt_ - 1), row = step * kCells / decoded;
  return row < kCells && step == (row * decoded + kCells - 1) / kCells ? row : -1;
}

double Probe::prefill_mass() const { return prefill_count_ ? prefill_sum_ / double(prefill_count_) : 1.0; }
double Probe::decode_mass() const { return decode_count_ ? decode_sum_ / double(decode_count_) : 1.0; }

void Probe::look(LayerView& at) {
  const double begin = now();
  Scratch scope(at.queue.scratch);
  if (at.stores) peak_ = std::max(peak_, at.stores->bytes());
  if (at.phase == Phase::Decode) look_decode(at);
  if (at.phase == Phase::Prompt || at.phase == Phase::Chunk) {
    if (dense_->layer(at.layer) >= 0) look_prefill(at);
    if (maps_ && at.phase == Phase::Prompt && at.layer == at.model.layers / 2) draw_plan(at);
  }
  seconds_ += now() - begin;
}

void Probe::look_prefill(LayerView& at) {
  if (at.plan.form == Plan::Form::Dense || !at.lse) return;
  const Tensor full = at.queue.scratch.take(Dtype::F32, {at.q.values.size[0]});
  OnHost host(at.queue);
  const Ragged queries = host.segments(at.q);
  const Tensor planned = host(at.lse);
  const int64_t n = at.rows[0];
  // Rows in the middle see fewer keys: the panel is cut so that they are its last queries.
  for (const int64_t eighth : {4, 6, 7}) {
    const int64_t last = n * eighth / 8, first = std::max<int64_t>(0, last - kRows), all = at.q.segments();
    if (last == 0) continue;
    Ragged rows = at.q, keys = at.k;
    const Num begin = begin_of(at.q, index());
    rows.offsets = compute(at.queue, Dtype::I64, {all + 1}, pick(index() < all, begin + first, end_of(at.q, all - 1)));
    rows.ends = compute(at.queue, Dtype::I64, {all}, begin + last);
    keys.ends = compute(at.queue, Dtype::I64, {at.k.segments()}, end_of(at.k, index()) - (n - last));
    RowStats stats;
    stats.lse = full;
    at.run().observe_rows(at.queue, rows, {.panel = &keys, .pages = nullptr, .read = nullptr}, nullptr, at.mods, stats);
    const Tensor dense = host(full);
    for (int64_t s = 0; s < all; ++s)
      for (int64_t row = queries.begin(s) + first; row < queries.begin(s) + last; ++row) {
        const double share = std::exp(double(planned.at<float>(row)) - double(dense.at<float>(row)));
        if (!std::isfinite(share)) continue;
        prefill_sum_ += std::min(1.0, share), ++prefill_count_;
      }
  }
}

void Probe::look_decode(LayerView& at) {
  const int layer = dense_->layer(at.layer), step = dense_->step(at.step());
  if (layer >= 0 && step >= 0 && record_) {
    OnHost host(at.queue);
    const Ragged paid = at.observe(at.q, {.rows = Observe::Rows::Sum, .heads = Observe::Heads::Each}),
                 columns = host.segments(paid);
    const int group = at.model.group();
    const Tensor weights = host(paid.values);
    const float* values = weights.as<float>();
    for (int head = 0; head < at.model.h; ++head) {
      const int64_t segment = head / group;
      const std::vector<int32_t> positions = at.store->positions(segment);
      const std::span<float> row = dense_->row(layer, step, head);
      for (size_t i = 0; i < positions.size(); ++i)
        row[size_t(positions[i])] = values[(columns.begin(segment) + int64_t(i)) * group + head % group];
    }
  }
  if (layer >= 0 && step >= 0) look_output(at, layer, step);
  const int64_t y = at.layer == at.model.layers / 2 ? map_row(at.step()) : -1;
  const bool measured = layer >= 0 && step >= 0 && !record_, drawn = y >= 0;
  if (!measured && !drawn) return;
  const Reads reads(at);
  if (measured) {
    for (int head = 0; head < at.model.h; ++head) {
      const std::vector<int32_t> positions = session_.origins(at.layer, head / at.model.group());
      const std::span<const float> row = dense_->row(layer, step, head);
      double sum = 0;
      reads.each(head, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sum += row[size_t(positions[size_t(i)])];
      });
      decode_sum_ += std::min(1.0, sum), ++decode_count_;
      head_mass_[size_t(layer * at.model.h + head)] += std::min(1.0, sum);
    }
  }
  if (!drawn) return;
  if (reads_.empty())
    for (int head = 0; head < std::min(kMapHeads, at.model.h); ++head)
      reads_.push_back({at.layer, head * at.model.h / std::min(kMapHeads, at.model.h), kCells, kCells,
                        std::vector<float>(size_t(kCells) * kCells)});
  for (Map& map : reads_) {
    const std::vector<int32_t> positions = session_.origins(at.layer, map.head / at.model.group());
    reads.each(map.head, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t x = std::min<int64_t>(kCells - 1, int64_t(positions[size_t(i)]) * kCells / length_);
        map.share[size_t(y * kCells + x)] += float(double(kCells) / double(length_));
      }
    });
  }
}

void Probe::look_output(LayerView& at, int layer, int step) {
  const std::span<float> dense = dense_->output(layer, step);
  if (record_) return at.queue.read_back(at.out, dense.data());
  std::vector<float> out(dense.size());
  at.queue.read_back(at.out, out.data());
  const size_t width = size_t(at.model.d_v);
  for (size_t head = 0; head < size_t(at.model.h); ++head) {
    double distance = 0, norm = 0;
    for (size_t c = head * width; c < (head + 1) * width; ++c) {
      distance += double(out[c] - dense[c]) * double(out[c] - dense[c]);
      norm += double(dense[c]) * double(dense[c]);
    }
    head_error_[size_t(layer) * size_t(at.model.h) + head] += norm > 0 ? std::sqrt(distance / norm) : 0;
    ++head_count_[size_t(layer) * size_t(at.model.h) + head];
  }
}

std::vector<std::vector<double>> Probe::by_head(const std::vector<double>& sums, double none) const {
  const size_t h = size_t(session_.model().info().h);
  std::vector<std::vector<double>> out;
  for (size_t i = 0; i < sums.size(); ++i) {
    if (i % h == 0) out.emplace_back();
    out.back().push_back(head_count_[i] > 0 ? sums[i] / head_count_[i] : none);
  }
  return out;
}

void Probe::draw_plan(LayerView& at) {
  OnHost host(at.queue);
  const Plan plan = host(at.plan);
  const Ragged q = host.segments(at.q), k = host.segments(at.k);
  const Mods mods = host.positions(at.mods);
  const int64_t n = at.rows[0], m = at.key_rows[0];
  const int heads = std::min(kMapHeads, at.model.h), cells = int(std::min<int64_t>(kCells, n));
  for (int i = 0; i < heads; ++i) {
    Map map{at.layer, i * at.model.h / heads, cells, cells, std::vector<float>(size_t(cells) * size_t(cells))};
    // Every pair counts as its share of a cell; a few rows a cell are enough for a picture.
    const int64_t every = std::max<int64_t>(1, n / cells / 4);
    std::vector<int64_t> sampled(static_cast<size_t>(cells));
    for (int64_t row = 0; row < n; row += every) ++sampled[size_t(row * cells / n)];
    each_interval(plan, q, k, mods, 0, map.head, [&](int64_t row, int64_t begin, int64_t end) {
      if (row % every != 0) return;
      const int64_t y = row * cells / n;
      for (int64_t x = begin * cells / m; x < cells; ++x) {
        const int64_t from = std::max(begin, x * m / cells), to = std::min(end, (x + 1) * m / cells);
        if (from >= to && x * m / cells >= end) break;
        if (from < to)
          map.share[size_t(y * cells + x)] += float(double(to - from) * cells / double(m) / double(sampled[size_t(y)]));
      }
    });
    for (float& share : map.share) share = std::min(share, 1.0f);
    plans_.push_back(std::move(map));
  }
}

}  // namespace heed
