#include "lab/calibrate.h"

#include <filesystem>
#include <iostream>

#include "apps/command.h"
#include "lab/code_books.h"
#include "lab/cutoff.h"
#include "lab/files.h"
#include "lab/progress.h"
#include "lab/query_stats.h"
#include "mechanisms/registry.h"

namespace heed::apps {
namespace {

class Calibrate final : public Command {
 public:
  void declare(CLI::App& app) override {
    flags_.declare(app);
    std::string known;
    for (const Calibrated& c : calibrated_mechanisms()) known += std::string("\n  ") + c.name + ": " + c.learns;
    app.add_option("mechanism", spec_, "a mechanism, with what else it is to be given")->type_name("SPEC")->required();
    app.add_option("-f,--file", file_, "the text to learn from; - is standard input")->type_name("FILE")->required();
    app.add_option("-o,--output", output_, "the profile to write")->type_name("FILE.json")->required();
    app.add_option("--share", share_, "of the KV heads, those that retrieve most (-1: as usual for the mechanism)")
        ->type_name("X")
        ->check(CLI::Range(-1.0, 1.0));
    app.add_option("-c,--ctx-size", context_, "tokens of a prompt")
        ->type_name("N")
        ->check(CLI::Range(int64_t(512), int64_t(1) << 24))
        ->capture_default_str();
    app.add_option(
           "--prompts", prompts_,
           "needles to look for, at different depths (-1: 6, or 32 for a probe); 0: heads are ranked by how far they "
           "look. For statistics of queries and code books: parts of the text that are read (-1: 100)")
        ->type_name("N")
        ->check(CLI::Range(-1, 1000));
    app.add_flag("--gradients", gradients_, "code books: numbers count by their squared gradients of the text's loss");
    app.add_option("-s,--seed", seed_, "of the needles")->type_name("N");
    add_json(app, json_);
    app.footer(
        "Finds:" + known +
        "\n\nThe profile names its model, and other models refuse it.\n\n"
        "Examples:\n"
        "  heed calibrate \"duo-attention(sinks=4,recent=256)\" -m model.gguf -f book.txt -o duo.json\n"
        "  heed calibrate \"headkv(snapkv(budget=512))\" -m model.gguf -f book.txt -o headkv.json\n"
        "  heed calibrate expected-attention-stats -m model.gguf -f book.txt -c 512 -o stats.json   # and stats.npz\n"
        "  heed calibrate \"kvquant(bits=3)\" -m model.gguf -f book.txt -c 512 -o books.json   # and books.npz\n"
        "  heed run -m model.gguf -f book.txt --attention @duo.json");
  }

  int run() override {
    // What is wrong with the spec or the output is said before a model is loaded.
    const std::vector<Spec> specs = value_or_throw(parse_spec(spec_));
    require(specs.size() == 1, "calibrate", "one mechanism at a time, not " + std::to_string(specs.size()),
            "join profiles by hand");
    const Calibrated what = value_or_throw(find_calibrated(specs[0].name));
    const bool has_arrays = std::string_view(what.parameter) == "book" || std::string_view(what.parameter) == "stats";
    require(!has_arrays || arrays() != output_, "-o", "'" + output_ + "' is where the arrays go, beside the profile",
            "name a .json file");
    check_outputs({output_, has_arrays ? arrays().string() : ""});
    const auto model = flags_.load();
    value_or_throw(Composition::parse(spec_, model->info(), registry()));
    const std::vector<int32_t> text = tokens_of(*model, file_);
    Progress progress("calibrate");
    const std::string_view learnt = what.parameter;
    if (learnt == "book") return learn_books(specs[0], model, text, progress);
    require(!gradients_, "--gradients", "only code books are learnt with them", "leave it out");
    if (learnt == "stats") return learn_queries(specs[0], model, text, progress);
    if (what.share == 0) return learn_probe(specs[0], model, text, progress);
    if (prompts_ < 0) prompts_ = 6;
    const HeadStudy study = study_heads(model, text, context_, prompts_, seed_, flags_.session("dense"),
                                        [&](double share) { progress.at(share); });
    progress.clear();
    const Json profile = calibrate(specs[0], model->info(), study, share_ < 0 ? what.share : share_);
    value_or_throw(write_file(output_, profile.dump(2) + "\n"));
    if (json_) return print(profile), 0;
    std::cout << output_ << ": " << what.learns << '\n';
    if (prompts_ > 0)
      std::cerr << study.retrieval.counted << " of " << prompts_ << " needles were found by the model"
                << (study.retrieval.counted ? "" : "; heads are ranked by how far they look") << '\n';
    return 0;
  }

