// Selectors whose weights are a trained layer's, given as inputs, against their definitions in plain loops.
#include <bit>

#include "plan_case.h"

namespace heed::test {
namespace {

class Trained : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Trained);

Buffer random_input(std::initializer_list<int64_t> sizes, uint64_t seed, double size = 1) {
  Random random(seed);
  Buffer out(Dtype::F32, sizes);
  for (float& x : out->span<float>()) x = float(size * random.normal());
  return out;
}
Buffer constant_input(std::initializer_list<int64_t> sizes, float value) {
  Buffer out(Dtype::F32, sizes);
  for (float& x : out->span<float>()) x = value;
  return out;
}
ApplyInput with(const Case& c, const std::string& backend, std::map<std::string, Tensor> inputs) {
  ApplyInput in = c.input(backend);
  in.inputs = std::move(inputs);
  return in;
}
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

/// Σ p v of one row, in place of logits those given; −∞ for keys that are not read.
std::vector<double> attended(const Case& c, int64_t head, const std::vector<double>& logits) {
  std::vector<double> p = logits;
  const double most = *std::max_element(p.begin(), p.end());
  if (most == -INFINITY) return std::vector<double>(size_t(c.shape.d_v), 0.0);
  double sum = 0;
  for (double& x : p) sum += x = std::exp(x - most);
  for (double& x : p) x /= sum;
  return c.output(head, p);
}
void expect_row(const ApplyOutput& out, int64_t head, int64_t i, const std::vector<double>& expected,
                const std::string& what) {
  double worst = 0;
  for (size_t e = 0; e < expected.size(); ++e) {
    const double x = out.find("out")->view().at<float>(head, i, int64_t(e));
    worst = std::max(worst, std::isnan(x) ? INFINITY : std::abs(x - expected[e]));
  }
  EXPECT_LT(worst, kExact) << what << " head " << head << " row " << i;
}

TEST_P(Trained, DsaReadsTheBestOfItsIndexer) {
  for (const auto& [s, heads, width, k] : {std::tuple{shape(90, 90), 4, 8, 12},
                                           {shape(33, 101), 1, 16, 7},
                                           {shape(1, 1), 2, 8, 3},
                                           {shape(1, 40), 3, 8, 5},
                                           {shape(60, 60), 4, 8, 100}}) {
    const Case c(s, 3);
    const Buffer q = random_input({heads, s.n, width}, 4), key = random_input({s.m, width}, 5),
                 w = random_input({s.n, heads}, 6);
    const ApplyOutput out = Case::run("dsa(topk=" + std::to_string(k) + ")",
                                      with(c, backend(), {{"index_q", q}, {"index_k", key}, {"index_w", w}}));
    const auto plan = lists(out, "plan");
    std::vector<std::vector<int32_t>> read;
    for (int64_t i = 0; i < s.n; ++i) {
      std::vector<double> score;
      for (int64_t j = 0; j <= c.first() + i; ++j) {
        double sum = 0;
        for (int64_t head = 0; head < heads; ++head) {
          double dot = 0;
          for (int64_t e = 0; e < width; ++e) dot += double(q->at<float>(head, i, e)) * double(key->at<float>(j, e));
          sum += double(w->at<float>(i, head)) * std::max(0.0, dot);
        }
        score.push_back(sum);
      }
      read.push_back(top(score, k));
      for (int64_t head = 0; head < s.h; ++head)
        EXPECT_EQ(plan[size_t(head * s.n + i)], read.back()) << "head " << head << " row " << i;
    }
    EXPECT_LT(c.error(out,
                      [&](int64_t, int64_t i, int64_t j) {
                        return std::binary_search(read[size_t(i)].begin(), read[size_t(i)].end(), int32_t(j));
                      }),
              kExact);
  }
}

TEST_P(Trained, DmaReadsTheBestOfItsBiasAndAddsIt) {
  for (const auto& [s, k, linear] :
       {std::tuple{shape(90, 90), 11, false}, {shape(33, 101), 20, true}, {shape(1, 1), 2, false}, {shape(50, 50), 50, false}}) {
    const Case c(s, 7);
    const Buffer w = random_input({s.g, s.g * s.d_v}, 8, 0.3), a = random_input({s.g}, 9, 0.3);
    const ApplyOutput out = Case::run("dma(topk=" + std::to_string(k) + (linear ? ",form=linear)" : ")"),
                                      with(c, backend(), {{"w_dt", w}, {"a", a}}));
    for (int64_t head = 0; head < s.h; ++head) {
      const int64_t kv = head / c.group();
      std::vector<double> bias;
      for (int64_t j = 0; j < s.m; ++j) {
        double x = 0;
        for (int64_t other = 0; other < s.g; ++other)
          for (int64_t e = 0; e < s.d_v; ++e)
            x += double(w->at<float>(kv, other * s.d_v + e)) * double(c.v->at<float>(other, j, e));
        const double step = double(a->at<float>(kv)) * std::log(1 + std::exp(x));
        bias.push_back(linear ? step : std::exp(step));
      }
      for (int64_t i = 0; i < s.n; ++i) {
        const std::vector<double> seen(bias.begin(), bias.begin() + c.first() + i + 1);
        std::vector<double> logits(size_t(s.m), -INFINITY);
        for (int32_t j : top(seen, k)) logits[size_t(j)] = c.dot(head, i, j) / std::sqrt(double(s.d)) + bias[size_t(j)];
        expect_row(out, head, i, attended(c, head, logits), "dma");
      }
    }
  }
}

TEST_P(Trained, DmaOfNoStepIsDense) {
  const Case c(shape(60, 60), 10);
  const Shape& s = c.shape;
  const Buffer w = random_input({s.g, s.g * s.d_v}, 8), a = constant_input({s.g}, 0);
  for (const char* spec : {"dma(topk=60)", "dma(topk=60,form=linear)"})
    EXPECT_LT(c.dense_error(Case::run(spec, with(c, backend(), {{"w_dt", w}, {"a", a}}))), kExact) << spec;
}

TEST_P(Trained, SparseKReadsItsWindowAndTheBestBefore) {
  for (const auto& [s, k, window, recency] : {std::tuple{shape(90, 90), 9, 12, 0.0},
                                              {shape(33, 101), 5, 1, 0.05},
                                              {shape(1, 1), 1, 0, 0.0},
                                              {shape(1, 60), 7, 20, 0.0},
                                              {shape(40, 40), 6, 0, 0.0}}) {
    const Case c(s, 11);
    const Buffer u = random_input({s.g, s.m}, 12);
    const ApplyOutput out = Case::run("sparsek(topk=" + std::to_string(k) + ",window=" + std::to_string(window) +
                                          ",recency=" + std::to_string(recency) + ")",
                                      with(c, backend(), {{"importance", u}}));
    const auto plan = lists(out, "plan");
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t i = 0; i < s.n; ++i) {
        const int64_t at = c.first() + i;
        std::vector<double> old;
        for (int64_t j = 0; j <= at - window; ++j)
          old.push_back(double(u->at<float>(head / c.group(), j)) + recency * double(j));
        auto keys = top(old, k);
        for (int64_t j = std::max<int64_t>(0, at - window + 1); j <= at; ++j) keys.push_back(int32_t(j));
        EXPECT_EQ(plan[size_t(head * s.n + i)], keys) << "head " << head << " row " << i;
      }
    EXPECT_LT(c.error(out,
                      [&](int64_t head, int64_t i, int64_t j) {
                        const auto& list = plan[size_t(head * s.n + i)];
                        return std::binary_search(list.begin(), list.end(), int32_t(j));
                      }),
              kExact);
  }
}

