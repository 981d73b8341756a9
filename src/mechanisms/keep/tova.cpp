#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// TOVA (Oren et al., 2024): the last query's weights, averaged over all query heads of the layer, rank the entries; the
// same entries stay in every head. The newest token competes too, as in the paper (the library port forces it).
struct Tova final : KeepPolicy {
  bool force_newest;

  static std::vector<ParamInfo> params() {
    using M = Tova;
    return keep_params<M>("1024", "every(1)",
                          {param(&M::force_newest, "force_last", false, "the newest entry always stays")});
  }

  Ragged score(LayerView& at) const override {
    Observe how;
    how.rows = Observe::Rows::Last;
    how.heads = Observe::Heads::LayerMean;
    return force(at.queue, at.observe(at.last_queries(1), how), 0, force_newest);
  }
};

}  // namespace

Entry tova() {
  Entry e = entry<Tova>("tova", "Transformers are Multi-State RNNs", "Oren et al., 2024, arXiv 2401.06104", 2024,
                        uint8_t(Role::Keep));
  e.equation = "keep the top B of mean over heads of P_last,j";
  e.needs = "nothing";
  e.identity = "tova(budget=1.0,when=prompt)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
