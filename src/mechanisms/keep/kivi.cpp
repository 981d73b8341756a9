#include "attention/select.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/quantised_past.h"

namespace heed::mechanisms {

namespace {

// KIVI (Liu et al., 2024): entries older than the newest `residual` lie in few bits, keys by channel over `group` entries,
// values by entry over `group` channels (the authors turn keys `residual` at a time and values one by one).
struct Kivi final : QuantisedPast {
  int group;

  static std::vector<ParamInfo> params() {
    using M = Kivi;
    return {
        param(&M::bits, "bits", 2, 2, 8, "2, 4 or 8 bits a number"),
        param(&M::group, "group", 32, 1, 64, "entries (keys) or channels (values) that share a scale: 1, 2, 4, … 64"),
        residual_param(128),
    };
  }
  std::string check() const override {
    const std::string bad = only({2, 4, 8});
    return bad.empty() ? uneven(group, "group") : bad;
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.quantised = true;
    n.quantised_k.kind = n.quantised_v.kind = kind(bits);
    n.quantised_k.axis = PageType::Axis::Channel;
    n.quantised_v.axis = PageType::Axis::Token;
    n.quantised_k.group = n.quantised_v.group = group;
    return n;
  }
};

}  // namespace

Entry kivi() {
  Entry e = entry<Kivi>("kivi", "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
                        "Liu et al., 2024, arXiv 2402.02750", 2024, uint8_t(Role::Keep));
  e.equation = "code = round((x − min) / s), s = (max − min) / (2^b − 1); keys by channel, values by entry";
  e.needs = "a second layout of pages";
  e.identity = "kivi(residual=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
