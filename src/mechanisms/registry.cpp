#include "mechanisms/registry.h"

#include "mechanisms/entries.h"

namespace heed {

std::span<const Entry> registry() {
  using namespace mechanisms;
  static const std::vector<Entry> entries = {
      dense(),
      a_shape(),
      a2sf(),
      act(),
      adakv(),
      caote(),
      chunkkv(),
      cur(),
      dms(),
      duo_attention(),
      expected_attention(),
      flexprefill(),
      gdn(),
      gna(),
      h2o(),
      headkv(),
      keydiff(),
      kivi(),
      knorm(),
      kvzip(),
      lagkv(),
      moba(),
      noncausal(),
      observed_attention(),
      omnikv(),
      power(),
      pyramidkv(),
      quest(),
      random(),
      recycled_attention(),
      retrieval_heads(),
      ring(),
      simlayerkv(),
      snapkv(),
      star(),
      stochastic_sa(),
      streaming_llm(),
      tidal_decode(),
      tova(),
      tri_shape(),
      triangle_mix(),
      twilight(),
      xattention(),
  };
  return entries;
}

}  // namespace heed
