#include <algorithm>
#include <cmath>

#include "attention/clusters.h"
#include "attention/rotation.h"
#include "base/random.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/quantised_past.h"

namespace heed::mechanisms {

namespace {

// TurboQuant (Zandieh et al., 2025), in its form of least squared error: behind a random rotation every coordinate of a
// unit vector has one known density, so one table of 2^b numbers serves all; a norm is kept for each key and value. The
// rotation is made once and stays: queries, keys and values live in it, and the output is turned back. The form without
// bias, which spends a bit on the signs of what is left, needs codes of one bit beside these and is not here; nor are
// mixed widths (2.5 and 3.5 bits).
struct TurboQuant final : QuantisedPast {
  int seed;

  static std::vector<ParamInfo> params() {
    using M = TurboQuant;
    return {
        param(&M::bits, "bits", 4, 2, 4, "2 or 4 bits a number"),
        residual_param(0),
        param(&M::seed, "seed", 1, 0, 1 << 30, "of the random rotations"),
    };
  }
  std::string check() const override { return only({2, 4}); }

  /// Of rows of `width` numbers whose root mean square is their scale.
  PageType side(int width) const {
    PageType out;
    out.kind = kind(bits), out.codes = PageType::Codes::Table, out.group = width;
    const auto points = lloyd_max(1 << bits, -1, 1, [&](double t) { return std::pow(1 - t * t, (width - 3) / 2.0); });
    for (size_t i = 0; i < points.size(); ++i) out.points[i] = float(points[i] * std::sqrt(double(width)));
    return out;
  }

  Needs needs(const ModelInfo& m) const override {
    Needs n;
    n.quantised = n.basis = true;
    n.quantised_k = side(m.d), n.quantised_v = side(m.d_v);
    return n;
  }
  Basis basis(const ModelInfo& m) const override {
    Basis out;
    out.k = random_orthogonal(m.d, mixed({uint64_t(seed), 0}));
    out.v = random_orthogonal(m.d_v, mixed({uint64_t(seed), 1}));
    return out;
  }
};

}  // namespace

Entry turboquant() {
  Entry e = entry<TurboQuant>("turboquant", "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate",
                              "Zandieh et al., 2025, arXiv 2504.19874", 2025, uint8_t(Role::Keep));
  e.equation =
      "y = Π x / ‖x‖, Π a random rotation; y_i → the nearest of 2^b Lloyd–Max points of f(t) ~ (1 − t²)^((d − 3) / 2)";
  e.needs = "a second layout of pages";
  e.identity = "turboquant(residual=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
