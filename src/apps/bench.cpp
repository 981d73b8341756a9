#include "lab/bench.h"

#include <algorithm>
#include <ctime>
#include <iostream>

#include "apps/bench_kernels.h"
#include "attention/spec.h"
#include "base/threads.h"
#include "kernels/kernels.h"
#include "lab/files.h"
#include "lab/machine.h"
#include "lab/progress.h"
#include "lab/shapes.h"
#include "mechanisms/registry.h"

namespace heed::apps {
namespace {

/// llama-bench's fields that mean something here, and `attention`.
Json result_json(const Model& model, const ModelFlags& flags, const std::string& attention, const BenchResult& r,
                 const std::string& time) {
  Json samples_ns = Json::array();
  for (double s : r.seconds) samples_ns.push_back(int64_t(s * 1e9));
  const size_t comma = flags.kv.find(',');
  const Kernels& run = backend(flags.backend, flags.device);
  const int64_t ubatch = flags.ubatch > 0 ? flags.ubatch : run.tile_rows;
  return {{"build_commit", HEED_VERSION},
          {"build_number", 0},
          {"cpu_info", cpu_name()},
          {"gpu_info", run.memory == &cpu_memory() ? "" : cuda_state()},
          {"backends", run.name},
          {"model_filename", model.path()},
          {"model_type", model.name()},
          {"model_size", model.bytes()},
          {"model_n_params", parameters(model)},
          {"n_batch", std::max(r.test.prompt, ubatch)},
          {"n_ubatch", ubatch},
          {"n_threads", threads()},
          {"type_k", flags.kv.substr(0, comma)},
          {"type_v", comma == std::string::npos ? flags.kv : flags.kv.substr(comma + 1)},
          {"n_gpu_layers", 0},
          {"attention", attention},
          {"n_prompt", r.test.prompt},
          {"n_gen", r.test.generate},
          {"n_depth", r.test.depth},
          {"test_time", time},
          {"avg_ns", int64_t(r.mean_ns())},
          {"stddev_ns", int64_t(r.deviation_ns())},
          {"avg_ts", r.mean_ts()},
          {"stddev_ts", r.deviation_ts()},
          {"samples_ns", samples_ns},
          {"samples_ts", r.rates()},
          {"density", r.density},
          {"keys_read", r.keys_read},
          {"seconds", to_json(r.times)}};
}

std::string utc_now() {
  const std::time_t time = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&time));
  return text;
}

std::string csv_field(const Json& value) {
  std::string out = "\"";
  for (char c : value.is_string() ? value.get<std::string>() : value.dump())
    out += c == '"' ? "\"\"" : std::string(1, c);
  return out + "\"";
}

class BenchCommand final : public Command {
 public:
  void declare(CLI::App& app) override {
    flags_.declare(app, false);
    app.add_option("-p,--n-prompt", prompts_, "prompt lengths; 0: none")
        ->delimiter(',')
        ->type_name("LIST")
        ->check(at_least(0))
        ->capture_default_str();
    app.add_option("-n,--n-gen", generates_, "numbers of generated tokens; 0: none")
        ->delimiter(',')
        ->type_name("LIST")
        ->check(at_least(0))
        ->capture_default_str();
    app.add_option("-d,--n-depth", depths_, "tokens already in the cache")
        ->delimiter(',')
        ->type_name("LIST")
        ->check(at_least(0))
        ->capture_default_str();
    app.add_option("-r,--repetitions", repetitions_, "timed runs of each test")
        ->type_name("N")
        ->check(CLI::Range(1, 1000))
        ->capture_default_str();
    app.add_option("--attention", attention_, "a mechanism; once for each")->type_name("SPEC")->allow_extra_args(false)->capture_default_str();
    app.add_option("-o,--output", format_, "md, json or csv")->check(CLI::IsMember({"md", "json", "csv"}))->capture_default_str();
    app.add_option("-s,--seed", seed_, "of the tokens")->type_name("N");
    app.add_option("--shape", shape_, "instead of a model, its shape with random weights: llama-1b, llama-8b, llama-70b")
        ->type_name("NAME");
    app.add_option("--weights", weights_, "with --shape: their type, as in GGUF files")->type_name("TYPE")->capture_default_str();
    app.add_option(
           "what", what_,
           "kernels: every kernel of this machine's instruction sets, or of --backend, beside the machine's limits")
        ->check(CLI::IsMember({"kernels"}));
    app.add_option("--kernel", kernel_, "kernels: only those whose name begins so")->type_name("NAME");
    add_json(app, json_);
    app.footer(
        "Field names are llama-bench's. Numbers mean something only on an idle machine.\n\n"
        "Examples:\n"
        "  heed bench -m model.gguf -p 512 -n 128 -d 0,4096,16384\n"
        "  heed bench -m model.gguf -p 0 -n 64 -d 16384 --attention dense --attention \"quest(budget=1024)\" -o json\n"
        "  heed bench --shape llama-8b --weights q4_k -p 512 -n 32 -d 0,8192\n"
        "  heed bench kernels --kernel attend\n"
        "  heed bench kernels --backend cuda");
  }

