#include <iostream>

#include "apps/command.h"
#include "lab/files.h"

namespace heed::apps {
namespace {

class Tokenize final : public Command {
 public:
  void declare(CLI::App& app) override {
    app.add_option("-m,--model", model_, "GGUF file with the vocabulary")->type_name("FILE")->required();
    auto* file = app.add_option("-f,--file", file_, "text; - is standard input")->type_name("FILE");
    app.add_option("-p,--prompt", prompt_, "text on the command line")->type_name("TEXT")->excludes(file);
    app.add_flag("--special", special_, "text such as <|im_end|> names a control token");
    add_json(app, json_);
    app.footer(
        "No BOS is added.\n\nExamples:\n  heed tokenize -m model.gguf -f book.txt --json\n  heed tokenize -m "
        "model.gguf -p \"Hello\" --special");
  }

  int run() override {
    require(!file_.empty() || !prompt_.empty(), "tokenize", "there is no text", "give -f FILE or -p TEXT");
    const std::string text = file_.empty() ? prompt_ : value_or_throw(read_file(file_));
    const auto model = value_or_throw(Model::load(model_));
    const Tokenizer& words = tokenizer(*model);
    const std::vector<int32_t> ids = words.encode(text, {.special = special_, .bos = false});
    if (json_) {
      Json pieces = Json::array();
      for (int32_t id : ids) pieces.push_back(std::string(words.piece(id)));
      print({{"ids", ids}, {"pieces", pieces}});
      return 0;
    }
    for (int32_t id : ids)
      std::cout << id << '\t' << Json(std::string(words.piece(id))).dump(-1, ' ', false, Json::error_handler_t::replace)
                << '\n';
    return 0;
  }

 private:
  std::string model_, file_, prompt_;
  bool special_ = false, json_ = false;
};

}  // namespace

std::unique_ptr<Command> tokenize_command() { return std::make_unique<Tokenize>(); }

}  // namespace heed::apps
