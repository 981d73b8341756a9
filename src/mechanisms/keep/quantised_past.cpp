#include "mechanisms/keep/quantised_past.h"

#include <algorithm>

namespace heed::mechanisms {

ParamInfo QuantisedPast::residual_param(int fallback) {
  return param(&QuantisedPast::residual, "residual", fallback, 0, 1000000000, "newest entries that stay exact");
}

ParamInfo QuantisedPast::first_param(int fallback) {
  return param(&QuantisedPast::first, "first", fallback, 0, 1 << 20,
               "first entries that stay exact, in whole pages of 64");
}

PageType::Kind QuantisedPast::kind(int bits) {
  return bits == 2   ? PageType::Kind::Q2
         : bits == 3 ? PageType::Kind::Q3
         : bits == 4 ? PageType::Kind::Q4
                     : PageType::Kind::Q8;
}

std::string QuantisedPast::only(std::initializer_list<int> allowed) const {
  if (std::find(allowed.begin(), allowed.end(), bits) != allowed.end()) return {};
  std::string list;
  for (const int* x = allowed.begin(); x != allowed.end(); ++x)
    list += (x == allowed.begin() ? "" : x + 1 == allowed.end() ? " or " : ", ") + std::to_string(*x);
  return "bits=" + std::to_string(bits) + " is not " + list;
}

const When& QuantisedPast::timing() const {
  static const When each{When::At::Every, 1};
  return each;
}

bool QuantisedPast::settle(LayerView& at) const {
  // Every page but the newest that the residual reaches into and the first, in the heads that this applies to.
  const int64_t all = at.store->segments(), g = at.model.g, begin = (first + kPage - 1) / kPage;
  std::vector<uint8_t> chosen;
  int64_t most = 0;  // pages that can have become old enough since the last step, or ever
  for (int64_t s = 0; s < all; ++s) {
    chosen.push_back(heads.holds(int(s % g), int(g)));
    const int64_t last = std::max<int64_t>(0, at.store->length(s) - residual) / kPage;
    const int64_t due = std::max<int64_t>(0, last - begin);
    if (chosen.back()) most += at.decoding() ? std::min<int64_t>(due, 1) : due;
  }
  if (most == 0) return true;
  Num old = floor_div(max(0, load(at.store->pages().length, index()) - residual), kPage);
  if (!heads.all()) old = pick(load(at.queue.upload(chosen), index()), old, 0);
  const Tensor from = compute(at.queue, Dtype::I32, {all}, begin), to = compute(at.queue, Dtype::I32, {all}, old);
  at.store->convert(at.queue, from, to, 1, most);
  return true;
}

}  // namespace heed::mechanisms
