#include "lab/report.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/threads.h"
#include "kernels/kernels.h"
#include "lab/machine.h"
#include "lab/report/assets.h"

namespace heed {
namespace {

using Json = nlohmann::ordered_json;

/// Shares 0 … 1 as one letter each, which is a twentieth of the numbers written out.
std::string letters(std::span<const float> shares) {
  static constexpr std::string_view levels = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
  std::string out;
  out.reserve(shares.size());
  for (float x : shares) out += levels[size_t(std::lround(std::clamp(x, 0.0f, 1.0f) * float(levels.size() - 1)))];
  return out;
}

Json maps(const std::vector<Map>& all) {
  Json out = Json::array();
  for (const Map& m : all)
    out.push_back(
        {{"layer", m.layer}, {"head", m.head}, {"rows", m.rows}, {"columns", m.columns}, {"share", letters(m.share)}});
  return out;
}

/// Puts `parts` where their names stand as @NAME@. What was put in is not looked at again.
std::string fill(std::string_view page, std::initializer_list<std::pair<std::string_view, std::string_view>> parts) {
  std::string out;
  while (true) {
    size_t at = std::string_view::npos;
    std::pair<std::string_view, std::string_view> next;
    for (const auto& part : parts) {
      const size_t found = page.find(part.first);
      if (found < at) at = found, next = part;
    }
    out += page.substr(0, at);
    if (at == std::string_view::npos) return out;
    out += next.second;
    page.remove_prefix(at + next.first.size());
  }
}

}  // namespace

std::string report(const Model& model, const Comparison& comparison, const std::string& text_name, const std::string& rows) {
  Json data = {{"model", model.name().empty() ? model.path() : model.name()},
               {"text", text_name.substr(text_name.find_last_of('/') + 1)},
               {"machine", cpu_name() + ", " + std::to_string(threads()) +
                               (threads() == 1 ? " thread, " : " threads, ") + backend("auto").name},
               {"prompt", comparison.prompt},
               {"scored", comparison.scored},
               {"bins", kKeptBins},
               {"rows", Json::parse(rows)}};
  for (size_t i = 0; i < comparison.rows.size(); ++i) {
    const Row& row = comparison.rows[i];
    Json& out = data["rows"][i];
    std::vector<double> nll;
    for (float x : row.nll) nll.push_back(std::round(double(x) * 1e4) / 1e4);
    std::string where;
    for (const auto& shares : row.kept_where) where += letters(shares);
    out["nll"] = nll, out["kept"] = row.kept, out["kept_where"] = where;
    out["plans"] = maps(row.plans), out["reads"] = maps(row.reads);
  }
  // Names come from the command line: nothing in them may end the script element.
  std::string json = data.dump(-1, ' ', false, Json::error_handler_t::replace);
  for (size_t at = 0; (at = json.find('<', at)) != std::string::npos; at += 6) json.replace(at, 1, "\\u003c");
  return fill(report_page(), {{"@STYLE@", report_style()},
                              {"@VERSION@", HEED_VERSION},
                              {"@LIBRARY@", chart_library()},
                              {"@DATA@", json},
                              {"@SCRIPT@", report_script()}});
}

}  // namespace heed
