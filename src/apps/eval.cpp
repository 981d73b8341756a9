#include <iostream>

#include "apps/command.h"
#include "lab/compare.h"
#include "lab/files.h"
#include "lab/perplexity.h"
#include "lab/progress.h"

namespace heed::apps {
namespace {

class Eval final : public Command {
 public:
  void declare(CLI::App& app) override {
    flags_.declare(app);
    app.add_option("-f,--file", file_, "the text; - is standard input")->type_name("FILE")->required();
    app.add_option("--tasks", tasks_, "of ppl, kld, niah, niah-aware, mass; with commas")
        ->type_name("LIST")
        ->delimiter(',')
        ->check(CLI::IsMember({"ppl", "kld", "niah", "niah-aware", "mass"}))
        ->capture_default_str();
    app.add_option("-c,--ctx-size", context_, "tokens of a chunk (ppl) or of the whole passage")
        ->type_name("N")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    app.add_option("--chunks", chunks_, "chunks of ppl; -1: all")->type_name("N")->capture_default_str();
    app.add_option("--score", score_, "kld, mass: tokens fed one by one behind the prompt (0: a quarter of -c)")
        ->type_name("N")
        ->check(CLI::NonNegativeNumber);
    app.add_option("--attention", attention_, "the mechanism")->type_name("SPEC")->capture_default_str();
    app.add_option("--state", state_, "ppl: keep what is done in this file and go on from it")->type_name("FILE.json");
    app.add_option("-s,--seed", seed_, "of niah's numbers")->type_name("N");
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
    const std::vector<int32_t> tokens = tokens_of(*model, file_);
    Json out = {{"model", model->path()}, {"attention", attention_}, {"context", context_}};
    if (wants("ppl")) ppl(model, tokens, out);
    if (!interrupted() && (wants("kld") || wants("mass") || wants("niah") || wants("niah-aware")))
      against_dense(model, tokens, out);
    if (interrupted()) out["interrupted"] = true;
    if (json_) print(out);
    else
      for (const auto& [key, value] : out.items())
        std::cout << key << std::string(key.size() < 16 ? 16 - key.size() : 1, ' ')
                  << (value.is_string() ? value.get<std::string>() : value.dump()) << '\n';
    if (interrupted()) std::cerr << "heed: interrupted; what was finished is above\n";
    return interrupted() ? 130 : 0;
  }

 private:
  bool wants(const std::string& task) const { return std::find(tasks_.begin(), tasks_.end(), task) != tasks_.end(); }

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
        out[task] = {{"accuracy", score.accuracy}, {"recall", score.recall}, {"nll", score.nll}, {"runs", score.runs}};
      } catch (const Error& e) {
        if (e.failure().code != Code::Interrupted) throw;
      }
    }
  }

  ModelFlags flags_;
  std::string file_, attention_ = "dense", state_;
  std::vector<std::string> tasks_ = {"ppl"};
  int64_t context_ = 2048, chunks_ = -1, score_ = 0;
  uint64_t seed_ = 0;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> eval_command() { return std::make_unique<Eval>(); }

}  // namespace heed::apps