TEST_P(Trained, MosaAttendsAmongTheTokensOfEachHead) {
  for (const auto& [s, sparsity, first] :
       {std::tuple{shape(91, 91), 8.0, false}, {shape(50, 50), 3.0, true}, {shape(1, 1), 4.0, false}, {shape(3, 3), 50.0, false}}) {
    const Case c(s, 13);
    Buffer r = random_input({s.h, s.n}, 14);
    for (float& x : r->span<float>()) x = float(sigmoid(x));
    const ApplyOutput out = Case::run("mosa(sparsity=" + std::to_string(sparsity) + (first ? ",include_first=true)" : ")"),
                                      with(c, backend(), {{"router", r}}));
    for (int64_t head = 0; head < s.h; ++head) {
      std::vector<double> score;
      for (int64_t i = 0; i < s.n; ++i) score.push_back(first && i == 0 ? INFINITY : double(r->at<float>(head, i)));
      const auto taken = top(score, std::min(s.n, std::max<int64_t>(2, int64_t(double(s.n) / sparsity))));
      for (int64_t i = 0; i < s.n; ++i) {
        std::vector<double> logits(size_t(s.m), -INFINITY);
        const bool in = std::binary_search(taken.begin(), taken.end(), int32_t(i));
        for (int32_t j : taken)
          if (in && j <= i) logits[size_t(j)] = c.dot(head, i, j) / std::sqrt(double(s.d));
        auto row = attended(c, head, logits);
        for (double& x : row) x *= double(r->at<float>(head, i));
        expect_row(out, head, i, row, "mosa");
      }
    }
  }
}

TEST_P(Trained, MosaOfAllTokensIsDense) {
  const Case c(shape(70, 70), 15);
  const Buffer r = constant_input({c.shape.h, 70}, 1);
  EXPECT_LT(c.dense_error(Case::run("mosa(sparsity=1)", with(c, backend(), {{"router", r}}))), kExact);
}

/// x turned to a position, halves of the channels as pairs.
std::vector<double> rotated(std::vector<double> x, double position, double base) {
  const size_t half = x.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    const double angle = position * std::pow(base, -double(i) / double(half)), a = x[i], b = x[i + half];
    x[i] = a * std::cos(angle) - b * std::sin(angle), x[i + half] = a * std::sin(angle) + b * std::cos(angle);
  }
  return x;
}

