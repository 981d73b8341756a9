#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "attention/spec.h"
#include "base/hash.h"

namespace heed {
namespace {

constexpr int64_t kMostProfile = 1 << 20;

/// A JSON string, number or list as the text of a range.
Result<std::string> range_text(const nlohmann::json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_integer()) return std::to_string(value.get<int64_t>());
  if (value.is_array()) {
    std::string list;
    for (const auto& item : value) {
      if (item.is_array()) return fail(Code::Invalid, "", "a list inside a list of layers or heads");
      auto text = range_text(item);
      if (!text) return text;
      list += (list.empty() ? "[" : ",") + *text;
    }
    return list.empty() ? list : list + "]";
  }
  return fail(Code::Invalid, "", "layers and heads are text, a number or a list");
}

/// Files that a profile names (key=@FILE) lie beside it, unless their path is absolute.
void find_beside(const std::string& profile, Spec& spec) {
  for (Spec::Setting& s : spec.settings)
    if (s.value.size() > 1 && s.value[0] == '@' && s.value[1] != '/')
      s.value = "@" + (std::filesystem::path(profile).parent_path() / s.value.substr(1)).string();
  for (Spec& inner : spec.inner) find_beside(profile, inner);
}

/// A profile's specs, each with the layers and heads that its line names. `hash`: of the model at hand, 0 when there is none.
Result<std::vector<Spec>> read_profile(const std::string& path, uint64_t hash) {
  const std::string where = "profile " + path;
  std::ifstream file(path, std::ios::binary);
  if (!file) return fail(Code::NotFound, where, "cannot be opened", "give the path of a JSON file: @profile.json");
  std::string text(size_t(kMostProfile) + 1, '\0');
  file.read(text.data(), int64_t(text.size()));
  text.resize(size_t(file.gcount()));
  if (int64_t(text.size()) > kMostProfile) return fail(Code::Invalid, where, "is longer than 1 MiB");
  const auto json = nlohmann::json::parse(text, nullptr, false);
  const std::string shape =
      "a profile is {\"attention\": \"SPEC\"} or {\"attention\": [{\"spec\": \"SPEC\", \"layers\": \"0-3\"}, …]}";
  if (json.is_discarded()) return fail(Code::Invalid, where, "is not JSON", shape);
  if (!json.is_object() || !json.contains("attention"))
    return fail(Code::Invalid, where, "has no \"attention\"", shape);
  if (json.contains("model")) {
    if (!json["model"].is_string()) return fail(Code::Invalid, where, "\"model\" is no text", shape);
    const auto made_for = json["model"].get<std::string>();
    if (made_for.size() != 16 || made_for.find_first_not_of("0123456789abcdef") != std::string::npos)
      return fail(Code::Invalid, where, "\"model\" is no hash of 16 hexadecimal digits",
                  "`heed info MODEL` shows a model's");
    if (hash != 0 && made_for != hexadecimal(hash))
      return fail(Code::Invalid, where,
                  "was made for a model with the hash " + made_for + "; this one's is " + hexadecimal(hash),
                  "`heed calibrate` makes one for this model");
  }
  const auto& attention = json["attention"];
  auto parse = [&](const std::string& spec) -> Result<std::vector<Spec>> {
    if (spec.starts_with("@")) return fail(Code::Invalid, where, "names another profile", "write its specs here");
    auto list = parse_spec(spec);
    if (!list)
      return fail(list.error().code, where + ", " + list.error().where, list.error().what, list.error().remedy);
    for (Spec& one : *list) find_beside(path, one);
    return list;
  };
  if (attention.is_string()) return parse(attention.get<std::string>());
  if (!attention.is_array()) return fail(Code::Invalid, where, "\"attention\" is neither text nor a list", shape);
  std::vector<Spec> out;
  for (const auto& line : attention) {
    if (!line.is_object() || !line.contains("spec") || !line["spec"].is_string())
      return fail(Code::Invalid, where, "a line has no \"spec\"", shape);
    auto list = parse(line["spec"].get<std::string>());
    if (!list) return list;
    for (Spec& spec : *list) {
      for (const char* key : {"layers", "heads"}) {
        if (!line.contains(key)) continue;
        auto value = range_text(line[key]);
        if (!value) return fail(value.error().code, where, value.error().what, shape);
        for (const Spec::Setting& s : spec.settings)
          if (s.key == key)
            return fail(Code::Invalid, where, std::string(key) + " is given in the spec and beside it", "leave one out");
        if (!value->empty()) spec.settings.push_back({key, *value, spec.at});
      }
      out.push_back(std::move(spec));
    }
  }
  return out;
}

struct Claim {
  Role role;
  const char* words;
};
constexpr Claim kClaims[] = {
    {Role::Plan, "plan what a prompt reads in"},      {Role::Keep, "decide what is kept in"},
    {Role::Read, "decide what decoding reads in"},    {Role::State, "put a linear form in place of"},
    {Role::Drive, "feed the model their own way in"}, {Role::Weights, "rewrite the weights of"},
    {Role::Store, "decide where pages lie in"},
};

/// Two keep policies of which one cuts prompts and the other while decoding.
bool never_meet(const Composition::Part& one, const Composition::Part& two) {
  const When &a = static_cast<const KeepPolicy&>(*one.mechanism).timing(),
             &b = static_cast<const KeepPolicy&>(*two.mechanism).timing();
  return (!a.prompts() && !b.decodes()) || (!b.prompts() && !a.decodes());
}

bool keeps_block_columns(const Needs& needs) {
  for (const Column& c : needs.columns)
    if (c.keeps != Column::Keeps::User) return true;
  return false;
}

}  // namespace

