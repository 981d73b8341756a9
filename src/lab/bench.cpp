#include "lab/bench.h"

#include <algorithm>
#include <cmath>

#include "base/random.h"
#include "lab/progress.h"
#include "lab/score.h"

namespace heed {
namespace {

double deviation(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  const double centre = mean(values);
  double sum = 0;
  for (double x : values) sum += (x - centre) * (x - centre);
  return std::sqrt(sum / double(values.size() - 1));
}

std::vector<int32_t> random_tokens(Random& random, int64_t count, int64_t vocabulary) {
  std::vector<int32_t> out(static_cast<size_t>(count));
  for (int32_t& token : out) token = int32_t(random.below(vocabulary));
  return out;
}

constexpr int kUntimed = 2;  // tokens that come before those that are timed

}  // namespace

double BenchResult::mean_ns() const { return 1e9 * mean(seconds); }
double BenchResult::deviation_ns() const { return 1e9 * deviation(seconds); }
double BenchResult::mean_ts() const { return mean(rates()); }
double BenchResult::deviation_ts() const { return deviation(rates()); }

std::vector<double> BenchResult::rates() const {
  std::vector<double> out;
  for (double s : seconds) out.push_back(double(test.prompt + test.generate) / s);
  return out;
}

BenchResult bench(std::shared_ptr<const Model> model, const SessionOptions& options, const BenchTest& test,
                  int repetitions, uint64_t seed) {
  const int64_t vocabulary = model->info().vocabulary;
  Random random(seed);
  Session start(model, options);
  start.check_reach(test.depth + std::max(test.prompt, test.generate));
  if (test.depth > 0) start.prefill(random_tokens(random, test.depth, vocabulary), Session::Logits::None);
  BenchResult result{.test = test, .seconds = {}, .times = {}};
  const auto over_heads = [](const std::vector<std::vector<double>>& layers) {
    std::vector<double> all;
    for (const std::vector<double>& layer : layers) all.insert(all.end(), layer.begin(), layer.end());
    return mean(all);
  };
  for (int r = -1; r < repetitions; ++r) {
    if (interrupted()) throw Error(Code::Interrupted, "bench", "stopped");
    const std::vector<int32_t> prompt = random_tokens(random, test.prompt, vocabulary);
    const std::vector<int32_t> generated = random_tokens(random, test.generate, vocabulary);
    const std::unique_ptr<Session> session = start.fork();
    // A fork's first token copies pages and, where steps are recorded, the second one is made into a recording.
    const bool fits = start.reach() == 0 || test.depth + test.generate + kUntimed <= start.reach();
    for (int i = 0; i < kUntimed && fits && prompt.empty() && !generated.empty(); ++i) session->decode(generated[0]);
    const Times untimed = session->times();
    const double begin = now();
    if (!prompt.empty()) session->prefill(prompt);
    for (int32_t token : generated) {
      session->decode(token);
      if (r < 0) break;  // one token warms everything up
      if (interrupted()) throw Error(Code::Interrupted, "bench", "stopped");
    }
    if (r < 0) continue;
    result.seconds.push_back(now() - begin);
    result.times = session->times() - untimed;
    result.density = over_heads(session->density());
    if (test.generate > 0) result.keys_read = over_heads(session->read_tokens());
  }
  return result;
}

}  // namespace heed
