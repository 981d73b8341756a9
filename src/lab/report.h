// The comparison as a page: one self-contained HTML file that needs no network.
#pragma once
#include <string>

#include "lab/compare.h"

namespace heed {

/// `rows`: the JSON of `heed compare --json`, which the page shows and draws. Comparison must have been made with details.
std::string report(const Model& model, const Comparison& comparison, const std::string& text_name, const std::string& rows);

}  // namespace heed
