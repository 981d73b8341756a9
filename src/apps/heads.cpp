#include "lab/heads.h"

#include <iostream>
#include <numeric>

#include "apps/command.h"
#include "lab/progress.h"

namespace heed::apps {
namespace {

class Heads final : public Command {
 public:
  void declare(CLI::App& app) override {
    flags_.declare(app);
    app.add_option("-f,--file", file_, "a text to look at and to hide needles in; - is standard input")
        ->type_name("FILE")
        ->required();
    app.add_option("-c,--ctx-size", context_, "tokens of a prompt")
        ->type_name("N")
        ->check(CLI::Range(int64_t(512), int64_t(1) << 24))
        ->capture_default_str();
    app.add_option("--prompts", prompts_, "needles to look for, at different depths; 0: do not look for retrieval heads")
        ->type_name("N")
        ->check(CLI::Range(0, 1000))
        ->capture_default_str();
    app.add_option("--top", top_, "lines of the table (0: every head)")->type_name("N")->check(at_least(0))->capture_default_str();
    app.add_option("-s,--seed", seed_, "of the needles")->type_name("N");
    add_json(app, json_);
    app.footer(
        "retrieval: share of a needle's tokens that the head looks at just when the model says them (Wu et al., "
        "2024).\n"
        "sink, local: share of attention on the first 4 and on the last 256 tokens; a head with both near 1 together "
        "streams.\n\n"
        "Examples:\n  heed heads -m model.gguf -f book.txt -c 2048\n  heed heads -m model.gguf -f book.txt --json");
  }

  int run() override {
    const auto model = flags_.load();
    const std::vector<int32_t> text = tokens_of(*model, file_);
    Progress progress("heads");
    const HeadStudy study = study_heads(model, text, context_, prompts_, seed_, flags_.session("dense"),
                                        [&](double share) { progress.at(share); });
    const RetrievalScores& scores = study.retrieval;
    progress.clear();

    const ModelInfo& m = model->info();
    Json heads = Json::array();
    for (int l = 0; l < m.layers; ++l)
      for (int h = 0; h < m.h; ++h) {
        const HeadView& v = study.views[size_t(l)][size_t(h)];
        heads.push_back({{"layer", l},
                         {"head", h},
                         {"retrieval", scores.counted ? Json(scores.at(l, h)) : Json(nullptr)},
                         {"sink", v.sink},
                         {"local", v.local},
                         {"distance", v.distance},
                         {"entropy", v.entropy}});
      }
    if (json_) {
      print({{"model", model->path()},
             {"tokens", context_},
             {"prompts", prompts_},
             {"prompts_answered", scores.counted},
             {"heads", heads}});
      return 0;
    }
    // Without scores, heads that look far away first.
    const auto rank = [&](const Json& h) {
      return scores.counted ? h["retrieval"].get<double>() : -h["sink"].get<double>() - h["local"].get<double>();
    };
    std::stable_sort(heads.begin(), heads.end(), [&](const Json& a, const Json& b) { return rank(a) > rank(b); });
    std::vector<std::vector<std::string>> rows;
    for (const Json& h : heads) {
      if (top_ > 0 && int64_t(rows.size()) >= top_) break;
      rows.push_back({h["layer"].dump(), h["head"].dump(), h["retrieval"].is_null() ? "" : fixed(h["retrieval"], 3),
                      fixed(h["sink"], 3), fixed(h["local"], 3), fixed(h["distance"], 0), fixed(h["entropy"], 2)});
    }
    std::cout << table({"layer", "head", "retrieval", "sink", "local", "distance", "entropy"}, rows);
    if (prompts_ > 0)
      std::cerr << '\n'
                << scores.counted << " of " << prompts_
                << " needles were found by the model; scores are means over those\n";
    return 0;
  }

 private:
  ModelFlags flags_;
  std::string file_;
  int64_t context_ = 2048, top_ = 20;
  int prompts_ = 6;
  uint64_t seed_ = 0;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> heads_command() { return std::make_unique<Heads>(); }

}  // namespace heed::apps
