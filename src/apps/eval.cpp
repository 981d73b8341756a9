#include <cmath>
#include <iostream>
#include <map>

#include "apps/command.h"
#include "apps/eval_rows.h"
#include "base/hash.h"
#include "lab/agreement.h"
#include "lab/compare.h"
#include "lab/eval_report.h"
#include "lab/files.h"
#include "lab/longbench.h"
#include "lab/perplexity.h"
#include "lab/position.h"
#include "lab/progress.h"
#include "lab/ruler.h"
#include "lab/score.h"

namespace heed::apps {
namespace {

const std::vector<std::string>& task_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all = {"ppl",       "position", "kld",        "mass", "heads",
                                    "agreement", "niah",     "niah-aware", "grid", "ruler"};
    for (const RulerTask& task : ruler_tasks()) all.push_back(task.name);
    return all;
  }();
  return names;
}

std::vector<std::string> metric_names() {
  std::vector<std::string> names;
  for (const Metric& m : longbench_metrics()) names.push_back(m.name);
  return names;
}

constexpr int kBuckets = 8;

class Eval final : public Command {
 public:
  void declare(CLI::App& app) override {
    flags_.declare(app);
    app.add_option("-f,--file", file_, "the text; - is standard input. All tasks but --longbench need one")
        ->type_name("FILE");
    chosen_ = app.add_option("--tasks", tasks_, "what to measure, with commas; told below")
                  ->type_name("LIST")
                  ->delimiter(',')
                  ->check(CLI::IsMember(task_names()))
                  ->capture_default_str();
    app.add_option("-c,--ctx-size", context_,
                   "tokens: of a chunk (ppl, position), of the passage (kld, mass, heads, niah), of prompt and answer "
                   "(ruler, grid, longbench), of the prompt (agreement)")
        ->type_name("N")
        ->check(at_least(1))
        ->capture_default_str();
    app.add_option("--attention", attention_, "the mechanism")->type_name("SPEC")->capture_default_str();
    app.add_option("--chunks", chunks_, "chunks of ppl and position; -1: all")
        ->type_name("N")
        ->check(CLI::Range(int64_t(-1), int64_t(1) << 40))
        ->capture_default_str();
    app.add_option("--score", score_, "kld, mass, heads: tokens fed one by one behind the prompt (0: a quarter of -c)")
        ->type_name("N")
        ->check(at_least(0));
    app.add_option("--query", query_,
                   "ruler, grid, longbench: what a mechanism has when it cuts: blind (the context alone), aware (the "
                   "question too), both (a row of each)")
        ->check(CLI::IsMember({"aware", "blind", "both"}))
        ->capture_default_str();
    app.add_option("--count", count_,
                   "samples of each task (0: 10 of ruler's, 3 of a grid's cell, 3 of agreement, all of longbench)")
        ->type_name("N")
        ->check(CLI::Range(0, 1 << 20));
    app.add_option("--lengths", lengths_,
                   "ruler, grid: lengths in tokens, with commas (-c; grid: a quarter, a half and all of it)")
        ->type_name("LIST")
        ->delimiter(',')
        ->check(at_least(1));
    app.add_option("--depths", depths_, "grid: depths of the needle, evenly spread")
        ->type_name("N")
        ->check(CLI::Range(1, 100))
        ->capture_default_str();
    app.add_flag("!--no-example", example_,
                 "ruler, grid: RULER's bare prompts, without a short answered example before each (vt and cwe have "
                 "RULER's own in any case)");
    app.add_option("--generate", generate_, "agreement: tokens to continue by")
        ->type_name("N")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str();
    app.add_option("--longbench", longbench_,
                   "also ask the examples of this file: a line of JSON each, with input, context and answers")
        ->type_name("FILE.jsonl");
    app.add_option("--metric", metric_, "longbench: how answers are scored")->type_name("NAME")->check(CLI::IsMember(metric_names()));
    app.add_option("--template", template_, "longbench: the prompt, with {context} and {input} in it")
        ->type_name("TEXT");
    app.add_option("-n,--predict", predict_, "longbench: most tokens of an answer (0: by metric)")->type_name("N")->check(at_least(0));
    app.add_option("--samples", samples_,
                   "ruler, grid, longbench: write every sample to this file as it is finished, and do not run again "
                   "those that it has")
        ->type_name("FILE.jsonl");
    app.add_option("--state", state_, "ppl: keep what is done in this file and go on from it")->type_name("FILE.json");
    app.add_option("--report", report_, "a page with tables and pictures, in one file")->type_name("FILE.html");
    app.add_option("-s,--seed", seed_, "of what niah, ruler and grid hide")->type_name("N");
    add_json(app, json_);
    app.footer(
        "Tasks:\n"
        "  ppl         perplexity as llama-perplexity has it: the second half of each chunk is scored, before "
        "anything is evicted (kld tells what that costs)\n"
        "  position    loss by place in the chunk\n"
        "  kld, mass   divergence from dense, and its attention mass read, on tokens fed behind the prompt\n"
        "  heads       mass and error of the output against dense, by layer and head\n"
        "  agreement   how far a greedy continuation is that of dense\n"
        "  niah        a number hidden in the text, asked behind the cut; niah-aware: before it\n"
        "  grid        a needle by length and depth\n"
        "  ruler       RULER's 13: niah_single_1..3, niah_multikey_1..3, niah_multivalue, niah_multiquery, vt, cwe, "
        "fwe, qa_1, qa_2\n\n"
        "Examples:\n"
        "  heed eval -m model.gguf --tasks ppl -f book.txt -c 2048 --chunks 4\n"
        "  heed eval -m model.gguf --tasks kld,niah -f book.txt -c 8192 --attention \"snapkv(budget=1024)\" --json\n"
        "  heed eval -m model.gguf --tasks ruler -f book.txt -c 8192 --query both --attention \"snapkv(budget=1024)\" "
        "--samples ruler.jsonl\n"
        "  heed eval -m model.gguf --tasks grid,position,heads -f book.txt -c 8192 --attention \"h2o(budget=1024)\" "
        "--report eval.html\n"
        "  heed eval -m model.gguf --longbench hotpotqa.jsonl --metric qa_f1 -c 8192");
  }

