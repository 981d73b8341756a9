#include "lab/calibrate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/hash.h"
#include "base/npy.h"

namespace heed {
namespace {

using Json = nlohmann::ordered_json;

/// The largest of what the query heads of a KV head (layer · g + head) are.
template <class Value>
double largest_of_group(const ModelInfo& m, int kv, Value&& value) {
  double out = -kInfinity;
  for (int i = 0; i < m.group(); ++i) out = std::max(out, value(kv / m.g, kv % m.g * m.group() + i));
  return out;
}

double retrieval(const ModelInfo& m, const HeadStudy& study, int kv) {
  if (study.retrieval.counted == 0) return 0;
  return largest_of_group(m, kv, [&](int layer, int head) { return study.retrieval.at(layer, head); });
}

double far(const ModelInfo& m, const HeadStudy& study, int kv) {
  return largest_of_group(m, kv, [&](int layer, int head) {
    const HeadView& view = study.views[size_t(layer)][size_t(head)];
    return std::max(0.0, 1 - view.sink - view.local);
  });
}

std::string list(const std::vector<std::string>& items) {
  std::string out;
  for (const std::string& item : items) out += (out.empty() ? "[" : ",") + item;
  return out + "]";
}

std::string short_number(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", x);
  return text;
}

}  // namespace

std::vector<Calibrated> calibrated_mechanisms() {
  return {{"duo-attention", "heads", 0.5, "the heads that stream: all but those that retrieve"},
          {"razor-attention", "heads", 0.15, "the heads that are cut: all but those that retrieve"},
          {"headkv", "scores", 1, "a score for each KV head"},
          {"lychee-decode", "retrieval", 0.25, "the heads that retrieve"},
          {"context-cutoff", "probes", 0, "a probe that tells when enough has been read"},
          {"expected-attention-stats", "stats", 0,
           "means and covariances of queries, in a file of arrays beside the profile"},
          {"kvquant", "book", 0, "code books of each layer's keys and values, in a file of arrays beside the profile"}};
}

Result<Calibrated> find_calibrated(const std::string& name) {
  std::string known;
  for (const Calibrated& c : calibrated_mechanisms()) {
    if (c.name == name) return c;
    known += (known.empty() ? "" : ", ") + std::string(c.name);
  }
  return fail(Code::NotFound, "calibrate", "'" + name + "' has nothing that a calibration could find", "there are " + known);
}

std::vector<int> by_retrieval(const ModelInfo& m, const HeadStudy& study) {
  std::vector<int> order(size_t(m.layers) * size_t(m.g));
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](int kv) { return m.window(kv / m.g) > 0; });
  const auto key = [&](int kv) { return std::pair(retrieval(m, study, kv), far(m, study, kv)); };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) > key(b); });
  return order;
}

Json calibrate(const Spec& spec, const ModelInfo& m, const HeadStudy& study, double share) {
  const Calibrated what = value_or_throw(find_calibrated(spec.name));
  for (const Spec::Setting& s : spec.settings)
    for (const char* key : {what.parameter, "layers", "heads"})
      require(s.key != key, "calibrate",
              spec.name + " is given " + std::string(key) + "=, which a calibration is to find",
              "leave it out, or write the profile by hand");
  std::vector<int> order = by_retrieval(m, study);
  order.resize(size_t(std::ceil(share * double(order.size()))));
  std::sort(order.begin(), order.end());
  const auto retrieves = [&](int kv) { return std::binary_search(order.begin(), order.end(), kv); };

  Json attention;
  const std::string parameter = what.parameter;
  if (parameter == "heads") {
    attention = Json::array();
    for (int l = 0; l < m.layers; ++l) {
      Json heads = Json::array();
      for (int kv = 0; kv < m.g; ++kv)
        if (m.window(l) == 0 && !retrieves(l * m.g + kv)) heads.push_back(kv);
      if (!heads.empty()) attention.push_back({{"spec", spec.text()}, {"layers", l}, {"heads", heads}});
    }
  } else {
    std::vector<std::string> items;
    if (parameter == "scores")
      for (int kv = 0; kv < m.layers * m.g; ++kv)
        items.push_back(short_number(study.retrieval.counted ? retrieval(m, study, kv) : far(m, study, kv)));
    else
      for (int kv : order) items.push_back(std::to_string(kv));
    Spec with = spec;
    if (!items.empty()) with.settings.push_back({parameter, list(items), spec.at});
    attention = with.text();
  }
  return {
      {"attention", attention},
      {"model", hexadecimal(m.hash)},
      {"learnt",
       {{"what", what.learns}, {"share", share}, {"needles_found", study.retrieval.counted}, {"architecture", m.architecture}}}};
}

Json array_profile(const Spec& spec, const ModelInfo& m, const char* parameter, const std::string& arrays,
                   const std::string& named, std::vector<std::pair<std::string, Tensor>> given, Json learnt) {
  for (const Spec::Setting& s : spec.settings)
    require(s.key != parameter, "calibrate",
            spec.name + " is given " + std::string(parameter) + "=, which a calibration is to find", "leave it out");
  require(named.find_first_of(",()[]+") == std::string::npos, "-o",
          "'" + named + "' has characters that end a value of a spec", "choose another name");
  Buffer hash(Dtype::U64, {1});
  *hash->as<uint64_t>() = m.hash;
  given.emplace_back("model", hash);
  value_or_throw(write_npz(arrays, given));
  Spec with = spec;
  with.settings.push_back({parameter, "@" + named, spec.at});
  learnt["arrays"] = named, learnt["architecture"] = m.architecture;
  return {{"attention", with.text()}, {"model", hexadecimal(m.hash)}, {"learnt", learnt}};
}

}  // namespace heed
