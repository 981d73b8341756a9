#include "lab/longbench.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace heed {
namespace {

using Json = nlohmann::ordered_json;

bool texts(const Json& value, std::vector<std::string>& out) {
  if (!value.is_array()) return false;
  for (const Json& one : value) {
    if (!one.is_string()) return false;
    out.push_back(one.get<std::string>());
  }
  return true;
}

}  // namespace

Result<std::vector<LongBenchItem>> read_longbench(std::string_view jsonl, const std::string& where) {
  std::vector<LongBenchItem> out;
  int64_t number = 0;
  for (size_t at = 0; at < jsonl.size();) {
    const size_t end = std::min(jsonl.find('\n', at), jsonl.size());
    const std::string_view line = jsonl.substr(at, end - at);
    at = end + 1, ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const auto wrong = [&](const std::string& what) {
      return fail(Code::Invalid, where + ":" + std::to_string(number), what,
                  "a line is {\"input\": \"…\", \"context\": \"…\", \"answers\": [\"…\"]}");
    };
    const Json json = Json::parse(line, nullptr, false);
    if (!json.is_object()) return wrong("it is no JSON object");
    LongBenchItem item;
    for (const auto& [name, to] : {std::pair{"input", &item.input}, std::pair{"context", &item.context}}) {
      if (!json.contains(name) || !json[name].is_string())
        return wrong(std::string("the field '") + name + "' is no text");
      *to = json[name].get<std::string>();
    }
    if (!json.contains("answers") || !texts(json["answers"], item.answers) || item.answers.empty())
      return wrong("the field 'answers' is no list of texts");
    if (json.contains("all_classes") && !json["all_classes"].is_null() && !texts(json["all_classes"], item.classes))
      return wrong("the field 'all_classes' is no list of texts");
    out.push_back(std::move(item));
  }
  if (out.empty()) return fail(Code::Invalid, where, "it has no examples", "give a file with a line of JSON for each");
  return out;
}

std::string longbench_template(const Metric& metric) {
  const std::string_view name = metric.name;
  if (name == "code_similarity") return "Please complete the code given below.\n{context}{input}Next line of code:\n";
  if (name == "rouge_l") return "{context}\n\n{input}\nSummary:";
  return "{context}\n\n{input}\nAnswer:";
}

Question longbench_question(const LongBenchItem& item, const Metric& metric, const Tokenizer& words,
                            const std::string& form, int64_t length, int limit) {
  constexpr std::string_view context = "{context}", input = "{input}";
  const auto filled = [&](std::string text) {
    for (size_t at = 0; (at = text.find(input, at)) != std::string::npos; at += item.input.size())
      text.replace(at, input.size(), item.input);
    return text;
  };
  const size_t at = form.find(context);
  require(at != std::string::npos, "--template", "it has no {context}", "as in \"{context}\\n\\n{input}\\nAnswer:\"");
  const std::string before = filled(form.substr(0, at)), behind = filled(form.substr(at + context.size()));
  Question q;
  q.question = words.encode(behind);
  require(!q.question.empty(), "--template", "nothing stands behind {context}, so nothing is asked",
          "as in \"{context}\\n\\n{input}\\nAnswer:\"");
  q.context = words.encode(before + item.context, {.special = false, .bos = words.add_bos()});
  const int64_t room = length - limit - int64_t(q.question.size());
  require(room >= 2, "-c",
          std::to_string(length) + " tokens have no room for the context beside the question and an answer of " +
              std::to_string(limit),
          "give a larger -c");
  q.prompt = before + item.context + behind;
  if (int64_t(q.context.size()) > room) {
    const int64_t head = room / 2, tail = room - head;
    q.context.erase(q.context.begin() + head, q.context.end() - tail);
    q.prompt = words.decode(q.context) + behind;
  }
  if (q.context.empty()) q.context.push_back(q.question.front()), q.question.erase(q.question.begin());
  require(!q.question.empty(), "--longbench", "an example has neither context nor question");
  q.expected = item.answers;
  q.limit = limit, q.one_line = metric.one_line;
  q.score = [&metric, answers = item.answers, classes = item.classes](const std::string& said) {
    double best = 0;
    for (const std::string& right : answers) best = std::max(best, metric.score(said, right, classes));
    return best;
  };
  return q;
}

}  // namespace heed
