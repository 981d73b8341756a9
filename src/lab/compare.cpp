#include "lab/compare.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "base/random.h"
#include "lab/progress.h"
#include "lab/score.h"
#include "mechanisms/registry.h"

namespace heed {
namespace {

/// What dense measured, against which the others stand.
struct Baseline {
  std::shared_ptr<DenseMass> mass;
  std::unique_ptr<Distributions> distributions;
  double entries = 0, reads = 0, bytes = 0;
};

struct Timing {
  double prefill = 0, decode = 0;
};

class Bench {
 public:
  Bench(std::shared_ptr<const Model> model, const Passage& passage, const CompareOptions& options)
      : model_(std::move(model)), passage_(passage), options_(options) {
    const ModelInfo& m = model_->info();
    const int64_t decoded = std::max<int64_t>(0, passage_.scored() - 1);
    base_.mass = std::make_shared<DenseMass>(m, int64_t(passage_.tokens.size()), decoded, options_.probe_layers);
    base_.distributions = std::make_unique<Distributions>(passage_.scored(), m.vocabulary);
  }

  std::function<void(double)> progress;

  /// A run that measures quality, and times; the first call is the baseline.
  Row quality(const std::string& attention, Timing& timing) {
    const bool dense = !measured_;
    Session session(model_, with(attention));
    Row row;
    row.attention = attention;
    Probe probe(session, base_.mass, dense, passage_.prompt, int64_t(passage_.tokens.size()), options_.details);
    std::vector<double> kld, losses;
    int64_t same = 0;
    timing = walk(session, &probe, row, [&](int64_t i, std::span<const float> logits) {
      losses.push_back(nll(logits, passage_.tokens[size_t(passage_.prompt + i)]));
      if (dense) base_.distributions->set(i, logits);
      const auto difference = base_.distributions->against(i, logits);
      kld.push_back(difference.kl);
      same += difference.same_top;
    });
    row.ppl = std::exp(mean(losses));
    row.kld_mean = mean(kld), row.kld_p99 = quantile(kld, 0.99);
    row.top1_agree = double(same) / double(std::max<size_t>(1, kld.size()));
    row.density_prefill = mean_of_all(session.density());
    const double entries = held_, reads = mean_of_all(session.read_tokens());
    if (dense) base_.entries = entries, base_.reads = reads, base_.bytes = double(row.kv_bytes), measured_ = true;
    row.kv_share = base_.bytes > 0 ? double(row.kv_bytes) / base_.bytes : 1;
    row.density_kept = base_.entries > 0 ? entries / base_.entries : 1;
    row.density_read = base_.reads > 0 ? reads / base_.reads : 1;
    row.mass_prefill = probe.prefill_mass();
    row.mass_decode = probe.decode_mass();
    row.peak_bytes = std::max({probe.peak_bytes(), row.kv_bytes, session.kv_bytes()});
    row.plans = probe.plans(), row.reads = probe.reads();
    row.nll.assign(losses.begin(), losses.end());
    row.kld.assign(kld.begin(), kld.end());
    row.probed_layers = base_.mass->layers();
    row.mass_by_head = probe.mass_by_head(), row.error_by_head = probe.error_by_head();
    return row;
  }

  /// A run for its times alone.
  Timing again(const std::string& attention, Row& row) {
    Session session(model_, with(attention));
    Row times;
    const Timing timing = walk(session, nullptr, times, [](int64_t, std::span<const float>) {});
    row.prefill_times = times.prefill_times, row.decode_times = times.decode_times;
    return timing;
  }

 private:
  SessionOptions with(const std::string& attention) const {
    SessionOptions out = options_.session;
    out.attention = attention;
    return out;
  }