  int run() override {
    if (!longbench_.empty() && chosen_->count() == 0) tasks_.clear();
    require(longbench_.empty() == metric_.empty(), "eval", "--longbench and --metric go together",
            "as in --longbench qa.jsonl --metric qa_f1");
    require(tasks_.empty() || !file_.empty(), "eval",
            "--file is required for " + (tasks_.empty() ? "" : tasks_.front()), "give a text with -f");
    require(chunks_ != 0, "--chunks", "0 chunks measure nothing", "-1 takes all");
    check_outputs({report_, state_});
    const auto model = flags_.load();
    const Tokenizer& words = tokenizer(*model);
    Json out = {{"model", model->path()}, {"attention", attention_}, {"context", context_}};
    SampleFile file(samples_);
    std::vector<int32_t> tokens;
    if (!tasks_.empty()) {
      text_ = value_or_throw(read_file(file_));
      tokens = words.encode(text_, {.special = false, .bos = words.add_bos()});
      require(!tokens.empty(), file_.c_str(), "the text is empty", "give a file with text");
    }
    const size_t nothing = out.size();
    try {
      if (wants("ppl")) ppl(model, tokens, out);
      if (wants("position")) position(model, tokens, out);
      if (wants("kld") || wants("mass") || wants("heads") || wants("niah") || wants("niah-aware"))
        against_dense(model, tokens, out);
      if (wants("agreement")) agree(model, tokens, out);
      ruler(model, file, out);
      if (!longbench_.empty()) longbench(model, file, out);
    } catch (const Error& e) {  // what other tasks have found is not lost
      if (e.failure().code != Code::Interrupted) {
        if (out.size() > nothing) tell(out);
        throw;
      }
    }
    if (interrupted()) out["interrupted"] = true;
    tell(out);
    if (!report_.empty()) {
      value_or_throw(write_file(report_, eval_report(*model, out, file_.empty() ? longbench_ : file_)));
      std::cerr << "report: " << report_ << '\n';
    }
    if (interrupted()) std::cerr << "heed: interrupted; what was finished is above\n";
    return interrupted() ? 130 : 0;
  }

 private:
  void tell(const Json& out) const { json_ ? print(out) : show(out); }

  bool wants(const std::string& task) const { return std::find(tasks_.begin(), tasks_.end(), task) != tasks_.end(); }

  /// One row of RULER's tasks or of the grid: what to ask, how often.
  struct Asked {
    const RulerTask* task;
    TaskRow row;
    int64_t count;
  };

