#include "lab/query_stats.h"

#include <algorithm>

#include "attention/maps.h"
#include "attention/rotation.h"
#include "attention/scores.h"
#include "lab/calibrate.h"

namespace heed {

QueryStats learn_query_stats(std::shared_ptr<const Model> model, std::span<const int32_t> text,
                             const QueryStatsOptions& options, const std::function<void(double)>& progress) {
  const ModelInfo& m = model->info();
  const size_t d = size_t(m.d), heads = size_t(m.layers) * size_t(m.h);
  QueryStats out;
  out.mean.assign(heads * d, 0.0), out.covariance.assign(heads * d * d, 0.0);
  require(int64_t(text.size()) > options.skip + 1, "calibrate",
          "the text has " + std::to_string(text.size()) + " tokens, of which the first " +
              std::to_string(options.skip) + " do not count",
          "give a longer text");
  const int64_t all = int64_t(text.size()), wanted = std::min(all, options.length * options.texts);
  for (int64_t begin = 0; begin < wanted; begin += options.length) {
    const int64_t length = std::min(options.length, wanted - begin), fresh = length - options.skip;
    if (fresh < 2) break;
    if (interrupted()) throw Error(Code::Interrupted, "calibrate", "stopped");
    SessionOptions how = options.session;
    how.attention = "dense", how.chunk = 0;
    Session session(model, how);
    // Sums about the part's own mean, joined to those so far (Chan et al., 1979): nothing large is subtracted.
    session.tap([&](LayerView& at) {
      const Scratch scope(at.queue.scratch);
      Ragged q = at.q;
      if (const Rope* rope = m.rope(at.layer)) q = turned(at.queue, q, backwards(at.queue, *rope), at.q_pos);
      q = without_first(at.queue, q, options.skip);
      const Buffer mean = at.queue.read_back(mean_rows(at.queue, q).values);
      Ragged apart = q;
      apart.values = at.queue.scratch.take(Dtype::F32, {q.values.size[0], q.values.size[1]});
      at.queue.fill(apart.values, 0);
      const Tensor middle = at.queue.upload(mean);
      compute(at.queue, q, load(q.values, index()) - load(middle, segment() * m.d + channel()), apart.values);
      const Buffer squares = at.queue.read_back(outer_sums(at.queue, apart));
      const double old = double(out.count), joined = old + double(fresh);
      for (size_t h = 0; h < size_t(m.h); ++h) {
        double* mu = &out.mean[(size_t(at.layer) * size_t(m.h) + h) * d];
        double* s = &out.covariance[(size_t(at.layer) * size_t(m.h) + h) * d * d];
        const float *own = mean->as<float>() + h * d, *sums = squares->as<float>() + h * d * d;
        for (size_t a = 0; a < d; ++a)
          for (size_t b = 0; b < d; ++b)
            s[a * d + b] += double(sums[a * d + b]) +
                            (double(own[a]) - mu[a]) * (double(own[b]) - mu[b]) * old * double(fresh) / joined;
        for (size_t a = 0; a < d; ++a) mu[a] += (double(own[a]) - mu[a]) * double(fresh) / joined;
      }
    });
    session.prefill(text.subspan(size_t(begin), size_t(length)), Session::Logits::None);
    out.count += fresh, ++out.texts;
    if (progress) progress(double(begin + length) / double(wanted));
  }
  for (double& x : out.covariance) x /= double(out.count - 1);
  return out;
}

nlohmann::ordered_json query_stats_profile(const Spec& spec, const ModelInfo& m, const QueryStats& learnt,
                                           const std::string& arrays, const std::string& named) {
  Buffer mean(Dtype::F32, {m.layers, m.h, m.d}), covariance(Dtype::F32, {m.layers, m.h, m.d, m.d});
  std::transform(learnt.mean.begin(), learnt.mean.end(), mean->as<float>(), [](double x) { return float(x); });
  std::transform(learnt.covariance.begin(), learnt.covariance.end(), covariance->as<float>(),
                 [](double x) { return float(x); });
  return array_profile(spec, m, "stats", arrays, named, {{"mean", mean}, {"covariance", covariance}},
                       {{"what", "means and covariances of queries"}, {"texts", learnt.texts}, {"queries", learnt.count}});
}

}  // namespace heed
