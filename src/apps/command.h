// A command of the program: its flags, and what it does.
#pragma once
#include <CLI/CLI.hpp>
#include <initializer_list>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "model/session.h"

namespace heed {
struct Passage;
}

namespace heed::apps {

using Json = nlohmann::ordered_json;

struct Command {
  virtual ~Command() = default;
  /// Adds flags, and examples as the footer, to the command's own sub-application.
  virtual void declare(CLI::App& app) = 0;
  /// Returns the exit status; may throw Error.
  virtual int run() = 0;
};

std::unique_ptr<Command> run_command();
std::unique_ptr<Command> compare_command();
std::unique_ptr<Command> eval_command();
std::unique_ptr<Command> pairs_command();
std::unique_ptr<Command> trace_command();
std::unique_ptr<Command> apply_command();
std::unique_ptr<Command> tokenize_command();
std::unique_ptr<Command> list_command();
std::unique_ptr<Command> info_command();
std::unique_ptr<Command> heads_command();
std::unique_ptr<Command> calibrate_command();
std::unique_ptr<Command> bench_command();

/// Flags of every command that opens a model.
struct ModelFlags {
  std::string model, kv = "bf16", backend = "auto";
  int threads = 0, device = 0;
  int64_t ubatch = 0, chunk = 0;

  void declare(CLI::App& app, bool required = true);
  /// Sets the number of threads and checks what needs no model. Throws Error.
  void prepare() const;
  /// prepare(), and loads the model. Throws Error.
  std::shared_ptr<const Model> load() const;
  SessionOptions session(const std::string& attention) const;
};

/// What a run of a passage depends on beside the mechanism, as fields of a SampleFile's key.
Json run_key(const ModelFlags& flags, const Model& model, const Passage& passage);

/// "bf16", or "q8,q4" for keys and values apart → how pages are kept. Throws Error(Invalid).
std::pair<PageType, PageType> page_types(const std::string& text);
/// The model's tokenizer, or an Error that says it has none.
const Tokenizer& tokenizer(const Model& model);
/// The tokens of a text file, with BOS where the model expects one.
std::vector<int32_t> tokens_of(const Model& model, const std::string& path);

/// Refuses, before any work, what could not be written when the work is done: files that options name; empty: none.
/// Throws Error.
void check_outputs(std::initializer_list<std::string> paths);

/// Whole numbers from `least` on. CLI11's own checks name the largest number there is, which has 309 digits.
CLI::Validator at_least(int64_t least);

void add_json(CLI::App& app, bool& json);
/// One JSON document on stdout; bytes that are no UTF-8 become U+FFFD.
void print(const Json& json);

Json to_json(const Times& times);

/// "17.3 MiB".
std::string size_text(double bytes);
std::string fixed(double x, int digits);

/// Of `words`, the one nearest to `word`, if it is near enough to be meant; else empty.
std::string nearest(const std::string& word, const std::vector<std::string>& words);

/// Columns of text, aligned by width on a terminal and as Markdown anywhere: the header's first character '<' aligns left.
std::string table(const std::vector<std::string>& header, const std::vector<std::vector<std::string>>& rows);

}  // namespace heed::apps