TEST_P(Trained, SeerAttentionReadsWhereItsGateOpens) {
  int64_t shut = 0;
  for (const auto& [s, threshold, ratio, last] : {std::tuple{shape(150, 150), 0.1, 0.0, true},
                                                  {shape(61, 131), 0.15, 0.0, false},
                                                  {shape(90, 90), 0.0, 0.5, false},
                                                  {shape(1, 1), 0.1, 0.0, true}}) {
    const int64_t block = 8, blocks = ceil_of(s.m, block), tiles = ceil_of(s.n, block);
    const Case c(s, 16);
    const Buffer q = random_input({s.h, s.n, s.d}, 17, 2), k = random_input({s.g, s.m, s.d}, 18),
                 w = random_input({s.h, 2 * s.d, s.d}, 19, 0.4);
    const ApplyOutput out = Case::run("seer_attention(block=8,threshold=" + std::to_string(threshold) +
                                          ",ratio=" + std::to_string(ratio) + (last ? ")" : ",last=false)"),
                                      with(c, backend(), {{"plain_q", q}, {"plain_k", k}, {"w_k", w}}));
    const auto plan = lists(out, "plan");
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t end = std::min(s.n, (t + 1) * block), visible = ceil_of(c.first() + end, block);
        std::vector<double> mean(size_t(s.d), 0.0), logit;
        for (int64_t i = t * block; i < end; ++i)
          for (int64_t e = 0; e < s.d; ++e)
            mean[size_t(e)] += double(q->at<float>(head, i, e)) / double(end - t * block);
        mean = rotated(mean, double(c.first() + t * block), 10000);
        for (int64_t b = 0; b < visible; ++b) {
          std::vector<double> image(size_t(s.d), 0.0);
          for (int64_t e = 0; e < s.d; ++e) {
            double high = -INFINITY, low = INFINITY;
            for (int64_t j = b * block; j < std::min(s.m, (b + 1) * block); ++j) {
              const double x = k->at<float>(head / c.group(), j, e);
              high = std::max(high, x), low = std::min(low, x);
            }
            for (int64_t o = 0; o < s.d; ++o)
              image[size_t(o)] += high * double(w->at<float>(head, e, o)) + low * double(w->at<float>(head, s.d + e, o));
          }
          image = rotated(image, double(b * block), 10000);
          logit.push_back(std::inner_product(mean.begin(), mean.end(), image.begin(), 0.0) / std::sqrt(double(s.d)));
        }
        const auto gate = softmax(logit);
        const auto best = top(gate, std::max<int64_t>(1, int64_t((1 - std::sqrt(1 - ratio)) * double(blocks))));
        std::vector<int32_t> read;
        for (int32_t b = 0; b < visible; ++b) {
          const bool open = ratio > 0 ? std::binary_search(best.begin(), best.end(), b) : gate[size_t(b)] > threshold;
          if (open || b >= (c.first() + t * block) / block || (last && t >= tiles - 2)) read.push_back(b);
        }
        shut += visible - int64_t(read.size());
        EXPECT_EQ(plan[size_t(head * tiles + t)], read) << "head " << head << " tile " << t;
      }
    EXPECT_LT(c.error(out,
                      [&](int64_t head, int64_t i, int64_t j) {
                        const auto& list = plan[size_t(head * tiles + i / block)];
                        return std::binary_search(list.begin(), list.end(), int32_t(j / block));
                      }),
              kExact);
  }
  EXPECT_GT(shut, 0);
}

/// A cache by NAtS' rules: what each token finds in it, [KV head][token][key].
std::vector<std::vector<std::vector<bool>>> nats_cache(const Case& c, const Buffer& types, int64_t window) {
  std::vector<std::vector<std::vector<bool>>> out;
  for (int64_t kv = 0; kv < c.shape.g; ++kv) {
    auto& seen = out.emplace_back();
    std::vector<bool> held(size_t(c.shape.m), false);
    const auto type = [&](int64_t j) {
      const auto x = [&](int64_t which) { return types->at<float>(kv, j, which); };
      return j == 0 || x(0) >= std::max(x(1), x(2)) ? 0 : x(1) >= x(2) ? 1 : 2;
    };
    for (int64_t i = 0; i < c.shape.m; ++i) {
      held[size_t(i)] = true;
      for (int64_t j = 0; j < i; ++j)
        if (type(j) == 2 && i - j > window) held[size_t(j)] = false;  // a ring
      seen.push_back(held);
      for (int64_t j = 0; j < i && type(i) == 0; ++j)
        if (type(j) == 1) held[size_t(j)] = false;  // behind a global token's own attention
    }
  }
  return out;
}

TEST_P(Trained, NatsIsACacheThatDropsByType) {
  for (const auto& [s, window] : {std::pair{shape(90, 90), 5}, {shape(33, 131), 20}, {shape(1, 1), 3}, {shape(1, 60), 0}}) {
    const Case c(s, 60);
    const Buffer types = random_input({s.g, s.m, 3}, 61);
    const auto seen = nats_cache(c, types, window);
    const ApplyOutput out = Case::run("nats(window=" + std::to_string(window) + ")", with(c, backend(), {{"types", types}}));
    int64_t hidden = 0;
    EXPECT_LT(c.error(out,
                      [&](int64_t head, int64_t i, int64_t j) {
                        const bool held = seen[size_t(head / c.group())][size_t(c.first() + i)][size_t(j)];
                        hidden += !held;
                        return held;
                      }),
              kExact);
    EXPECT_EQ(hidden > 0, s.m > 1);
  }
}

