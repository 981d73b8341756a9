#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// KIVI (Liu et al., 2024): entries older than the newest `residual` lie in few bits, keys by channel over `group` entries,
// values by entry over `group` channels. Whole pages of 64 entries are turned, keys and values together, so between
// residual and residual + 63 entries stay exact (the authors turn keys `residual` at a time and values one by one).
struct Kivi final : KeepPolicy {
  int bits, group, residual;

  static std::vector<ParamInfo> params() {
    using M = Kivi;
    return {
        param(&M::bits, "bits", 2, 2, 8, "2, 4 or 8 bits a number"),
        param(&M::group, "group", 32, 1, 64, "entries (keys) or channels (values) that share a scale: 1, 2, 4, … 64"),
        param(&M::residual, "residual", 128, 0, 1000000000, "newest entries that stay exact"),
    };
  }
  std::string check() const override {
    if (bits != 2 && bits != 4 && bits != 8) return "bits=" + std::to_string(bits) + " is not 2, 4 or 8";
    return uneven(group, "group");
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.quantised = true;
    n.quantised_k.kind = n.quantised_v.kind = bits == 2   ? PageType::Kind::Q2
                                              : bits == 4 ? PageType::Kind::Q4
                                                          : PageType::Kind::Q8;
    n.quantised_k.axis = PageType::Axis::Channel;
    n.quantised_v.axis = PageType::Axis::Token;
    n.quantised_k.group = n.quantised_v.group = group;
    return n;
  }
  const When& timing() const override {
    static const When each{When::At::Every, 1};
    return each;
  }

  bool settle(LayerView& at) const override {
    // Every page but the newest that the residual reaches into, in the heads that this applies to.
    const int64_t all = at.store->segments(), g = at.model.g;
    std::vector<uint8_t> chosen;
    int64_t most = 0;  // pages that can have become old enough since the last step, or ever
    for (int64_t s = 0; s < all; ++s) {
      chosen.push_back(heads.holds(int(s % g), int(g)));
      const int64_t last = std::max<int64_t>(0, at.store->length(s) - residual) / kPage;
      if (chosen.back()) most += at.decoding() ? std::min<int64_t>(last, 1) : last;
    }
    if (most == 0) return true;
    Num old = floor_div(max(0, load(at.store->pages().length, index()) - residual), kPage);
    if (!heads.all()) old = pick(load(at.queue.upload(chosen), index()), old, 0);
    const Tensor first = compute(at.queue, Dtype::I32, {all}, 0), last = compute(at.queue, Dtype::I32, {all}, old);
    at.store->convert(at.queue, first, last, 1, most);
    return true;
  }
};

}  // namespace

Entry kivi() {
  Entry e = entry<Kivi>("kivi", "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
                        "Liu et al., 2024, arXiv 2402.02750", 2024, uint8_t(Role::Keep));
  e.equation = "code = round((x − min) / s), s = (max − min) / (2^b − 1); keys by channel, values by entry";
  e.needs = "a second layout of pages";
  e.identity = "kivi(residual=1000000000)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
