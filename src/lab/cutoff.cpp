#include "lab/cutoff.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "attention/scores.h"
#include "base/hash.h"
#include "lab/heads.h"

namespace heed {
namespace {

/// What has been seen behind one piece of one prompt: the mean output of every head, [layers · h · d_v].
struct Look {
  std::vector<float> means;
  int enough = 0;
  int prompt = 0;
};

std::vector<Look> looks(std::shared_ptr<const Model> model, std::span<const RetrievalPrompt> prompts,
                        const CutoffOptions& options, const std::function<void(double)>& progress) {
  const ModelInfo& m = model->info();
  const size_t width = size_t(m.h) * size_t(m.d_v);
  std::vector<Look> out;
  for (size_t number = 0; number < prompts.size(); ++number) {
    const RetrievalPrompt& p = prompts[number];
    const int64_t length = int64_t(p.tokens.size());
    const int64_t step = std::max<int64_t>(1, int64_t(std::ceil(options.piece * double(length))));
    SessionOptions how = options.session;
    how.attention = "dense";
    Session session(model, how);
    std::vector<double> sums(size_t(m.layers) * width, 0.0);
    session.tap([&](LayerView& at) {
      Ragged rows = at.q;
      rows.values = at.out;
      const Buffer mean = at.queue.read_back(mean_rows(at.queue, rows).values);
      for (size_t c = 0; c < width; ++c)
        sums[size_t(at.layer) * width + c] += double(mean->as<float>()[c]) * double(at.rows[0]);
    });
    for (int64_t begin = 0; begin + step < length; begin += step) {
      if (interrupted()) throw Error(Code::Interrupted, "calibrate", "stopped");
      session.prefill(std::span(p.tokens).subspan(size_t(begin), size_t(step)), Session::Logits::None);
      Look& look = out.emplace_back();
      for (double x : sums) look.means.push_back(float(x / double(begin + step)));
      look.enough = p.end <= begin + step, look.prompt = int(number);
    }
    if (progress) progress(double(number + 1) / double(prompts.size()));
  }
  return out;
}

/// The means of some heads, side by side.
std::vector<double> of_heads(const Look& look, std::span<const int> heads, int64_t d_v) {
  std::vector<double> out;
  for (int head : heads) out.insert(out.end(), look.means.begin() + head * d_v, look.means.begin() + (head + 1) * d_v);
  return out;
}

struct Examples {
  std::vector<std::vector<double>> x;
  std::vector<int> labels;
};

double f1_on(const Logistic& probe, const Examples& examples) {
  std::vector<int> said;
  for (const auto& x : examples.x) said.push_back(probe.probability(x) >= 0.5);
  return f1(said, examples.labels);
}

std::string list(std::span<const double> values) {
  std::string out = "[";
  for (double x : values) {
    char text[32];
    std::snprintf(text, sizeof text, "%s%.6g", out.size() > 1 ? "," : "", x);
    out += text;
  }
  return out + "]";
}

}  // namespace

double Logistic::probability(std::span<const double> x) const {
  return 1 / (1 + std::exp(-(std::inner_product(x.begin(), x.end(), weights.begin(), bias))));
}

Logistic fit_logistic(std::span<const std::vector<double>> x, std::span<const int> labels, double ridge, int rounds) {
  require(!x.empty() && x.size() == labels.size(), "logistic regression", "a label for each row is needed");
  const size_t rows = x.size(), width = x[0].size();
  Logistic out;
  std::vector<double>& weights = out.weights;
  double& bias = out.bias;
  weights.assign(width, 0.0);
  std::vector<double> mean(width, 0.0), deviation(width, 0.0), slope(width);
  for (const auto& row : x)
    for (size_t c = 0; c < width; ++c) mean[c] += row[c] / double(rows);
  for (const auto& row : x)
    for (size_t c = 0; c < width; ++c) deviation[c] += (row[c] - mean[c]) * (row[c] - mean[c]) / double(rows);
  for (size_t c = 0; c < width; ++c) {
    deviation[c] = std::sqrt(deviation[c]);
    if (deviation[c] < 1e-9 * std::abs(mean[c])) deviation[c] = 0;  // rounding of the mean alone
  }
  std::vector<std::vector<double>> z(rows, std::vector<double>(width, 0.0));
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < width; ++c) z[r][c] = deviation[c] > 0 ? (x[r][c] - mean[c]) / deviation[c] : 0;
  const double ones = double(std::accumulate(labels.begin(), labels.end(), 0));
  const double weight[2] = {ones < double(rows) ? 0.5 / (double(rows) - ones) : 0, ones > 0 ? 0.5 / ones : 0};
  // The steepest the gradient can become, with columns of unit variance: the mean squared length of a row over 4.
  const double rate = 1 / (ridge + (1 + double(width)) / 4);
  for (int round = 0; round < rounds; ++round) {
    std::fill(slope.begin(), slope.end(), 0.0);
    double bias_slope = 0;
    for (size_t r = 0; r < rows; ++r) {
      const double p = 1 / (1 + std::exp(-std::inner_product(z[r].begin(), z[r].end(), weights.begin(), bias)));
      const double off = (p - labels[r]) * weight[labels[r]];
      for (size_t c = 0; c < width; ++c) slope[c] += off * z[r][c];
      bias_slope += off;
    }
    for (size_t c = 0; c < width; ++c) weights[c] -= rate * (slope[c] + ridge * weights[c]);
    bias -= rate * bias_slope;
  }
  for (size_t c = 0; c < width; ++c) {
    weights[c] = deviation[c] > 0 ? weights[c] / deviation[c] : 0;
    bias -= weights[c] * mean[c];
  }
  return out;
}