  std::vector<Asked> asked() const {
    std::vector<Asked> out;
    const auto add = [&](const RulerTask& task, const std::string& name, int64_t length, double depth, int64_t count) {
      for (Query query : queries())
        out.push_back({&task,
                       {.task = name,
                        .metric = task.all ? "string_match_all" : "string_match_part",
                        .query = query,
                        .length = length,
                        .depth = depth},
                       count});
    };
    for (int64_t length : lengths_.empty() ? std::vector{context_} : lengths_)
      for (const RulerTask& task : ruler_tasks())
        if (wants("ruler") || wants(task.name)) add(task, task.name, length, -1, count_ ? count_ : 10);
    if (!wants("grid")) return out;
    for (int64_t length : lengths_.empty() ? std::vector{context_ / 4, context_ / 2, context_} : lengths_)
      for (int d = 0; d < depths_; ++d)
        add(*ruler_task("niah_single_2"), "grid", length, depths_ > 1 ? double(d) / (depths_ - 1) : 0.5, count_ ? count_ : 3);
    return out;
  }

  void ruler(const std::shared_ptr<const Model>& model, SampleFile& file, Json& out) {
    std::vector<Asked> all = asked();
    if (all.empty() || interrupted()) return;
    const RulerText text = RulerText::from(text_);
    const auto sample = [&](const Asked& a, int64_t index) {
      return ruler_sample(*a.task, *model->tokenizer(), a.row.length, seed_, index, text,
                          {.example = example_, .depth = a.row.depth});
    };
    // What cannot be asked is said before any work; a task that only the group named is left out.
    std::erase_if(all, [&](const Asked& a) {
      if (!wants("ruler") || wants(a.row.task) || a.row.task == "grid") return sample(a, 0), false;
      try {
        return sample(a, 0), false;
      } catch (const Error& e) {
        if (e.failure().code != Code::Invalid) throw;
        out["skipped"][a.row.task] = e.failure().text();
        return true;
      }
    });
    if (all.empty()) {
      const Json& skipped = out["skipped"];
      throw Error(Code::Invalid, "ruler", "none of its tasks can be asked, as " + skipped.begin()->get<std::string>());
    }
    SampleFile::Json key = sample_key(*model, text_);
    key["example"] = example_;
    Progress progress("ruler");
    double done = 0;
    for (const Asked& a : all) {
      const auto make = [&](int64_t index) {
        const RulerSample s = sample(a, index);
        return Question{.context = s.context_tokens,
                        .question = s.question_tokens,
                        .prompt = s.context + s.question,
                        .expected = s.expected,
                        .limit = a.task->limit,
                        .one_line = true,
                        .chance = s.chance,
                        .score = [all = a.task->all, expected = s.expected](const std::string& answer) {
                          return all ? string_match_all(answer, expected) : string_match_part(answer, expected);
                        }};
      };
      const TaskRow row = run_task(model, flags_.session(attention_), a.row, a.count, file, key, make, [&](double share) {
        progress.at((done + share) / double(all.size()), a.row.task + " " + std::to_string(a.row.length));
      });
      ++done;
      if (!row.scores.empty()) out["tasks"].push_back(to_json(row, attention_));
      if (row.interrupted) break;
    }
    progress.clear();
    if (wants("ruler")) mean_of_tasks(out);
  }

  /// RULER's own figure: the mean over its tasks, for each length and kind of query.
  static void mean_of_tasks(Json& out) {
    std::map<std::pair<int64_t, std::string>, std::vector<double>> scores;
    for (const Json& row : out.value("tasks", Json::array()))
      if (ruler_task(row["task"])) scores[{row["length"], row["query"]}].push_back(row["score"]);
    for (const auto& [of, list] : scores)
      out["ruler"].push_back({{"length", of.first}, {"query", of.second}, {"score", mean(list)}, {"tasks", list.size()}});
  }

  void longbench(const std::shared_ptr<const Model>& model, SampleFile& file, Json& out) {
    if (interrupted()) return;
    const std::string bytes = value_or_throw(read_file(longbench_));
    const std::vector<LongBenchItem> items = value_or_throw(read_longbench(bytes, longbench_));
    const Metric& metric = *longbench_metric(metric_);
    const std::string form = template_.empty() ? longbench_template(metric) : template_;
    const int limit = predict_ ? predict_ : metric.limit;
    const int64_t count = count_ ? std::min(count_, int64_t(items.size())) : int64_t(items.size());
    const auto make = [&](int64_t i) {
      return longbench_question(items[size_t(i)], metric, *model->tokenizer(), form, context_, limit);
    };
    make(0);
    Progress progress("longbench");
    std::string asked = bytes;  // what the samples hang on
    for (const std::string& part : {form, std::string(metric.name), std::to_string(limit)})
      asked.append(1, '\0').append(part);
    for (Query query : queries()) {
      const TaskRow row = run_task(model, flags_.session(attention_),
                                   {.task = "longbench", .metric = metric.name, .query = query, .length = context_},
                                   count, file, sample_key(*model, asked), make,
                                   [&](double share) { progress.at(share, metric.name); });
      if (!row.scores.empty()) out["tasks"].push_back(to_json(row, attention_));
    }
  }

