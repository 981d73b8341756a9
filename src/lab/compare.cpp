#include "lab/compare.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "base/random.h"
#include "lab/compare_rows.h"
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

class Bench {
 public:
  /// `names`: dense and others.
  Bench(std::shared_ptr<const Model> model, const Passage& passage, const CompareOptions& options,
        std::span<const std::string> names)
      : model_(std::move(model)), passage_(passage), options_(options), repetitions_(std::max(1, options.repetitions)) {
    for (const std::string& name : names) {
      bool all = true;
      for (int r = 0; r < repetitions_; ++r) all = all && finished(name, r);
      if (!all) unfinished_.push_back(name);
      baseline_ = baseline_ || !finished(name, 0);
    }
  }

  std::function<void(double)> progress;

  /// Mechanisms of which a run is not in the file.
  const std::vector<std::string>& unfinished() const { return unfinished_; }
  int repetitions() const { return repetitions_; }

  /// A run from the file, or made. Dense comes first; it is made wherever another is that stands against it.
  TimedRow run(const std::string& attention, int repetition) {
    const SampleFile::Json* line = finished(attention, repetition);
    const bool baseline = baseline_ && repetition == 0 && attention == "dense";
    if (line && !baseline) return timed_row(*line);
    TimedRow made = repetition == 0 ? quality(attention) : again(attention);
    if (line) return timed_row(*line);
    if (options_.file) options_.file->add(key(attention, repetition), to_json(made));
    return made;
  }

 private:
  SampleFile::Json key(const std::string& attention, int repetition) const {
    SampleFile::Json out = options_.key;
    out["attention"] = attention, out["repetition"] = repetition;
    if (const std::string files = files_of(attention, model_->info()); !files.empty()) out["files"] = files;
    return out;
  }
  const SampleFile::Json* finished(const std::string& attention, int repetition) const {
    return options_.file ? options_.file->find(key(attention, repetition)) : nullptr;
  }

