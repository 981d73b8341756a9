// Mechanisms two at a time: does each planner work with each keep policy and each reader, and those with each other?
#pragma once
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "lab/compare.h"
#include "lab/samples.h"
#include "lab/score.h"

namespace heed {

/// "a+b" out of `specs`: each planner with each keep policy, each planner with each reader, each keep policy with each
/// reader. One that plays two roles stands on both sides; what cannot be parsed is left out.
std::vector<std::string> pairs_of(const ModelInfo& model, std::span<const std::string> specs);

/// The setting of every mechanism at which it equals dense attention (Entry::identity).
std::vector<std::string> identities();

/// Every n-th of the pairs in an order that is drawn, the same in each process: part 0 … parts − 1. What a run has done
/// when it is stopped is then a sample of all.
std::vector<std::string> part_of(std::vector<std::string> pairs, int part, int parts);

struct PairRow {
  enum class Outcome : uint8_t {
    Ran,      // every logit was finite
    Refused,  // bad input (Failure::exit_status() is 2)
    Failed    // any other error, or logits that are not finite
  };
  std::string attention;
  Outcome outcome = Outcome::Ran;
  std::string reason;                                              // of what did not run
  bool at_once = false;                                            // it was refused before any token was fed
  double ppl = 0, kld_mean = 0, kld_max = 0, top1_agree = 0;       // against dense, over the scored tokens
  double density_prefill = 1, density_kept = 1, density_read = 1;  // as in Row
  double seconds = 0;
};
const char* name(PairRow::Outcome outcome);

/// As lines of a SampleFile; pair_row throws what nlohmann::json does.
SampleFile::Json to_json(const PairRow& row);
PairRow pair_row(const SampleFile::Json& line);
const SampleFile::Form& pair_lines();

/// Runs specs on one passage, the weights held from one to the next and nothing measured inside a step, so that decode
/// steps are recorded where they are in use.
class PairRunner {
 public:
  /// Runs dense. Throws Error when that fails. `passage` stays the caller's.
  PairRunner(std::shared_ptr<const Model> model, const Passage& passage, const SessionOptions& options);
  /// Throws Error(Interrupted) alone.
  PairRow run(const std::string& attention);
  const PairRow& dense() const { return dense_; }

 private:
  void feed(Session& session, PairRow& row, bool reference);

  std::shared_ptr<const Model> model_;
  const Passage& passage_;
  SessionOptions options_;
  std::unique_ptr<Session> held_;
  Distributions distributions_;
  double entries_ = 0, reads_ = 0;
  PairRow dense_;
};

}  // namespace heed
