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
      cake(),
      caote(),
      capkv(),
      chunk_local(),
      chunkkv(),
      compactor(),
      criticalkv(),
      cur(),
      defensivekv(),
      dms(),
      duo_attention(),
      expected_attention(),
      finch(),
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
      leverage(),
      moa(),
      moba(),
      noncausal(),
      observed_attention(),
      omnikv(),
      power(),
      pyramidkv(),
      quest(),
      r_kv(),
      random(),
      recycled_attention(),
      rerotate(),
      retrieval_heads(),
      ring(),
      simlayerkv(),
      snapkv(),
      spatten(),
      star(),
      stochastic_sa(),
      streaming_llm(),
      tidal_decode(),
      tova(),
      tri_shape(),
      triangle_mix(),
      twilight(),
      xattention(),
      zipvl(),
  };
  return entries;
}

}  // namespace heed
