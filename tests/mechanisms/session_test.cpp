// Every mechanism inside sessions: its identity is dense in all phases, and small budgets run on what nobody tuned for.
#include "model/session.h"
#include "harness.h"
#include "mechanisms/registry.h"

namespace heed::test {
namespace {

std::shared_ptr<const Model> tiny(int h, int g) {
  ModelInfo shape;
  shape.layers = 4, shape.h = h, shape.g = g, shape.d = shape.d_v = 16, shape.hidden = 48, shape.vocabulary = 61;
  shape.windows = {0, 24, 0, 0};
  return Model::random(shape, 64, Dtype::F32, 5);
}

/// Logits of every decoded step of two sequences of unequal length, one of them idle at times, the prompt in parts of `chunk`.
std::vector<float> logits(const std::shared_ptr<const Model>& model, const std::string& spec, int64_t chunk) {
  SessionOptions o;
  o.attention = spec, o.sequences = 2, o.chunk = chunk, o.backend = backend_or("reference");
  o.k.kind = o.v.kind = PageType::Kind::F32;
  Session session(model, o);
  const auto a = text(83, 1), b = text(30, 2);
  std::vector<float> out;
  auto take = [&](const Tensor& t) { out.insert(out.end(), t.as<float>(), t.as<float>() + t.numel()); };
  take(session.prefill({a, b}));
  for (int32_t i = 0; i < 6; ++i) {
    const std::vector<int32_t> next{(i * 13) % 61, i % 3 == 2 ? -1 : (i * 7) % 61};
    take(session.decode(next));
  }
  return out;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double d = std::abs(double(a[i]) - double(b[i]));
    worst = std::isnan(d) ? INFINITY : std::max(worst, d);
  }
  return worst;
}

TEST(Sessions, IdentitiesAreDense) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}}) {
    const auto model = tiny(h, g);
    for (int64_t chunk : {0, 25}) {
      const auto dense = logits(model, "dense", chunk);
      for (const Entry& e : registry())
        EXPECT_LT(distance(dense, logits(model, e.identity, chunk)), 1e-4) << e.identity << " chunk " << chunk;
    }
  }
}

// Streaming heads whose keys are turned to their places are StreamingLLM: it makes room before a step for what these cut
// behind it.
TEST(Sessions, RerotateReadsWhatStaysAtItsPlace) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}}) {
    const auto model = tiny(h, g);
    const auto moved = logits(model, "rerotate(duo-attention(sinks=2,recent=12))", 0);
    EXPECT_LT(distance(moved, logits(model, "streaming-llm(sinks=2,window=13)", 0)), 1e-5);
    EXPECT_GT(distance(moved, logits(model, "duo-attention(sinks=2,recent=12)", 0)), 1e-4);
  }
}

/// What each head of each layer holds behind a prompt.
std::vector<std::vector<int32_t>> held(const std::shared_ptr<const Model>& model, const std::string& spec, int64_t chunk) {
  SessionOptions o;
  o.attention = spec, o.chunk = chunk, o.backend = backend_or("reference");
  o.k.kind = o.v.kind = PageType::Kind::F32;
  Session session(model, o);
  session.prefill(text(83, 1));
  std::vector<std::vector<int32_t>> out;
  for (int l = 0; l < model->info().layers; ++l)
    for (int kv = 0; kv < model->info().g; ++kv) out.push_back(session.store().layer(l).positions(kv));
  return out;
}

// A store that keeps keys plain gives policies the same keys, rotated or not, as one that keeps them rotated.
TEST(Sessions, PoliciesSeeTheSameKeysHoweverTheyAreKept) {
  const auto model = tiny(6, 2);
  for (int64_t chunk : {0, 25})
    for (const std::string spec : {"leverage(budget=20)", "leverage(budget=20,sketch=8)", "keydiff(budget=20)"}) {
      const auto kept = held(model, spec, chunk), moved = held(model, "rerotate(" + spec + ")", chunk);
      ASSERT_EQ(kept.size(), moved.size());
      std::vector<int32_t> odd;  // turning keys back rounds: scores may tie
      for (size_t i = 0; i < kept.size(); ++i)
        std::set_symmetric_difference(kept[i].begin(), kept[i].end(), moved[i].begin(), moved[i].end(),
                                      std::back_inserter(odd));
      EXPECT_LE(odd.size(), 2u) << spec << " chunk " << chunk;
    }
}

