#include "lab/shapes.h"

#include <algorithm>

namespace heed {
namespace {

struct Shape {
  const char* name;
  int layers, h, g, d, hidden, feed_forward;
  int64_t vocabulary, context;
};

constexpr Shape kShapes[] = {
    {"llama-1b", 16, 32, 8, 64, 2048, 8192, 128256, 131072},
    {"llama-8b", 32, 32, 8, 128, 4096, 14336, 128256, 131072},
    {"llama-70b", 80, 64, 8, 128, 8192, 28672, 128256, 131072},
};

constexpr Dtype kTypes[] = {Dtype::F32,  Dtype::F16,  Dtype::BF16, Dtype::Q4_0,  Dtype::Q4_1,
                            Dtype::Q5_0, Dtype::Q5_1, Dtype::Q8_0, Dtype::Q2_K,  Dtype::Q3_K,
                            Dtype::Q4_K, Dtype::Q5_K, Dtype::Q6_K, Dtype::IQ4_NL};

/// The one of `all` whose name that is.
template <class Range, class Name>
auto& named(const Range& all, const std::string& word, const char* flag, Name name) {
  std::string known;
  for (const auto& one : all) {
    if (name(one) == word) return one;
    known += (known.empty() ? "" : ", ") + std::string(name(one));
  }
  throw Error(Code::NotFound, flag, "there is no '" + word + "'", "there are " + known);
}

}  // namespace

std::shared_ptr<const Model> random_model(const std::string& shape, const std::string& type) {
  const Shape& s = named(kShapes, shape, "--shape", [](const Shape& one) { return std::string(one.name); });
  const Dtype t = named(kTypes, type, "--weights", [](Dtype one) { return std::string(info(one).name); });
  ModelInfo m;
  m.layers = s.layers, m.h = s.h, m.g = s.g, m.d = m.d_v = s.d, m.hidden = s.hidden;
  m.vocabulary = s.vocabulary, m.context = s.context;
  return Model::random(m, s.feed_forward, t, 1, shape + " " + type + ", random");
}

}  // namespace heed
