// Planners that choose blocks, columns and diagonals by cheap scores, against their rules written out.
#include "plan_case.h"

namespace heed::test {
namespace {

class Blocks : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Blocks);

/// A tile of query rows and the blocks of keys it may read.
struct Tile {
  int64_t head, first, end;              // query rows
  int64_t own_first, own_last, visible;  // blocks
};

/// Checks each tile's blocks against what `expected` says of it.
template <class Expected>
void expect_blocks(const Case& c, const std::string& spec, const std::string& backend, int64_t q_block, int64_t k_block,
                   Expected expected) {
  const auto plan = planned(c, spec, backend, q_block, k_block);
  const int64_t tiles = ceil_of(c.shape.n, q_block);
  for (int64_t head = 0; head < c.shape.h; ++head)
    for (int64_t t = 0; t < tiles; ++t) {
      Tile tile{head, t * q_block, std::min(c.shape.n, (t + 1) * q_block), 0, 0, 0};
      tile.own_first = (c.first() + tile.first) / k_block, tile.own_last = (c.first() + tile.end - 1) / k_block;
      tile.visible = tile.own_last + 1;
      EXPECT_EQ(plan[size_t(head * tiles + t)], sorted(expected(tile))) << spec << " head " << head << " tile " << t;
    }
}

/// Checks each query's keys: what `reads(head, i, j)` says of any query of its tile.
template <class Reads>
void expect_keys(const Case& c, const std::string& spec, const std::string& backend, int64_t tile, Reads reads) {
  const auto plan = planned(c, spec, backend, 1, 1);
  for (int64_t head = 0; head < c.shape.h; ++head)
    for (int64_t i = 0; i < c.shape.n; ++i) {
      std::vector<int32_t> keys;
      for (int64_t j = 0; j <= c.first() + i; ++j) {
        bool any = false;
        for (int64_t r = i / tile * tile; r < std::min(c.shape.n, (i / tile + 1) * tile); ++r) any |= reads(head, r, j);
        if (any) keys.push_back(int32_t(j));
      }
      EXPECT_EQ(plan[size_t(head * c.shape.n + i)], keys) << spec << " head " << head << " row " << i;
    }
}

TEST_P(Blocks, IdentityIsDense) {
  for (const Shape s : {shape(130, 130), shape(33, 97), shape(1, 1), shape(1, 70)}) {
    const Case c(s);
    for (const char* spec :
         {"minference(columns=1000000000,block=16)", "minference(slashes=1000000000,block=16)",
          "minference(pattern=block-sparse,topk=1000,block=16)", "minference(pattern=a-shape,local=1000000000)",
          "sample_attention(alpha=1)", "sample_attention(window=1,tile=16)", "spargeattn(tau=1)",
          "spargeattn(theta=1,q_block=16,k_block=8)", "vggt_block_sparse(sparse_ratio=0)",
          "vggt_block_sparse(cdf=1,q_block=16,k_block=8)", "bra(topk=1000000,region=8)", "dhsa(density=1)",
          "dhsa(last=1000000000)", "proxyattn(gamma=1)", "proxyattn(min_budget=1000000,block=16)",
          "infllm_v2(topk=1000000)", "infllm_v2", "infllm_v2(dense_len=0,topk=9,block=16,stride=4)"})
      EXPECT_LT(c.dense_error(c.run(spec, backend())), kExact) << spec;
  }
}

TEST_P(Blocks, VerticalSlashReadsTheKeysAndDistancesOfTheLastRows) {
  for (const auto& [s, tile, last, columns, slashes] : {std::tuple{shape(171, 171), 1, 64, 40, 110},
                                                        {shape(171, 171), 16, 20, 35, 104},
                                                        {shape(70, 181), 8, 64, 50, 101},
                                                        {shape(9, 140), 4, 64, 33, 120}}) {
    const Case c(s, 3, 2.0);
    std::vector<std::set<int32_t>> keys, distances;
    for (int64_t head = 0; head < s.h; ++head) {
      std::vector<double> column(size_t(s.m), 0.0), distance(size_t(s.m), 0.0);
      for (int64_t i = std::max<int64_t>(0, s.n - last); i < s.n; ++i) {
        const auto p = c.causal(head, i);
        for (int64_t j = 0; j <= c.first() + i; ++j)
          column[size_t(j)] += p[size_t(j)], distance[size_t(c.first() + i - j)] += p[size_t(j)];
      }
      std::fill_n(column.begin(), 30, INFINITY), std::fill_n(distance.begin(), 100, INFINITY);
      const auto best = top(column, columns), best_distances = top(distance, slashes);
      keys.emplace_back(best.begin(), best.end()), distances.emplace_back(best_distances.begin(), best_distances.end());
    }
    expect_keys(c,
                "minference(block=" + std::to_string(tile) + ",last=" + std::to_string(last) +
                    ",columns=" + std::to_string(columns) + ",slashes=" + std::to_string(slashes) + ")",
                backend(), tile, [&](int64_t head, int64_t i, int64_t j) {
                  return keys[size_t(head)].contains(int32_t(j)) ||
                         distances[size_t(head)].contains(int32_t(c.first() + i - j));
                });
  }
}

/// The blocks of highest mean score, the tile's own first.
std::set<int32_t> best_means(const Case& c, const Tile& t, int64_t block, int64_t k) {
  std::vector<double> score;
  for (int64_t b = 0; b < t.visible; ++b)
    score.push_back(b >= t.own_first
                        ? INFINITY
                        : mean_dot(c, t.head, t.first, t.end, b * block, std::min(c.shape.m, (b + 1) * block)));
  const auto best = top(score, k);
  return {best.begin(), best.end()};
}

TEST_P(Blocks, MInferenceReadsBlocksOfHighestMean) {
  for (const auto& [s, block, k] : {std::tuple{shape(150, 150), 16, 3}, {shape(50, 133), 8, 5}, {shape(1, 60), 16, 2}}) {
    const Case c(s, 4);
    expect_blocks(c,
                  "minference(pattern=block-sparse,block=" + std::to_string(block) + ",topk=" + std::to_string(k) + ")",
                  backend(), block, block, [&](const Tile& t) { return best_means(c, t, block, k); });
  }
}

TEST_P(Blocks, MInferenceHasAPatternForEachHead) {
  const Case c(shape(165, 165), 5);
  std::vector<std::set<int32_t>> best;  // of the first head, by tile
  for (int64_t b = 0; b * 8 < 165; ++b)
    best.push_back(best_means(c, {0, b * 8, std::min<int64_t>(165, (b + 1) * 8), b, b, b + 1}, 8, 3));
  expect_keys(c, "minference(pattern=a-shape,sinks=5,local=9,blocks=0,topk=3,block=8)", backend(), 8,
              [&](int64_t head, int64_t i, int64_t j) {
                if (head > 0) return j < 5 || (j <= i && i - j < 9);
                return best[size_t(i / 8)].contains(int32_t(j / 8));
              });
}

TEST_P(Blocks, SampleAttentionReadsWhatSampledRowsPay) {
  for (const auto& [s, stride, alpha, window, tile] :
       {std::tuple{shape(150, 150), 5, 0.7, 0.08, 1}, {shape(61, 143), 10, 0.9, 0.02, 16}, {shape(1, 90), 20, 0.5, 0.1, 8}}) {
    const Case c(s, 6, 2.5);
    std::vector<std::set<int32_t>> keys;
    for (int64_t head = 0; head < s.h; ++head) {
      std::vector<double> mass(size_t(s.m), 0.0);
      for (int64_t i = s.n - 1; i >= 0; i -= stride) {
        const auto p = c.causal(head, i);
        for (size_t j = 0; j < p.size(); ++j) mass[j] += p[j];
      }
      const auto best = top(mass, holding(mass, double(float(alpha)), true));
      keys.emplace_back(best.begin(), best.end());
    }
    const int64_t local = std::max<int64_t>(1, int64_t(std::ceil(window * double(s.m))));
    expect_keys(c,
                "sample_attention(rows=" + number(1.0 / double(stride)) + ",alpha=" + number(alpha) +
                    ",window=" + number(window) + ",tile=" + std::to_string(tile) + ")",
                backend(), tile, [&](int64_t head, int64_t i, int64_t j) {
                  const int64_t behind = c.first() + i - j;
                  return keys[size_t(head)].contains(int32_t(j)) || (behind >= 0 && behind < local);
                });
  }
}

/// Rows of every second block point one way.
Case striped(const Shape& s, int64_t block, uint64_t seed) {
  Case c(s, seed, 1.0);
  Random random(seed + 100);
  for (const Buffer* x : {&c.q, &c.k}) {
    const Tensor& t = x->view();
    for (int64_t head = 0; head < t.size[0]; ++head)
      for (int64_t b = 0; b * block < t.size[1]; ++b) {
        std::vector<float> way;
        for (int64_t e = 0; e < s.d; ++e) way.push_back(float(3 * random.normal()));
        for (int64_t i = b * block; b % 2 == 0 && i < std::min(t.size[1], (b + 1) * block); ++i)
          for (int64_t e = 0; e < s.d; ++e) t.as<float>()[(head * t.size[1] + i) * s.d + e] += way[size_t(e)];
      }
  }
  return c;
}

/// Mean cosine of all pairs of rows, after `shift` is taken off each.
double likeness(const Tensor& x, int64_t head, int64_t first, int64_t end, const std::vector<double>& shift) {
  double sum = 0;
  const int64_t d = x.size[2];
  for (int64_t a = first; a < end; ++a)
    for (int64_t b = first; b < end; ++b) {
      double ab = 0, aa = 0, bb = 0;
      for (int64_t e = 0; e < d; ++e) {
        const double p = double(x.at<float>(head, a, e)) - shift[size_t(e)],
                     q = double(x.at<float>(head, b, e)) - shift[size_t(e)];
        ab += p * q, aa += p * p, bb += q * q;
      }
      sum += ab / std::sqrt(aa * bb);
    }
  return sum / double((end - first) * (end - first));
}

TEST_P(Blocks, SpargeAttnReadsAlikeBlocksByMassAndOthersAnyway) {
  int alike_blocks = 0, other_blocks = 0;
  for (const auto& [s, tau, topk, sink] :
       {std::tuple{shape(150, 150), 0.6, 0.0, false}, {shape(70, 141), 0.8, 0.0, true}, {shape(150, 150), 0.9, 0.3, false}}) {
    const int64_t q_block = 16, k_block = 8;
    const Case c = striped(s, 16, 7);
    const double theta = 0.5, scale = 1 / std::sqrt(double(s.d));
    const int64_t blocks = ceil_of(s.m, k_block);
    expect_blocks(
        c,
        "spargeattn(q_block=16,k_block=8,theta=0.5,tau=" + number(tau) + ",topk=" + number(topk) +
            (sink ? ",sink=true)" : ")"),
        backend(), q_block, k_block, [&, tau = tau, topk = topk, sink = sink](const Tile& t) {
          const int64_t kv = t.head / c.group();
          std::vector<double> mean(size_t(s.d), 0.0);
          for (int64_t j = 0; j < s.m; ++j)
            for (int64_t e = 0; e < s.d; ++e) mean[size_t(e)] += double(c.k->at<float>(kv, j, e)) / double(s.m);
          const bool whole = likeness(c.q, t.head, t.first, t.end, std::vector<double>(size_t(s.d), 0.0)) <= theta;
          std::set<int32_t> read;
          std::vector<int32_t> alike;
          std::vector<double> logit;
          for (int64_t b = 0; b < t.visible; ++b) {
            const int64_t end = std::min(s.m, (b + 1) * k_block);
            const bool like = likeness(c.k, kv, b * k_block, end, mean) > theta;
            (like ? alike_blocks : other_blocks) += 1;
            if (!like || whole || (sink && b == 0)) read.insert(int32_t(b));
            if (like)
              alike.push_back(int32_t(b)), logit.push_back(scale * mean_dot(c, t.head, t.first, t.end, b * k_block, end));
          }
          if (alike.empty()) return read;
          const auto p = softmax(logit);
          const int64_t count = topk > 0 ? int64_t(topk * double(blocks)) : holding(p, double(float(tau)), false);
          for (int32_t x : top(p, std::max<int64_t>(1, count))) read.insert(alike[size_t(x)]);
          return read;
        });
  }
  EXPECT_GT(alike_blocks, 0);
  EXPECT_GT(other_blocks, 0);
}

TEST_P(Blocks, VggtReadsItsMassOrItsShareAndSpecialTokens) {
  for (const auto& [s, cdf, ratio, special, frame] : {std::tuple{shape(150, 150), 0.6, 0.8, 0, 0},
                                                      {shape(150, 150), 0.3, 0.95, 3, 0},
                                                      {shape(60, 133), 0.5, 0.9, 2, 50},
                                                      {shape(1, 77), 0.5, 0.9, 1, 40}}) {
    const int64_t q_block = 16, k_block = 8, blocks = ceil_of(s.m, k_block);
    const Case c(s, 8, 2.0);
    const double scale = 1 / std::sqrt(double(s.d));
    auto marked = [&, special = special, frame = frame](int64_t first, int64_t end) {
      for (int64_t x = first; x < end; ++x)
        if ((frame ? x % frame : x) < special) return true;
      return false;
    };
    expect_blocks(c,
                  "vggt_block_sparse(q_block=16,k_block=8,cdf=" + number(cdf) + ",sparse_ratio=" + number(ratio) +
                      ",special=" + std::to_string(special) + ",frame=" + std::to_string(frame) + ")",
                  backend(), q_block, k_block, [&, cdf = cdf, ratio = ratio](const Tile& t) {
                    std::vector<double> logit;
                    std::set<int32_t> read;
                    const bool whole = marked(c.first() + t.first, c.first() + t.end);
                    for (int64_t b = 0; b < t.visible; ++b) {
                      const int64_t end = std::min(s.m, (b + 1) * k_block);
                      logit.push_back(scale * mean_dot(c, t.head, t.first, t.end, b * k_block, end));
                      if (whole || marked(b * k_block, (b + 1) * k_block)) read.insert(int32_t(b));
                    }
                    const auto p = softmax(logit);
                    const int64_t least = std::max<int64_t>(1, int64_t(double(blocks) * (1 - ratio)));
                    for (int32_t b : top(p, std::max(least, holding(p, double(float(cdf + 1e-5)), false))))
                      read.insert(b);
                    return read;
                  });
  }
}

TEST_P(Blocks, BraRoutesRegionsByAllHeadsTogether) {
  for (const auto& [s, region, k] : {std::tuple{shape(150, 150), 16, 3}, {shape(45, 131), 8, 4}}) {
    const Case c(s, 9);
    expect_blocks(c, "bra(region=" + std::to_string(region) + ",topk=" + std::to_string(k) + ")", backend(), region,
                  region, [&, region = region, k = k](const Tile& t) {
                    std::vector<double> affinity;
                    for (int64_t b = 0; b < t.visible; ++b) {
                      double sum = 0;
                      for (int64_t head = 0; head < s.h; ++head)
                        sum += mean_dot(c, head, t.first, t.end, b * region, std::min<int64_t>(s.m, (b + 1) * region));
                      affinity.push_back(sum);
                    }
                    const auto best = top(affinity, k);
                    return std::set<int32_t>(best.begin(), best.end());
                  });
  }
}

TEST_P(Blocks, DhsaReadsAShareByOneMapOfAllHeads) {
  for (const auto& [s, density, last, a_shape] :
       {std::tuple{shape(150, 150), 0.3, 0, false}, {shape(61, 139), 0.25, 20, false}, {shape(150, 150), 0.1, 5, true}}) {
    const int64_t q_block = 16, k_block = 8;
    const Case c(s, 10);
    auto mean = [&](const Tensor& x, int64_t first, int64_t end, int64_t e) {
      double sum = 0;
      for (int64_t head = 0; head < x.size[0]; ++head)
        for (int64_t i = first; i < end; ++i) sum += double(x.at<float>(head, i, e));
      return sum / double(x.size[0] * (end - first));
    };
    expect_blocks(c,
                  "dhsa(q_block=16,k_block=8,density=" + number(density) + ",last=" + std::to_string(last) +
                      (a_shape ? ",a_shape=true)" : ")"),
                  backend(), q_block, k_block, [&, density = density, last = last, a_shape = a_shape](const Tile& t) {
                    std::vector<double> score;
                    for (int64_t b = 0; b < t.visible; ++b) {
                      const int64_t end = std::min(s.m, (b + 1) * k_block);
                      double dot = 0;
                      for (int64_t e = 0; e < s.d; ++e)
                        dot += mean(c.q, t.first, t.end, e) * mean(c.k, b * k_block, end, e);
                      score.push_back(dot * std::sqrt(double(end - b * k_block)));
                    }
                    if (a_shape) score.front() = score.back() = INFINITY;
                    int64_t count = std::max<int64_t>(a_shape ? 2 : 1,
                                                      int64_t(std::ceil(density * double(t.visible) - 1e-9)));
                    if (t.end > s.n - last) count = t.visible;
                    const auto best = top(score, count);
                    return std::set<int32_t>(best.begin(), best.end());
                  });
  }
}

TEST_P(Blocks, ProxyAttnOrdersByItsProxyAndCountsByHead) {
  for (const auto& [s, proxies, stride, gamma, least] : {std::tuple{shape(150, 150), 1, 4, 0.5, 0},
                                                         {shape(150, 150), 1, 1, 0.7, 24},
                                                         {shape(67, 139), int(GetParam().g), 2, 0.6, 0},
                                                         {shape(1, 61), 1, 4, 0.6, 16}}) {
    const int64_t block = 8, blocks = ceil_of(s.m, block);
    const Case c(s, 11, 3.0);
    const double scale = 1 / std::sqrt(double(s.d));
    // Mean queries and keys of a group of heads, and what sampled rows pay sampled keys.
    auto mean = [&, proxies = proxies](const Tensor& x, int64_t p, int64_t i, int64_t e) {
      const int64_t count = x.size[0] / proxies;
      double sum = 0;
      for (int64_t head = p * count; head < (p + 1) * count; ++head) sum += double(x.at<float>(head, i, e));
      return sum / double(count);
    };
    std::vector<Rows> maps;
    for (int64_t p = 0; p < proxies; ++p) {
      Rows map(size_t(ceil_of(s.n, block)), std::vector<double>(size_t(blocks), 0.0));
      for (int64_t i = 0; i < s.n; i += stride) {
        std::vector<double> logit;
        for (int64_t j = 0; j <= c.first() + i; j += stride) {
          double dot = 0;
          for (int64_t e = 0; e < s.d; ++e) dot += mean(c.q, p, i, e) * mean(c.k, p, j, e);
          logit.push_back(scale * dot);
        }
        const auto w = softmax(logit);
        for (size_t x = 0; x < w.size(); ++x) {
          double& cell = map[size_t(i / block)][x * size_t(stride) / size_t(block)];
          cell = std::max(cell, w[x]);
        }
      }
      maps.push_back(map);
    }
    expect_blocks(c,
                  "proxyattn(block=8,proxies=" + std::to_string(proxies) + ",stride=" + std::to_string(stride) +
                      ",gamma=" + number(gamma) + ",min_budget=" + std::to_string(least) + ")",
                  backend(), block, block, [&, proxies = proxies, gamma = gamma, least = least](const Tile& t) {
                    std::vector<double> mass(size_t(blocks), 0.0);
                    for (int64_t i = std::max<int64_t>(0, s.n - block); i < s.n; ++i) {
                      const auto p = c.causal(t.head, i);
                      for (size_t j = 0; j < p.size(); ++j) mass[j / size_t(block)] += p[j];
                    }
                    const int64_t held = holding(mass, double(float(gamma)), true);
                    std::vector<double> score = maps[size_t(t.head * proxies / s.h)][size_t(t.first / block)];
                    score.resize(size_t(t.visible));
                    for (int64_t b = 0; b < t.visible; ++b)
                      if (b == 0 || b >= t.own_first) score[size_t(b)] = INFINITY;
                    const auto best = top(score, std::max(ceil_of(held * t.visible, blocks), ceil_of(least, block)));
                    return std::set<int32_t>(best.begin(), best.end());
                  });
  }
}

// A key that one query pays nearly all is seen by the largest weight of a block, and lost in a mean of means.
TEST_P(Blocks, ProxyAttnFindsASingleKey) {
  Case c(shape(128, 128), 12, 0.3);
  for (int64_t e = 0; e < 16; ++e) {
    for (int64_t head = 0; head < c.shape.h; ++head) c.q->as<float>()[(head * 128 + 100) * 16 + e] = 6;
    for (int64_t head = 0; head < c.shape.g; ++head) c.k->as<float>()[(head * 128 + 37) * 16 + e] = 6;
  }
  const auto plan = planned(c, "proxyattn(block=8,stride=1,gamma=0.05,min_budget=24)", backend(), 8, 8);
  for (int64_t head = 0; head < c.shape.h; ++head) {
    const auto& read = plan[size_t(head * 16 + 100 / 8)];
    EXPECT_TRUE(std::binary_search(read.begin(), read.end(), 37 / 8));
  }
}

TEST_P(Blocks, InfLlmV2ReadsBlocksThatItsWindowsTouch) {
  for (const auto& [s, stride, block, k, first, local] : {std::tuple{shape(150, 150), 4, 16, 4, 1, 1},
                                                          {shape(61, 139), 8, 8, 5, 0, 0},
                                                          {shape(1, 131), 4, 8, 6, 2, 1},
                                                          {shape(40, 40), 16, 16, 2, 1, 0}}) {
    const Case c(s, 14, 3.0);
    const std::string spec = "infllm_v2(dense_len=0,stride=" + std::to_string(stride) +
                             ",block=" + std::to_string(block) + ",topk=" + std::to_string(k) +
                             ",init_blocks=" + std::to_string(first) + ",local_blocks=" + std::to_string(local) + ")";
    const ApplyOutput out = c.run(spec, backend());
    const auto plan = lists(out, "plan"), read = lists(out, "read");
    const double scale = 1 / std::sqrt(double(s.d));
    for (int64_t kv = 0; kv < s.g; ++kv)
      for (int64_t i = 0; i < s.n; ++i) {
        const int64_t at = c.first() + i, own = at / block;
        std::vector<double> score(size_t(own + 1), 0.0), sum;
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
          std::vector<double> logit;
          for (int64_t w = 0; w + 2 * stride <= at + 1; w += stride)
            logit.push_back(scale * mean_dot(c, head, i, i + 1, w, w + 2 * stride));
          if (logit.empty()) continue;
          const auto p = softmax(logit);
          sum.resize(p.size(), 0.0);
          for (size_t w = 0; w < p.size(); ++w) sum[w] += p[w];
        }
        for (int64_t b = 0; b <= own; ++b) {
          // Windows with a key in the block or, as the released pooling has it, that begin in it.
          for (int64_t w = 0; w < int64_t(sum.size()); ++w)
            if (w * stride + 2 * stride > b * block && w * stride < (b + 1) * block)
              score[size_t(b)] = std::max(score[size_t(b)], sum[size_t(w)]);
          if (b < first || b >= own - local) score[size_t(b)] = INFINITY;
        }
        std::vector<int32_t> keys;
        for (int32_t b : top(score, k))
          for (int64_t j = b * block; j < (b + 1) * block && j <= at; ++j) keys.push_back(int32_t(j));
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
          EXPECT_EQ(plan[size_t(head * s.n + i)], keys) << spec << " head " << head << " row " << i;
          if (i + 1 == s.n) { EXPECT_EQ(read[size_t(head)], keys) << spec; }
        }
      }
    EXPECT_LT(c.error(out,
                      [&](int64_t head, int64_t i, int64_t j) {
                        const auto& list = plan[size_t(head * s.n + i)];
                        return std::binary_search(list.begin(), list.end(), int32_t(j));
                      }),
              kExact);
  }
}

