#include <iostream>

#include "apps/command.h"
#include "apps/eval_rows.h"
#include "lab/compare.h"
#include "lab/files.h"
#include "lab/metrics.h"
#include "lab/perplexity.h"
#include "lab/progress.h"
#include "lab/ruler.h"

namespace heed::apps {
namespace {

const std::vector<std::string>& task_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all = {"ppl", "kld", "mass", "niah", "niah-aware", "ruler"};
    for (const RulerTask& task : ruler_tasks()) all.push_back(task.name);
    return all;
  }();
  return names;
}

class Eval final : public Command {
 public:
  void declare(CLI::App& app) override {
    flags_.declare(app);
    app.add_option("-f,--file", file_, "the text; - is standard input")->type_name("FILE")->required();
    app.add_option("--tasks", tasks_, "with commas; see below")
        ->type_name("LIST")
        ->delimiter(',')
        ->check(CLI::IsMember(task_names()))
        ->capture_default_str();
    app.add_option("-c,--ctx-size", context_, "tokens of a chunk (ppl), of the whole passage (kld, mass, niah), or of prompt and answer (ruler)")
        ->type_name("N")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    app.add_option("--chunks", chunks_, "chunks of ppl; -1: all")->type_name("N")->capture_default_str();
    app.add_option("--score", score_, "kld, mass: tokens fed one by one behind the prompt (0: a quarter of -c)")
        ->type_name("N")
        ->check(CLI::NonNegativeNumber);
    app.add_option("--attention", attention_, "the mechanism")->type_name("SPEC")->capture_default_str();
    app.add_option("--lengths", lengths_, "ruler: several lengths instead of -c")->type_name("LIST")->delimiter(',')->check(CLI::PositiveNumber);
    app.add_option("--count", count_, "ruler: samples of each task")->type_name("N")->check(CLI::Range(1, 1 << 20))->capture_default_str();
    app.add_option("--query", query_, "ruler: what a mechanism sees before it cuts: aware (context and question), blind (the context), both (a run of each)")
        ->check(CLI::IsMember({"aware", "blind", "both"}))
        ->capture_default_str();
    app.add_flag("--example", example_, "ruler: an answered example before every prompt (vt and cwe have RULER's own in any case)");
    app.add_option("--samples", samples_, "keep every sample in this file as it is finished, and do not run again those that it has")->type_name("FILE.jsonl");
    app.add_option("--state", state_, "ppl: keep what is done in this file and go on from it")->type_name("FILE.json");
    app.add_option("-s,--seed", seed_, "of what niah and ruler hide")->type_name("N");
    add_json(app, json_);
    app.footer(
        "ppl is llama-perplexity's: the second half of each chunk is scored. kld and mass compare with dense attention "
        "on\n"
        "tokens fed behind the prompt, so a cache policy has cut before. niah asks behind the cut, niah-aware before "
        "it.\n\n"
        "Examples:\n"
        "  heed eval -m model.gguf --tasks ppl -f book.txt -c 2048 --chunks 4\n"
        "  heed eval -m model.gguf --tasks kld,niah -f book.txt -c 8192 --attention \"snapkv(budget=1024)\" --json");
  }

  int run() override {
    const auto model = flags_.load();
    text_ = value_or_throw(read_file(file_));
    const Tokenizer& words = tokenizer(*model);
    Json out = {{"model", model->path()}, {"attention", attention_}, {"context", context_}};
    const auto tokens = words.encode(text_, {.special = false, .bos = words.add_bos()});
    require(!tokens.empty(), file_.c_str(), "the text is empty", "give a file with text");
    if (wants("ppl")) ppl(model, tokens, out);
    if (!interrupted() && (wants("kld") || wants("mass") || wants("niah") || wants("niah-aware"))) against_dense(model, tokens, out);
    ruler(model, out);
    if (interrupted()) out["interrupted"] = true;
    if (json_)
      print(out);
    else
      show(out);
    if (interrupted()) std::cerr << "heed: interrupted; what was finished is above\n";
    return interrupted() ? 130 : 0;
  }

 private:
  bool wants(const std::string& task) const { return std::find(tasks_.begin(), tasks_.end(), task) != tasks_.end(); }