int Composition::owner(Role role, int layer) const {
  for (size_t i = 0; i < parts_.size(); ++i)
    if (has(parts_[i].roles, role) && parts_[i].mechanism->layers.holds(layer, layers_)) return int(i);
  return -1;
}

std::vector<int> Composition::with(Role role, int layer) const {
  std::vector<int> out;
  for (size_t i = 0; i < parts_.size(); ++i)
    if (has(parts_[i].roles, role) && parts_[i].mechanism->layers.holds(layer, layers_)) out.push_back(int(i));
  return out;
}

std::vector<int> Composition::edits(int layer) const {
  // What a plan or a read left to its edit comes first; a policy adds to that what it holds outside the store.
  std::vector<int> out = with(Role::Edit, layer);
  std::stable_partition(out.begin(), out.end(), [&](int p) { return !has(parts_[size_t(p)].roles, Role::Keep); });
  return out;
}
std::vector<int> Composition::keepers(int layer) const { return with(Role::Keep, layer); }

Result<Composition> Composition::parse(const std::string& text, const ModelInfo& model, std::span<const Entry> registry) {
  const size_t first = text.find_first_not_of(" \t\n\r");
  const bool profile = first != std::string::npos && text[first] == '@';
  auto specs = profile ? read_profile(text.substr(first + 1, text.find_last_not_of(" \t\n\r") - first), model.hash)
                       : parse_spec(text);
  if (!specs) return tl::unexpected(specs.error());

  Composition out;
  out.layers_ = model.layers;
  std::string joined;
  for (const Spec& spec : *specs) {
    auto mechanism = make_mechanism(spec, registry);
    if (!mechanism) return tl::unexpected(mechanism.error());
    const Entry* entry = *find_entry(spec.name, registry);
    const std::string where = "attention, " + entry->name;
    const int heads = has(entry->roles, Role::Keep) ? model.g : model.h;
    const Mechanism& m = **mechanism;
    if (m.layers.highest() >= model.layers)
      return fail(Code::Invalid, where,
                  "layers=" + m.layers.text + " names layer " + std::to_string(m.layers.highest()) +
                      ", but the model has " + std::to_string(model.layers),
                  "count layers from 0");
    if (m.heads.highest() >= heads)
      return fail(Code::Invalid, where,
                  "heads=" + m.heads.text + " names head " + std::to_string(m.heads.highest()) + ", but the model has " +
                      std::to_string(heads) + (has(entry->roles, Role::Keep) ? " KV heads" : " query heads"),
                  "count heads from 0");
    joined += (joined.empty() ? "" : "+") + spec.text();
    if (entry->roles) out.parts_.push_back({entry, std::move(*mechanism), entry->roles});
  }
  if (!joined.empty()) out.text_ = joined;

  for (size_t b = 1; b < out.parts_.size(); ++b)
    for (size_t a = 0; a < b; ++a) {
      const Part &one = out.parts_[a], &two = out.parts_[b];
      const std::string names = one.entry->name == two.entry->name ? "two of " + one.entry->name
                                                                   : one.entry->name + " and " + two.entry->name;
      for (const Claim& claim : kClaims) {
        if (!has(one.roles, claim.role) || !has(two.roles, claim.role)) continue;
        if (claim.role == Role::Keep && never_meet(one, two)) continue;
        for (int layer = 0; layer < model.layers; ++layer)
          if (one.mechanism->layers.holds(layer, model.layers) && two.mechanism->layers.holds(layer, model.layers))
            return fail(
                Code::Conflict, "attention", names + " both " + claim.words + " layer " + std::to_string(layer),
                claim.role == Role::Keep
                    ? "give one of them layers=…, or one when=prompt and the other when=decode(n), so that they do "
                      "not meet"
                    : "give one of them layers=… so that they do not meet");
      }
      const Needs x = one.mechanism->needs(model), y = two.mechanism->needs(model);
      for (const auto& [plain, bounds, p, q] : {std::tuple{&x, &y, &one, &two}, std::tuple{&y, &x, &two, &one}}) {
        if (plain->plain_keys && keeps_block_columns(*bounds))
          return fail(
              Code::Conflict, "attention",
              p->entry->name + " keeps keys before rotation, and " + q->entry->name + " needs bounds of rotated keys",
              "use a keep policy that leaves positions alone, such as snapkv");
        if (plain->plain_keys && bounds->basis)
          return fail(Code::Conflict, "attention",
                      p->entry->name + " keeps keys before rotation, and " + q->entry->name +
                          " changes the coordinates of rotated keys",
                      "use one of them");
        if (plain->same_entries && has(q->roles, Role::Keep) && !bounds->quantised && !bounds->paired)
          return fail(
              Code::Conflict, "attention",
              p->entry->name + " carries entry numbers from layer to layer, and " + q->entry->name + " drops entries",
              "use one of them");
        if (plain->slots.group > 0 && (bounds->quantised || bounds->paired))
          return fail(Code::Conflict, "attention",
                      p->entry->name + " has pages of one kind lie end to end, and " + q->entry->name +
                          " turns them into another kind",
                      "use one of them");
      }
      if ((x.quantised || x.paired) && (y.quantised || y.paired) &&
          (x.paired || y.paired || !(x.quantised_k == y.quantised_k && x.quantised_v == y.quantised_v)))
        return fail(Code::Conflict, "attention", names + " want different quantised pages in one store",
                    "give both the same bits and group");
    }
  return out;
}

}  // namespace heed
