#include <algorithm>
#include <iostream>

#include "apps/command.h"
#include "base/utf8.h"
#include "lab/files.h"
#include "lab/progress.h"
#include "model/sampler.h"

namespace heed::apps {
namespace {

/// What stands before and behind a user's text in a family's turns.
struct Turn {
  const char* token;  // a control token that tells the family
  const char *before, *behind;
};
constexpr Turn turns[] = {
    {"<|im_start|>", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"},
    {"<start_of_turn>", "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"},
    {"<|start_header_id|>", "<|start_header_id|>user<|end_header_id|>\n\n",
     "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"},
};

/// The text as a user's turn. Control tokens written in the text itself stay plain text.
std::vector<int32_t> chat(const Tokenizer& words, const std::string& text) {
  for (const Turn& turn : turns) {
    if (words.find(turn.token) < 0) continue;
    std::vector<int32_t> tokens = words.encode(turn.before, {.special = true, .bos = words.add_bos()});
    for (const auto& part : {words.encode(text), words.encode(turn.behind, {.special = true, .bos = false})})
      tokens.insert(tokens.end(), part.begin(), part.end());
    return tokens;
  }
  throw Error(Code::Unsupported, "--chat", "the vocabulary has no turns that are known (ChatML, Gemma, Llama 3)",
              "write the prompt as the model wants it, without --chat");
}

class Run final : public Command {
 public:
  void declare(CLI::App& app) override {
    flags_.declare(app);
    app.add_option("-f,--file", file_, "a text that comes first; - is standard input")->type_name("FILE");
    app.add_option("-p,--prompt", prompt_, "text behind it")->type_name("TEXT");
    app.add_option("-n,--predict,--n-predict", predict_,
                   "tokens to generate, until the model ends or its context is full; -1: until then alone")
        ->type_name("N")
        ->check(CLI::Range(int64_t(-1), int64_t(1) << 40))
        ->capture_default_str();
    app.add_option("-c,--ctx-size", context_, "use only the last N tokens of the prompt (0: all)")->type_name("N")->check(at_least(0));
    app.add_option("--attention", attention_, "the mechanism (heed list)")->type_name("SPEC")->capture_default_str();
    app.add_option("--temp", sampling_.temperature, "0: always the likeliest token")->capture_default_str();
    app.add_option("--top-k", sampling_.top_k, "draw from the K likeliest (0: all)")->capture_default_str();
    app.add_option("--top-p", sampling_.top_p, "draw from the likeliest that make up P")->capture_default_str();
    app.add_option("--min-p", sampling_.min_p, "draw from those at least P times as likely as the likeliest")->capture_default_str();
    app.add_option("-s,--seed", sampling_.seed, "of the draws")->capture_default_str();
    app.add_flag("--chat", chat_, "write the prompt as a user's turn, for models tuned to chat");
    app.add_flag("--ignore-eos", ignore_eos_, "go on behind the end of the text");
    add_json(app, json_);
    app.footer(
        "Examples:\n"
        "  heed run -m model.gguf -p \"Once upon a time\" -n 64\n"
        "  heed run -m model.gguf -f book.txt -p \"Who hid the key?\" --chat --attention \"snapkv(budget=1024)\"");
  }

  int run() override {
    require(!file_.empty() || !prompt_.empty(), "run", "there is no prompt", "give -p TEXT, -f FILE or both");
    Sampler sampler(sampling_);
    const auto model = flags_.load();
    const Tokenizer& words = tokenizer(*model);
    const std::vector<int32_t> tokens = prompt_tokens(words);
    Session session(model, flags_.session(attention_));

    Progress progress("prompt");
    session.progress([&](int64_t done, int64_t total) { progress.at(double(done) / double(total)); });
    double begin = now();
    Tensor logits = session.prefill(tokens);
    const double prefill = now() - begin;
    progress.clear();
    const int64_t kv_bytes = session.kv_bytes();

    begin = now();
    const Generated said = generate(session, logits, words);
    const double decode = now() - begin;
    if (!json_) std::cout << std::endl;

    const std::vector<int32_t>& generated = said.tokens;
    const double prefill_tps = double(tokens.size()) / std::max(1e-9, prefill);
    const double decode_tps = generated.size() > 1 ? double(generated.size() - 1) / std::max(1e-9, decode) : 0;
    if (json_)
      print({{"text", said.text},
             {"tokens", generated},
             {"stop", said.stop},
             {"attention", attention_},
             {"prompt_tokens", tokens.size()},
             {"prefill_tps", prefill_tps},
             {"decode_tps", decode_tps},
             {"kv_bytes", kv_bytes}});
    else
      std::cerr << "\nprompt " << tokens.size() << " tokens, " << fixed(prefill_tps, 1) << " t/s; generated "
                << generated.size() << ", " << fixed(decode_tps, 1) << " t/s; cache " << size_text(double(kv_bytes))
                << " behind the prompt" << (said.stop == "interrupted" ? "; interrupted" : "")
                << (said.stop == "context" ? "; the model's context is full" : "") << '\n';
    return said.stop == "interrupted" ? 130 : 0;
  }

 private:
  struct Generated {
    std::vector<int32_t> tokens;
    std::string text, stop = "length";
  };

  /// Draws tokens behind the prompt, whose logits these are, and shows them as they come.
  Generated generate(Session& session, Tensor logits, const Tokenizer& words) {
    Sampler sampler(sampling_);
    Generated out;
    Utf8Stream stream;
    // The last token that there is room for is said without being read.
    const int64_t room = session.reach() > 0 ? session.reach() - int64_t(session.tokens().size()) + 1 : INT64_MAX;
    const int64_t limit = predict_ < 0 ? room : std::min(predict_, room);
    if (limit != predict_) out.stop = "context";
    while (int64_t(out.tokens.size()) < limit) {
      if (interrupted()) {
        out.stop = "interrupted";
        break;
      }
      const int32_t token = sampler(logits.select(0, 0).span<const float>());
      if (words.is_end(token) && !ignore_eos_) {
        out.stop = "end";
        break;
      }
      out.tokens.push_back(token);
      emit(out.text, words.is_control(token) ? "" : stream.push(words.piece(token)));
      if (int64_t(out.tokens.size()) == limit) break;
      logits = session.decode(token);
    }
    emit(out.text, stream.finish());
    return out;
  }

  std::vector<int32_t> prompt_tokens(const Tokenizer& words) const {
    std::string text = file_.empty() ? "" : value_or_throw(read_file(file_));
    text += prompt_;
    // A file's last line break is rarely meant to be continued behind.
    if (prompt_.empty() && !text.empty() && text.back() == '\n') text.pop_back();
    require(!text.empty(), "run", "the prompt is empty", "give -p TEXT or -f FILE");
    std::vector<int32_t> tokens = chat_ ? chat(words, text)
                                        : words.encode(text, {.special = false, .bos = words.add_bos()});
    if (context_ > 0 && int64_t(tokens.size()) > context_) {
      std::cerr << "heed: the prompt's last " << context_ << " of " << tokens.size() << " tokens are used\n";
      tokens.erase(tokens.begin(), tokens.end() - context_);
    }
    return tokens;
  }

  void emit(std::string& text, const std::string& piece) const {
    text += piece;
    if (!json_) std::cout << piece << std::flush;
  }

  ModelFlags flags_;
  Sampling sampling_;
  std::string file_, prompt_, attention_ = "dense";
  int64_t predict_ = 128, context_ = 0;
  bool chat_ = false, ignore_eos_ = false, json_ = false;
};

}  // namespace

std::unique_ptr<Command> run_command() { return std::make_unique<Run>(); }

}  // namespace heed::apps
