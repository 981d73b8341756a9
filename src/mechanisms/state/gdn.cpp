#include <cmath>

#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Gated DeltaNet (Yang et al., 2024): a state that decays, then moves towards v for the key at hand. Decay and step are
// inputs; queries and keys are normalised here. Value heads that share a key head each have their own state.
struct Gdn final : Mechanism {
  bool l2norm;

  static std::vector<ParamInfo> params() {
    return {param(&Gdn::l2norm, "l2norm", true, "divide q and k by √(Σ x² + 1e-6)")};
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.inputs = {"g [h, n]: log decay ≤ 0", "beta [h, n]: step in (0, 1)",
                "state [h, d, d_v]: optional, before the first row"};
    return n;
  }

  Tensor recur(LayerView& at) const override {
    const int64_t h = at.q.heads, all = at.q.segments(), rows = at.q.values.size[0], d = at.q.values.size[1],
                  d_v = at.v.values.size[1];
    const std::string shape = "[h, n]";
    RecurInputs in;
    in.q = at.q;
    in.q.values = normal(at, at.q.values);
    in.k = repeated(at, at.k, d), in.v = repeated(at, at.v, d_v);
    in.k.values = normal(at, in.k.values);
    in.g = at.input("g", shape), in.beta = at.input("beta", shape);
    for (const auto& [name, tensor] : {std::pair{"g", &in.g}, std::pair{"beta", &in.beta}}) {
      require(tensor->numel() == rows && tensor->type == Dtype::F32, "--input",
              std::string(name) + " is " + tensor->shape() + ", not [h, n]");
      *tensor = tensor->reshape({rows});
    }
    if (at.inputs && at.inputs->contains("state")) {
      in.state = at.input("state", "[h, d, d_v]");
      require(in.state.numel() == h * d * d_v && all == h && in.state.type == Dtype::F32, "--input",
              "state is " + in.state.shape() + ", not [h, d, d_v]");
      in.state = in.state.reshape({h, d, d_v});
    }
    Recur how;
    how.decay = Recur::Decay::Scalar, how.correction = Recur::Correction::Delta, how.scale = at.mods.scale;
    const Tensor state = at.queue.scratch.take(Dtype::F32, {all, d, d_v});
    at.run().recur(at.queue, in, how, at.out, state, {});
    return state;
  }

 private:
  /// Rows divided by √(Σ x² + 1e-6), which is an RMS norm with weight 1/√d and 1e-6/d; a copy in any case.
  Tensor normal(const LayerView& at, const Tensor& x) const {
    const int64_t rows = x.size[0], d = x.size[1];
    const Tensor out = at.queue.scratch.take(Dtype::F32, {rows, d});
    at.queue.move(x, out);
    if (!l2norm) return out;
    const Tensor weight = compute(at.queue, Dtype::F32, {d}, 1 / std::sqrt(float(d)));
    at.run().rms_norm(at.queue, out, weight, 1e-6f / float(d), out);
    return out;
  }

  /// The last rows of a panel that belong to the queries, one copy for each query head, in f32.
  static Ragged repeated(const LayerView& at, const Ragged& panel, int64_t width) {
    Ragged out = at.q;
    out.values = at.queue.scratch.take(Dtype::F32, {at.q.values.size[0], width});
    const int64_t group = at.q.heads / panel.heads;
    for (size_t s = 0; s < at.key_rows.size(); ++s)
      require(at.key_rows[s] >= at.rows[s / size_t(panel.heads)], "gdn", "there are fewer keys than queries");
    const Num row = end_of(panel, floor_div(segment(), group)) - length() + place();
    compute(at.queue, out, load(panel.values, row * width + channel()), out.values);
    return out;
  }
};

}  // namespace

Entry gdn() {
  Entry e = entry<Gdn>("gdn", "Gated Delta Networks: Improving Mamba2 with Delta Rule",
                       "Yang et al., 2024, arXiv 2412.06464", 2024, uint8_t(Role::State));
  e.equation = "S' = e^g S; S = S' + k (β (v − S'ᵀ k))ᵀ; o = Sᵀ q / √d";
  e.needs = "g and beta of a trained layer: --input g=…, --input beta=…";
  e.no_identity = "a recurrence with a bounded state cannot equal softmax attention";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
