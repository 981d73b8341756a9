#include "lab/eval_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>

#include "base/utf8.h"
#include "lab/report/assets.h"

namespace heed {
namespace {

using Json = nlohmann::ordered_json;

std::string escaped(const std::string& text) {
  std::string out;
  for (char c : valid_utf8(text)) {
    if (c == '<') out += "&lt;";
    else if (c == '>') out += "&gt;";
    else if (c == '&') out += "&amp;";
    else if (c == '"') out += "&quot;";
    else out += c;
  }
  return out;
}

std::string number(double x, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, x);
  return text;
}

std::string percent(double share, int digits = 0) { return number(100 * share, digits) + " %"; }

std::string text_at(double x, double y, const std::string& text, const char* anchor = "middle") {
  return "<text x=\"" + number(x, 1) + "\" y=\"" + number(y, 1) + "\" text-anchor=\"" + anchor + "\">" + escaped(text) +
         "</text>";
}

std::string svg(double width, double height, const std::string& content) {
  return "<svg viewBox=\"0 0 " + number(width, 0) + " " + number(height, 0) +
         "\" style=\"max-width:" + number(width, 0) + "px\" role=\"img\">" + content + "</svg>";
}

std::string section(const char* title, const std::string& hint, const std::string& content) {
  return "<section><h2>" + std::string(title) + "</h2><p class=\"hint\">" + escaped(hint) + "</p>" + content +
         "</section>\n";
}

/// A cell between red (0) and green (1), told by its number as well as by its colour.
std::string cell(double x, double y, double width, double height, double share, const std::string& label,
                 const std::string& title) {
  const std::string hue = number(8 + 132 * std::clamp(share, 0.0, 1.0), 0);
  std::string out = "<g><title>" + escaped(title) + "</title><rect x=\"" + number(x, 1) + "\" y=\"" + number(y, 1) +
                    "\" width=\"" + number(width, 1) + "\" height=\"" + number(height, 1) + "\" fill=\"hsl(" + hue +
                    " 55% 62%)\"/>";
  if (!label.empty())
    out += "<text class=\"in\" x=\"" + number(x + width / 2, 1) + "\" y=\"" + number(y + height / 2 + 4, 1) +
           "\" text-anchor=\"middle\">" + escaped(label) + "</text>";
  return out + "</g>";
}

std::string task_table(const Json& rows) {
  std::string out =
      "<div class=\"wide\"><table><thead><tr><th>task</th><th>query</th><th>length</th><th>score</th><th>95 % "
      "interval</th><th>samples</th><th>chance</th><th>density</th><th>note</th></tr></thead><tbody>";
  for (const Json& row : rows) {
    if (row.contains("depth")) continue;
    std::string note = row["at_chance"].get<bool>() ? "at chance" : "";
    if (row["not_exercised"].is_string())
      note += (note.empty() ? "" : "; ") + ("not exercised: " + row["not_exercised"].get<std::string>());
    out += "<tr><td>" + escaped(row["task"].get<std::string>()) + "</td><td>" + row["query"].get<std::string>() +
           "</td><td>" + std::to_string(row["length"].get<int64_t>()) + "</td><td>" + percent(row["score"], 1) +
           "</td><td>" + percent(row["low"], 1) + " to " + percent(row["high"], 1) + " (" +
           row["interval"].get<std::string>() + ")</td><td>" + std::to_string(row["samples"].get<int64_t>()) +
           "</td><td>" + percent(row["chance"], 1) + "</td><td>" + number(row["density"], 3) + "</td><td>" +
           escaped(note) + "</td></tr>";
  }
  return out + "</tbody></table></div>";
}

std::string grid(const Json& rows, const std::string& query) {
  std::set<int64_t> lengths;
  std::set<double> depths;
  for (const Json& row : rows)
    if (row.contains("depth") && row["query"] == query)
      lengths.insert(row["length"].get<int64_t>()), depths.insert(row["depth"].get<double>());
  if (lengths.empty()) return {};
  const double left = 60, top = 24, width = std::clamp(640.0 / double(lengths.size()), 28.0, 120.0), height = 34;
  std::string content = text_at(left / 2, 14, "depth");
  for (const Json& row : rows) {
    if (!row.contains("depth") || row["query"] != query) continue;
    const double x = left + width * double(std::distance(lengths.begin(), lengths.find(row["length"].get<int64_t>())));
    const double y = top + height * double(std::distance(depths.begin(), depths.find(row["depth"].get<double>())));
    content += cell(x + 1, y + 1, width - 2, height - 2, row["score"], percent(row["score"]),
                    std::to_string(row["length"].get<int64_t>()) + " tokens, depth " + percent(row["depth"]) + ": " +
                        percent(row["score"], 1) + " of " + std::to_string(row["samples"].get<int64_t>()) +
                        " samples, 95 % interval " + percent(row["low"]) + " to " + percent(row["high"]));
  }
  size_t i = 0;
  for (double depth : depths)
    content += text_at(left - 8, top + height * (double(i++) + 0.5) + 4, percent(depth), "end");
  i = 0;
  for (int64_t length : lengths) content += text_at(left + width * (double(i++) + 0.5), 14, std::to_string(length));
  return svg(left + width * double(lengths.size()) + 4, top + height * double(depths.size()) + 4, content);
}

/// Loss by position: a line through the means, a bar for each interval.
std::string losses(const Json& parts) {
  double low = 1e300, high = -1e300, end = 1;
  for (const Json& p : parts)
    low = std::min(low, p["nll_low"].get<double>()), high = std::max(high, p["nll_high"].get<double>()),
    end = std::max(end, p["end"].get<double>());
  const double left = 50, top = 10, width = 640, height = 220, span = std::max(1e-9, high - low);
  const auto x_of = [&](double at) { return left + width * at / end; };
  const auto y_of = [&](double nll) { return top + height * (high - nll) / span; };
  std::string content, points;
  for (int i = 0; i <= 4; ++i) {
    const double nll = low + span * i / 4;
    content += "<line class=\"axis\" x1=\"" + number(left, 1) + "\" x2=\"" + number(left + width, 1) + "\" y1=\"" +
               number(y_of(nll), 1) + "\" y2=\"" + number(y_of(nll), 1) + "\"/>" +
               text_at(left - 8, y_of(nll) + 4, number(nll, 2), "end");
  }
  for (const Json& p : parts) {
    const double x = x_of((p["first"].get<double>() + p["end"].get<double>()) / 2), y = y_of(p["nll"]);
    points += number(x, 1) + "," + number(y, 1) + " ";
    content += "<line class=\"bar\" x1=\"" + number(x, 1) + "\" x2=\"" + number(x, 1) + "\" y1=\"" +
               number(y_of(p["nll_low"]), 1) + "\" y2=\"" + number(y_of(p["nll_high"]), 1) + "\"/>";
    content += text_at(x, top + height + 20,
                       std::to_string(p["first"].get<int64_t>()) + "–" + std::to_string(p["end"].get<int64_t>()));
  }
  return svg(left + width + 40, top + height + 30, content + "<polyline class=\"line\" points=\"" + points + "\"/>");
}

std::string heads(const Json& of, const char* field, bool error) {
  const Json& rows = of[field];
  if (rows.empty() || rows[0].empty()) return {};
  const double left = 44, side = 22;
  double most = 1e-12;
  for (const Json& row : rows)
    for (const Json& x : row) most = std::max(most, x.get<double>());
  std::string content;
  for (size_t l = 0; l < rows.size(); ++l) {
    const std::string layer = std::to_string(of["layers"][l].get<int>());
    content += text_at(left - 6, side * double(l) + 15, layer, "end");
    for (size_t h = 0; h < rows[l].size(); ++h) {
      const double value = rows[l][h];
      content += cell(left + side * double(h), side * double(l), side - 1, side - 1,
                      error ? 1 - value / std::max(1.0, most) : value, "",
                      "layer " + layer + ", head " + std::to_string(h) + ": " + number(value, 3));
    }
  }
  return svg(left + side * double(rows[0].size()) + 4, side * double(rows.size()) + 4, content);
}

}  // namespace

