#include "apps/catalogue_page.h"

#include <algorithm>
#include <cctype>
#include <cmath>

#include "apps/catalogue.h"
#include "lab/files.h"

namespace heed::apps {
namespace {

std::string joined(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : ", ") + word;
  return out;
}

/// Text in a cell of a table: a bar would end the cell.
std::string cell(const std::string& text) {
  std::string out;
  for (char c : text) out += c == '|' ? std::string("\\|") : std::string(1, c);
  return out;
}

/// Whether a spec names the entry, alone, as a wrapper, inside one or as a part of several.
bool names(const std::string& spec, const std::string& entry) {
  const auto part_of_name = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_'; };
  for (size_t at = spec.find(entry); at != std::string::npos; at = spec.find(entry, at + 1)) {
    const size_t end = at + entry.size();
    if ((at == 0 || !part_of_name(spec[at - 1])) && (end == spec.size() || !part_of_name(spec[end]))) return true;
  }
  return false;
}

constexpr const char* kColumns =
    "| attention | perplexity | KLD | top-1 | KV | density | prefill t/s | decode t/s | |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---|\n";

std::string line(const Json& row) {
  const auto number = [&](const char* field) { return row.value(field, std::nan("")); };
  std::string note;
  if (row.value("front_memory", false)) note = "front: memory";
  if (row.value("front_time", false)) note += note.empty() ? "front: time" : ", time";
  if (const auto idle = row.find("not_exercised"); idle != row.end() && idle->is_string())
    note += (note.empty() ? "not exercised: " : "; not exercised: ") + idle->get<std::string>();
  std::string out = "| `" + cell(row.value("attention", "")) + "`";
  for (const std::string& text :
       {fixed(number("ppl"), 3), fixed(number("kld_mean"), 4), fixed(100 * number("top1_agree"), 1) + " %",
        size_text(number("kv_bytes")), fixed(number("density"), 3), fixed(number("prefill_tps"), 0),
        fixed(number("decode_tps"), 1), note})
    out += " | " + cell(text);
  return out + " |\n";
}

void section(std::string& out, const Entry& e, std::span<const Measured> results) {
  out += "\n## " + e.name + "\n\n" + e.title + (e.paper.empty() ? "" : ". *" + e.paper + "*") + "\n";
  if (!e.equation.empty()) out += "\n    " + e.equation + "\n";
  out += "\n";
  const std::vector<std::string> roles = role_names(e.roles);
  if (!roles.empty()) out += "- Roles: " + joined(roles) + (e.wrapper ? ", around a keep policy" : "") + "\n";
  if (e.kind != "mechanism") out += "- Kind: " + e.kind + "\n";
  if (!e.needs.empty()) out += "- Needs: " + e.needs + "\n";
  if (!e.identity.empty()) out += "- Equals dense: `" + e.identity + "`\n";
  if (!e.no_identity.empty()) out += "- Never equals dense: " + e.no_identity + "\n";
  if (!e.verified.empty()) out += "- Checked: " + joined(e.verified) + "\n";
  bool any = false;
  for (const ParamInfo& p : e.params) {
    if (p.name == std::string("layers") || p.name == std::string("heads")) continue;
    if (!any) out += "\n| parameter | default | range | |\n|---|---|---|---|\n";
    any = true;
    out += "| `" + std::string(p.name) + "` | " + cell(p.fallback.empty() ? "" : "`" + p.fallback + "`") + " | " +
           cell(p.range) + " | " + cell(p.help) + " |\n";
  }
  for (const Measured& result : results) {
    std::string lines;
    for (const Json& row : result.rows)
      if (e.name != "dense" && names(row.value("attention", ""), e.name)) lines += line(row);
    if (!lines.empty()) out += "\n" + result.name + ":\n\n" + kColumns + lines;
  }
}

}  // namespace

Measured measured(const std::string& path) {
  const auto text = value_or_throw(read_file(path));
  Measured out;
  out.rows = Json::parse(text, nullptr, false);
  const bool rows = out.rows.is_array() && std::all_of(out.rows.begin(), out.rows.end(), [](const Json& row) {
                      return row.is_object() && row.contains("attention") && row["attention"].is_string() &&
                             row.contains("ppl") && row["ppl"].is_number();
                    });
  if (!rows)
    throw Error(Code::Invalid, path, "it does not hold the rows of a comparison",
                "write it with `heed compare … --json`");
  out.name = path.substr(path.find_last_of('/') + 1);
  out.name = out.name.substr(0, out.name.find_last_of('.'));
  return out;
}

std::string catalogue_page(std::span<const Entry> entries, std::span<const Measured> results) {
  std::string out = "# Mechanisms\n\nWritten by `heed list --page`" +
                    std::string(results.empty() ? "" : ", with what `heed compare --all --json` measured") +
                    ". Every mechanism also takes `layers=` and `heads=`, the layers and heads it applies to.\n\n"
                    "| | roles | paper |\n|---|---|---|\n";
  for (const Entry& e : entries)
    out += "| [" + e.name + "](#" + e.name + ") | " + joined(role_names(e.roles)) + " | " + cell(e.paper) + " |\n";
  for (const Measured& result : results) {
    std::vector<const Json*> rows;
    for (const Json& row : result.rows) rows.push_back(&row);
    std::stable_sort(rows.begin(), rows.end(),
                     [](const Json* a, const Json* b) { return a->value("ppl", 0.0) < b->value("ppl", 0.0); });
    out += "\n## Measured: " + result.name + "\n\n" + kColumns;
    for (const Json* row : rows) out += line(*row);
  }
  for (const Entry& e : entries) section(out, e, results);
  return out;
}

}  // namespace heed::apps
