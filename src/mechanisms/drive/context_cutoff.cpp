#include <cmath>

#include "attention/number_list.h"
#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Dynamic context cutoff (Xie et al., 2025): the prompt is read in pieces, and after each a probe on a few heads says
// whether what is needed has been read. If so, the rest is skipped but for the prompt's last `question` tokens. A head is
// seen by the mean of its outputs, before the output matrix, over all tokens so far. The released code lets four
// classifiers vote; here one logistic regression decides, which `heed calibrate` learns from planted sentences. Only a
// session's first prompt is cut.
struct ContextCutoff final : Mechanism {
  double threshold, piece, bias;
  int64_t question;
  Range probes;
  SignedList weights;

  static std::vector<ParamInfo> params() {
    using M = ContextCutoff;
    return {
        param(&M::threshold, "threshold", 0.95, 0, 2, "probability of having read enough from which reading stops"),
        param(&M::piece, "piece", 0.1, 1e-3, 1, "share of the prompt that is read between two probes"),
        param<M, int64_t>(&M::question, "question", 32, 1, 1 << 20, "last tokens of the prompt, which are always read"),
        param(&M::probes, "probes", "range", "", "[3,40-42,…]",
              "query heads looked at, by number: layer · heads + head"),
        param(&M::weights, "weights", "list", "", "[x,…]", "of the means of their outputs, head by head"),
        param(&M::bias, "bias", 0, -1e6, 1e6, "added to the weighted means"),
    };
  }
  std::string check() const override {
    if (!layers.all() || !heads.all()) return "a prompt is cut for the whole model: leave out layers= and heads=";
    return {};
  }

  std::vector<int> looked_at(const ModelInfo& m) const {
    std::vector<int> out;
    const int all = m.layers * m.h;
    if (threshold > 1) return out;
    if (probes.all() || weights.values.empty())
      throw Error(Code::Invalid, "context-cutoff",
                  "threshold=" + detail::number_text(threshold) + " asks a probe: probes= and weights= are missing",
                  "learn them with `heed calibrate`, or give a threshold above 1");
    if (probes.highest() >= all)
      throw Error(Code::Invalid, "context-cutoff",
                  "probes=" + probes.text + " names head " + std::to_string(probes.highest()) + ", but the model has " +
                      std::to_string(all) + " in all layers");
    for (int head = 0; head < all; ++head)
      if (probes.holds(head, all)) out.push_back(head);
    if (out.size() * size_t(m.d_v) != weights.values.size())
      throw Error(Code::Invalid, "context-cutoff",
                  std::to_string(weights.values.size()) + " weights for " + std::to_string(out.size()) + " heads of " +
                      std::to_string(m.d_v) + " channels");
    return out;
  }

  /// Σ of outputs over the tokens so far, [probes, d_v], while the prompt is read piece by piece.
  struct Sums final : State {
    Buffer of;
    std::unique_ptr<State> clone() const override { return std::make_unique<Sums>(); }
  };
  std::unique_ptr<State> open(const ModelInfo& m) const override {
    looked_at(m);
    return std::make_unique<Sums>();
  }

  std::vector<int32_t> shorten(Run& run, int sequence, std::span<const int32_t> prompt) const override {
    const int64_t length = int64_t(prompt.size()), context = length - question;
    const int64_t step = std::max<int64_t>(1, int64_t(std::ceil(piece * double(length))));
    if (threshold > 1) return {};
    const std::vector<int> heads_at = looked_at(run.model());
    Buffer& sums = static_cast<Sums&>(*run.state()).of;
    sums = Buffer(Dtype::F32, {int64_t(heads_at.size()), run.model().d_v}, *run.queue().memory);
    run.queue().fill(sums, 0);
    std::vector<int32_t> read;
    for (int64_t begin = 0; begin + step < context; begin += step) {
      run.feed(sequence, prompt.subspan(size_t(begin), size_t(step)));
      const Buffer so_far = run.queue().read_back(sums);
      double z = bias;
      for (size_t c = 0; c < weights.values.size(); ++c)
        z += weights.values[c] * double(so_far->as<float>()[c]) / double(begin + step);
      if (1 / (1 + std::exp(-z)) < threshold) continue;
      for (int64_t i = 0; i < length; ++i)
        if (i < begin + step || i >= context) read.push_back(int32_t(i));
      break;
    }
    sums = {};
    return read;
  }

  void observe(LayerView& at) const override {
    if (at.phase != Phase::Chunk) return;
    const Buffer& sums = static_cast<Sums&>(at.state()).of;
    if (!sums) return;
    const std::vector<int> heads_at = looked_at(at.model);
    Ragged out = at.q;
    out.values = at.out;
    const Ragged mean = mean_rows(at.queue, out);
    for (size_t i = 0; i < heads_at.size(); ++i) {
      if (heads_at[i] / at.model.h != at.layer) continue;
      const Tensor sum = sums->select(0, int64_t(i));
      for (int s = 0; s < at.sequences(); ++s) {
        if (at.rows[size_t(s)] == 0) continue;
        const int64_t row = s * at.model.h + heads_at[i] % at.model.h;
        compute(at.queue,
                load(sum, index()) + load(mean.values, row * at.model.d_v + index()) * double(at.rows[size_t(s)]), sum);
      }
    }
  }
};

}  // namespace

Entry context_cutoff() {
  Entry e = entry<ContextCutoff>("context-cutoff",
                                 "Knowing When to Stop: Dynamic Context Cutoff for Large Language Models",
                                 "Xie et al., 2025, arXiv 2502.01025", 2025, uint8_t(Role::Drive));
  e.equation = "stop behind token t when σ(w · mean of o_1 … o_t of the probed heads + b) ≥ τ; then read the question";
  e.needs = "a probe, which `heed calibrate` learns; the question's length";
  e.identity = "context-cutoff(threshold=2)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
