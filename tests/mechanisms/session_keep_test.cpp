// Policies that look beyond a layer or a cut, each written out beside a session.
#include "session_case.h"

namespace heed::test {
namespace {

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

// Heads that hold unequally many entries, some fewer than an even share, have the whole budget between them all the same.
TEST(Sessions, ADividedBudgetIsThereBehindTheNextChunkToo) {
  const auto model = tiny_model(6, 2);
  for (const auto& [spec, layer_by_layer] : {std::pair{"kvzip(budget=50%,sinks=1)", false},
                                             {"kvcompose(budget=50%,structured=false)", false},
                                             {"kvzip(budget=50%,sinks=1,share=layer)", true},
                                             {"adakv(knorm(budget=50%),port=true)", true}}) {
    SessionOptions o;
    o.attention = spec, o.backend = backend_or("cpu"), o.k.kind = o.v.kind = PageType::Kind::F32;
    Session session(model, o);
    session.prefill(text(200, 1));
    bool uneven = false;
    for (const int more : {24, 8}) {
      const auto length = [&](int l, int kv) { return session.store().layer(l).length(kv); };
      for (int l : {0, 2, 3})
        uneven = uneven || std::min(length(l, 0), length(l, 1)) + more < int64_t(session.tokens().size() + more) / 2;
      session.prefill(text(more, 2));
      int64_t sum = 0;
      for (int l : {0, 2, 3}) {
        const int64_t own = length(l, 0) + length(l, 1);
        if (layer_by_layer) { EXPECT_EQ(own, int64_t(session.tokens().size())) << spec << " layer " << l; }
        sum += own;
      }
      EXPECT_EQ(sum, 3 * int64_t(session.tokens().size())) << spec;
    }
    EXPECT_TRUE(uneven) << spec;
  }
}

TEST(Sessions, CakeDividesABudgetBetweenLayers) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}})
    for (const auto& [budget, tau1, tau2] : {std::tuple{24, 1.6, 0.4}, {24, 1.0, 4.0}, {60, 1.0, 1.0}}) {
      const int64_t window = 8, n = 83;
      const auto model = tiny_model(h, g);
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
    const auto model = tiny_model(h, g);
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

// However often a head is cut, its one synthetic entry stands for all that went.
TEST(Sessions, RazorAttentionsEntryStandsForAllThatWent) {
  for (const char* when : {"prompt", "chunk", "every(1)", "every(4)"}) {
    const auto model = tiny_model(6, 2);
    Session session(model, in_f32(std::string("razor-attention(sinks=2,recent=8,share=0,when=") + when + ")", 25));
    std::vector<Rows> keys(2);  // all that there were, rotated
    session.tap([&](LayerView& at) {
      if (at.layer != 0) return;
      const Ragged now = stored_keys(at);
      for (int64_t kv = 0; kv < 2; ++kv)
        for (int64_t r = now.end(kv) - at.rows[0]; r < now.end(kv); ++r) {
          auto& row = keys[size_t(kv)].emplace_back();
          for (int64_t c = 0; c < 16; ++c) row.push_back(double(now.values.at<float>(r, c)));
        }
      if (!at.decoding() || at.store->length(0) >= int64_t(keys[0].size())) return;
      // The cut of this step is still to come.
      const Ragged bias = at.bias();
      const int64_t gone = int64_t(keys[0].size()) - at.store->length(0) + 1;
      for (int64_t kv = 0; kv < 2; ++kv) {
        for (int64_t j = 0; j < at.store->length(kv); ++j)
          EXPECT_NEAR(bias.values.at<float>(bias.begin(kv) + j), j == 2 ? std::log(double(gone)) : 0, 1e-5) << when;
        for (int64_t c = 0; c < 16; ++c) {
          double sum = 0;
          for (int64_t j = 2; j < 2 + gone; ++j) sum += keys[size_t(kv)][size_t(j)][size_t(c)];
          EXPECT_NEAR(now.values.at<float>(now.begin(kv) + 2, c), sum / double(gone), 1e-5) << when;
        }
      }
    });
    session.prefill(text(60, 8));
    for (int32_t i = 0; i < 9; ++i) session.decode(i * 5 % 61);
    // A token of a further prompt sees the entry as a decoded one does.
    const auto fork = session.fork();
    const Tensor a = session.decode(7);
    const std::vector<float> decoded(a.as<float>(), a.as<float>() + a.numel());
    const Tensor b = fork->prefill(std::vector<int32_t>{7});
    EXPECT_LT(distance(decoded, {b.as<float>(), b.as<float>() + b.numel()}), 1e-4) << when;
  }
}

/// What query row i of one sequence's new ones pays to each entry, all heads together.
std::vector<double> paid_by(LayerView& at, int64_t i) {
  const int64_t h = at.model.h, g = at.model.g, m = at.store->length(0), n = at.rows[0];
  const Ragged keys = stored_keys(at);
  std::vector<double> paid(size_t(m), 0.0);
  for (int64_t head = 0; head < h; ++head) {
    std::vector<double> p;
    double total = 0;
    for (int64_t j = 0; j <= m - n + i; ++j) {
      double dot = 0;
      for (int64_t c = 0; c < 16; ++c)
        dot += double(at.q.values.at<float>(at.q.begin(head) + i, c)) *
               double(keys.values.at<float>(keys.begin(head * g / h) + j, c));
      total += p.emplace_back(std::exp(dot / 4));
    }
    for (size_t j = 0; j < p.size(); ++j) paid[j] += p[j] / total;
  }
  return paid;
}

struct OvParameters {
  int budget, block, sinks, recent, kernel;
  bool norm;
  int rescued = 0;
  std::string anchor = "";
  std::string spec() const {
    std::string out = std::string(rescued ? "kvcrush" : "ov-evict") + "(budget=" + std::to_string(budget) +
                      ",block=" + std::to_string(block) + ",sinks=" + std::to_string(sinks) +
                      ",recent=" + std::to_string(recent) + ",kernel=" + std::to_string(kernel) +
                      ",norm=" + (norm ? "true" : "false");
    return out + (rescued ? ",rescued=" + std::to_string(rescued) + ",anchor=" + anchor : "") + ")";
  }
};

/// The blocks among `gone` that KVCrush keeps, from the votes of all entries.
std::vector<int32_t> rescued(const OvParameters& p, const std::vector<int32_t>& gone, const std::vector<double>& votes,
                             int64_t blocks) {
  const int64_t end = (blocks - p.recent / p.block) * p.block;
  const std::vector<double> evictable(votes.begin() + p.sinks, votes.begin() + end);
  const auto high = top(evictable, int64_t(evictable.size()) / 2);
  const auto bit = [&](int32_t b, int i) {
    return std::binary_search(high.begin(), high.end(), int32_t(b * p.block + i - p.sinks)) ? 1 : 0;
  };
  std::vector<std::pair<int, int32_t>> order;
  for (int32_t b : gone) {
    int distance = 0;
    for (int i = 0; i < p.block; ++i) {
      int ones = 0;
      for (int32_t other : gone) ones += bit(other, i);
      const int anchor = p.anchor == "ones"          ? 1
                         : p.anchor == "alternating" ? i % 2
                         : p.anchor == "mean"        ? 2 * ones > int(gone.size())
                                                     : 0;
      distance += bit(b, i) != anchor;
    }
    order.emplace_back(distance, b);
  }
  std::sort(order.begin(), order.end());
  std::vector<int32_t> out;
  for (size_t x = 0; x < size_t(p.rescued); ++x) out.push_back(order[x * (gone.size() / size_t(p.rescued))].second);
  return out;
}

// Votes step by step over what is held, in plain loops: the last rows of the prompt, then every token.
TEST(Sessions, OvEvictDropsTheBlocksPaidLeast) {
  const OvParameters all[] = {{24, 4, 4, 8, 7, true},
                              {24, 4, 4, 8, 3, false},
                              {12, 3, 0, 0, 1, true},
                              {20, 1, 2, 5, 2, true},
                              {16, 4, 4, 4, 7, true, 2, "zeros"},
                              {12, 3, 3, 3, 1, false, 3, "ones"},
                              {12, 3, 0, 0, 2, true, 1, "mean"},
                              {16, 4, 4, 0, 3, true, 3, "alternating"}};
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const OvParameters& p : all)
      for (const int64_t chunk : {0, 25}) {
        const auto model = tiny_model(h, g);
        Session session(model, in_f32(p.spec(), chunk));
        std::vector<int32_t> held;
        std::vector<double> votes, voters;
        int saved = 0;
        session.tap([&, g = g](LayerView& at) {
          if (at.layer != 2) return;
          for (int kv = 0; kv < g; ++kv) {
            const auto positions = at.store->positions(kv);
            if (held.empty()) continue;
            for (size_t j = 0; j + 1 < positions.size() && at.decoding(); ++j) EXPECT_EQ(positions[j], held[j]);
          }
          const int64_t m = at.store->length(0), n = at.rows[0], rows = std::min<int64_t>(n, 8);
          std::vector<double> paid(size_t(m), 0.0);
          for (int64_t i = n - rows; i < n; ++i) {
            const auto row = paid_by(at, i);
            for (size_t j = 0; j < row.size(); ++j) paid[j] += row[j];
          }
          if (!at.decoding()) votes.clear(), voters.clear();
          votes.resize(size_t(m), 0.0), voters.resize(size_t(m), 0.0);
          for (int64_t j = 0; j < m; ++j) {
            votes[size_t(j)] += *std::max_element(paid.begin() + j, paid.begin() + std::min<int64_t>(m, j + p.kernel));
            voters[size_t(j)] += double(std::min<int64_t>(rows, m - j));
          }
          held = at.store->positions(0);
          if (!at.decoding() || m < p.budget + (1 + p.rescued) * p.block) return;
          std::vector<double> score;
          const int64_t blocks = m / p.block;
          for (int64_t b = 0; b < blocks; ++b) {
            double& sum = score.emplace_back(0.0);
            for (int64_t j = b * p.block; j < (b + 1) * p.block; ++j)
              sum += votes[size_t(j)] / (p.norm ? voters[size_t(j)] : 1);
            if (b * p.block < p.sinks || b >= blocks - p.recent / p.block) sum = INFINITY;
          }
          auto stay = top(score, p.budget / p.block);
          if (p.rescued) {
            std::vector<int32_t> gone;
            for (int32_t b = 0; b < blocks; ++b)
              if (!std::binary_search(stay.begin(), stay.end(), b)) gone.push_back(b);
            for (int32_t b : rescued(p, gone, votes, blocks)) stay.push_back(b), ++saved;
            std::sort(stay.begin(), stay.end());
          }
          std::vector<int32_t> left;
          std::vector<double> their_votes, their_voters;
          for (int64_t j = 0; j < m; ++j)
            if (j / p.block >= blocks || std::binary_search(stay.begin(), stay.end(), int32_t(j / p.block)))
              left.push_back(held[size_t(j)]), their_votes.push_back(votes[size_t(j)]),
                  their_voters.push_back(voters[size_t(j)]);
          held = left, votes = their_votes, voters = their_voters;
        });
        session.prefill(text(50, 9));
        EXPECT_EQ(session.store().layer(2).length(0), 50) << "nothing goes before the first token";
        for (int32_t i = 0; i < 20; ++i) {
          session.decode(i * 5 % 61);
          for (int kv = 0; kv < g; ++kv) EXPECT_EQ(session.store().layer(2).positions(kv), held) << p.spec();
          EXPECT_LT(int64_t(held.size()), p.budget + (1 + p.rescued) * p.block);
        }
        EXPECT_EQ(saved > 0, p.rescued > 0);
      }
}

