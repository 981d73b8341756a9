#include "lab/compare_rows.h"

namespace heed {
namespace {

using Json = SampleFile::Json;

// What a line holds, each field named once: f(name, field) writes or reads it.

void fields(Times& x, auto f) {
  f("plan", x.plan), f("observe", x.observe), f("select", x.select);
  f("attend", x.attend), f("products", x.products), f("rest", x.rest);
}
void fields(NiahScore& x, auto f) {
  f("accuracy", x.accuracy), f("recall", x.recall), f("nll", x.nll), f("runs", x.runs);
}
void fields(Map& x, auto f) {
  f("layer", x.layer), f("head", x.head), f("rows", x.rows), f("columns", x.columns), f("share", x.share);
}
void fields(TimedRow& run, auto f) {
  f("prefill", run.prefill), f("decode", run.decode);
  Row& x = run.row;
  f("prefill_seconds", x.prefill_times), f("decode_seconds", x.decode_times);
  f("kv_bytes", x.kv_bytes), f("peak_bytes", x.peak_bytes), f("kv_share", x.kv_share);
  f("ppl", x.ppl), f("kld_mean", x.kld_mean), f("kld_p99", x.kld_p99), f("top1_agree", x.top1_agree);
  f("density_prefill", x.density_prefill), f("density_kept", x.density_kept), f("density_read", x.density_read);
  f("mass_prefill", x.mass_prefill), f("mass_decode", x.mass_decode), f("tasks", x.tasks);
  f("probed_layers", x.probed_layers), f("mass_by_head", x.mass_by_head), f("error_by_head", x.error_by_head);
  f("nll", x.nll), f("kld", x.kld), f("kept", x.kept), f("kept_where", x.kept_where);
  f("plans", x.plans), f("reads", x.reads);
}

template <class T>
concept Fielded = requires(T& x) { fields(x, [](const char*, auto&) {}); };

template <class T>
Json write(T& x) {
  if constexpr (Fielded<T>) {
    Json out = Json::object();
    fields(x, [&](const char* name, auto& field) { out[name] = write(field); });
    return out;
  } else if constexpr (std::is_same_v<T, std::vector<Map>>) {
    Json out = Json::array();
    for (Map& map : x) out.push_back(write(map));
    return out;
  } else if constexpr (std::is_same_v<T, std::map<std::string, NiahScore>>) {
    Json out = Json::object();
    for (auto& [name, score] : x) out[name] = write(score);
    return out;
  } else {
    return x;
  }
}

template <class T>
void read(const Json& from, T& x) {
  if constexpr (Fielded<T>) fields(x, [&](const char* name, auto& field) { read(from.at(name), field); });
  else if constexpr (std::is_same_v<T, std::vector<Map>>)
    for (const Json& map : from) read(map, x.emplace_back());
  else if constexpr (std::is_same_v<T, std::map<std::string, NiahScore>>)
    for (const auto& [name, score] : from.items()) read(score, x[name]);
  else from.get_to(x);
}

bool is_line(const Json& line) {
  try {
    return line.is_object() && !timed_row(line).row.attention.empty() && line.at("repetition").is_number_integer();
  } catch (const Json::exception&) { return false; }
}

}  // namespace

Json to_json(const TimedRow& run) {
  TimedRow copy = run;
  return write(copy);
}

TimedRow timed_row(const Json& line) {
  TimedRow run;
  read(line, run);
  run.row.attention = line.at("attention").get<std::string>();
  return run;
}

const SampleFile::Form& compare_lines() {
  static const SampleFile::Form form = {"run of `heed compare`",
                                        {"model", "machine", "backend", "threads", "kv", "chunk", "ubatch", "text",
                                         "prompt", "scored", "asked", "seed", "attention", "files", "repetition"},
                                        is_line};
  return form;
}

}  // namespace heed