TEST_P(Trained, NatsOfOneTypeIsDenseOrAWindow) {
  const Case c(shape(60, 80), 62);
  const Shape& s = c.shape;
  for (int64_t which = 0; which < 3; ++which) {
    Buffer types = constant_input({s.g, s.m, 3}, 0);
    for (int64_t x = which; x < s.g * s.m * 3; x += 3) types->as<float>()[x] = 1;
    const ApplyOutput out = Case::run("nats(window=9)", with(c, backend(), {{"types", types}}));
    // The first token is global; without another, local ones are seen to the end.
    EXPECT_LT(c.error(out, [&](int64_t, int64_t i, int64_t j) { return which < 2 || j == 0 || c.first() + i - j <= 9; }), kExact)
        << which;
  }
}

TEST_P(Trained, FlashBlockJoinsAnEarlierStepsRest) {
  for (const auto& [s, block, causal] : {std::tuple{shape(90, 90), 16, false},
                                         {shape(33, 131), 40, false},
                                         {shape(60, 60), 7, true},
                                         {shape(1, 1), 4, false},
                                         {shape(40, 40), 100, false}}) {
    const Case c(s, 63), before(s, 64);
    ApplyInput in = with(c, backend(), {{"cached_q", before.q}});
    in.causal = causal;
    const ApplyOutput out = Case::run("flashblock(block=" + std::to_string(block) + ")", in);
    const double scale = 1 / std::sqrt(double(s.d));
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t i = 0; i < s.n; ++i) {
        const int64_t at = c.first() + i, first = at / block * block;
        std::vector<double> logits(size_t(s.m), -INFINITY);
        for (int64_t j = 0; j < std::min<int64_t>(s.m, first + block); ++j) {
          double old = 0;
          for (int64_t e = 0; e < s.d; ++e)
            old += double(before.q->at<float>(head, i, e)) * double(c.k->at<float>(head / c.group(), j, e));
          if (j < first) logits[size_t(j)] = scale * old;
          else if (!causal || j <= at) logits[size_t(j)] = scale * c.dot(head, i, j);
        }
        expect_row(out, head, i, attended(c, head, logits), "flashblock");
      }
  }
}

TEST_P(Trained, FlashBlockWithItsOwnQueriesIsDense) {
  const Case c(shape(60, 90), 65);
  EXPECT_LT(c.dense_error(Case::run("flashblock(block=13)", with(c, backend(), {{"cached_q", c.q}}))), kExact);
}

/// Landmark's grouped softmax of one row: own tokens beside the landmarks of chosen blocks, tokens of those by their own softmax.
std::vector<double> grouped(const Case& c, int64_t head, int64_t i, int64_t block, int64_t topk) {
  const int64_t at = c.first() + i, own = at / block;
  const double scale = 1 / std::sqrt(double(c.shape.d));
  const auto logit = [&](int64_t j) { return scale * c.dot(head, i, j); };
  std::vector<double> landmark;
  for (int64_t b = 0; b < own; ++b) landmark.push_back(logit((b + 1) * block - 1));
  const auto chosen = top(landmark, topk);
  double total = 0;
  for (int64_t j = own * block; j <= at; ++j) total += j % block == block - 1 ? 0 : std::exp(logit(j));
  for (int32_t b : chosen) total += std::exp(landmark[size_t(b)]);
  std::vector<double> weight(size_t(c.shape.m), 0.0);
  for (int64_t j = own * block; j <= at; ++j)
    weight[size_t(j)] = j % block == block - 1 ? 0 : std::exp(logit(j)) / total;
  for (int32_t b : chosen) {
    double inside = 0;
    for (int64_t j = b * block; j < (b + 1) * block - 1; ++j) inside += std::exp(logit(j));
    for (int64_t j = b * block; j < (b + 1) * block - 1; ++j)
      weight[size_t(j)] = std::exp(logit(j)) / inside * std::exp(landmark[size_t(b)]) / total;
  }
  return weight;
}

TEST_P(Trained, LandmarkPaysABlockWhatItsLandmarkDraws) {
  for (const auto& [s, block, topk] : {std::tuple{shape(90, 90), 8, 3},
                                       {shape(61, 131), 16, 1000},
                                       {shape(1, 1), 8, 2},
                                       {shape(40, 77), 5, 0},
                                       {shape(1, 64), 16, 1}}) {
    const Case c(s, 20, 2.0);
    const ApplyOutput out = c.run("landmark(block=" + std::to_string(block) + ",topk=" + std::to_string(topk) + ")",
                                  backend());
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t i = 0; i < s.n; ++i)
        expect_row(out, head, i, c.output(head, grouped(c, head, i, block, topk)), "landmark");
  }
}

// With keys of 0 every logit is 0: a landmark draws what one token does, whatever its block holds.
TEST_P(Trained, LandmarkOfEqualLogitsDividesByBlocks) {
  Case c(shape(32, 32), 21);
  std::fill(c.k->span<float>().begin(), c.k->span<float>().end(), 0.0f);
  for (int64_t j = 0; j < 32 * c.shape.g; ++j) c.v->as<float>()[j * c.shape.d_v] = (j % 32) / 8 == 1 ? 1.0f : 0.0f;
  const ApplyOutput out = c.run("landmark(block=8)", backend());
  EXPECT_NEAR(out.find("out")->view().at<float>(0, 29, 0), 1.0 / (3 + 6), kExact);  // blocks 0, 1, 2 and six own tokens
}

