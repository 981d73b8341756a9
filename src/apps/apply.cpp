#include "lab/apply.h"

#include <iostream>

#include "apps/command.h"
#include "base/npy.h"
#include "base/threads.h"
#include "base/whole_file.h"
#include "lab/score.h"

namespace heed::apps {
namespace {

class Apply final : public Command {
 public:
  void declare(CLI::App& app) override {
    app.add_option("spec", spec_, "a mechanism: name(key=value, …)")->type_name("SPEC")->required();
    app.add_option("--q", q_, "queries [h, n, d], npy")->type_name("FILE")->required();
    app.add_option("--k", k_, "keys [h_kv, m, d], npy")->type_name("FILE")->required();
    app.add_option("--v", v_, "values [h_kv, m, d_v], npy")->type_name("FILE")->required();
    app.add_option("--input", inputs_, "name=file.npy: what the mechanism needs besides (heed info NAME)")
        ->type_name("NAME=FILE")
        ->allow_extra_args(false);
    app.add_option("--positions", positions_, "true positions of the keys [m], npy")->type_name("FILE");
    app.add_flag("--no-causal", no_causal_, "every query sees every key");
    app.add_option("--scale", scale_, "of the logits; 0: 1/sqrt(d)")->type_name("S");
    app.add_option("--dtype", dtype_, "what keys and values are rounded to")
        ->check(CLI::IsMember({"f32", "bf16", "f16"}))
        ->capture_default_str();
    app.add_option("--backend", backend_, "auto, reference, cpu, cuda, or a kernel table's name")->type_name("NAME")->capture_default_str();
    app.add_option("--device", device_, "which of the backend's devices, counted from 0")->type_name("N")->check(CLI::Range(0, 1023));
    app.add_option("-s,--seed", seed_, "of mechanisms that draw random numbers")->type_name("N");
    app.add_option("-t,--threads", threads_, "threads; 0: one a core")->type_name("N")->check(CLI::Range(0, 4096));
    app.add_option("--times", times_, "timed runs behind one that is not counted, beside dense attention; medians")
        ->type_name("N")
        ->check(CLI::Range(0, 1000));
    app.add_option("-o,--output", out_, "where the arrays go")->type_name("FILE.npz")->required();
    add_json(app, json_);
    app.footer(
        "Examples:\n"
        "  heed apply \"moba(block=64,topk=4)\" --q q.npy --k k.npy --v v.npy -o out.npz\n"
        "  heed apply \"snapkv(budget=256)\" --q q.npy --k k.npy --v v.npy --dtype bf16 -o out.npz --json\n"
        "  heed apply nsa --q q.npy --k k.npy --v v.npy --input gates=gates.npy --dtype bf16 --times 5 -o out.npz");
  }

  int run() override {
    set_threads(threads_);
    value_or_throw(regular_target(out_));
    check_outputs({out_});
    ApplyInput input;
    const auto load = [&](const std::string& path) -> Tensor {
      return held_.emplace_back(value_or_throw(read_npy(path)));
    };
    held_.reserve(4 + inputs_.size());
    input.q = load(q_), input.k = load(k_), input.v = load(v_);
    if (!positions_.empty()) input.positions = as_i32(load(positions_));
    for (const std::string& text : inputs_) {
      const size_t equals = text.find('=');
      require(equals != std::string::npos && equals > 0 && equals + 1 < text.size(), "--input",
              "'" + text + "' is not NAME=FILE.npy");
      const std::string name = text.substr(0, equals);
      require(input.inputs.emplace(name, load(text.substr(equals + 1))).second, "--input",
              "'" + name + "' is given twice");
    }
    input.causal = !no_causal_, input.scale = scale_, input.backend = backend_, input.device = device_, input.seed = seed_;
    input.dtype = dtype_ == "bf16" ? Dtype::BF16 : dtype_ == "f16" ? Dtype::F16 : Dtype::F32;
    const ApplyOutput output = value_or_throw(heed::apply(spec_, input));
    for (const std::string& note : output.notes) std::cerr << "heed: " << note << '\n';
    const ApplySeconds seconds = timed(input);

    std::vector<std::pair<std::string, Tensor>> arrays;
    Json shapes;
    for (const auto& [name, array] : output.arrays) {
      arrays.emplace_back(name, array);
      shapes[name] = std::vector<int64_t>(array->size.begin(), array->size.begin() + array->rank);
    }
    value_or_throw(write_npz(out_, arrays));
    if (json_) {
      Json document{{"attention", spec_}, {"output", out_}, {"arrays", shapes}};
      if (times_ > 0) document["backend"] = backend(backend_, device_).name, document["seconds"] = seconds;
      print(document);
    } else {
      for (const auto& [name, shape] : shapes.items()) std::cout << name << ' ' << shape.dump() << '\n';
      for (const auto& [part, s] : seconds) std::cout << part << ' ' << s * 1e3 << " ms\n";
    }
    return 0;
  }

 private:
  /// Medians of each part's seconds.
  ApplySeconds timed(ApplyInput input) const {
    input.beside_dense = true;
    std::map<std::string, std::vector<double>> all;
    for (int i = 0; i < times_; ++i)
      for (const auto& [part, s] : value_or_throw(heed::apply(spec_, input)).seconds) all[part].push_back(s);
    ApplySeconds out;
    for (const auto& [part, s] : all) out[part] = quantile(s, 0.5);
    return out;
  }

  /// Positions of any integer type as I32; others and numbers that do not fit are an error.
  Tensor as_i32(const Tensor& from) {
    if (from.type == Dtype::I32) return from;
    require(from.type == Dtype::I64, positions_.c_str(), std::string("positions are ") + info(from.type).name,
            "save them as int32");
    std::vector<int32_t> values;
    for (int64_t p : from.span<int64_t>()) {
      require(p >= 0 && p <= INT32_MAX, positions_.c_str(), "position " + std::to_string(p) + " is out of range",
              "positions are 0 … 2^31 - 1");
      values.push_back(int32_t(p));
    }
    return held_.emplace_back(Buffer::of<int32_t>({int64_t(values.size())}, values));
  }

  std::string spec_, q_, k_, v_, positions_, dtype_ = "f32", backend_ = "auto", out_;
  int device_ = 0;
  std::vector<std::string> inputs_;
  std::vector<Buffer> held_;
  bool no_causal_ = false, json_ = false;
  float scale_ = 0;
  uint64_t seed_ = 0;
  int threads_ = 0, times_ = 0;
};

}  // namespace

std::unique_ptr<Command> apply_command() { return std::make_unique<Apply>(); }

}  // namespace heed::apps
