// What a mechanism must be told of a model's heads, learnt from a text and kept as a profile (attention/spec.h).
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "attention/spec.h"
#include "lab/heads.h"

namespace heed {

/// A mechanism that calibrate() can make a profile for.
struct Calibrated {
  const char* name;
  const char* parameter;  // what is found; "heads": the KV heads, layer by layer, to which the mechanism applies
  double share;  // of the KV heads that retrieve, unless the user says otherwise; 0: other than from a HeadStudy
  const char* learns;
};
std::vector<Calibrated> calibrated_mechanisms();
/// By name; NotFound tells the names there are.
Result<Calibrated> find_calibrated(const std::string& name);

/// KV heads, layer · g + head, from the one that retrieves most. A group retrieves as much as the most of its query heads
/// does (RazorAttention, section 3.3); among equals the one goes first that looks most at what is neither sink nor near.
std::vector<int> by_retrieval(const ModelInfo&, const HeadStudy&);

/// {"attention": …, "model": its hash, "learnt": …}: the spec with what was found. `share` (0 … 1) of all KV heads retrieve,
/// rounded up; layers with a sliding window are no part of it. Throws Error(Invalid) when the spec sets what is to be found.
nlohmann::ordered_json calibrate(const Spec& spec, const ModelInfo&, const HeadStudy&, double share);

/// Writes `arrays` (npz: what is given, and the model's hash as `model`) and returns the profile of the spec whose `parameter`
/// names it; `named` is the file's path seen from the profile. `learnt` is told with it. Throws Error(Invalid) when the spec sets
/// the parameter, Error(Io).
nlohmann::ordered_json array_profile(const Spec& spec, const ModelInfo&, const char* parameter,
                                     const std::string& arrays, const std::string& named,
                                     std::vector<std::pair<std::string, Tensor>> given, nlohmann::ordered_json learnt);

}  // namespace heed
