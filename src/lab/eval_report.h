// An evaluation as a page: one HTML file that needs no network and no script; its pictures are SVG.
#pragma once
#include <nlohmann/json.hpp>
#include <string>

#include "model/model.h"

namespace heed {

/// `result`: the document of `heed eval --json`. Draws what is in it: the tasks' scores with their intervals, the needle
/// grid, loss by position, and heads.
std::string eval_report(const Model& model, const nlohmann::ordered_json& result, const std::string& text_name);

}  // namespace heed
