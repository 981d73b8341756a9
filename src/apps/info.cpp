#include <iostream>
#include <utility>

#include "apps/catalogue.h"
#include "base/hash.h"
#include "base/threads.h"
#include "kernels/kernels.h"
#include "lab/machine.h"
#include "mechanisms/registry.h"

namespace heed::apps {
namespace {

Json machine() {
  Json tables = Json::array();
  for (const Kernels* k : cpu_kernels()) tables.push_back(k->name);
  tables.push_back(reference_kernels().name);
  if (cuda_kernels()) tables.push_back(cuda_kernels()->name);
  return {{"version", HEED_VERSION}, {"cpu", cpu_name()},
          {"threads", threads()},    {"memory_bytes", memory_bytes()},
          {"kernels", tables},       {"best", backend("auto").name},
          {"gpu", cuda_state()},     {"mechanisms", registry().size()}};
}

Json describe(const Model& model) {
  const ModelInfo& m = model.info();
  const Tokenizer* words = model.tokenizer();
  return {{"path", model.path()},
          {"name", model.name()},
          {"architecture", m.architecture},
          {"hash", hexadecimal(m.hash)},
          {"bytes", model.bytes()},
          {"parameters", parameters(model)},
          {"layers", m.layers},
          {"heads", m.h},
          {"kv_heads", m.g},
          {"head_dim", m.d},
          {"hidden", m.hidden},
          {"vocabulary", m.vocabulary},
          {"context", m.context},
          {"windows", m.windows},
          {"tokenizer", words != nullptr},
          {"add_bos", words && words->add_bos()},
          {"kv_bytes_per_token_bf16", int64_t(m.layers) * m.g * (m.d + m.d_v) * 2}};
}

void print_pairs(const Json& object) {
  for (const auto& [key, value] : object.items()) {
    std::string text = value.is_string() ? value.get<std::string>() : value.dump();
    if (key.find("bytes") != std::string::npos) text = size_text(value.get<double>());
    std::cout << key << std::string(key.size() < 26 ? 26 - key.size() : 1, ' ') << text << '\n';
  }
}

void print_page(const Entry& e) {
  std::cout << e.name << " — " << e.title << '\n' << e.paper << (e.year ? ", " + std::to_string(e.year) : "") << "\n\n";
  if (!e.equation.empty()) std::cout << "  " << e.equation << "\n\n";
  std::string roles;
  for (const std::string& r : role_names(e.roles)) roles += (roles.empty() ? "" : ", ") + r;
  std::cout << "roles      " << (roles.empty() ? "none" : roles) << (e.wrapper ? " (wraps a keep policy)" : "") << '\n';
  if (e.kind != "mechanism") std::cout << "kind       " << e.kind << ", no --attention\n";
  if (!e.needs.empty()) std::cout << "needs      " << e.needs << '\n';
  const char* label = "inputs     ";
  for (const std::string& input : inputs_of(e)) std::cout << std::exchange(label, "           ") << input << '\n';
  if (!e.identity.empty()) std::cout << "is dense   " << e.identity << '\n';
  if (!e.no_identity.empty()) std::cout << "never dense: " << e.no_identity << '\n';
  std::string verified;
  for (const std::string& v : e.verified) verified += (verified.empty() ? "" : ", ") + v;
  if (!verified.empty()) std::cout << "verified   " << verified << '\n';
  if (e.params.empty()) return;
  std::vector<std::vector<std::string>> rows;
  for (const ParamInfo& p : e.params) rows.push_back({p.name, p.type, p.fallback, p.range, p.help});
  std::cout << '\n' << table({"<parameter", "<type", "<default", "<range", "<meaning"}, rows);
}

class Info final : public Command {
 public:
  void declare(CLI::App& app) override {
    auto* name = app.add_option("name", name_, "a mechanism of `heed list`")->type_name("NAME");
    file_ = app.add_option("-m,--model", model_, "describe this GGUF file")->type_name("FILE")->excludes(name);
    add_json(app, json_);
    app.footer(
        "Examples:\n  heed info                    # this machine\n  heed info snapkv\n  heed info -m model.gguf");
  }

  int run() override {
    if (!name_.empty()) {
      const Entry* entry = value_or_throw(find_entry(name_, registry()));
      json_ ? print(to_json(*entry)) : print_page(*entry);
      return 0;
    }
    const Json what = file_->count() == 0 ? machine() : describe(*value_or_throw(Model::load(model_)));
    json_ ? print(what) : print_pairs(what);
    return 0;
  }

 private:
  std::string name_, model_;
  CLI::Option* file_ = nullptr;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> info_command() { return std::make_unique<Info>(); }

}  // namespace heed::apps
