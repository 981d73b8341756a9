// Mechanisms side by side: what each costs in quality and saves in time and memory, on one text.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lab/niah.h"
#include "lab/probe.h"
#include "lab/samples.h"
#include "model/session.h"

namespace heed {

/// The first `prompt` tokens are prefilled, which is when a mechanism plans and cuts; the others are fed one at a time
/// and scored, the first of them by the prefill's own logits.
struct Passage {
  std::vector<int32_t> tokens;
  int64_t prompt = 0;
  int64_t scored() const { return int64_t(tokens.size()) - prompt; }
};

/// The first `context` tokens of a text, the last `score` of them scored (0: a quarter). Throws Error(Invalid) when the
/// text is too short for that.
Passage passage(std::vector<int32_t> text, int64_t context, int64_t score);

/// One mechanism on the passage. Times are medians over repetitions; everything else is of the first.
struct Row {
  std::string attention;
  double prefill_tps = 0, decode_tps = 0;
  int64_t kv_bytes = 0, peak_bytes = 0;  // held right behind the prefill; most held at any time
  double ppl = 0, kld_mean = 0, kld_p99 = 0, top1_agree = 1;
  double density_prefill = 1;  // share of causal pairs computed
  double density_kept = 1;     // entries held behind the prefill, against dense
  double density_read = 1;     // entries read by a decoded token, against dense
  double kv_share = 1;         // kv_bytes, against dense
  double mass_prefill = 1, mass_decode = 1;
  Times prefill_times, decode_times;  // of the last repetition
  double seconds = 0;                 // of the whole passage, prefill and decode
  std::map<std::string, NiahScore> tasks;

  std::vector<int> probed_layers;                                // that the next two tell of
  std::vector<std::vector<double>> mass_by_head, error_by_head;  // [probed layers][h], as Probe has them

  // For the report.
  std::vector<float> nll, kld;                 // of each scored token
  std::vector<std::vector<int64_t>> kept;      // [layers][g]: entries held behind the prefill
  std::vector<std::vector<float>> kept_where;  // [layers · g][bins]: share kept of each part of the prompt
  std::vector<Map> plans, reads;

  /// The least of the three: what share of dense attention's work or memory is left where it is least.
  double density() const;
};

struct CompareOptions {
  std::vector<std::string> attention;  // dense is put first
  SessionOptions session;
  int repetitions = 1;
  std::vector<std::string> tasks;  // niah, niah-aware
  bool details = false;            // what the report draws
  int probe_layers = 6;            // layers in which attention mass and output error are sampled
  uint64_t seed = 0;               // of the order in which repetitions are timed
  // Every run is added to `file`, if any, as it is finished, and not made again when it is there (compare_lines()). `key`:
  // what runs depend on beside the mechanism and its repetition. Rows of a file have details only if it was made with them.
  SampleFile* file = nullptr;
  SampleFile::Json key;
};

struct Comparison {
  std::vector<Row> rows;
  std::vector<std::pair<std::string, std::string>> failed;  // mechanisms that stopped with an error, and what it said
  int64_t prompt = 0, scored = 0;
  bool interrupted = false;  // rows are those that were finished
};

inline constexpr int kKeptBins = 96;

/// Specs of every mechanism of the registry that a session of this model can open. One that takes a budget, itself or as a
/// wrapper (around SnapKV), stands there once for each budget; the others once, with their defaults. Throws Error for what
/// is no budget.
struct Everything {
  std::vector<std::string> specs;
  std::vector<std::pair<std::string, std::string>> left_out;  // a spec, and why it cannot run
};
Everything every_mechanism(std::shared_ptr<const Model> model, const SessionOptions& options,
                           std::span<const std::string> budgets);

/// `progress(share, name)`. Throws Error for bad specs before any work is done, and when dense itself fails; another
/// mechanism that fails later is told of in `failed`, and the rest go on. Dense is run again where another mechanism is,
/// which stands against it, but its row is the file's, if it is there.
Comparison compare(std::shared_ptr<const Model> model, const Passage& passage, const CompareOptions& options,
                   const std::function<void(double, const std::string&)>& progress = {});

/// Which rows no other row beats: none has at most their cost and at most their perplexity, and less of one of the two.
std::vector<bool> pareto_front(const std::vector<Row>& rows, const std::function<double(const Row&)>& cost);

/// Why a row's quality says little: "density 0.72" (and no fewer bytes) or "4096 tokens"; empty when the mechanism was
/// truly at work.
std::string not_exercised(const Row& row, int64_t tokens);

}  // namespace heed