TEST(Sessions, AdaptiveRkvDropsTheBlocksThatRepeatOthers) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const auto& [budget, block, sinks, recent, kernel, mass, chunk] :
         {std::tuple{24, 4, 4, 8, 7, 0.5, 0}, {24, 3, 0, 6, 1, 0.2, 25}, {12, 2, 2, 2, 3, 0.9, 0}, {20, 1, 2, 5, 2, 0.3, 0}}) {
      const auto model = tiny_model(h, g);
      Session session(model, in_f32("adaptive-rkv(budget=" + std::to_string(budget) + ",block=" + std::to_string(block) +
                                        ",sinks=" + std::to_string(sinks) + ",recent=" + std::to_string(recent) +
                                        ",kernel=" + std::to_string(kernel) + ",mass=" + std::to_string(mass) + ")",
                                    chunk));
      std::vector<int32_t> held;
      Rows history;
      int by_mass = 0, by_redundancy = 0;
      session.tap([&, g = g, budget = budget, block = block, sinks = sinks, recent = recent, kernel = kernel,
                   mass = mass](LayerView& at) {
        if (at.layer != 2) return;
        const int64_t m = at.store->length(0), n = at.rows[0];
        if (!at.decoding()) history.clear();
        for (int64_t i = std::max<int64_t>(0, n - 8); i < n; ++i) history.push_back(paid_by(at, i));
        if (history.size() > 8) history.erase(history.begin());
        held = at.store->positions(0);
        if (!at.decoding() || m < budget + block) return;
        std::vector<double> paid(size_t(m), 0.0), score;
        for (const auto& row : history)
          for (size_t j = 0; j < row.size(); ++j) paid[j] += row[j];
        const int64_t blocks = m / block - (sinks + recent) / block, quota = (budget - sinks - recent) / block;
        double total = 0, sum = 0;
        for (int64_t b = 0; b < blocks; ++b) {
          score.push_back(0);
          for (int64_t j = sinks + b * block; j < sinks + (b + 1) * block; ++j)
            score.back() += *std::max_element(paid.begin() + j, paid.begin() + std::min<int64_t>(m, j + kernel));
          total += score.back();
        }
        std::vector<int32_t> order = all_of(blocks), sure;
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return score[size_t(a)] > score[size_t(b)]; });
        for (int32_t b : order) {
          if (sum >= mass * total || int64_t(sure.size()) >= quota) break;
          sum += score[size_t(b)], sure.push_back(b);
        }
        std::sort(sure.begin(), sure.end());
        // Entries are those between the first and the latest ones.
        const Ragged keys = stored_keys(at);
        const int64_t size = blocks * block;
        std::vector<double> worth(size_t(blocks), 0.0);
        for (int64_t kv = 0; kv < g; ++kv) {
          auto key = [&](int64_t i, int64_t c) { return double(keys.values.at<float>(keys.begin(kv) + sinks + i, c)); };
          for (int64_t i = 0; i < size; ++i) {
            std::vector<double> cosine(size_t(size), 0.0);
            for (int64_t t = 0; t < size; ++t) {
              double it = 0, ii = 0, tt = 0;
              for (int64_t c = 0; c < 16; ++c)
                it += key(i, c) * key(t, c), ii += key(i, c) * key(i, c), tt += key(t, c) * key(t, c);
              if (t != i) cosine[size_t(t)] = it / std::sqrt(ii * tt);
            }
            const double mean = std::accumulate(cosine.begin(), cosine.end(), 0.0) / double(size);
            for (int64_t t = 0; t < size; ++t)
              if (cosine[size_t(t)] >= mean && !std::binary_search(sure.begin(), sure.end(), int32_t(t / block)))
                worth[size_t(i / block)] -= cosine[size_t(t)];
          }
        }
        for (int32_t b : sure) worth[size_t(b)] = INFINITY;
        by_mass += int(sure.size()), by_redundancy += int(quota) - int(sure.size());
        const auto stay = top(worth, quota);
        std::vector<int32_t> left;
        for (int64_t j = 0; j < m; ++j)
          if (j < sinks || j >= sinks + size || std::binary_search(stay.begin(), stay.end(), int32_t((j - sinks) / block)))
            left.push_back(held[size_t(j)]);
        held = left;
        history.clear();
      });
      session.prefill(text(50, 9));
      for (int32_t i = 0; i < 20; ++i) {
        session.decode(i * 5 % 61);
        for (int kv = 0; kv < g; ++kv) EXPECT_EQ(session.store().layer(2).positions(kv), held) << "token " << i;
      }
      EXPECT_GT(by_mass, 0);
      EXPECT_TRUE(by_redundancy > 0 || mass > 0.8);
    }
}

