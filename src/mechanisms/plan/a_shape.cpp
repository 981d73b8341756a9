#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// The A-shape: a query sees the first keys and its own neighbourhood, i − j < local; the rows of the last queries may see
// all (tri-shape), and the first layers may be dense (triangle-mix).
struct AShape : Mechanism {
  int64_t sinks, local, last = 0;
  int from = 0;

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = last > 0;
    return n;
  }
  Plan plan(LayerView& at) const override {
    Plan dense;
    dense.causal = at.plan.causal;
    if (at.layer < from) return dense;
    return pattern_plan(at, [this](int64_t i, int64_t m, const AddKeys& add) {
      const bool whole = i >= m - last;
      add(0, whole ? m : sinks);
      add(i - local + 1, i + 1);
    });
  }

  template <class M>
  static std::vector<ParamInfo> shape(int64_t sinks, int64_t local) {
    return {
        param<M, int64_t>(&M::sinks, "sinks", sinks, 0, 1 << 30, "first keys that every query sees"),
        param<M, int64_t>(&M::local, "local", local, 1, 1 << 30, "latest keys that a query sees, its own among them"),
    };
  }
};

struct Streaming final : AShape {
  static std::vector<ParamInfo> params() { return shape<Streaming>(128, 3968); }
};

// Tri-shape (Li et al., 2024).
struct TriShape final : AShape {
  static std::vector<ParamInfo> params() {
    auto all = shape<TriShape>(128, 3968);
    all.push_back(param<TriShape, int64_t>(&TriShape::last, "last", 100, 0, 1 << 30, "last queries, which see all"));
    return all;
  }
};

// TriangleMix as MInference's repository has it: layers below `from` dense.
struct TriangleMix final : AShape {
  static std::vector<ParamInfo> params() {
    auto all = shape<TriangleMix>(8, 512);
    all.push_back(
        param<TriangleMix, int64_t>(&TriangleMix::last, "last", 128, 0, 1 << 30, "last queries, which see all"));
    all.push_back(param<TriangleMix, int>(&TriangleMix::from, "from", 16, 0, 1 << 20, "first layer that is sparse"));
    return all;
  }
};

}  // namespace

Entry a_shape() {
  Entry e = entry<Streaming>("a-shape", "A-shape: sinks and a window", "Jiang et al., 2024, arXiv 2407.02490", 2024,
                             uint8_t(Role::Plan));
  e.equation = "i sees j ≤ i iff j < sinks or i − j < local";
  e.needs = "nothing";
  e.identity = "a-shape(local=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

Entry tri_shape() {
  Entry e = entry<TriShape>("tri-shape", "SCBench: A KV Cache-Centric Analysis of Long-Context Methods",
                            "Li et al., 2024, arXiv 2412.10319", 2024, uint8_t(Role::Plan));
  e.equation = "a-shape; the last rows see all";
  e.needs = "the whole prompt";
  e.identity = "tri-shape(local=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

Entry triangle_mix() {
  Entry e = entry<TriangleMix>("triangle-mix",
                               "TriangleMix: Accelerating Prefilling via Decoding-time Contribution Sparsity",
                               "arXiv 2507.21526", 2025, uint8_t(Role::Plan));
  e.equation = "tri-shape in layers ≥ from, dense below";
  e.needs = "the whole prompt";
  e.identity = "triangle-mix(local=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