double f1(std::span<const int> said, std::span<const int> labels) {
  double hits = 0, wrong = 0;
  for (size_t i = 0; i < said.size(); ++i) hits += said[i] && labels[i], wrong += said[i] != labels[i];
  return hits > 0 ? 2 * hits / (2 * hits + wrong) : 0;
}

CutoffProbe learn_cutoff(std::shared_ptr<const Model> model, std::span<const int32_t> text,
                         const CutoffOptions& options, const std::function<void(double)>& progress) {
  const Tokenizer* words = model->tokenizer();
  require(words != nullptr, "calibrate", "this file has no tokenizer, and what is planted is text");
  require(options.prompts >= 8, "--prompts", std::to_string(options.prompts) + " are too few to learn from",
          "give at least 8");
  const ModelInfo& m = model->info();
  require(options.heads >= 1 && options.heads <= m.layers * m.h, "calibrate",
          "a probe looks at 1…" + std::to_string(m.layers * m.h) + " heads");
  const auto seen = looks(model, retrieval_prompts(*words, text, options.length, options.prompts, options.seed),
                          options, progress);
  // Depths ascend with the prompt's number: every fourth one is alike.
  const auto examples = [&](std::span<const int> heads, int first, int last) {
    Examples out;
    for (const Look& look : seen)
      if (look.prompt % 4 >= first && look.prompt % 4 < last)
        out.x.push_back(of_heads(look, heads, m.d_v)), out.labels.push_back(look.enough);
    return out;
  };
  std::vector<std::pair<double, int>> ranked;
  for (int head = 0; head < m.layers * m.h; ++head) {
    const Examples teach = examples({&head, 1}, 0, 2);
    ranked.emplace_back(f1_on(fit_logistic(teach.x, teach.labels), examples({&head, 1}, 2, 3)), head);
  }
  std::stable_sort(ranked.begin(), ranked.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  CutoffProbe out;
  for (int i = 0; i < options.heads; ++i) out.heads.push_back(ranked[size_t(i)].second);
  std::sort(out.heads.begin(), out.heads.end());
  const Examples teach = examples(out.heads, 0, 2), test = examples(out.heads, 3, 4);
  out.probe = fit_logistic(teach.x, teach.labels);
  out.f1 = f1_on(out.probe, test);
  out.f1_always = f1(std::vector<int>(test.labels.size(), 1), test.labels);
  return out;
}

nlohmann::ordered_json cutoff_profile(const Spec& spec, const ModelInfo& m, const CutoffProbe& learnt) {
  Spec with = spec;
  for (const Spec::Setting& s : spec.settings)
    for (const char* key : {"probes", "weights", "bias"})
      require(s.key != key, "calibrate",
              spec.name + " is given " + std::string(key) + "=, which a calibration is to find",
              "leave it out, or write the profile by hand");
  with.settings.push_back({"probes", list(std::vector<double>(learnt.heads.begin(), learnt.heads.end())), spec.at});
  with.settings.push_back({"weights", list(learnt.probe.weights), spec.at});
  with.settings.push_back({"bias", list({&learnt.probe.bias, 1}), spec.at});
  with.settings.back().value = with.settings.back().value.substr(1, with.settings.back().value.size() - 2);
  return {
      {"attention", with.text()},
      {"model", hexadecimal(m.hash)},
      {"learnt", {{"what", "when enough of a prompt has been read"}, {"f1", learnt.f1}, {"f1_always", learnt.f1_always}}}};
}

}  // namespace heed