TEST_P(Trained, NsaMixesWindowsBlocksAndLatestKeys) {
  for (const auto& [s, stride, block, topk, window, learned] : {std::tuple{shape(130, 130), 4, 16, 4, 20, false},
                                                                {shape(61, 139), 8, 8, 5, 9, true},
                                                                {shape(1, 1), 4, 8, 2, 3, false},
                                                                {shape(40, 40), 4, 8, 100, 1000, false},
                                                                {shape(1, 99), 4, 8, 3, 10, true}}) {
    const Case c(s, 22, 2.0);
    const int64_t count = std::max<int64_t>(1, s.m / stride - 1);
    Buffer gates = random_input({s.h, s.n, 3}, 23);
    for (float& x : gates->span<float>()) x = float(sigmoid(x));
    Buffer ck = random_input({s.g, count, s.d}, 24), cv = random_input({s.g, count, s.d_v}, 25);
    std::map<std::string, Tensor> inputs = {{"gates", gates}};
    if (learned) {
      inputs["compressed_k"] = ck, inputs["compressed_v"] = cv;
    } else {
      for (const auto& [from, to] : {std::pair{&c.k, &ck}, {&c.v, &cv}})
        for (int64_t kv = 0; kv < s.g; ++kv)
          for (int64_t x = 0; (x + 2) * stride <= s.m; ++x)
            for (int64_t e = 0; e < (*to)->size[2]; ++e) {
              double sum = 0;
              for (int64_t j = x * stride; j < (x + 2) * stride; ++j) sum += double((*from)->at<float>(kv, j, e));
              (*to)->as<float>()[(kv * count + x) * (*to)->size[2] + e] = float(sum / double(2 * stride));
            }
    }
    const ApplyOutput out = Case::run("nsa(stride=" + std::to_string(stride) + ",block=" + std::to_string(block) +
                                          ",topk=" + std::to_string(topk) + ",window=" + std::to_string(window) + ")",
                                      with(c, backend(), inputs));
    const double scale = 1 / std::sqrt(double(s.d));
    for (int64_t kv = 0; kv < s.g; ++kv)
      for (int64_t i = 0; i < s.n; ++i) {
        const int64_t at = c.first() + i, own = at / block;
        std::vector<double> score(size_t(own + 1), 0.0);
        Rows coarse;
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
          std::vector<double> logit, row(size_t(s.d_v), 0.0);
          for (int64_t x = 0; (x + 2) * stride <= at + 1; ++x) {
            double dot = 0;
            for (int64_t e = 0; e < s.d; ++e)
              dot += double(c.q->at<float>(head, i, e)) * double(ck->at<float>(kv, x, e));
            logit.push_back(scale * dot);
          }
          if (!logit.empty()) {
            const auto p = softmax(logit);
            for (size_t x = 0; x < p.size(); ++x) {
              for (int64_t e = 0; e < s.d_v; ++e) row[size_t(e)] += p[x] * double(cv->at<float>(kv, int64_t(x), e));
              // A window weighs in each block as often as it has a stride there.
              for (int64_t half = 0; half < 2; ++half) {
                const int64_t b = (int64_t(x) + half) * stride / block;
                if (b <= own) score[size_t(b)] += p[x];
              }
            }
          }
          coarse.push_back(row);
        }
        for (int64_t b = 0; b <= own; ++b)
          if (b == 0 || b >= own - 1) score[size_t(b)] = INFINITY;
        const auto read = top(score, topk);
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
          const auto selected = c.output(head, c.weights(head, i, [&](int64_t j) {
            return j <= at && std::binary_search(read.begin(), read.end(), int32_t(j / block));
          }));
          const auto latest = c.output(
              head, c.weights(head, i, [&, window = window](int64_t j) { return j <= at && at - j < window; }));
          std::vector<double> row;
          for (int64_t e = 0; e < s.d_v; ++e)
            row.push_back(double(gates->at<float>(head, i, 0)) * coarse[size_t(head - kv * c.group())][size_t(e)] +
                          double(gates->at<float>(head, i, 1)) * selected[size_t(e)] +
                          double(gates->at<float>(head, i, 2)) * latest[size_t(e)]);
          expect_row(out, head, i, row, "nsa");
        }
      }
  }
}

