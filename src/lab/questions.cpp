#include "lab/questions.h"

#include <algorithm>

#include "lab/score.h"

namespace heed {
namespace {

/// The least of: pairs computed in prefill, entries held, entries read by a decoded token; each as a share of what dense
/// attention has.
double density(Session& session) {
  const ModelInfo& m = session.model().info();
  const double length = double(session.tokens().size());
  const double decoding = length - double(std::max<int64_t>(0, session.step() - 1)) / 2;  // keys there were, on average
  double pairs = 0, read = 0;
  const auto computed = session.density(), reads = session.read_tokens();
  for (int l = 0; l < m.layers; ++l)
    for (int head = 0; head < m.h; ++head) {
      const double seen = m.window(l) > 0 ? std::min(decoding, double(m.window(l))) : decoding;
      pairs += computed[size_t(l)][size_t(head)];
      read += std::min(1.0, reads[size_t(l)][size_t(head)] / seen);
    }
  const double heads = double(m.layers) * m.h, held = double(session.store().entries()) / (double(m.layers) * m.g * length);
  return std::min({pairs / heads, read / heads, held, 1.0});
}

}  // namespace

double TaskRow::score() const { return mean(scores); }

TaskRow run_task(std::shared_ptr<const Model> model, const SessionOptions& options, TaskRow row, int64_t count,
                 SampleFile& file, const SampleFile::Json& run, const std::function<Question(int64_t)>& make,
                 const std::function<void(double)>& done) {
  row.chance = row.density = row.tokens = 0;
  double chance = 0, dense = 0, tokens = 0;
  for (int64_t index = 0; index < count && !row.interrupted; ++index) {
    SampleFile::Json key = run;
    key["task"] = row.task, key["query"] = name(row.query), key["length"] = row.length;
    if (row.depth >= 0) key["depth"] = row.depth;
    key["index"] = index;
    SampleFile::Json result;
    if (const auto* old = file.find(key)) {
      result = *old;
    } else {
      if (interrupted()) {
        row.interrupted = true;
        break;
      }
      const Question q = make(index);
      Session session(model, options);
      session.progress([&](int64_t layer, int64_t layers) {
        if (done) done((double(index) + 0.9 * double(layer) / double(layers)) / double(count));
      });
      try {
        const Tensor logits = ask(session, q.context, q.question, row.query);
        const Answer said = answer(session, logits, q.limit, q.one_line);
        result = {{"metric", row.metric},        {"expected", q.expected},
                  {"answer", said.text},         {"score", q.score(said.text)},
                  {"chance", q.chance},          {"tokens", q.context.size() + q.question.size()},
                  {"density", density(session)}, {"prompt", q.prompt}};
      } catch (const Error& e) {
        if (e.failure().code != Code::Interrupted) throw;
        row.interrupted = true;
        break;
      }
      file.add(key, result);
    }
    row.scores.push_back(result["score"].get<double>());
    chance += result["chance"].get<double>(), dense += result["density"].get<double>(),
        tokens += result["tokens"].get<double>();
    if (done) done(double(index + 1) / double(count));
  }
  const double n = std::max(1.0, double(row.scores.size()));
  row.chance = chance / n, row.density = row.scores.empty() ? 1 : dense / n, row.tokens = tokens / n;
  return row;
}

}  // namespace heed
