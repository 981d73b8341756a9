#include <cmath>

#include "attention/select.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/quantised_past.h"

namespace heed::mechanisms {

namespace {

// QJL (Zandieh et al., 2024): of a key only the signs of random projections are kept, more of them than it has channels,
// and its norm; the query is projected as it is, and √(π/2) makes the product's mean that of q and k. Channels that tower over
// the others in a group of entries have a sketch of their own. Values lie in few bits, as KIVI keeps them. The authors draw
// each block of projections from a normal distribution and make it orthogonal; ours are orthogonal as they come, two rounds
// of random signs and a Hadamard matrix, so that what a key stands for is found in n log n steps and no matrix is kept. The
// authors give the first layers twice as many signs; here all have as many.
struct Qjl final : QuantisedPast {
  int group, outliers, outlier_bits, values, seed;

  static std::vector<ParamInfo> params() {
    using M = Qjl;
    return {
        param(&M::bits, "bits", 2, 1, 16, "signs of a key for each of its channels"),
        param(&M::outliers, "outliers", 8, 0, 64, "channels of a group that have signs of their own"),
        param(&M::outlier_bits, "outlier_bits", 64, 32, 1024, "those signs of a key, a multiple of 32"),
        param(&M::group, "group", 32, 1, 64, "entries with the same outliers: 1, 2, 4, … 64"),
        param(&M::values, "values", 2, 0, 8,
              "2, 4 or 8 bits a value (32 channels share a range); 0: as the store keeps them"),
        residual_param(128),
        param(&M::seed, "seed", 1, 0, 1 << 30, "of the projections"),
    };
  }
  std::string check() const override {
    if (values != 0 && values != 2 && values != 4 && values != 8)
      return "values=" + std::to_string(values) + " is not 0, 2, 4 or 8";
    if (outlier_bits % 32 != 0) return "outlier_bits=" + std::to_string(outlier_bits) + " is no multiple of 32";
    return uneven(group, "group");
  }

  Needs needs(const ModelInfo& m) const override {
    if (m.d > kMostSketchWidth || (m.d > 0 && outliers >= m.d))
      throw Error(Code::Unsupported, "qjl",
                  "keys of " + std::to_string(m.d) + " channels, of which " + std::to_string(outliers) + " are outliers",
                  "keys have at most 256 channels, and more than outliers=");
    Needs n;
    n.quantised = true;
    PageType& k = n.quantised_k;
    k.kind = PageType::Kind::Q1, k.codes = PageType::Codes::Sketch, k.axis = PageType::Axis::Channel, k.group = group;
    k.sketch = (bits * m.d + 31) / 32 * 32, k.outliers = uint8_t(outliers),
    k.outlier_sketch = outliers > 0 ? outlier_bits : 0;
    k.seed = uint32_t(seed);
    if (values > 0) n.quantised_v.kind = kind(values);
    return n;
  }
};

}  // namespace

Entry qjl() {
  Entry e = entry<Qjl>("qjl", "QJL: 1-Bit Quantized JL Transform for KV Cache Quantization with Zero Overhead",
                       "Zandieh et al., 2024, arXiv 2406.03482", 2024, uint8_t(Role::Keep));
  e.equation =
      "q·k ≈ √(π/2) / m ‖k‖ Σ_i (s_i·q) sign(s_i·k), s_i of length √n, orthogonal n at a time; outlier channels alike";
  e.needs = "a second layout of pages; keys of at most 256 channels";
  e.identity = "qjl(residual=1000000000)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
