#include "lab/report/assets.h"

// The assembler takes the files in as they are: nothing is generated, and 200 kB of script cost the compiler nothing.
#define HEED_EMBED(name, file)    \
  asm(".pushsection .rodata\n"    \
      ".global heed_asset_" #name \
      "\n"                        \
      "heed_asset_" #name         \
      ":\n"                       \
      ".incbin \"" file           \
      "\"\n"                      \
      ".global heed_asset_" #name \
      "_end\n"                    \
      "heed_asset_" #name         \
      "_end:\n"                   \
      ".popsection\n");           \
  extern "C" const char heed_asset_##name[], heed_asset_##name##_end[];

HEED_EMBED(page, HEED_REPORT "/page.html")
HEED_EMBED(style, HEED_REPORT "/page.css")
HEED_EMBED(script, HEED_REPORT "/page.js")
HEED_EMBED(library, HEED_CHART_JS)

namespace heed {

std::string_view report_page() { return {heed_asset_page, heed_asset_page_end}; }
std::string_view report_style() { return {heed_asset_style, heed_asset_style_end}; }
std::string_view report_script() { return {heed_asset_script, heed_asset_script_end}; }
std::string_view chart_library() { return {heed_asset_library, heed_asset_library_end}; }

}  // namespace heed
