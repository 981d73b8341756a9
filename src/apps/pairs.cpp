#include "lab/pairs.h"

#include <iostream>
#include <map>

#include "apps/command.h"
#include "lab/progress.h"
#include "mechanisms/registry.h"

namespace heed::apps {
namespace {

using Outcome = PairRow::Outcome;

/// "3/16" → part 2 of 16.
std::pair<int, int> shard_of(const std::string& text) {
  int part = 0, parts = 0, used = 0;
  const bool read = std::sscanf(text.c_str(), "%d/%d%n", &part, &parts, &used) == 2 && size_t(used) == text.size();
  require(read && part >= 1 && part <= parts, "--shard", "'" + text + "' names no part",
          "give I/N with I from 1 to N: 3/16");
  return {part - 1, parts};
}

class Pairs final : public Command {
 public:
  void declare(CLI::App& app) override {
    flags_.declare(app);
    app.add_option("-f,--file", file_, "the text; - is standard input")->type_name("FILE")->required();
    app.add_option("-c,--ctx-size", context_,
                   "of the text, how many tokens in all: the prompt and those that are scored")
        ->type_name("N")
        ->check(at_least(1))
        ->capture_default_str();
    app.add_option("--score", score_, "of them, how many are fed one by one behind the prompt and scored")
        ->type_name("N")
        ->check(at_least(1))
        ->capture_default_str();
    app.add_option(
           "--budget", budgets_,
           "entries for each KV head, or shares of the prompt, of both of a pair; identity: what makes each of them "
           "equal to dense")
        ->type_name("LIST")
        ->delimiter(',')
        ->capture_default_str();
    app.add_option("--with", with_, "only pairs in which this mechanism is one")->type_name("NAME");
    app.add_option("--shard", shard_, "I/N: the I-th of N parts of the pairs, for as many processes")
        ->type_name("I/N")
        ->capture_default_str();
    app.add_option("--rows", rows_file_,
                   "write every pair to this file as it is finished, and do not run again those that it has")
        ->type_name("FILE.jsonl");
    add_json(app, json_);
    app.footer(
        "Every planner with every keep policy, every planner with every reader, every keep policy with every reader.\n"
        "A pair runs, is refused in words (two claims on one role of a layer), or fails: then the exit status is 1.\n\n"
        "Examples:\n"
        "  heed pairs -m model.gguf -f book.txt --with quest\n"
        "  for i in $(seq 16); do heed pairs -m model.gguf -f book.txt -t 1 --shard $i/16 --rows $i.jsonl & done");
  }

  int run() override {
    const auto [part, parts] = shard_of(shard_);
    if (!with_.empty()) value_or_throw(find_entry(with_, registry()));
    const auto model = flags_.load();
    const std::vector<int32_t> tokens = tokens_of(*model, file_);
    const Passage text = passage(tokens, context_, score_);
    SampleFile file(rows_file_, pair_lines());
    SampleFile::Json key = run_key(flags_, *model, text);
    std::vector<std::vector<std::string>> pairs;
    size_t all = 0, done = 0;
    for (const std::string& budget : budgets_) {
      pairs.push_back(part_of(pairs_at(model, budget), part, parts));
      all += pairs.back().size();
    }
    Progress progress("pairs");
    progress.at(0, "dense");
    PairRunner runner(model, text, flags_.session("dense"));
    Json out = {{"model", model->path()},  {"backend", key["backend"]},       {"prompt", text.prompt},
                {"scored", text.scored()}, {"ppl_dense", runner.dense().ppl}, {"budgets", Json::array()}};
    bool failed = false;
    for (size_t b = 0; b < budgets_.size(); ++b) {
      Sum sum;
      for (const std::string& pair : pairs[b]) {
        if (interrupted()) break;
        progress.at(double(done++) / double(all), pair);
        key["attention"] = pair;
        PairRow row;
        if (const auto* old = file.find(key)) {
          row = pair_row(*old);
        } else {
          try {
            row = runner.run(pair);
          } catch (const Error&) { break; }
          file.add(key, to_json(row));
        }
        sum.add(row);
        failed = failed || row.outcome == Outcome::Failed;
      }
      out["budgets"].push_back(sum.json(budgets_[b], pairs[b].size()));
    }
    progress.clear();
    out["interrupted"] = interrupted();
    json_ ? print(out) : show(out);
    if (interrupted()) std::cerr << "heed: interrupted; what was finished is above\n";
    return interrupted() ? 130 : failed ? 1 : 0;
  }

 private:
  /// What the pairs of one budget came to.
  struct Sum {
    Json rows = Json::array();
    std::map<Outcome, int64_t> count;
    double kld_mean = 0, kld_max = 0;
    std::string furthest;

    void add(const PairRow& row) {
      rows.push_back(to_json(row));
      ++count[row.outcome];
      if (row.outcome != Outcome::Ran) return;
      if (row.kld_mean >= kld_mean) kld_mean = row.kld_mean, furthest = row.attention;
      kld_max = std::max(kld_max, row.kld_max);
    }
    Json json(const std::string& budget, size_t pairs) {
      return {{"budget", budget},
              {"pairs", pairs},
              {"ran", count[Outcome::Ran]},
              {"refused", count[Outcome::Refused]},
              {"failed", count[Outcome::Failed]},
              {"kld_mean_most", kld_mean},
              {"furthest", furthest},
              {"kld_most", kld_max},
              {"rows", std::move(rows)}};
    }
  };

  std::vector<std::string> pairs_at(const std::shared_ptr<const Model>& model, const std::string& budget) const {
    const std::vector<std::string> one = {budget};
    const auto specs = budget == "identity" ? identities() : every_mechanism(model, flags_.session("dense"), one).specs;
    std::vector<std::string> out = pairs_of(model->info(), specs);
    if (with_.empty()) return out;
    std::erase_if(out, [&](const std::string& pair) {
      const auto parts = value_or_throw(parse_spec(pair));
      return std::none_of(parts.begin(), parts.end(), [&](const Spec& s) { return s.name == with_; });
    });
    return out;
  }

  void show(const Json& out) const {
    std::vector<std::vector<std::string>> rows;
    for (const Json& b : out["budgets"]) {
      const auto number = [&](const char* field) { return std::to_string(b[field].get<int64_t>()); };
      rows.push_back({b["budget"].get<std::string>(), number("pairs"), number("ran"), number("refused"),
                      number("failed"), fixed(b["kld_mean_most"].get<double>(), 4), b["furthest"].get<std::string>()});
      for (const Json& row : b["rows"])
        if (row["outcome"] == name(Outcome::Failed))
          std::cerr << "heed: " << row["attention"].get<std::string>()
                    << " failed: " << row["reason"].get<std::string>() << '\n';
    }
    std::cout << table({"<budget", "pairs", "ran", "refused", "failed", "KLD, most", "<of"}, rows);
  }

  ModelFlags flags_;
  std::string file_, rows_file_, with_, shard_ = "1/1";
  std::vector<std::string> budgets_ = {"20%", "identity"};
  int64_t context_ = 640, score_ = 64;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> pairs_command() { return std::make_unique<Pairs>(); }

}  // namespace heed::apps