/// Weights of rows first … n − 1 of a query head of a prompt of one sequence, in f64.
Rows weights(const LayerView& at, int64_t head, int64_t first) {
  const int64_t n = at.rows[0], window = at.model.window(at.layer);
  const Buffer q = at.queue.read_back(at.q.values), k = at.queue.read_back(at.k.values);
  Rows out;
  for (int64_t i = first; i < n; ++i) {
    auto& row = out.emplace_back(size_t(n), 0.0);
    double sum = 0;
    for (int64_t j = 0; j <= i; ++j) {
      if (window > 0 && i - j >= window) continue;
      double dot = 0;
      for (int64_t c = 0; c < at.model.d; ++c)
        dot += double(q->at<float>(head * n + i, c)) * double(k->at<float>(head / at.model.group() * n + j, c));
      sum += row[size_t(j)] = std::exp(dot / std::sqrt(double(at.model.d)));
    }
    for (double& x : row) x /= sum;
  }
  return out;
}

TEST(Sessions, CakeDividesABudgetBetweenLayers) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}})
    for (const auto& [budget, tau1, tau2] : {std::tuple{24, 1.6, 0.4}, {24, 1.0, 4.0}, {60, 1.0, 1.0}}) {
      const int64_t window = 8, n = 83;
      const auto model = tiny(h, g);
      const ModelInfo& m = model->info();
      SessionOptions o;
      o.attention = "cake(window=8,budget=" + std::to_string(budget) + ",tau1=" + std::to_string(tau1) +
                    ",tau2=" + std::to_string(tau2) + ")";
      o.backend = backend_or("reference"), o.k.kind = o.v.kind = PageType::Kind::F32;
      Session session(model, o);
      std::vector<double> preferred;
      session.tap([&, heads = h](LayerView& at) {
        double entropy = 0, variance = 0;
        for (int64_t head = 0; head < heads; ++head) {
          const Rows p = weights(at, head, n - window);
          for (int64_t j = 0; j < n - window; ++j) {
            double mean = 0;
            for (const auto& row : p) mean += row[size_t(j)] / double(window);
            for (const auto& row : p) {
              entropy -= row[size_t(j)] * std::log(row[size_t(j)] + 1e-10);
              variance += std::pow(row[size_t(j)] - mean, 2) / double(window - 1);
            }
          }
        }
        preferred.push_back(std::pow(entropy, 1 / tau1) * std::pow(variance, 1 / tau2));
      });
      session.prefill(text(n, 1));
      const double total = double(m.layers * (budget - window)), room = double(n - window),
                   all = std::accumulate(preferred.begin(), preferred.end(), 0.0);
      std::vector<double> expected;
      for (double x : preferred) expected.push_back(std::min(room, x / all * total));
      for (int round = 0; round < 10; ++round) {  // what is over, in equal parts
        const double over = total - std::accumulate(expected.begin(), expected.end(), 0.0);
        const double open = double(std::count_if(expected.begin(), expected.end(), [&](double x) { return x < room; }));
        for (double& x : expected)
          if (x < room) x = std::min(room, x + over / open);
      }
      int64_t sum = 0;
      for (int l = 0; l < m.layers; ++l)
        for (int kv = 0; kv < g; ++kv) {
          const int64_t count = session.store().layer(l).length(kv);
          EXPECT_NEAR(double(count), expected[size_t(l)] + double(window), 2.5) << o.attention << " layer " << l;
          sum += kv == 0 ? count : 0;
        }
      EXPECT_LE(sum, m.layers * budget);
      EXPECT_GT(sum, m.layers * (budget - 1));
    }
}

// What layers hold shrinks around its mean, each layer's tokens are among those of the one before, and which those are is
// what all layers so far have paid.
TEST(Sessions, SpattenDropsATokenInAllDeeperLayers) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}}) {
    const int64_t n = 83;
    const auto model = tiny(h, g);
    SessionOptions o;
    o.attention = "spatten(budget=0.6)", o.backend = backend_or("reference"), o.k.kind = o.v.kind = PageType::Kind::F32;
    Session session(model, o);
    std::vector<Rows> paid;  // [layer][1][token]
    session.tap([&, heads = h](LayerView& at) {
      if (at.phase != Phase::Prompt) return;
      auto& sums = paid.emplace_back(1, std::vector<double>(size_t(n), 0.0))[0];
      for (int64_t head = 0; head < heads; ++head)
        for (const auto& row : weights(at, head, 0))
          for (size_t j = 0; j < row.size(); ++j) sums[j] += row[j];
    });
    session.prefill(text(n, 1));
    std::vector<double> total(size_t(n), 0.0);
    double held = 0;
    for (int l = 0; l < 4; ++l) {
      for (size_t j = 0; j < total.size(); ++j) total[j] += paid[size_t(l)][0][j];
      // One layer keeps all; then r = step, 2 step, 3 step, which add up to 4 (1 − 0.6).
      const int64_t count = l == 0 ? n : std::llround(double(n) * (1 - l * 4 * (1 - 49.0 / 83) / 6));
      const auto expected = top(total, count);
      for (int kv = 0; kv < g; ++kv) EXPECT_EQ(session.store().layer(l).positions(kv), expected) << "layer " << l;
      for (int32_t j = 0, e = 0; j < n; ++j) {
        if (e < int32_t(expected.size()) && expected[size_t(e)] == j) ++e;
        else total[size_t(j)] = -INFINITY;
      }
      held += double(count);
    }
    EXPECT_NEAR(held / 4, 49, 1);
  }
}