TEST_P(Trained, RoutingTransformerAttendsInsideClusters) {
  for (const auto& [s, clusters, window, causal] : {std::tuple{shape(60, 60), 4, 15, true},
                                                    {shape(33, 71), 3, 30, true},
                                                    {shape(60, 60), 5, 9, false},
                                                    {shape(1, 1), 2, 4, true}}) {
    const Case c(s, 26);
    const Buffer mu = random_input({s.h, clusters, s.d}, 27);
    ApplyInput in = with(c, backend(), {{"centroids", mu}});
    in.causal = causal;
    const ApplyOutput out = Case::run("routing_transformer(window=" + std::to_string(window) + ")", in);
    for (int64_t head = 0; head < s.h; ++head) {
      const auto taken = [&, window = window](const Tensor& x, int64_t of, int64_t cluster) {
        std::vector<double> score;
        for (int64_t i = 0; i < x.size[1]; ++i) {
          double dot = 0, size = 0;
          for (int64_t e = 0; e < s.d; ++e) {
            const double y = x.at<float>(of, i, e);
            dot += y * double(mu->at<float>(head, cluster, e)), size += y * y;
          }
          score.push_back(dot / std::sqrt(size));
        }
        return top(score, window);
      };
      Rows sum(size_t(s.n), std::vector<double>(size_t(s.d_v), 0.0));
      std::vector<double> times(size_t(s.n), 0.0);
      for (int64_t cluster = 0; cluster < clusters; ++cluster) {
        const auto queries = taken(c.q, head, cluster), keys = taken(c.k, head / c.group(), cluster);
        for (int32_t i : queries) {
          const auto row = c.output(head, c.weights(head, i, [&, causal = causal](int64_t j) {
            return (!causal || j <= c.first() + i) && std::binary_search(keys.begin(), keys.end(), int32_t(j));
          }));
          for (int64_t e = 0; e < s.d_v; ++e) sum[size_t(i)][size_t(e)] += row[size_t(e)];
          ++times[size_t(i)];
        }
      }
      for (int64_t i = 0; i < s.n; ++i) {
        for (double& x : sum[size_t(i)]) x /= std::max(1.0, times[size_t(i)]);
        expect_row(out, head, i, sum[size_t(i)], "routing_transformer");
      }
    }
  }
}

TEST_P(Trained, OneClusterOfAllIsDense) {
  const Case c(shape(50, 50), 28);
  const Buffer mu = random_input({c.shape.h, 1, c.shape.d}, 29);
  EXPECT_LT(c.dense_error(Case::run("routing_transformer(window=50)", with(c, backend(), {{"centroids", mu}}))), kExact);
}

// Heads that a spec leaves out attend as they would without it.
TEST_P(Trained, OtherHeadsStayDense) {
  const Case c(shape(60, 60), 30);
  const Shape& s = c.shape;
  const Buffer router = constant_input({s.h, s.n}, 0.5), gates = random_input({s.h, s.n, 3}, 31),
               mu = random_input({s.h, 3, s.d}, 32), other = random_input({s.h, s.n, s.d}, 33),
               other_k = random_input({s.g, s.m, s.d}, 34), other_v = random_input({s.g, s.m, s.d_v}, 35),
               u = random_input({s.g, s.m}, 36), cached = random_input({s.h, s.n, s.d}, 37);
  const ApplyInput in = with(c, backend(),
                             {{"router", router},
                              {"gates", gates},
                              {"centroids", mu},
                              {"dense_q", other},
                              {"dense_k", other_k},
                              {"dense_v", other_v},
                              {"importance", u},
                              {"cached_q", cached}});
  const ApplyOutput dense = Case::run("dense", in);
  for (const std::string name : {"mosa(", "nsa(topk=2,block=8,stride=4,window=5,", "routing_transformer(window=9,",
                                 "rettention(window=3,step=19,", "sparsek(topk=3,window=4,", "flashblock(block=9,"}) {
    const ApplyOutput some = Case::run(name + "heads=1-)", in), all = Case::run(name + "heads=0-)", in);
    double same = 0, more = 0;
    for (int64_t i = 0; i < s.n; ++i)
      for (int64_t e = 0; e < s.d_v; ++e) {
        const auto at = [&](const ApplyOutput& out, int64_t head) {
          return double(out.find("out")->view().at<float>(head, i, e));
        };
        same = std::max({same, std::abs(at(some, 0) - at(dense, 0)), std::abs(at(some, 1) - at(all, 1))});
        more = std::max(more, std::abs(at(all, 0) - at(dense, 0)));
      }
    EXPECT_LT(same, kExact) << name;
    EXPECT_GT(more, 1e-2) << name;
  }
}

// Panels of bf16, as models have them: of numbers that bf16 holds, what is chosen is the same.
TEST_P(Trained, PanelsMayBeRounded) {
  const Case c(shape(64, 64), 40);
  for (const Buffer* x : {&c.k, &c.v})
    for (float& y : (*x)->span<float>()) y = std::bit_cast<float>(std::bit_cast<uint32_t>(y) & 0xffff0000u);
  const Shape& s = c.shape;
  const Buffer router = constant_input({s.h, s.n}, 0.5), gates = random_input({s.h, s.n, 3}, 41),
               mu = random_input({s.h, 3, s.d}, 42), w_dt = random_input({s.g, s.g * s.d_v}, 43, 0.1),
               a = random_input({s.g}, 44, 0.2), w_k = random_input({s.h, 2 * s.d, s.d}, 45, 0.3),
               u = random_input({s.g, s.m}, 46);
  ApplyInput in = with(c, backend(),
                       {{"router", router},
                        {"gates", gates},
                        {"centroids", mu},
                        {"w_dt", w_dt},
                        {"a", a},
                        {"w_k", w_k},
                        {"plain_q", c.q},
                        {"plain_k", c.k},
                        {"importance", u},
                        {"dense_q", c.q},
                        {"dense_k", c.k},
                        {"dense_v", c.v}});
  for (const char* spec : {"dma(topk=20)", "sparsek(topk=9,window=8)", "mosa(sparsity=4)",
                           "nsa(topk=3,block=8,stride=4,window=9)", "seer_attention(block=8,threshold=0.05)",
                           "routing_transformer(window=20)", "rettention(window=9)", "landmark(block=8,topk=2)"}) {
    in.dtype = Dtype::F32;
    const ApplyOutput exact = Case::run(spec, in);
    in.dtype = Dtype::BF16;
    const ApplyOutput rounded = Case::run(spec, in);
    double worst = 0;
    for (int64_t x = 0; x < s.h * s.n * s.d_v; ++x)
      worst = std::max(worst, std::abs(double(exact.find("out")->view().as<float>()[x]) -
                                       double(rounded.find("out")->view().as<float>()[x])));
    EXPECT_LT(worst, 0.03) << spec;  // attention may round queries too
  }
}