 private:
  int learn_probe(const Spec& spec, const std::shared_ptr<const Model>& model, std::span<const int32_t> text,
                  Progress& progress) {
    require(share_ < 0, "--share", "a probe has none", "leave it out");
    CutoffOptions options;
    options.session = flags_.session("dense"), options.length = context_, options.seed = seed_;
    if (prompts_ >= 0) options.prompts = prompts_;
    const CutoffProbe probe = learn_cutoff(model, text, options, [&](double share) { progress.at(share); });
    progress.clear();
    const Json profile = cutoff_profile(spec, model->info(), probe);
    value_or_throw(write_file(output_, profile.dump(2) + "\n"));
    if (json_) return print(profile), 0;
    char told[96];
    std::snprintf(told, sizeof told, ": F1 %.3f on prompts it has not seen; always \"enough\" has %.3f", probe.f1,
                  probe.f1_always);
    std::cout << output_ << told << '\n';
    return 0;
  }

  int learn_queries(const Spec& spec, const std::shared_ptr<const Model>& model, std::span<const int32_t> text,
                    Progress& progress) {
    const auto options = of_texts<QueryStatsOptions>("statistics");
    const QueryStats stats = learn_query_stats(model, text, options, [&](double share) { progress.at(share); });
    progress.clear();
    return save(query_stats_profile(spec, model->info(), stats, arrays().string(), arrays().filename().string()),
                std::to_string(stats.count) + " queries a head, from " + std::to_string(stats.texts) + " texts");
  }

  int learn_books(const Spec& spec, const std::shared_ptr<const Model>& model, std::span<const int32_t> text,
                  Progress& progress) {
    auto options = of_texts<CodeBookOptions>("code books");
    options.gradients = gradients_;
    const Needs needs = value_or_throw(make_mechanism(spec, registry()))->needs(model->info());
    const CodeBooks books = learn_code_books(model, text, needs.quantised_k, needs.quantised_v, options,
                                             [&](double share) { progress.at(share); });
    progress.clear();
    return save(code_books_profile(spec, model->info(), books, arrays().string(), arrays().filename().string()),
                std::to_string(books.pages) + " pages a KV head, from " + std::to_string(books.texts) + " texts");
  }

  /// Of what is learnt from parts of a text and lies in a file of arrays.
  template <class Options>
  Options of_texts(const std::string& what) const {
    require(share_ < 0, "--share", what + " have none", "leave it out");
    require(prompts_ != 0, "--prompts", "0 parts of the text teach nothing", "give at least 1");
    Options options;
    options.session = flags_.session("dense"), options.length = context_;
    if (prompts_ > 0) options.texts = prompts_;
    return options;
  }
  std::filesystem::path arrays() const { return std::filesystem::path(output_).replace_extension(".npz"); }
  int save(const Json& profile, const std::string& learnt_of) const {
    value_or_throw(write_file(output_, profile.dump(2) + "\n"));
    if (json_) return print(profile), 0;
    std::cout << output_ << ", " << arrays().string() << ": of " << learnt_of << '\n';
    return 0;
  }

  ModelFlags flags_;
  std::string spec_, file_, output_;
  double share_ = -1;
  int64_t context_ = 2048;
  int prompts_ = -1;
  uint64_t seed_ = 0;
  bool gradients_ = false, json_ = false;
};

}  // namespace

std::unique_ptr<Command> calibrate_command() { return std::make_unique<Calibrate>(); }

}  // namespace heed::apps
