#include "attention/select.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/quantised_past.h"

namespace heed::mechanisms {

namespace {

// PolarQuant (Wu et al., 2025): what an outlier channel of a rotated key does, the channel that rotary embedding turns it
// with does too, and together they go round a circle. So pairs are kept as angle and length, both in few bits over a
// group of entries. The authors' groups have 128 entries and ours at most a page of 64; their logits come from a table of the
// angles' cosines, ours from the keys that the codes stand for, which is the same number.
struct PolarRope final : QuantisedPast {
  int group, values;

  static std::vector<ParamInfo> params() {
    using M = PolarRope;
    return {
        param(&M::bits, "bits", 4, 2, 8, "2, 4 or 8 bits an angle, and as many a length"),
        param(&M::group, "group", 64, 1, 64, "entries that share a range: 1, 2, 4, … 64"),
        param(&M::values, "values", 0, 0, 8,
              "2, 4 or 8 bits a value (32 channels share a range); 0: as the store keeps them"),
        residual_param(128),
    };
  }
  std::string check() const override {
    if (values != 0 && values != 2 && values != 4 && values != 8)
      return "values=" + std::to_string(values) + " is not 0, 2, 4 or 8";
    const std::string bad = only({2, 4, 8});
    return bad.empty() ? uneven(group, "group") : bad;
  }

  Needs needs(const ModelInfo& m) const override {
    Needs n;
    n.quantised = true;
    n.quantised_k.kind = kind(bits), n.quantised_k.axis = PageType::Axis::Channel, n.quantised_k.group = group;
    n.quantised_k.codes = PageType::Codes::Polar;
    const Rope* rope = m.rope(0);
    n.quantised_k.turned = !rope ? m.d / 2 * 2 : rope->neox ? rope->dims : 0;
    if (values > 0) n.quantised_v.kind = kind(values);
    return n;
  }
};

}  // namespace

Entry polar_rope() {
  Entry e = entry<PolarRope>("polar-rope",
                             "PolarQuant: Leveraging Polar Transformation for Efficient Key Cache Quantization",
                             "Wu et al., 2025, arXiv 2502.00527", 2025, uint8_t(Role::Keep));
  e.equation =
      "(x_i, x_j) turned together → φ, ρ; code = ⌊(φ − min) / s⌋, s = (max − min) / 2^b; φ ≈ min + (code + 1/2) s, ρ "
      "alike";
  e.needs = "a second layout of pages";
  e.identity = "polar-rope(residual=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