  int run() override {
    if (json_) format_ = "json";
    if (what_ == "kernels") return bench_kernels(kernel_, flags_.backend, flags_.threads, format_);
    require(flags_.model.empty() != shape_.empty(), "bench", "either --model or --shape is required",
            "give -m FILE, --shape llama-8b, or say `heed bench kernels`");
    flags_.prepare();
    const auto model = shape_.empty() ? flags_.load() : random_model(shape_, weights_);
    std::vector<BenchTest> tests;
    for (int64_t depth : depths_) {
      for (int64_t n : prompts_)
        if (n > 0) tests.push_back({.prompt = n, .generate = 0, .depth = depth});
      for (int64_t n : generates_)
        if (n > 0) tests.push_back({.prompt = 0, .generate = n, .depth = depth});
    }
    require(!tests.empty(), "bench", "nothing to do", "give -p or -n above 0");
    if (attention_.empty()) attention_ = {"dense"};
    Json results = Json::array();
    Progress progress("bench");
    const double total = double(tests.size() * attention_.size());
    bool stopped = false, failed = false;
    for (const std::string& attention : attention_)  // a mistake in the last one shows at once
      value_or_throw(Composition::parse(attention, model->info(), registry()));
    for (const std::string& attention : attention_) {
      for (const BenchTest& test : tests) {
        progress.at(double(results.size()) / total, attention);
        const std::string time = utc_now();
        try {
          results.push_back(result_json(*model, flags_, attention,
                                        bench(model, flags_.session(attention), test, repetitions_, seed_), time));
        } catch (const Error& e) {
          stopped = e.failure().code == Code::Interrupted;
          if (!stopped && results.empty()) throw;
          if (stopped) break;
          failed = true;  // what was measured before it, and what comes, still stands
          progress.clear();
          std::cerr << "heed: " << attention << " failed: " << e.what() << '\n';
        }
        if (stopped) break;
      }
      if (stopped) break;
    }
    progress.clear();
    if (format_ == "json") print(results);
    if (format_ == "csv") csv(results);
    if (format_ == "md") markdown(results);
    if (stopped) std::cerr << "heed: interrupted; " << results.size() << " tests were finished\n";
    return stopped ? 130 : failed ? 1 : 0;
  }

 private:
  static void csv(const Json& results) {
    for (size_t i = 0; i < results.size(); ++i) {
      std::string names, values;
      for (const auto& [name, value] : results[i].items()) {
        if (value.is_structured()) continue;
        names += (names.empty() ? "" : ",") + name;
        values += (values.empty() ? "" : ",") + csv_field(value);
      }
      if (i == 0) std::cout << names << '\n';
      std::cout << values << '\n';
    }
  }

  static void markdown(const Json& results) {
    std::vector<std::vector<std::string>> rows, parts;
    for (const Json& r : results) {
      const int64_t prompt = r["n_prompt"], depth = r["n_depth"];
      std::string test = prompt > 0 ? "pp" + std::to_string(prompt) : "tg" + std::to_string(r["n_gen"].get<int64_t>());
      if (depth > 0) test += " @ d" + std::to_string(depth);
      rows.push_back(
          {r["model_type"], size_text(r["model_size"].get<double>()), fixed(r["model_n_params"].get<double>() / 1e6, 2) + " M",
           r["backends"], std::to_string(r["n_threads"].get<int>()), r["attention"], test,
           fixed(r["avg_ts"], 2) + " ± " + fixed(r["stddev_ts"], 2),
           prompt > 0 ? fixed(100 * r["density"].get<double>(), 1) + " % of pairs" : fixed(r["keys_read"], 0) + " keys"});
      double total = 0;
      for (const auto& [part, seconds] : r["seconds"].items()) total += seconds.get<double>();
      parts.push_back({r["attention"], test});
      for (const auto& [part, seconds] : r["seconds"].items())
        parts.back().push_back(fixed(100 * seconds.get<double>() / std::max(1e-12, total), 1) + " %");
    }
    std::cout << table({"<model", "size", "params", "<backend", "threads", "<attention", "test", "t/s", "reads"}, rows)
              << "\nWhere the last repetition's time went:\n\n"
              << table({"<attention", "<test", "plan", "observe", "select", "attend", "products", "rest"}, parts);
  }

  ModelFlags flags_;
  std::vector<int64_t> prompts_ = {512}, generates_ = {128}, depths_ = {0};
  std::vector<std::string> attention_;
  std::string format_ = "md", what_, kernel_, shape_, weights_ = "bf16";
  int repetitions_ = 5;
  uint64_t seed_ = 0;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> bench_command() { return std::make_unique<BenchCommand>(); }

}  // namespace heed::apps