TEST(TrainedErrors, NameTheInput) {
  const Case c({2, 2, 64, 64, 16, 16});
  for (const auto& [spec, name] : {std::pair{"dsa", "index_q"},
                                   {"dma", "w_dt"},
                                   {"sparsek", "importance"},
                                   {"mosa", "router"},
                                   {"seer_attention", "plain_q"},
                                   {"nsa(topk=1)", "gates"},
                                   {"routing_transformer", "centroids"},
                                   {"nats", "types"},
                                   {"flashblock", "cached_q"},
                                   {"leank", "channels"}})
    EXPECT_NE(apply(spec, c.input("reference")).error().text().find(name), std::string::npos) << spec;
  for (const char* spec : {"dma(heads=0)", "landmark(heads=0)", "nats(heads=0)"})
    EXPECT_NE(apply(spec, c.input("reference")).error().text().find("heads"), std::string::npos) << spec;
  ApplyInput in = with(c, "reference", {{"router", c.q}});
  EXPECT_NE(apply("mosa", in).error().text().find("[h, n]"), std::string::npos);
}

/// The router of five layers in f64.
std::vector<double> routed(const std::map<std::string, Tensor>& in, std::vector<double> x) {
  for (int layer = 1; layer <= 5; ++layer) {
    const Tensor &w = in.at("w" + std::to_string(layer)), &b = in.at("b" + std::to_string(layer));
    std::vector<double> y;
    for (int64_t o = 0; o < w.size[0]; ++o) {
      double sum = b.at<float>(o);
      for (int64_t c = 0; c < w.size[1]; ++c) sum += double(w.at<float>(o, c)) * x[size_t(c)];
      y.push_back(layer == 2 || layer == 5 ? sum : sum * sigmoid(sum));
    }
    x = y;
  }
  return x;
}

TEST_P(Trained, FluxRoutesALayerByItsFirstAndLastQueries) {
  int dense = 0, sparse = 0;
  for (const auto& [s, pooled, block, sinks, window] : {std::tuple{shape(90, 90), 7, 8, 5, 24},
                                                        {shape(33, 101), 40, 16, 20, 16},
                                                        {shape(61, 61), 3, 4, 1, 4},
                                                        {shape(1, 1), 5, 8, 3, 8}})
    for (uint64_t seed = 1; seed <= 6; ++seed) {
      const Case c(s, seed);
      const int64_t d = s.d, first = c.first(), p = std::min<int64_t>(pooled, s.n);
      const Buffer w1 = random_input({8 * d, d}, 10 * seed, 0.5), b1 = random_input({8 * d}, 10 * seed + 1),
                   w2 = random_input({2 * d, 8 * d}, 10 * seed + 2, 0.1), b2 = random_input({2 * d}, 10 * seed + 3),
                   w3 = random_input({4 * d, 2 * d}, 10 * seed + 4, 0.2), b3 = random_input({4 * d}, 10 * seed + 5),
                   w4 = random_input({d, 4 * d}, 10 * seed + 6, 0.2), b4 = random_input({d}, 10 * seed + 7),
                   w5 = random_input({2, d}, 10 * seed + 8), b5 = constant_input({2}, 0),
                   plain = random_input({s.h, s.n, d}, 99 + seed);
      std::map<std::string, Tensor> in{{"w1", w1}, {"b1", b1}, {"w2", w2}, {"b2", b2}, {"w3", w3},
                                       {"b3", b3}, {"w4", w4}, {"b4", b4}, {"w5", w5}, {"b5", b5}};
      if (seed % 2) in["plain_q"] = plain;
      const Tensor& q = seed % 2 ? plain.view() : c.q.view();
      std::vector<double> mean(size_t(d), 0.0);
      for (int64_t head = 0; head < s.h; ++head)
        for (int64_t i = 0; i < p; ++i)
          for (int64_t e = 0; e < d; ++e)
            mean[size_t(e)] += (double(q.at<float>(head, i, e)) + double(q.at<float>(head, s.n - p + i, e))) /
                               double(2 * p * s.h);
      const std::vector<double> a = routed(in, mean);
      ASSERT_GT(std::abs(a[1] - a[0]), 1e-4) << "too close to call";
      const bool all = a[1] > a[0];
      (all ? dense : sparse) += 1;
      const ApplyOutput out = Case::run("flux_layer_router(pooled=" + std::to_string(pooled) +
                                            ",block=" + std::to_string(block) + ",sinks=" + std::to_string(sinks) +
                                            ",window=" + std::to_string(window) + ")",
                                        with(c, backend(), in));
      EXPECT_LT(c.error(out,
                        [&, block = block, sinks = sinks, window = window](int64_t, int64_t i, int64_t j) {
                          if (all || j < sinks) return true;
                          if (i == s.n - 1) return j > first + i - window;  // read as a decoded token
                          return j >= first + (i / block + 1) * block - window;
                        }),
                kExact);
      for (const auto& list : lists(out, "read"))
        for (int32_t j = 0; j < s.m; ++j)
          EXPECT_EQ(std::binary_search(list.begin(), list.end(), j), all || j < sinks || j >= s.m - window);
    }
  EXPECT_GT(dense, 0);
  EXPECT_GT(sparse, 0);
}

