#include <algorithm>

#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// SinkLoRA (Zhang, 2024), the mask it trains with: LongLoRA's shifted sparse attention, and first tokens that all
// see. Heads attend inside groups; those of the second half have groups that begin half a group later, so that what
// one half keeps apart the other joins. LongLoRA rolls the text, which joins its end with its beginning and lets the
// beginning see the end: those two stay apart here. SinkLoRA returns some of the shifted heads to the others; how
// many, neither text nor code says.
struct SinkLora final : Mechanism {
  int64_t groups, sinks;
  double shifted;

  static std::vector<ParamInfo> params() {
    using M = SinkLora;
    return {
        param<M, int64_t>(&M::groups, "groups", 4, 1, 1 << 30, "groups of the text"),
        param(&M::shifted, "shifted", 0.5, 0, 1,
              "share of the heads, the last, whose groups are shifted by half of one"),
        param<M, int64_t>(&M::sinks, "sinks", 4, 0, 1 << 30, "first tokens, which all see"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    const auto inside = [this](bool later) -> Pattern {
      return [this, later](int64_t i, int64_t m, const AddKeys& add) {
        const int64_t size = (m + groups - 1) / groups, before = later ? size - size / 2 : 0,
                      first = (i + before) / size * size - before;
        add(0, sinks);
        add(first, first + size);
      };
    };
    const Pattern plain = inside(false), later = inside(true);
    const int64_t from = at.q.heads - int64_t(shifted * double(at.q.heads));
    return pattern_plan(at, [&](int64_t head) -> const Pattern& { return head < from ? plain : later; });
  }
};

}  // namespace

Entry sinklora() {
  Entry e = entry<SinkLora>(
      "sinklora", "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
      "Zhang, 2024, arXiv 2406.05678", 2024, uint8_t(Role::Plan));
  e.equation = "i sees j ≤ i iff ⌊(i + o) / n_g⌋ = ⌊(j + o) / n_g⌋, o = 0 or n_g / 2 by head, or j < s";
  e.needs = "the whole prompt; a model trained so";
  e.identity = "sinklora(groups=1,shifted=0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
