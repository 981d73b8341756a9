#include "mechanisms/registry.h"

#include "mechanisms/entries.h"

namespace heed {

std::span<const Entry> registry() {
  using namespace mechanisms;
  static const std::vector<Entry> entries = {
      dense(), act(), adakv(), flexprefill(), gdn(), h2o(), kivi(), knorm(), kvzip(), moba(), pyramidkv(), quest(),
      retrieval_heads(), ring(), snapkv(), streaming_llm(), tidal_decode(), tova(), xattention(),
  };
  return entries;
}

}  // namespace heed