TEST_P(Trained, FluxBeginsDense) {
  const Case c(shape(70, 70), 4);
  const int64_t d = 16;
  const Buffer w1 = random_input({8 * d, d}, 1), b1 = random_input({8 * d}, 2), w2 = random_input({2 * d, 8 * d}, 3),
               b2 = random_input({2 * d}, 4), w3 = random_input({4 * d, 2 * d}, 5), b3 = random_input({4 * d}, 6),
               w4 = random_input({d, 4 * d}, 7), b4 = random_input({d}, 8), w5 = constant_input({2, d}, 0);
  for (const auto& [sparse, dense] : {std::pair{0.f, 4.5f}, {4.5f, 0.f}}) {
    Buffer b5 = constant_input({2}, sparse);
    b5->at<float>(1) = dense;
    const ApplyOutput out = Case::run(
        "flux_layer_router(block=8,sinks=3,window=8)",
        with(c, backend(),
             {{"w1", w1}, {"b1", b1}, {"w2", w2}, {"b2", b2}, {"w3", w3}, {"b3", b3}, {"w4", w4}, {"b4", b4}, {"w5", w5}, {"b5", b5}}));
    EXPECT_EQ(c.dense_error(out) < kExact, dense > sparse);
  }
}

// Anchor by anchor in plain loops.
TEST_P(Trained, SuperlinearReadsSpansAroundTheBestAnchors) {
  for (const auto& [s, spans, w, back, ahead] : {std::tuple{shape(90, 90), 3, 1, 2.0, 0.0},
                                                 {shape(33, 101), 2, 2, 1.3, 0.4},
                                                 {shape(60, 60), 5, 3, 0.0, 0.0},
                                                 {shape(1, 40), 1, 1, 2.0, 1.0},
                                                 {shape(30, 30), 3, 7, 2.0, 0.0}}) {
    const Case c(s, 3);
    const Buffer search = random_input({s.h, s.n, s.d}, 4);
    const ApplyOutput out = Case::run("superlinear(spans=" + std::to_string(spans) + ",window=" + std::to_string(w) +
                                          ",back=" + std::to_string(back) + ",ahead=" + std::to_string(ahead) + ")",
                                      with(c, backend(), {{"search_q", search}}));
    const int64_t near = (w + 1) * (w + 1) - 1;
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t i = 0; i < s.n; ++i) {
        const int64_t t = c.first() + i;
        std::vector<int64_t> anchors;  // the farthest first
        std::vector<double> u;
        for (int64_t r = w + 1; t - (r * r - 1) >= 0; ++r) anchors.insert(anchors.begin(), t - (r * r - 1));
        for (int64_t a : anchors) {
          u.push_back(0);
          for (int64_t e = 0; e < s.d; ++e)
            u.back() += double(search->at<float>(head, i, e)) * double(c.k->at<float>(head / c.group(), a, e));
        }
        const auto latest = [&](int64_t j) { return j <= t && j > t - near; };
        std::vector<double> expected(size_t(s.d_v), 0.0), gates;
        std::vector<int64_t> taken;
        for (int32_t x : top(u, spans)) taken.push_back(anchors[size_t(x)]), gates.push_back(u[size_t(x)]);
        if (taken.empty()) expected = c.output(head, c.weights(head, i, latest));
        else gates = softmax(gates);
        for (size_t x = 0; x < taken.size(); ++x) {
          const double root = std::sqrt(double(t + 1));
          const int64_t begin = taken[x] - int64_t(std::ceil(back * root)),
                        end = std::min(taken[x] + int64_t(std::ceil(ahead * root)), t - near);
          const auto part = c.output(
              head, c.weights(head, i, [&](int64_t j) { return latest(j) || (j >= begin && j <= end); }));
          for (size_t e = 0; e < part.size(); ++e) expected[e] += gates[x] * part[e];
        }
        expect_row(out, head, i, expected, "superlinear");
      }
  }
}

TEST_P(Trained, SuperlinearWithAWindowOfAllIsDense) {
  const Case c(shape(50, 62), 3);
  const Buffer search = random_input({c.shape.h, c.shape.n, c.shape.d}, 4);
  EXPECT_LT(c.dense_error(Case::run("superlinear(window=7)", with(c, backend(), {{"search_q", search}}))), kExact);
  // One span that begins before the text.
  EXPECT_LT(c.dense_error(Case::run("superlinear(window=1,spans=1,back=100,ahead=100)",
                                    with(c, backend(), {{"search_q", search}}))),
            kExact);
  // Elsewhere it is not.
  EXPECT_GT(c.dense_error(Case::run("superlinear(window=1,spans=1)", with(c, backend(), {{"search_q", search}}))), 0.01);
}

}  // namespace
}  // namespace heed::test
