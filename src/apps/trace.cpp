#include "lab/trace.h"

#include <iostream>

#include "apps/command.h"
#include "base/npy.h"
#include "base/whole_file.h"
#include "lab/progress.h"

namespace heed::apps {
namespace {

std::vector<int32_t> read_ids(const std::string& path) {
  const Buffer ids = value_or_throw(read_npy(path));
  require(ids->rank == 1 && (ids->type == Dtype::I32 || ids->type == Dtype::I64), path.c_str(),
          std::string("token ids are ") + info(ids->type).name + " " + ids->shape(), "give int32 or int64 [T]");
  if (ids->type == Dtype::I32) return {ids->as<int32_t>(), ids->as<int32_t>() + ids->numel()};
  std::vector<int32_t> out;
  for (int64_t id : ids->span<int64_t>()) {
    require(id >= 0 && id <= INT32_MAX, path.c_str(), "token " + std::to_string(id) + " is out of range");
    out.push_back(int32_t(id));
  }
  return out;
}

class TraceCommand final : public Command {
 public:
  void declare(CLI::App& app) override {
    flags_.declare(app);
    auto* text = app.add_option("-f,--file", file_, "text; - is standard input")->type_name("FILE");
    app.add_option("--tokens", ids_, "token ids [T] instead of text, npy")->type_name("FILE")->excludes(text);
    app.add_option("-c,--ctx-size", context_, "use the first N tokens only")->type_name("N")->check(at_least(1));
    app.add_option("--prefill", prefill_, "tokens prefilled; the rest is fed one at a time (default: all but one)")
        ->type_name("N")
        ->check(at_least(1));
    app.add_option("--attention", attention_, "the mechanism")->type_name("SPEC")->capture_default_str();
    app.add_option("-o,--output", out_, "where the arrays go")->type_name("FILE.npz")->required();
    add_json(app, json_);
    app.footer(
        "Examples:\n  heed trace -m model.gguf -f book.txt -c 4096 --prefill 3072 --attention \"h2o(budget=256)\" -o "
        "trace.npz");
  }

  int run() override {
    require(!file_.empty() || !ids_.empty(), "trace", "there is no text", "give -f FILE or --tokens ids.npy");
    value_or_throw(regular_target(out_));
    check_outputs({out_});
    const auto model = flags_.load();
    std::vector<int32_t> tokens = ids_.empty() ? tokens_of(*model, file_) : read_ids(ids_);
    if (context_ > 0 && context_ < int64_t(tokens.size())) tokens.resize(size_t(context_));
    const int64_t prefill = prefill_ > 0 ? prefill_ : std::max<int64_t>(1, int64_t(tokens.size()) - 1);
    Progress progress("trace");
    const Arrays arrays = trace(model, flags_.session(attention_), tokens, prefill,
                                [&](double share) { progress.at(share); });
    progress.clear();
    std::vector<std::pair<std::string, Tensor>> views;
    Json shapes;
    for (const auto& [name, array] : arrays) {
      views.emplace_back(name, array);
      shapes[name] = std::vector<int64_t>(array->size.begin(), array->size.begin() + array->rank);
    }
    value_or_throw(write_npz(out_, views));
    if (json_)
      print({{"attention", attention_}, {"prefill", prefill}, {"output", out_}, {"arrays", shapes}, {"interrupted", interrupted()}});
    else
      for (const auto& [name, shape] : shapes.items()) std::cout << name << ' ' << shape.dump() << '\n';
    if (!interrupted()) return 0;
    std::cerr << "heed: interrupted; " << out_ << " holds the first " << views[0].second.size[0] << " tokens\n";
    return 130;
  }

 private:
  ModelFlags flags_;
  std::string file_, ids_, attention_ = "dense", out_;
  int64_t context_ = 0, prefill_ = 0;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> trace_command() { return std::make_unique<TraceCommand>(); }

}  // namespace heed::apps