  void position(const std::shared_ptr<const Model>& model, const std::vector<int32_t>& tokens, Json& out) {
    if (interrupted()) return;
    Progress progress("position");
    for (const PositionBucket& b : loss_by_position(model, flags_.session(attention_), tokens, context_, chunks_,
                                                    kBuckets, [&](double share) { progress.at(share); })) {
      if (b.losses.empty()) continue;
      const Interval ci = b.interval();
      out["position"].push_back({{"first", b.first},
                                 {"end", b.end},
                                 {"nll", b.nll()},
                                 {"ppl", std::exp(b.nll())},
                                 {"nll_low", ci.low},
                                 {"nll_high", ci.high},
                                 {"interval", ci.method},
                                 {"tokens", b.losses.size()}});
    }
  }

  void agree(const std::shared_ptr<const Model>& model, const std::vector<int32_t>& tokens, Json& out) {
    const int64_t count = count_ ? count_ : 3;
    require(int64_t(tokens.size()) >= context_, "text",
            "it has " + std::to_string(tokens.size()) + " tokens, fewer than -c " + std::to_string(context_),
            "give a longer text or a smaller -c");
    Progress progress("agreement");
    std::vector<double> first, before, after;
    try {
      for (int64_t i = 0; i < count; ++i) {
        if (interrupted()) break;
        // Prompts spread over the text.
        const int64_t at = count > 1 ? (int64_t(tokens.size()) - context_) * i / (count - 1) : 0;
        const Agreement a = generation_agreement(model, flags_.session(attention_),
                                                 std::span(tokens).subspan(size_t(at), size_t(context_)), generate_);
        first.push_back(double(a.first_difference)), before.push_back(a.before), after.push_back(a.after);
        progress.at(double(i + 1) / double(count));
      }
    } catch (const Error& e) {
      if (e.failure().code != Code::Interrupted) throw;
    }
    if (first.empty()) return;
    const Interval ci = score_interval(before);
    out["agreement"] = {{"prompts", first.size()}, {"tokens", generate_},  {"first_difference", mean(first)},
                        {"before", mean(before)},  {"before_low", ci.low}, {"before_high", ci.high},
                        {"interval", ci.method},   {"after", mean(after)}, {"first_differences", first}};
  }

  std::vector<Query> queries() const {
    if (query_ == "both") return {Query::Blind, Query::Aware};
    return {query_ == "aware" ? Query::Aware : Query::Blind};
  }

  /// What makes a sample belong to this question and no other.
  SampleFile::Json sample_key(const Model& model, std::string_view text) const {
    SampleFile::Json key = {{"model", hexadecimal(model.info().hash)},
                            {"attention", attention_},
                            {"kv", flags_.kv},
                            {"chunk", flags_.chunk},
                            {"text", fingerprint(text)},
                            {"seed", seed_}};
    if (const std::string files = files_of(attention_, model.info()); !files.empty()) key["files"] = files;
    return key;
  }

  void ppl(const std::shared_ptr<const Model>& model, const std::vector<int32_t>& tokens, Json& out) {
    // What makes a half-done sum of losses belong to this question and no other.
    const Json key = {{"model", model->info().hash}, {"attention", attention_},
                      {"context", context_},         {"kv", flags_.kv},
                      {"chunk", flags_.chunk},       {"text", fingerprint(text_)}};
    Perplexity from;
    if (!state_.empty()) {
      auto state = read_file(state_);
      if (state || state.error().code != Code::NotFound) from = resume(value_or_throw(std::move(state)), key);
    }
    Progress progress("ppl");
    const Perplexity result = perplexity(
        model, flags_.session(attention_), tokens, context_, chunks_, from, [&](const Perplexity& p, double share) {
          progress.at(share, "ppl " + fixed(p.ppl(), 4));
          if (!state_.empty())
            value_or_throw(write_file(
                state_,
                Json{{"key", key}, {"chunks", p.chunks}, {"tokens", p.tokens}, {"sum", p.sum}, {"squares", p.squares}}.dump()));
        });
    if (result.tokens > 0) out["ppl"] = result.ppl(), out["ppl_error"] = result.error(), out["nll"] = result.nll();
    out["tokens"] = result.tokens, out["chunks"] = result.chunks;
  }