TEST(BlockErrors, AreSaid) {
  const Case c({2, 2, 64, 64, 16, 16});
  ApplyInput in = c.input("reference");
  in.causal = false;
  for (const char* spec : {"minference", "sample_attention", "dhsa", "proxyattn", "infllm_v2"})
    EXPECT_FALSE(apply(spec, in).has_value()) << spec;
  EXPECT_NE(apply("proxyattn(proxies=3)", c.input("reference")).error().text().find("proxies"), std::string::npos);
  EXPECT_NE(apply("proxyattn(stride=3)", c.input("reference")).error().text().find("stride"), std::string::npos);
}

// Without causality nothing is hidden: vggt's and SpargeAttn's plans are those of images too.
TEST_P(Blocks, PlansOfImagesReadLaterBlocks) {
  const Case c(shape(96, 96), 13, 2.0);
  ApplyInput in = c.input(backend());
  in.causal = false;
  for (const std::string spec : {"vggt_block_sparse(q_block=16,k_block=8,cdf=0.4,sparse_ratio=0.9,special=0)",
                                 "spargeattn(q_block=16,k_block=8,theta=-1,tau=0.5)", "bra(region=16,topk=2)"}) {
    const ApplyOutput out = Case::run(spec, in);
    const auto plan = lists(out, "plan");
    const int64_t cols = out.find("plan_block")->view().at<int32_t>(1);
    double worst = 0;
    bool later = false;
    for (int64_t head = 0; head < c.shape.h; ++head)
      for (int64_t i = 0; i < 96; ++i) {
        const auto& list = plan[size_t(head * 6 + i / 16)];
        later |= !list.empty() && list.back() * cols > i;
        const auto expected = c.output(head, c.weights(head, i, [&](int64_t j) {
          return std::binary_search(list.begin(), list.end(), int32_t(j / cols));
        }));
        for (int64_t x = 0; x < c.shape.d_v; ++x)
          worst = std::max(worst, std::abs(expected[size_t(x)] - double(out.find("out")->view().at<float>(head, i, x))));
      }
    EXPECT_LT(worst, kExact) << spec;
    EXPECT_TRUE(later) << spec;
  }
}

}  // namespace
}  // namespace heed::test
