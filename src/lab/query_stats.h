// Means and covariances of a model's queries, for expected-attention-stats.
#pragma once
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "attention/spec.h"
#include "model/session.h"

namespace heed {

struct QueryStatsOptions {
  SessionOptions session;
  int64_t length = 2048;  // tokens of a text
  int texts = 100;        // at most; parts of the text that follow one another
  int skip = 4;           // first tokens of each that do not count: their queries are like no others
};

/// Of every query head, layer by layer, before rotary embedding; covariances with the divisor count − 1.
struct QueryStats {
  int64_t count = 0;  // queries of a head
  int texts = 0;
  std::vector<double> mean;        // [layers, h, d]
  std::vector<double> covariance;  // [layers, h, d, d]
};

/// Reads parts of the text under dense attention. progress(share) may be empty. Throws Error(Invalid) when the text has
/// fewer than two tokens that count.
QueryStats learn_query_stats(std::shared_ptr<const Model>, std::span<const int32_t> text, const QueryStatsOptions&,
                             const std::function<void(double)>& progress = {});

/// Writes `arrays` (npz: mean, covariance, model) and returns the profile of the spec that names it; `named` is the file's
/// path seen from the profile. Throws Error(Invalid) when the spec sets what is learnt, Error(Io).
nlohmann::ordered_json query_stats_profile(const Spec&, const ModelInfo&, const QueryStats&, const std::string& arrays,
                                           const std::string& named);

}  // namespace heed