  /// Prefill, then one token at a time; the probe's own time is taken off.
  template <class Visit>
  Timing walk(Session& session, Probe* probe, Row& row, Visit visit) {
    const double total = double(passage_.tokens.size());
    session.progress([&](int64_t done, int64_t layers) {
      if (progress) progress(double(done) / double(layers) * double(passage_.prompt) / total);
    });
    const auto probed = [&] { return probe ? probe->seconds() : 0.0; };
    Timing timing;
    double begin = now(), watched = probed();
    Tensor logits = session.prefill(std::span(passage_.tokens).subspan(0, size_t(passage_.prompt)));
    timing.prefill = now() - begin - (probed() - watched);
    const Times behind_prefill = session.times();
    row.prefill_times = behind_prefill;
    row.kv_bytes = session.kv_bytes();
    held_ = double(session.store().entries());
    if (probe && options_.details) describe(session, row);
    visit(0, logits.select(0, 0).span<const float>());
    for (int64_t i = 1; i < passage_.scored(); ++i) {
      if (interrupted()) throw Error(Code::Interrupted, "compare", "stopped");
      if (probe) probe->before(i - 1);
      begin = now(), watched = probed();
      logits = session.decode(passage_.tokens[size_t(passage_.prompt + i - 1)]);
      timing.decode += now() - begin - (probed() - watched);
      visit(i, logits.select(0, 0).span<const float>());
      if (progress) progress(double(passage_.prompt + i) / total);
    }
    row.decode_times = session.times() - behind_prefill;
    return timing;
  }

  void describe(Session& session, Row& row) {
    const ModelInfo& m = model_->info();
    for (int l = 0; l < m.layers; ++l) {
      std::vector<int64_t>& counts = row.kept.emplace_back();
      for (int64_t head = 0; head < m.g; ++head) {
        const std::vector<int32_t> positions = session.origins(l, head);
        counts.push_back(int64_t(positions.size()));
        std::vector<float>& where = row.kept_where.emplace_back(size_t(kKeptBins), 0.0f);
        const auto bin = [&](int64_t position) { return position * kKeptBins / passage_.prompt; };
        std::vector<float> size(size_t(kKeptBins), 0.0f);
        for (int64_t p = 0; p < passage_.prompt; ++p) size[size_t(bin(p))] += 1;
        for (int32_t p : positions) where[size_t(bin(p))] += 1 / size[size_t(bin(p))];
      }
    }
  }

  std::shared_ptr<const Model> model_;
  const Passage& passage_;
  const CompareOptions& options_;
  Baseline base_;
  bool measured_ = false;
  double held_ = 0;
};

void run_tasks(std::shared_ptr<const Model> model, const Passage& passage, const CompareOptions& options, Row& row) {
  for (const std::string& task : options.tasks) {
    NiahOptions niah;
    niah.question_first = task == "niah-aware";
    niah.session = options.session;
    niah.session.attention = row.attention;
    niah.seed = options.seed;
    row.tasks[task] = heed::niah(model, std::span(passage.tokens).subspan(0, size_t(passage.prompt)), niah);
  }
}

}  // namespace

double Row::density() const { return std::min({density_prefill, density_kept, density_read}); }

Passage passage(std::vector<int32_t> text, int64_t context, int64_t score) {
  require(text.size() >= 8, "text", "it has " + std::to_string(text.size()) + " tokens, too few to compare on",
          "give at least 8");
  require(context >= 8, "-c", std::to_string(context) + " tokens are too few to compare on", "give at least 8");
  require(int64_t(text.size()) >= context, "text",
          "it has " + std::to_string(text.size()) + " tokens, fewer than -c " + std::to_string(context),
          "give a longer text, or -c " + std::to_string(text.size()));
  if (score == 0) score = std::max<int64_t>(1, context / 4);
  require(score >= 1 && score < context, "--score", std::to_string(score) + " of " + std::to_string(context) + " tokens",
          "at least one must be left for the prompt");
  text.resize(size_t(context));
  return {std::move(text), context - score};
}

Comparison compare(std::shared_ptr<const Model> model, const Passage& passage, const CompareOptions& options,
                   const std::function<void(double, const std::string&)>& progress) {
  std::vector<std::string> names = {"dense"};
  for (const std::string& name : options.attention)
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  for (const std::string& name : names) value_or_throw(Composition::parse(name, model->info(), registry()));
  SessionOptions trial = options.session;
  trial.attention = "dense";
  const int64_t fed = int64_t(passage.tokens.size()) - 1;  // the last one is only predicted
  Session held(model, trial);                              // weights stay on a device from one run to the next
  held.check_reach(fed);
  {
    // What a process does once is not the first mechanism's: with a GPU, scratch for a long prompt halved its rate.
    Session first(model, trial);
    const int64_t prompt = std::min(passage.prompt, 2 * backend(trial.backend, trial.device).tile_rows);
    first.prefill(std::span(passage.tokens).first(size_t(prompt)));
    first.decode(passage.tokens[size_t(prompt)]);
  }
  for (const std::string& name : names) {
    // Opening a session says what parsing cannot: a mechanism that needs more than a model gives.
    trial.attention = name;
    Session(model, trial).check_reach(fed);
  }

  Comparison out{.rows = {}, .prompt = passage.prompt, .scored = passage.scored()};
  Bench bench(model, passage, options);
  std::vector<std::vector<Timing>> timings;  // of each row
  const double runs = double(names.size()) * std::max(1, options.repetitions);
  double done = 0;
  std::string current;
  bench.progress = [&](double share) {
    if (progress) progress((done + share) / runs, current);
  };
  try {
    for (size_t i = 0; i < names.size(); ++i) {
      current = names[i];
      Timing timing;
      try {
        Row row = bench.quality(names[i], timing);
        run_tasks(model, passage, options, row);
        out.rows.push_back(std::move(row));
        timings.push_back({timing});
      } catch (const Error& e) {
        if (i == 0 || e.failure().code == Code::Interrupted) throw;
        out.failed.emplace_back(names[i], e.what());
      }
      ++done;
    }
    // Further repetitions in an order of their own each time, so that no mechanism always runs on a warmer machine.
    Random random(options.seed);
    for (int r = 1; r < options.repetitions; ++r) {
      std::vector<size_t> order(out.rows.size());
      std::iota(order.begin(), order.end(), size_t(0));
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[size_t(random.below(int64_t(i)))]);
      for (size_t i : order) {
        current = out.rows[i].attention;
        timings[i].push_back(bench.again(current, out.rows[i]));
        ++done;
      }
    }
  } catch (const Error& e) {
    if (e.failure().code != Code::Interrupted) throw;
    out.interrupted = true;
  }
  for (size_t i = 0; i < out.rows.size(); ++i) {
    std::vector<double> prefill, decode;
    for (const Timing& t : timings[i]) prefill.push_back(t.prefill), decode.push_back(t.decode);
    Row& row = out.rows[i];
    const double prefilled = std::max(1e-9, quantile(prefill, 0.5)), decoded = std::max(1e-9, quantile(decode, 0.5));
    row.prefill_tps = double(passage.prompt) / prefilled;
    row.decode_tps = passage.scored() > 1 ? double(passage.scored() - 1) / decoded : 0;
    row.seconds = prefilled + (passage.scored() > 1 ? decoded : 0);
  }
  return out;
}

