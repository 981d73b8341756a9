#include "mechanisms/registry.h"

#include "mechanisms/entries.h"

namespace heed {

std::span<const Entry> registry() {
  using namespace mechanisms;
  static const std::vector<Entry> entries = {dense(), adakv(), h2o(), pyramidkv(), snapkv(), streaming_llm(), tova()};
  return entries;
}

}  // namespace heed
