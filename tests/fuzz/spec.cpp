// Any text is a composition or an error; what is accepted prints as text that is accepted again.
#include <cstdint>
#include <cstdlib>

#include "mechanisms/registry.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace heed;
  const std::string text(reinterpret_cast<const char*>(data), size);
  if (text.find('@') != std::string::npos) return 0;  // no files from here
  ModelInfo model;
  model.layers = 6, model.h = 4, model.g = 2, model.d = model.d_v = 64;
  const auto once = Composition::parse(text, model, registry());
  if (!once) {
    if (once.error().what.empty() || once.error().exit_status() != 2) std::abort();
    return 0;
  }
  const auto again = Composition::parse(once->text(), model, registry());
  if (!again || again->text() != once->text()) std::abort();
  return 0;
}
