#include <cmath>
#include <numbers>

#include "attention/clusters.h"
#include "attention/rotation.h"
#include "base/random.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/quantised_past.h"

namespace heed::mechanisms {

namespace {

// PolarQuant (Han et al., 2025): behind a random rotation, the angles between neighbouring numbers, between neighbours'
// lengths and so on up four levels have known densities, so code books are made beforehand: 4 bits of equal parts for the
// first level, 2 bits of Lloyd–Max points for the others, and one length in f16 for 16 numbers (62 bits, which take 64
// here). The authors may also learn the points online from each prompt; heed has their offline form.
struct PolarQuant final : QuantisedPast {
  int seed;

  static std::vector<ParamInfo> params() {
    using M = PolarQuant;
    return {residual_param(0), param(&M::seed, "seed", 1, 0, 1 << 30, "of the random rotation")};
  }

  Needs needs(const ModelInfo& m) const override {
    if (m.d % 16 != 0 || m.d_v % 16 != 0)
      throw Error(
          Code::Unsupported, "polarquant",
          "heads of " + std::to_string(m.d) + " and " + std::to_string(m.d_v) + " numbers are no whole blocks of 16");
    Needs n;
    n.quantised = n.basis = true;
    n.quantised_k.kind = PageType::Kind::Q3, n.quantised_k.codes = PageType::Codes::Sphere, n.quantised_k.group = 16;
    // Lengths of 2^(l − 1) normal numbers on either side: the angle's density is ~ sin(2 x)^(2^(l − 1) − 1).
    for (int level = 2; level <= 4; ++level) {
      const auto points = lloyd_max(4, 0, std::numbers::pi / 2,
                                    [&](double x) { return std::pow(std::sin(2 * x), (1 << (level - 1)) - 1); });
      for (size_t i = 0; i < 4; ++i) n.quantised_k.points[4 * size_t(level - 2) + i] = float(points[i]);
    }
    n.quantised_v = n.quantised_k;
    return n;
  }
  Basis basis(const ModelInfo& m) const override {
    Basis out;
    out.k = random_orthogonal(m.d, mixed({uint64_t(seed)}));
    out.v = random_orthogonal(m.d_v, mixed({uint64_t(seed)}));
    return out;
  }
};

}  // namespace

Entry polarquant() {
  Entry e = entry<PolarQuant>("polarquant", "PolarQuant: Quantizing KV Caches with Polar Transformation",
                              "Han et al., 2025, arXiv 2502.02617", 2025, uint8_t(Role::Keep));
  e.equation =
      "of Π x, 16 numbers at a time: r and the angles of a tree of pairs, atan2(x_2i+1, x_2i), then atan2 of the "
      "pairs' lengths";
  e.needs = "a second layout of pages; widths of whole blocks of 16";
  e.identity = "polarquant(residual=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