// The layers behind the first keep what it has named.
TEST(Sessions, TrimmedLlamaTrimsAllLayersAlike) {
  const auto model = tiny_model(6, 2);
  for (int64_t chunk : {0, 25}) {
    const auto kept = held(model, "trimmed-llama(budget=0.1,layers=1-)", chunk);
    ASSERT_EQ(kept.size(), 8u);
    for (size_t i = 2; i < kept.size(); ++i) EXPECT_EQ(kept[i], kept[2]);
    EXPECT_EQ(kept[0].size(), 83u);
    EXPECT_GE(kept[2].size(), 8u);
    EXPECT_LE(kept[2].size(), 48u);
  }
}

// Cosines in plain loops; one-dimensional k-means begun with layers spread evenly; the group of the highest gives up.
TEST(Sessions, SqueezeAttentionTakesFromLayersThatTurnTheStreamLeast) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}})
    for (const auto& [budget, share, chunk] : {std::tuple{24, 0.35, 0}, {20, 0.5, 25}, {16, 1.0, 0}, {30, 0.0, 0}}) {
      ModelInfo shape;
      shape.layers = 7, shape.h = h, shape.g = g, shape.d = shape.d_v = 16, shape.hidden = 48, shape.vocabulary = 61;
      const auto model = Model::random(shape, 64, Dtype::F32, 5);
      Session session(model, in_f32("squeeze-attention(knorm(budget=" + std::to_string(budget) +
                                        "),share=" + std::to_string(share) + ")",
                                    chunk));
      std::vector<double> cosine(7, 0.0);
      session.tap([&, h = h](LayerView& at) {
        const int64_t n = at.rows[0];
        for (int64_t t = 0; t < n; ++t) {
          double xx = 0, xy = 0, yy = 0;
          for (int64_t c = 0; c < 48; ++c) {
            const double x = at.hidden.at<float>(t, c);
            double y = x;
            for (int64_t e = 0; e < h * 16; ++e)
              y += double(at.output_matrix.at<float>(c, e)) * double(at.out.at<float>(e / 16 * n + t, e % 16));
            xx += x * x, xy += x * y, yy += y * y;
          }
          cosine[size_t(at.layer)] += xy / std::sqrt(xx * yy) / 83;
        }
      });
      session.prefill(text(83, 1));
      std::vector<double> centre = {cosine[0], cosine[2], cosine[4]};
      std::vector<size_t> label(7);
      for (int round = 0; round < 17; ++round) {
        for (size_t l = 0; l < 7; ++l)
          for (size_t x = 0; x < 3; ++x)
            if (x == 0 || std::abs(cosine[l] - centre[x]) < std::abs(cosine[l] - centre[label[l]])) label[l] = x;
        for (size_t x = 0; x < 3 && round < 16; ++x) {
          double sum = 0, size = 0;
          for (size_t l = 0; l < 7; ++l)
            if (label[l] == x) sum += cosine[l], size += 1;
          if (size > 0) centre[x] = sum / size;
        }
      }
      const size_t least = size_t(std::max_element(centre.begin(), centre.end()) - centre.begin());
      const double many = double(std::count(label.begin(), label.end(), least));
      ASSERT_LT(many, 7);
      for (int l = 0; l < 7; ++l) {
        const double granted = share >= 1 || many == 7     ? budget
                               : label[size_t(l)] == least ? budget * share
                                                           : budget * (7 - many * share) / (7 - many);
        for (int kv = 0; kv < g; ++kv)
          EXPECT_EQ(session.store().layer(l).length(kv), std::max<int64_t>(1, int64_t(granted + 1e-6))) << "layer " << l;
      }
    }
}

}  // namespace
}  // namespace heed::test