TEST(Sessions, SmallBudgetsChangeLogitsAndStayFinite) {
  const auto model = tiny(6, 2);
  for (int64_t chunk : {0, 25}) {
    const auto dense = logits(model, "dense", chunk);
    for (const char* spec : {"streaming-llm(window=12)",
                             "snapkv(budget=16,window=4)",
                             "snapkv(budget=0.1)",
                             "pyramidkv(budget=16,window=4)",
                             "pyramidkv(budget=20,window=4,rule=authors)",
                             "adakv(snapkv(budget=16,window=4))",
                             "adakv(pyramidkv(budget=16,window=4),port=true)",
                             "adakv(h2o(budget=10))",
                             "h2o(budget=10)",
                             "h2o(budget=10,when=chunk)+quest(budget=8,page=4,dense=0)",
                             "tova(budget=7)",
                             "quest(budget=16,page=8,dense=1)",
                             "tidal-decode(budget=9,selection=1,correction=2)",
                             "xattention(block=8,stride=4,threshold=0.3)",
                             "moba(block=8,topk=2)",
                             "flexprefill(block=8,gamma=0.3,min_budget=8)",
                             "kvzip(budget=0.2,chunk=32)",
                             "kvzip(budget=0.2,chunk=32,share=layer)",
                             "kivi(residual=0)",
                             "act(threshold=0.02,skip_first=0,skip_last=0)",
                             "a2sf(budget=10)",
                             "observed-attention(budget=10)",
                             "keydiff(budget=10)",
                             "cur(budget=10)",
                             "lagkv(budget=12,lag=4)",
                             "noncausal(budget=10,tile=8)",
                             "expected-attention(budget=10)",
                             "random(budget=10)",
                             "duo-attention(sinks=2,recent=6)",
                             "simlayerkv(threshold=0,recent=6)",
                             "chunkkv(tova(budget=10),chunk=4)",
                             "caote(tova(budget=7))",
                             "dms(keydiff,threshold=0,window=4)",
                             "adakv(expected-attention(budget=12,eps=0.01))",
                             "recycled-attention(budget=8,stride=4)",
                             "omnikv(budget=6,filters=1,wait=0)",
                             "twilight(p=0.6,dense=1)",
                             "headkv(snapkv(budget=16,window=4),window=4,scores=[1,2,3,4,5,6,7,8])",
                             "a-shape(sinks=2,local=9)",
                             "tri-shape(sinks=2,local=9,last=3)",
                             "triangle-mix(sinks=2,local=9,last=3,from=2)",
                             "power(block=4,local=1)",
                             "star(block=10,query=4)",
                             "gna(window=8,stride=2,dilation=2)",
                             "stochastic-sa(window=16)",
                             "cake(budget=16,window=4)",
                             "capkv(budget=12)",
                             "chunk-local(knorm(budget=0.3),chunk=10)",
                             "compactor(budget=16,tile=16)",
                             "criticalkv(adakv(snapkv(budget=16,window=4)))",
                             "defensivekv(budget=16,window=4)",
                             "finch(budget=16,window=4)",
                             "leverage(budget=12)",
                             "moa(alpha=[4],beta=[0.1],sinks=2,block=4)",
                             "r-kv(budget=16,window=3,when=every(2))",
                             "rerotate(snapkv(budget=16,window=4))",
                             "spatten(budget=0.3,when=every(2))",
                             "zipvl(tau=0.7)",
                             "xattention(block=8,threshold=0.3,layers=1-)+adakv(snapkv(budget=12,window=2),layers=-2)+"
                             "h2o(budget=5,layers=3,heads=0)+quest(budget=4,page=1)+ring(ranks=3)"}) {
      const double changed = distance(dense, logits(model, spec, chunk));
      EXPECT_GT(changed, 1e-4) << spec << " chunk " << chunk;
      EXPECT_LT(changed, 100) << spec << " chunk " << chunk;
    }
  }
}