std::string eval_report(const Model& model, const Json& result, const std::string& text_name) {
  const Json none = Json::array();
  const Json& rows = result.contains("tasks") ? result["tasks"] : none;
  std::string body;
  if (std::any_of(rows.begin(), rows.end(), [](const Json& row) { return !row.contains("depth"); }))
    body += section("Tasks",
                    "Scores with 95 % intervals. Blind: the mechanism cut before it saw the question; aware: after. "
                    "The two do not compare. At chance: naming things of the asked kind at random could do as well.",
                    task_table(rows));
  for (const char* query : {"blind", "aware"})
    if (const std::string picture = grid(rows, query); !picture.empty())
      body += section("A needle by length and depth",
                      std::string("Query-") + query +
                          ". Columns are prompt lengths in tokens, rows where in the text the needle lies. Share of "
                          "samples in which it was found.",
                      picture);
  if (result.contains("position"))
    body += section("Loss by position", "Nats a token, by its place in the chunk; bars are 95 % intervals (normal).",
                    losses(result["position"]));
  if (result.contains("heads")) {
    body += section("Attention mass read, by layer and head",
                    "Share of dense attention's mass that lies on what is read while decoding. Rows are layers, "
                    "columns query heads.",
                    heads(result["heads"], "mass", false));
    body += section("Output error, by layer and head",
                    "‖o − dense o‖ / ‖dense o‖ of each head while decoding, what layers below changed included.",
                    heads(result["heads"], "output_error", true));
  }
  Json numbers = result;
  for (const char* drawn : {"tasks", "position", "heads"}) numbers.erase(drawn);
  body += section("All other figures", "As `heed eval --json` gives them.",
                  "<pre>" + escaped(numbers.dump(2, ' ', false, Json::error_handler_t::replace)) + "</pre>");
  const std::string name = model.name().empty() ? model.path() : model.name();
  return "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" "
         "content=\"width=device-width, initial-scale=1\">\n"
         "<meta name=\"color-scheme\" content=\"light dark\">\n<title>heed eval</title>\n<link rel=\"icon\" "
         "href=\"data:,\">\n<style>" +
         std::string(report_style()) +
         "svg { display: block; width: 100%; height: auto; font-size: 12px; } svg text { fill: var(--soft); } svg "
         "text.in { fill: #1d2127; }\n"
         ".axis { stroke: var(--line); } .bar { stroke: var(--accent); stroke-width: 2; opacity: .5; } .line { fill: "
         "none; stroke: var(--accent); stroke-width: 2; } pre { overflow-x: auto; font-size: 12px; }</style>\n"
         "</head>\n<body>\n<header><h1>heed eval</h1><p id=\"about\">" +
         escaped(name) + " on " + escaped(text_name.substr(text_name.find_last_of('/') + 1)) + ", " +
         escaped(result.value("attention", "")) + "</p></header>\n<main>\n" + body +
         "</main>\n<footer>Made by heed " HEED_VERSION ". This file needs no network.</footer>\n</body>\n</html>\n";
}

}  // namespace heed
