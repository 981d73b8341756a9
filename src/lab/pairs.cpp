#include "lab/pairs.h"

#include <algorithm>
#include <cmath>

#include "base/random.h"
#include "lab/progress.h"
#include "mechanisms/registry.h"

namespace heed {
namespace {

constexpr PairRow::Outcome outcomes[] = {PairRow::Outcome::Ran, PairRow::Outcome::Refused, PairRow::Outcome::Failed};

SessionOptions with(SessionOptions options, const std::string& attention) {
  options.attention = attention;
  return options;
}

bool is_pair_line(const SampleFile::Json& line) {
  const auto text = [&](const char* field) { return line.contains(field) && line[field].is_string(); };
  if (!line.is_object() || !text("model") || !text("attention") || !text("outcome")) return false;
  if (std::none_of(std::begin(outcomes), std::end(outcomes), [&](auto o) { return line["outcome"] == name(o); }))
    return false;
  try {
    pair_row(line);
    return true;
  } catch (const SampleFile::Json::exception&) { return false; }
}

}  // namespace

std::vector<std::string> pairs_of(const ModelInfo& model, std::span<const std::string> specs) {
  const auto playing = [&](Role role) {
    std::vector<std::string> out;
    for (const std::string& spec : specs) {
      const auto parsed = Composition::parse(spec, model, registry());
      if (parsed && std::any_of(parsed->parts().begin(), parsed->parts().end(),
                                [&](const Composition::Part& p) { return has(p.roles, role); }))
        out.push_back(spec);
    }
    return out;
  };
  std::vector<std::string> out;
  for (const auto& [one, other] : {std::pair(Role::Plan, Role::Keep), {Role::Plan, Role::Read}, {Role::Keep, Role::Read}}) {
    const auto others = playing(other);
    for (const std::string& a : playing(one))
      for (const std::string& b : others)
        if (a != b) out.emplace_back(a).append("+").append(b);
  }
  return out;
}

std::vector<std::string> identities() {
  std::vector<std::string> specs;
  for (const Entry& e : registry())
    if (e.kind == "mechanism" && !e.identity.empty() && e.name != "dense") specs.push_back(e.identity);
  return specs;
}

std::vector<std::string> part_of(std::vector<std::string> pairs, int part, int parts) {
  Random random(23);
  for (size_t i = pairs.size(); i > 1; --i) std::swap(pairs[i - 1], pairs[size_t(random.below(int64_t(i)))]);
  std::vector<std::string> out;
  for (size_t i = size_t(part); i < pairs.size(); i += size_t(parts)) out.push_back(std::move(pairs[i]));
  return out;
}

const char* name(PairRow::Outcome outcome) {
  switch (outcome) {
    case PairRow::Outcome::Ran: return "ran";
    case PairRow::Outcome::Refused: return "refused";
    case PairRow::Outcome::Failed: return "failed";
  }
  return "";
}

SampleFile::Json to_json(const PairRow& row) {
  SampleFile::Json out = {{"attention", row.attention}, {"outcome", name(row.outcome)}, {"seconds", row.seconds}};
  if (row.outcome != PairRow::Outcome::Ran) {
    out["reason"] = row.reason, out["at_once"] = row.at_once;
    return out;
  }
  out["ppl"] = row.ppl, out["kld_mean"] = row.kld_mean, out["kld_max"] = row.kld_max,
  out["top1_agree"] = row.top1_agree, out["density_prefill"] = row.density_prefill,
  out["density_kept"] = row.density_kept, out["density_read"] = row.density_read;
  return out;
}

PairRow pair_row(const SampleFile::Json& line) {
  PairRow row;
  row.attention = line.at("attention").get<std::string>();
  row.seconds = line.at("seconds").get<double>();
  const auto outcome = line.at("outcome").get<std::string>();
  for (const auto o : outcomes)
    if (outcome == name(o)) row.outcome = o;
  if (row.outcome != PairRow::Outcome::Ran) {
    row.reason = line.at("reason").get<std::string>(), row.at_once = line.at("at_once").get<bool>();
    return row;
  }
  for (const auto& [field, to] : {std::pair("ppl", &row.ppl),
                                  {"kld_mean", &row.kld_mean},
                                  {"kld_max", &row.kld_max},
                                  {"top1_agree", &row.top1_agree},
                                  {"density_prefill", &row.density_prefill},
                                  {"density_kept", &row.density_kept},
                                  {"density_read", &row.density_read}})
    *to = line.at(field).get<double>();
  return row;
}

const SampleFile::Form& pair_lines() {
  static const SampleFile::Form form = {
      "pair of `heed pairs`", {"model", "backend", "kv", "chunk", "text", "prompt", "scored", "attention"}, is_pair_line};
  return form;
}

PairRunner::PairRunner(std::shared_ptr<const Model> model, const Passage& passage, const SessionOptions& options)
    : model_(std::move(model)), passage_(passage), options_(options),
      held_(std::make_unique<Session>(model_, with(options, "dense"))),
      distributions_(passage.scored(), model_->info().vocabulary) {
  dense_.attention = "dense";
  held_->check_reach(int64_t(passage_.tokens.size()) - 1);  // the last one is only predicted
  Session session(model_, with(options_, "dense"));
  feed(session, dense_, true);
}

PairRow PairRunner::run(const std::string& attention) {
  PairRow row;
  row.attention = attention;
  row.at_once = true;
  const double begin = now();
  try {
    Session session(model_, with(options_, attention));
    row.at_once = false;
    feed(session, row, false);
  } catch (const Error& e) {
    if (e.failure().code == Code::Interrupted) throw;
    row.outcome = e.failure().exit_status() == 2 ? PairRow::Outcome::Refused : PairRow::Outcome::Failed;
    row.reason = e.what();
  } catch (const std::exception& e) {
    row.outcome = PairRow::Outcome::Failed;
    row.reason = e.what();
  }
  row.seconds = now() - begin;
  return row;
}

void PairRunner::feed(Session& session, PairRow& row, bool reference) {
  std::vector<double> losses, kld;
  int64_t same = 0;
  Tensor logits = session.prefill(std::span(passage_.tokens).first(size_t(passage_.prompt)));
  const double entries = double(session.store().entries());
  for (int64_t i = 0; i < passage_.scored(); ++i) {
    const size_t at = size_t(passage_.prompt + i);
    if (i > 0) logits = session.decode(passage_.tokens[at - 1]);
    if (interrupted()) throw Error(Code::Interrupted, "pairs", "stopped");
    const auto scores = logits.select(0, 0).span<const float>();
    // A sum is finite only if every number is, and no 262144 of them are too large for it.
    double sum = 0;
    for (float x : scores) sum += x;
    if (!std::isfinite(sum))
      throw Error(Code::Internal, "pairs", "logits of token " + std::to_string(at) + " are not finite");
    if (reference) distributions_.set(i, scores);
    losses.push_back(nll(scores, passage_.tokens[at]));
    const auto difference = distributions_.against(i, scores);
    kld.push_back(difference.kl), same += difference.same_top;
  }
  const double reads = mean_of_all(session.read_tokens());
  if (reference) entries_ = entries, reads_ = reads;
  row.ppl = std::exp(mean(losses)), row.kld_mean = mean(kld), row.kld_max = *std::max_element(kld.begin(), kld.end());
  row.top1_agree = double(same) / double(kld.size());
  row.density_prefill = mean_of_all(session.density());
  row.density_kept = entries_ > 0 ? entries / entries_ : 1, row.density_read = reads_ > 0 ? reads / reads_ : 1;
}

}  // namespace heed