  void ruler(const std::shared_ptr<const Model>& model, Json& out) {
    std::vector<const RulerTask*> tasks;
    for (const RulerTask& task : ruler_tasks())
      if (wants("ruler") || wants(task.name)) tasks.push_back(&task);
    if (tasks.empty()) return;
    const RulerText text = RulerText::from(text_);
    SampleFile file(samples_);
    std::vector<TaskRow> rows;
    Progress progress("ruler");
    const SampleFile::Json key = run_key(*model, text_);
    const std::vector<int64_t> lengths = lengths_.empty() ? std::vector{context_} : lengths_;
    const double all = double(tasks.size() * lengths.size() * queries().size());
    for (int64_t length : lengths)
      for (const RulerTask* task : tasks)
        for (Query query : queries()) {
          const auto make = [&](int64_t index) {
            const RulerSample s = ruler_sample(*task, *model->tokenizer(), length, seed_, index, text, {.example = example_});
            return Question{.context = s.context_tokens, .question = s.question_tokens, .prompt = s.context + s.question, .expected = s.expected,
                            .limit = task->limit, .one_line = true, .chance = s.chance,
                            .score = [all = task->all, expected = s.expected](const std::string& answer) {
                              return all ? string_match_all(answer, expected) : string_match_part(answer, expected);
                            }};
          };
          rows.push_back(run_task(model, flags_.session(attention_),
                                  {.task = task->name, .metric = task->all ? "string_match_all" : "string_match_part", .query = query, .length = length}, count_, file,
                                  key, make, [&](double share) { progress.at((double(rows.size()) + share) / all, task->name); }));
          if (rows.back().interrupted) break;
        }
    progress.clear();
    for (const TaskRow& row : rows)
      if (!row.scores.empty()) out["tasks"].push_back(to_json(row, attention_));
  }

  std::vector<Query> queries() const {
    if (query_ == "both") return {Query::Blind, Query::Aware};
    return {query_ == "aware" ? Query::Aware : Query::Blind};
  }

  /// What makes a sample belong to this question and no other.
  SampleFile::Json run_key(const Model& model, std::string_view text) const {
    return {{"model", hexadecimal(model.info().hash)}, {"attention", attention_}, {"kv", flags_.kv}, {"chunk", flags_.chunk}, {"text", fingerprint(text)}, {"seed", seed_}, {"example", example_}};
  }

  void ppl(const std::shared_ptr<const Model>& model, const std::vector<int32_t>& tokens, Json& out) {
    // What makes a half-done sum of losses belong to this question and no other.
    const Json key = {{"model", model->info().hash},
                      {"attention", attention_},
                      {"context", context_},
                      {"kv", flags_.kv},
                      {"text", tokens.size()}};
    Perplexity from;
    if (!state_.empty())
      if (auto text = read_file(state_)) from = resume(*text, key);
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
      return {state.at("chunks").get<int64_t>(), state.at("tokens").get<int64_t>(), state.at("sum").get<double>(),
              state.at("squares").get<double>()};
    } catch (const Json::exception&) { return wrong("it is damaged"); }
  }

  void against_dense(const std::shared_ptr<const Model>& model, const std::vector<int32_t>& tokens, Json& out) {
    const Passage text = passage(tokens, context_, score_);
    if (wants("kld") || wants("mass")) {
      CompareOptions options;
      options.session = flags_.session(attention_);
      options.attention = {attention_};
      Progress progress("kld");
      const Comparison result = compare(model, text, options,
                                        [&](double share, const std::string& name) { progress.at(share, name); });
      if (result.interrupted) return;
      const Row& row = result.rows.back();
      if (wants("kld"))
        out["kld"] = {{"kld_mean", row.kld_mean}, {"kld_p99", row.kld_p99},          {"top1_agree", row.top1_agree},
                      {"ppl", row.ppl},           {"ppl_dense", result.rows[0].ppl}, {"density", row.density()},
                      {"prompt", result.prompt},  {"scored", result.scored}};
      if (wants("mass")) out["mass"] = {{"prefill", row.mass_prefill}, {"decode", row.mass_decode}};
    }
    for (const char* task : {"niah", "niah-aware"}) {
      if (!wants(task) || interrupted()) continue;
      NiahOptions options;
      options.session = flags_.session(attention_);
      options.question_first = std::string(task) == "niah-aware";
      options.seed = seed_;
      try {
        const NiahScore score = niah(model, std::span(text.tokens).subspan(0, size_t(text.prompt)), options);
        const Interval ci = wilson(score.accuracy, score.runs);
        out[task] = {{"accuracy", score.accuracy}, {"recall", score.recall}, {"nll", score.nll}, {"runs", score.runs},
                     {"query", options.question_first ? "aware" : "blind"}, {"low", ci.low}, {"high", ci.high}, {"interval", ci.method}};
      } catch (const Error& e) {
        if (e.failure().code != Code::Interrupted) throw;
      }
    }
  }

  ModelFlags flags_;
  std::string file_, text_, attention_ = "dense", state_, samples_, query_ = "blind";
  std::vector<std::string> tasks_ = {"ppl"};
  std::vector<int64_t> lengths_;
  int64_t context_ = 2048, chunks_ = -1, score_ = 0, count_ = 10;
  uint64_t seed_ = 0;
  bool json_ = false, example_ = false;
};

}  // namespace

std::unique_ptr<Command> eval_command() { return std::make_unique<Eval>(); }

}  // namespace heed::apps