  /// A run that measures quality, and times; the first one is the baseline.
  TimedRow quality(const std::string& attention) {
    const bool dense = !base_.mass;
    if (dense) {
      const ModelInfo& m = model_->info();
      base_.distributions = std::make_unique<Distributions>(passage_.scored(), m.vocabulary);
      base_.mass = std::make_shared<DenseMass>(m, int64_t(passage_.tokens.size()),
                                               std::max<int64_t>(0, passage_.scored() - 1), options_.probe_layers);
    }
    Session session(model_, with(attention));
    TimedRow out;
    Row& row = out.row;
    row.attention = attention;
    Probe probe(session, base_.mass, dense, passage_.prompt, int64_t(passage_.tokens.size()), options_.details);
    std::vector<double> kld, losses;
    int64_t same = 0;
    walk(session, &probe, out, [&](int64_t i, std::span<const float> logits) {
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
    if (dense) base_.entries = entries, base_.reads = reads, base_.bytes = double(row.kv_bytes);
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
    run_tasks(row);
    return out;
  }

  /// A run for its times alone.
  TimedRow again(const std::string& attention) {
    Session session(model_, with(attention));
    TimedRow out;
    walk(session, nullptr, out, [](int64_t, std::span<const float>) {});
    return out;
  }

  void run_tasks(Row& row) const {
    for (const std::string& task : options_.tasks) {
      NiahOptions niah;
      niah.question_first = task == "niah-aware";
      niah.session = with(row.attention);
      niah.seed = options_.seed;
      row.tasks[task] = heed::niah(model_, std::span(passage_.tokens).subspan(0, size_t(passage_.prompt)), niah);
    }
  }

  SessionOptions with(const std::string& attention) const {
    SessionOptions out = options_.session;
    out.attention = attention;
    return out;
  }

  /// Prefill, then one token at a time; the probe's own time is taken off.
  template <class Visit>
  void walk(Session& session, Probe* probe, TimedRow& run, Visit visit) {
    const double total = double(passage_.tokens.size());
    session.progress([&](int64_t done, int64_t layers) {
      if (progress) progress(double(done) / double(layers) * double(passage_.prompt) / total);
    });
    const auto probed = [&] { return probe ? probe->seconds() : 0.0; };
    Row& row = run.row;
    double begin = now(), watched = probed();
    Tensor logits = session.prefill(std::span(passage_.tokens).subspan(0, size_t(passage_.prompt)));
    run.prefill = now() - begin - (probed() - watched);
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
      run.decode += now() - begin - (probed() - watched);
      visit(i, logits.select(0, 0).span<const float>());
      if (progress) progress(double(passage_.prompt + i) / total);
    }
    row.decode_times = session.times() - behind_prefill;
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
  int repetitions_;
  std::vector<std::string> unfinished_;
  bool baseline_ = false;
  Baseline base_;
  double held_ = 0;
};

/// Says of each mechanism, before any work, what opening a session tells and parsing cannot; then does what a process does
/// once, so that it is not the first mechanism's: with a GPU, scratch for a long prompt halved its rate. Weights stay on a
/// device from one run to the next while the session is there.
std::unique_ptr<Session> warm_up(const std::shared_ptr<const Model>& model, const Passage& passage, SessionOptions with,
                                 const std::vector<std::string>& names) {
  const int64_t fed = int64_t(passage.tokens.size()) - 1;  // the last one is only predicted
  with.attention = "dense";
  auto held = std::make_unique<Session>(model, with);
  held->check_reach(fed);
  for (const std::string& name : names) {
    SessionOptions trial = with;
    trial.attention = name;
    Session(model, trial).check_reach(fed);
  }
  Session first(model, with);
  const int64_t prompt = std::min(passage.prompt, 2 * backend(with.backend, with.device).tile_rows);
  first.prefill(std::span(passage.tokens).first(size_t(prompt)));
  first.decode(passage.tokens[size_t(prompt)]);
  return held;
}

/// Medians over the runs of each row.
void set_rates(const Passage& passage, const std::vector<std::vector<TimedRow>>& runs, std::vector<Row>& rows) {
  for (size_t i = 0; i < rows.size(); ++i) {
    std::vector<double> prefill, decode;
    for (const TimedRow& run : runs[i]) prefill.push_back(run.prefill), decode.push_back(run.decode);
    const double prefilled = std::max(1e-9, quantile(prefill, 0.5)), decoded = std::max(1e-9, quantile(decode, 0.5));
    Row& row = rows[i];
    row.prefill_tps = double(passage.prompt) / prefilled;
    row.decode_tps = passage.scored() > 1 ? double(passage.scored() - 1) / decoded : 0;
    row.seconds = prefilled + (passage.scored() > 1 ? decoded : 0);
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

  Comparison out{.rows = {}, .prompt = passage.prompt, .scored = passage.scored()};
  Bench bench(model, passage, options, names);
  std::vector<std::vector<TimedRow>> runs;  // of each row
  double done = 0;
  std::string current;
  const auto run = [&](const std::string& name, int repetition) {
    current = name;
    return bench.run(name, repetition);
  };
  bench.progress = [&](double share) {
    if (progress) progress((done + share) / (double(names.size()) * bench.repetitions()), current);
  };
  try {
    std::unique_ptr<Session> held;
    if (!bench.unfinished().empty()) held = warm_up(model, passage, options.session, bench.unfinished());
    for (const std::string& name : names) {
      try {
        TimedRow first = run(name, 0);
        out.rows.push_back(std::move(first.row));
        runs.push_back({std::move(first)});
      } catch (const Error& e) {
        if (name == "dense" || e.failure().code == Code::Interrupted) throw;
        out.failed.emplace_back(name, e.what());
      }
      ++done;
    }
    // Further repetitions in an order of their own each time, so that no mechanism always runs on a warmer machine.
    Random random(options.seed);
    for (int r = 1; r < bench.repetitions(); ++r) {
      std::vector<size_t> order(out.rows.size());
      std::iota(order.begin(), order.end(), size_t(0));
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[size_t(random.below(int64_t(i)))]);
      for (size_t i : order) {
        runs[i].push_back(run(out.rows[i].attention, r));
        const Row& last = runs[i].back().row;
        out.rows[i].prefill_times = last.prefill_times, out.rows[i].decode_times = last.decode_times;
        ++done;
      }
    }
  } catch (const Error& e) {
    if (e.failure().code != Code::Interrupted) throw;
    out.interrupted = true;
  }
  set_rates(passage, runs, out.rows);
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
