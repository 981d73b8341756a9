#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// GemFilter (Shi et al., 2024): an early layer already knows which tokens of a prompt matter to its end. The first layers
// read the whole prompt, the last query of one of them ranks its tokens by plain products summed over heads, and the model
// reads the best alone, in order, as a text of their own. Nothing stays for its place unless `recent` says so (nor does it
// in the released code, which can lose a chat template's end). A layer with a sliding window does not see the prompt: the
// last one before it without a window ranks then, or the first one behind. Only a session's first prompt is shortened.
struct GemFilter final : Mechanism {
  Budget budget;
  int layer, kernel, recent;

  static std::vector<ParamInfo> params() {
    using M = GemFilter;
    return {
        budget_param(&M::budget, "1024", "tokens of the prompt that are read by all layers"),
        param(&M::layer, "layer", 13, 0, 1 << 20,
              "layer that ranks tokens, from 0; the last one of a model that has fewer"),
        param(&M::kernel, "kernel", 5, 1, 63, "smoothing width over tokens, odd"),
        param(&M::recent, "recent", 0, 0, 1 << 20, "last tokens of the prompt that are read anyway"),
    };
  }
  std::string check() const override {
    if (kernel % 2 == 0) return "kernel=" + std::to_string(kernel) + " is even: a smoothing width has a middle";
    if (!layers.all() || !heads.all()) return "a prompt is shortened for the whole model: leave out layers= and heads=";
    return too_small(budget, recent, "recent");
  }

  struct Ranked final : State {
    std::shared_ptr<const Buffer> best;  // I32, ascending; forks share it
    std::unique_ptr<State> clone() const override { return std::make_unique<Ranked>(*this); }
  };
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Ranked>(); }

  int ranking_layer(const ModelInfo& m) const {
    const int wanted = std::min(layer, m.layers - 1);
    for (int l = wanted; l >= 0; --l)
      if (m.window(l) == 0) return l;
    for (int l = wanted; l < m.layers; ++l)
      if (m.window(l) == 0) return l;
    return wanted;
  }

  std::vector<int32_t> shorten(Run& run, int sequence, std::span<const int32_t> prompt) const override {
    if (budget.entries(int64_t(prompt.size())) >= int64_t(prompt.size())) return {};
    run.replay(sequence, prompt, ranking_layer(run.model()) + 1);
    const Buffer best = run.queue().read_back(*static_cast<Ranked&>(*run.state()).best);
    return {best->span<int32_t>().begin(), best->span<int32_t>().end()};
  }

  void observe(LayerView& at) const override {
    if (at.phase != Phase::Replay || at.layer != ranking_layer(at.model)) return;
    Queue& queue = at.queue;
    Observe how;
    how.rows = Observe::Rows::Last, how.heads = Observe::Heads::LayerMean, how.logits = true;
    Ragged liked = at.observe(at.q, how);
    const Tensor smooth = queue.scratch.take(Dtype::F32, {liked.values.size[0]});
    queue.run->smooth(queue, liked, PoolKind::Mean, kernel, smooth);
    liked.values = smooth;
    for (int s = 0; s < at.sequences(); ++s) {
      if (at.rows[size_t(s)] == 0) continue;
      const int64_t count = budget.entries(at.rows[size_t(s)]);
      const Lists found = chosen(
          queue, force(queue, segments(liked, s * liked.heads, s * liked.heads + 1, 1), 0, recent), {.k = count}, count);
      auto best = std::make_shared<Buffer>(Dtype::I32, std::initializer_list<int64_t>{count}, *queue.memory);
      queue.move(found.index, *best);
      static_cast<Ranked&>(at.state()).best = best;
    }
  }
};

}  // namespace

Entry gemfilter() {
  Entry e = entry<GemFilter>(
      "gemfilter",
      "Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction",
      "Shi et al., 2024, arXiv 2409.17422", 2024, uint8_t(Role::Drive));
  e.equation =
      "s_j = mean_k(Σ over heads of q_last · k_j) in layer l; read the k best tokens alone, at positions 0 … k − 1";
  e.needs = "the prompt fed through the first layers before; it should end with the question";
  e.identity = "gemfilter(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
