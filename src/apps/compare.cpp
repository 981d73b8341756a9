#include "lab/compare.h"

#include <iostream>

#include "apps/command.h"
#include "base/threads.h"
#include "lab/compare_rows.h"
#include "lab/files.h"
#include "lab/machine.h"
#include "lab/progress.h"
#include "lab/report.h"

namespace heed::apps {
namespace {

Json row_json(const Row& row, int64_t tokens) {
  Json tasks = Json::object();
  for (const auto& [name, score] : row.tasks)
    tasks[name] = {{"accuracy", score.accuracy}, {"recall", score.recall}, {"nll", score.nll}, {"runs", score.runs}};
  const std::string idle = not_exercised(row, tokens);
  return {{"attention", row.attention},
          {"prefill_tps", row.prefill_tps},
          {"decode_tps", row.decode_tps},
          {"kv_bytes", row.kv_bytes},
          {"peak_bytes", row.peak_bytes},
          {"ppl", row.ppl},
          {"kld_mean", row.kld_mean},
          {"kld_p99", row.kld_p99},
          {"top1_agree", row.top1_agree},
          {"density", row.density()},
          {"tasks", tasks},
          {"kv_share", row.kv_share},
          {"density_prefill", row.density_prefill},
          {"density_kept", row.density_kept},
          {"density_read", row.density_read},
          {"mass_prefill", row.mass_prefill},
          {"mass_decode", row.mass_decode},
          {"prefill_seconds", to_json(row.prefill_times)},
          {"decode_seconds", to_json(row.decode_times)},
          {"seconds", row.seconds},
          {"not_exercised", idle.empty() ? Json(nullptr) : Json(idle)}};
}

class Compare final : public Command {
 public:
  void declare(CLI::App& app) override {
    flags_.declare(app);
    app.add_option("-f,--file", file_, "the text; - is standard input")->type_name("FILE")->required();
    app.add_option("--attention", attention_, "a mechanism; once for each. dense comes first in any case")
        ->type_name("SPEC")
        ->allow_extra_args(false);
    app.add_flag("--all", all_, "every mechanism that this model can run, at each budget of --budget");
    app.add_option("--budget", budgets_, "with --all: entries for each KV head, or shares of the prompt")
        ->type_name("LIST")
        ->delimiter(',')
        ->needs("--all")
        ->capture_default_str();
    app.add_option("-c,--ctx-size", context_,
                   "tokens of the text in all (0: 8192, or what the text or the model's context has)")
        ->type_name("N")
        ->check(at_least(0))
        ->capture_default_str();
    app.add_option("--score", score_, "of them, how many are fed one by one behind the prompt and scored (0: a quarter)")
        ->type_name("N")
        ->check(at_least(0));
    app.add_option("--tasks", tasks_, "also niah (asked behind the cut), niah-aware (before it)")
        ->type_name("LIST")
        ->delimiter(',')
        ->check(CLI::IsMember({"niah", "niah-aware"}));
    app.add_option("-r,--repetitions", repetitions_, "timed runs; medians are shown")
        ->type_name("N")
        ->check(CLI::Range(1, 100))
        ->capture_default_str();
    app.add_option("--rows", rows_file_,
                   "write every run to this file as it is finished, and do not run again those that it has")
        ->type_name("FILE.jsonl");
    app.add_option("--report", report_, "a page with charts, in one file")->type_name("FILE.html");
    app.add_option("-o,--output", format_, "md or json")->check(CLI::IsMember({"md", "json"}))->capture_default_str();
    app.add_option("-s,--seed", seed_, "of the order of repetitions and of niah's numbers")->type_name("N");
    add_json(app, json_);
    app.footer(
        "The first part of the text is prefilled: then a mechanism plans and cuts. The rest is fed token by token and "
        "scored\n"
        "against dense attention on the same tokens.\n\n"
        "Examples:\n"
        "  heed compare -m model.gguf -f book.txt -c 8192 --attention \"streaming-llm(window=1020)\" --attention "
        "\"quest(budget=512)\"\n"
        "  heed compare -m model.gguf -f book.txt -c 16384 --attention \"snapkv(budget=1024)\" --report out.html\n"
        "  heed compare -m model.gguf -f book.txt -c 8192 --all --budget 5%,20% --rows all.jsonl --report all.html");
  }

  int run() override {
    check_outputs({report_});
    const auto model = flags_.load();
    const std::vector<int32_t> tokens = tokens_of(*model, file_);
    int64_t context = context_;
    if (context == 0) context = std::min<int64_t>(8192, int64_t(tokens.size()));
    if (context_ == 0 && model->info().context > 0) context = std::min(context, model->info().context);
    const Passage text = passage(tokens, context, score_);
    SampleFile file(rows_file_, compare_lines());
    const CompareOptions options = asked(model, text, file);
    Progress progress("compare");
    const Comparison result = compare(model, text, options,
                                      [&](double share, const std::string& name) { progress.at(share, name); });
    progress.clear();
    tell(*model, result, context);
    for (const auto& [spec, reason] : result.failed) std::cerr << "heed: " << spec << " failed: " << reason << '\n';
    if (!result.interrupted) return result.failed.empty() ? 0 : 1;
    std::cerr << "heed: interrupted; " << result.rows.size() << " of the mechanisms were finished\n";
    return 130;
  }