TEST(Sessions, AForkGoesOnAsTheOriginalDoes) {
  const auto model = tiny(6, 2);
  for (const char* spec :
       {"tidal-decode(budget=9,selection=1,correction=2)", "h2o(budget=10)", "kivi(residual=0)",
        "quest(budget=8,page=4,dense=0)", "a2sf(budget=10)", "recycled-attention(budget=8,stride=4)",
        "omnikv(budget=6,filters=1,wait=0)", "caote(h2o(budget=10))", "random(budget=10,when=every(2))",
        "r-kv(budget=16,window=3,when=every(2))", "spatten(budget=0.4,when=every(2))", "criticalkv(h2o(budget=10))"}) {
    SessionOptions o;
    o.attention = spec, o.backend = backend_or("reference");
    Session session(model, o);
    session.prefill(text(70, 3));
    session.decode(4);
    const auto other = session.fork();
    for (int32_t token : {9, 17, 3}) {
      const Tensor a = session.decode(token);
      const std::vector<float> x(a.as<float>(), a.as<float>() + a.numel());
      const Tensor b = other->decode(token);
      EXPECT_EQ(x, std::vector<float>(b.as<float>(), b.as<float>() + b.numel())) << spec;
    }
  }
}

/// What query head 0 of a decoded token reads in a layer.
std::vector<int32_t> first_row(const Plan& plan) {
  std::vector<int32_t> out;
  for (int64_t e = plan.begin(0); e < plan.end(0); ++e) out.push_back(plan.index.at<int32_t>(e));
  return out;
}

/// Σ or max over the group of the weights that the last query pays to the entries of the first KV head, over all of them.
std::vector<double> paid(LayerView& at, Observe::Heads heads) {
  Observe how;
  how.rows = Observe::Rows::Last, how.heads = heads;
  const Ragged columns = at.observe(at.last_queries(1), how);
  std::vector<double> out;
  for (int64_t j = columns.begin(0); j < columns.end(0); ++j) out.push_back(columns.values.at<float>(j));
  return out;
}

TEST(Sessions, RecycledAttentionReadsTheLastFullStepsBest) {
  SessionOptions o;
  o.attention = "recycled-attention(budget=9,stride=4)", o.backend = "reference";
  Session session(tiny(6, 2), o);
  std::vector<double> scores;
  int full = 0, partial = 0;
  session.tap([&](LayerView& at) {
    if (at.layer != 2) return;
    if (!at.decoding()) {
      scores = paid(at, Observe::Heads::GroupMax);
      return;
    }
    scores.push_back(INFINITY);  // a new token has no score yet and stays
    if (at.read.plan.form == Plan::Form::Dense) {
      scores = paid(at, Observe::Heads::GroupMax);
      ++full;
    } else {
      EXPECT_EQ(first_row(at.read.plan), top(scores, 9));
      ++partial;
    }
  });
  session.prefill(text(60, 4));
  for (int32_t i = 0; i < 12; ++i) session.decode(i * 5 % 61);
  EXPECT_EQ(full, 3);
  EXPECT_EQ(partial, 9);
}

TEST(Sessions, OmniKvHandsTheFiltersChoiceOn) {
  SessionOptions o;
  o.attention = "omnikv(budget=7,filters=0,wait=1)", o.backend = "reference";
  Session session(tiny(6, 2), o);
  std::vector<double> most;
  int handed = 0;
  session.tap([&](LayerView& at) {
    if (!at.decoding()) return;
    if (at.layer < 2) { EXPECT_EQ(at.read.plan.form, Plan::Form::Dense); }
    if (at.layer == 0) {
      Observe how;
      how.rows = Observe::Rows::Last, how.heads = Observe::Heads::Each;
      const Ragged each = at.observe(at.q, how);
      const int64_t length = each.length(0), group = at.model.group();
      most.assign(size_t(length), 0.0);
      for (int64_t s = 0; s < each.segments(); ++s)
        for (int64_t j = 0; j < length; ++j)
          for (int64_t member = 0; member < group; ++member)
            most[size_t(j)] = std::max(most[size_t(j)], double(each.values.at<float>(each.begin(s) + j, member)));
      for (int64_t j = 50; j < length; ++j) most[size_t(j)] = INFINITY;  // generated
    }
    if (at.layer < 2) return;
    EXPECT_EQ(first_row(at.read.plan), top(most, 7 + at.step() + 1));
    EXPECT_EQ(at.read.plan.scope, Plan::Scope::Layer);
    ++handed;
  });
  session.prefill(text(50, 4));
  for (int32_t i = 0; i < 5; ++i) session.decode(i * 5 % 61);
  EXPECT_EQ(handed, 10);
}

}  // namespace
}  // namespace heed::test