Everything every_mechanism(std::shared_ptr<const Model> model, const SessionOptions& options,
                           std::span<const std::string> budgets) {
  for (const std::string& budget : budgets) value_or_throw(Budget::parse_kept(budget));
  Everything out;
  const auto offer = [&](const std::string& spec) {
    try {
      SessionOptions trial = options;
      trial.attention = spec;
      Session session(model, trial);
      out.specs.push_back(spec);
    } catch (const Error& e) { out.left_out.emplace_back(spec, e.what()); }
  };
  for (const Entry& e : registry()) {
    if (e.kind != "mechanism") continue;
    const bool budgeted = std::any_of(e.params.begin(), e.params.end(),
                                      [](const ParamInfo& p) { return p.name == std::string("budget"); });
    if (!e.wrapper && !budgeted) {
      offer(e.name);
      continue;
    }
    for (const std::string& budget : budgets)
      offer(e.wrapper ? e.name + "(snapkv(budget=" + budget + "))" : e.name + "(budget=" + budget + ")");
  }
  return out;
}

std::vector<bool> pareto_front(const std::vector<Row>& rows, const std::function<double(const Row&)>& cost) {
  std::vector<bool> out;
  for (const Row& row : rows)
    out.push_back(std::none_of(rows.begin(), rows.end(), [&](const Row& other) {
      return cost(other) <= cost(row) && other.ppl <= row.ppl && (cost(other) < cost(row) || other.ppl < row.ppl);
    }));
  return out;
}

std::string not_exercised(const Row& row, int64_t tokens) {
  if (row.attention == "dense") return {};
  // A cache in fewer bits reads every pair and is at work all the same.
  if (std::min(row.density(), row.kv_share) > 0.5) {
    char text[32];
    std::snprintf(text, sizeof text, "density %.2f", row.density());
    return text;
  }
  if (tokens < 8192) return std::to_string(tokens) + " tokens";
  return {};
}

}  // namespace heed