 private:
  CompareOptions asked(const std::shared_ptr<const Model>& model, const Passage& text, SampleFile& file) const {
    CompareOptions options;
    options.attention = attention_;
    options.session = flags_.session("dense");
    options.repetitions = repetitions_;
    options.tasks = tasks_;
    options.seed = seed_;
    options.details = !report_.empty() || !rows_file_.empty();  // a page may be asked of the file later
    options.file = &file;
    options.key = run_key(flags_, *model, text);
    options.key.update({{"machine", options.key["backend"] == "cuda" ? cuda_state() : cpu_name()},
                        {"threads", threads()},
                        {"ubatch", flags_.ubatch},
                        {"asked", tasks_},
                        {"seed", seed_}});
    if (!all_) return options;
    const Everything every = every_mechanism(model, options.session, budgets_);
    for (const auto& [spec, reason] : every.left_out) std::cerr << "left out: " << spec << ": " << reason << '\n';
    options.attention.insert(options.attention.end(), every.specs.begin(), every.specs.end());
    return options;
  }

  void tell(const Model& model, const Comparison& result, int64_t context) const {
    const auto by_memory = pareto_front(result.rows, [](const Row& r) { return double(r.kv_bytes); });
    const auto by_time = pareto_front(result.rows, [](const Row& r) { return r.seconds; });
    Json rows = Json::array();
    for (size_t i = 0; i < result.rows.size(); ++i) {
      rows.push_back(row_json(result.rows[i], context));
      rows.back()["front_memory"] = bool(by_memory[i]), rows.back()["front_time"] = bool(by_time[i]);
    }
    json_ || format_ == "json" ? print(rows) : show(model, result, context);
    if (report_.empty() || result.rows.empty()) return;
    value_or_throw(
        write_file(report_, report(model, result, file_, rows.dump(-1, ' ', false, Json::error_handler_t::replace))));
    std::cerr << "report: " << report_ << '\n';
  }

  void show(const Model& model, const Comparison& result, int64_t context) const {
    std::vector<std::string> header = {"<attention", "prefill t/s", "decode t/s",   "KV",
                                       "peak KV",    "density",     "ppl",          "KLD",
                                       "KLD 99 %",   "top-1",       "mass prefill", "mass decode"};
    for (const std::string& task : tasks_) header.push_back(task);
    header.push_back("<note");
    std::vector<std::vector<std::string>> rows;
    for (const Row& row : result.rows) {
      std::vector<std::string> cells = {row.attention,
                                        fixed(row.prefill_tps, 1),
                                        fixed(row.decode_tps, 1),
                                        size_text(double(row.kv_bytes)),
                                        size_text(double(row.peak_bytes)),
                                        fixed(row.density(), 3),
                                        fixed(row.ppl, 3),
                                        fixed(row.kld_mean, 4),
                                        fixed(row.kld_p99, 3),
                                        fixed(100 * row.top1_agree, 1) + " %",
                                        fixed(row.mass_prefill, 3),
                                        fixed(row.mass_decode, 3)};
      for (const std::string& task : tasks_) {
        const auto found = row.tasks.find(task);
        cells.push_back(found == row.tasks.end() ? "" : fixed(100 * found->second.accuracy, 0) + " %");
      }
      const std::string idle = not_exercised(row, context);
      cells.push_back(idle.empty() ? "" : "not exercised: " + idle);
      rows.push_back(cells);
    }
    std::cout << table(header, rows);
    std::cerr << '\n'
              << model.name() << ": " << result.prompt << " tokens prefilled, " << result.scored << " scored one by one, "
              << repetitions_ << (repetitions_ == 1 ? " run" : " runs, medians") << "; cache " << flags_.kv << '\n';
    times(result);
  }

  /// Where a row's time went.
  static void times(const Comparison& result) {
    std::vector<std::vector<std::string>> rows;
    const auto line = [&](const Row& row, const char* part, const Times& t) {
      const double total = std::max(1e-12, t.total());
      std::vector<std::string> cells = {row.attention, part, fixed(t.total(), 2) + " s"};
      for (double x : {t.plan, t.observe, t.select, t.attend, t.products, t.rest})
        cells.push_back(fixed(100 * x / total, 1) + " %");
      rows.push_back(cells);
    };
    for (const Row& row : result.rows) line(row, "prefill", row.prefill_times), line(row, "decode", row.decode_times);
    std::cout << '\n'
              << table({"<attention", "<part", "total", "plan", "observe", "select", "attend", "products", "rest"}, rows);
  }

  ModelFlags flags_;
  std::string file_, rows_file_, report_, format_ = "md";
  std::vector<std::string> attention_, tasks_, budgets_ = {"5%", "10%", "20%", "50%"};
  int64_t context_ = 0, score_ = 0;
  int repetitions_ = 1;
  uint64_t seed_ = 0;
  bool all_ = false, json_ = false;
};

}  // namespace

std::unique_ptr<Command> compare_command() { return std::make_unique<Compare>(); }

}  // namespace heed::apps