  Perplexity resume(const std::string& text, const Json& key) const {
    const Json state = Json::parse(text, nullptr, false);
    const auto wrong = [&](const char* what) -> Perplexity {
      throw Error(Code::Invalid, state_, what, "remove the file or name another");
    };
    if (!state.is_object() || !state.contains("key")) return wrong("it is no state of `heed eval`");
    if (state["key"] != key) return wrong("it belongs to another model, text, context or mechanism");
    try {
      const Perplexity done{state.at("chunks").get<int64_t>(), state.at("tokens").get<int64_t>(),
                            state.at("sum").get<double>(), state.at("squares").get<double>()};
      return done.chunks < 0 || done.tokens < 0 ? wrong("it is damaged") : done;
    } catch (const Json::exception&) { return wrong("it is damaged"); }
  }

  void against_dense(const std::shared_ptr<const Model>& model, const std::vector<int32_t>& tokens, Json& out) {
    if (interrupted()) return;
    const Passage text = passage(tokens, context_, score_);
    if (wants("kld") || wants("mass") || wants("heads")) {
      CompareOptions options;
      options.session = flags_.session(attention_);
      options.attention = {attention_};
      if (wants("heads")) options.probe_layers = model->info().layers;
      Progress progress("kld");
      const Comparison result = compare(model, text, options,
                                        [&](double share, const std::string& name) { progress.at(share, name); });
      if (result.interrupted) return;
      const Row& row = result.rows.back();
      if (wants("kld")) out["kld"] = kld(result);
      if (wants("mass")) out["mass"] = {{"prefill", row.mass_prefill}, {"decode", row.mass_decode}};
      if (wants("heads"))
        out["heads"] = {{"layers", row.probed_layers}, {"mass", row.mass_by_head}, {"output_error", row.error_by_head}};
    }
    for (const char* task : {"niah", "niah-aware"}) {
      if (!wants(task) || interrupted()) continue;
      NiahOptions options;
      options.session = flags_.session(attention_);
      options.question_first = std::string(task) == "niah-aware";
      options.seed = seed_;
      const NiahScore score = niah(model, std::span(text.tokens).subspan(0, size_t(text.prompt)), options);
      const Interval ci = wilson(score.accuracy, score.runs);
      out[task] = {{"accuracy", score.accuracy},
                   {"recall", score.recall},
                   {"nll", score.nll},
                   {"runs", score.runs},
                   {"query", options.question_first ? "aware" : "blind"},
                   {"low", ci.low},
                   {"high", ci.high},
                   {"interval", ci.method}};
    }
  }

  static Json kld(const Comparison& result) {
    const Row &row = result.rows.back(), &dense = result.rows.front();
    const std::vector<double> each(row.kld.begin(), row.kld.end());
    const Interval divergence = normal_interval(each), top = wilson(row.top1_agree, result.scored);
    Json out = {{"kld_mean", row.kld_mean},
                {"kld_p99", row.kld_p99},
                {"top1_agree", row.top1_agree},
                {"ppl", row.ppl},
                {"ppl_dense", dense.ppl},
                {"density", row.density()},
                {"prompt", result.prompt},
                {"scored", result.scored},
                {"kld_low", std::max(0.0, divergence.low)},
                {"kld_high", divergence.high},
                {"kld_interval", divergence.method},
                {"top1_low", top.low},
                {"top1_high", top.high},
                {"top1_interval", top.method}};
    const int64_t parts = std::min<int64_t>(kBuckets, result.scored);
    for (int64_t b = 0; b < parts; ++b) {
      const size_t first = size_t(b * result.scored / parts), size = size_t((b + 1) * result.scored / parts) - first;
      const auto part = [&](const std::vector<float>& values) {
        return mean(
            std::vector<double>(values.begin() + std::ptrdiff_t(first), values.begin() + std::ptrdiff_t(first + size)));
      };
      out["by_position"].push_back({{"first", result.prompt + int64_t(first)},
                                    {"end", result.prompt + int64_t(first + size)},
                                    {"kld", part(row.kld)},
                                    {"nll", part(row.nll)},
                                    {"nll_dense", part(dense.nll)}});
    }
    return out;
  }

  ModelFlags flags_;
  CLI::Option* chosen_ = nullptr;
  std::string longbench_, metric_, template_, report_;
  std::string file_, text_, attention_ = "dense", state_, samples_, query_ = "blind";
  std::vector<std::string> tasks_ = {"ppl"};
  std::vector<int64_t> lengths_;
  int64_t context_ = 2048, chunks_ = -1, score_ = 0, count_ = 0, generate_ = 256;
  int depths_ = 5, predict_ = 0;
  uint64_t seed_ = 0;
  bool json_ = false, example_ = true;
};

}  // namespace

std::unique_ptr<Command> eval_command() { return std::make_unique<Eval>(); }

}  // namespace heed::apps
