#include <iostream>

#include "apps/catalogue.h"
#include "apps/catalogue_page.h"
#include "lab/apply.h"
#include "mechanisms/registry.h"

namespace heed::apps {
namespace {

/// A default as the type it has: numbers and truth values are not text.
Json typed(const ParamInfo& param) {
  if (param.type == "bool") return param.fallback == "true";
  if (param.type == "int" || param.type == "float") {
    const Json number = Json::parse(param.fallback, nullptr, false);
    if (number.is_number()) return number;
  }
  return param.fallback;
}

class List final : public Command {
 public:
  void declare(CLI::App& app) override {
    add_json(app, json_);
    app.add_option("--role", role_, "only mechanisms with this role")
        ->check(CLI::IsMember({"plan", "keep", "read", "edit", "state", "drive", "weights", "store"}));
    app.add_flag("--page", page_, "the whole catalogue as Markdown, as in docs/mechanisms.md");
    app.add_option("--results", results_, "with --page: files that `heed compare --json` wrote")->type_name("FILE");
    app.footer(
        "Examples:\n"
        "  heed list\n"
        "  heed list --role keep\n"
        "  heed list --json\n"
        "  heed list --page --results docs/results/*.json > docs/mechanisms.md");
  }

  int run() override {
    if (page_) {
      std::vector<Measured> results;
      for (const std::string& path : results_) results.push_back(measured(path));
      std::cout << catalogue_page(registry(), results);
      return 0;
    }
    Json all = Json::array();
    std::vector<std::vector<std::string>> rows;
    for (const Entry& e : registry()) {
      const auto roles = role_names(e.roles);
      if (!role_.empty() && std::find(roles.begin(), roles.end(), role_) == roles.end()) continue;
      if (json_) {
        all.push_back(to_json(e));
        continue;
      }
      std::string joined;
      for (const std::string& r : roles) joined += (joined.empty() ? "" : " ") + r;
      rows.push_back({e.name, joined, e.year ? std::to_string(e.year) : "", e.title});
    }
    if (json_) print(all);
    else
      std::cout << table({"<name", "<roles", "year", "<title"}, rows)
                << "\n`heed info NAME` tells parameters and equations.\n";
    return 0;
  }

 private:
  bool json_ = false, page_ = false;
  std::string role_;
  std::vector<std::string> results_;
};

}  // namespace

std::vector<std::string> role_names(uint8_t roles) {
  static constexpr std::pair<Role, const char*> names[] = {
      {Role::Plan, "plan"},   {Role::Keep, "keep"},   {Role::Read, "read"},       {Role::Edit, "edit"},
      {Role::State, "state"}, {Role::Drive, "drive"}, {Role::Weights, "weights"}, {Role::Store, "store"}};
  std::vector<std::string> out;
  for (const auto& [role, name] : names)
    if (has(roles, role)) out.push_back(name);
  return out;
}

std::vector<std::string> inputs_of(const Entry& entry) {
  if (!entry.make) return entry.apply_inputs;
  const auto specs = value_or_throw(parse_spec(entry.wrapper ? entry.name + "(snapkv)" : entry.name));
  ModelInfo model;
  model.h = model.g = 1, model.d = model.d_v = 64;
  return heed::inputs_of(specs[0], model);
}

Json to_json(const Entry& e) {
  Json params = Json::array();
  for (const ParamInfo& p : e.params)
    params.push_back({{"name", p.name}, {"type", p.type}, {"default", typed(p)}, {"range", p.range}, {"help", p.help}});
  Json out = {{"name", e.name},
              {"title", e.title},
              {"paper", e.paper},
              {"year", e.year},
              {"roles", role_names(e.roles)},
              {"needs", e.needs},
              {"parameters", params},
              {"verified", e.verified},
              {"kind", e.kind},
              {"wrapper", e.wrapper},
              {"equation", e.equation},
              {"inputs", inputs_of(e)},
              {"identity", nullptr},
              {"no_identity", nullptr}};
  if (!e.identity.empty()) out["identity"] = e.identity;
  if (!e.no_identity.empty()) out["no_identity"] = e.no_identity;
  return out;
}

std::unique_ptr<Command> list_command() { return std::make_unique<List>(); }

}  // namespace heed::apps
