// Planners that look before they read: searches, estimates in few bits, plans of other steps, corrections of what is left out.
#include "plan_case.h"

namespace heed::test {
namespace {

class Estimates : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Estimates);

TEST_P(Estimates, IdentityIsDense) {
  for (const Shape s : {shape(130, 130), shape(33, 97), shape(1, 1), shape(1, 70)}) {
    const Case c(s);
    for (const char* spec :
         {"hip(topk=1000000000)", "hip(topk=16,window=200)", "sale(tau=0)", "sale", "sale(tau=1,dense_len=0,local=200)",
          "sparsed(ratio=1)", "sparsed(step=205)", "sparsed(ratio=0.99,block=16)", "light_forcing",
          "light_forcing(sparsity=0,target=0,topk=1000000000,frame=16,block=16)", "hyperattention",
          "hyperattention(min_len=16,sample=1000000)", "hyperattention(min_len=16,block=1000000,sample=3)",
          "rectified_spaattn(remain=1)", "rectified_spaattn(topk=1000,block=16)", "rectified_spaattn(text=256)"})
      EXPECT_LT(c.dense_error(c.run(spec, backend())), kExact) << spec;
  }
}

/// HiP's search in one tile: the candidate blocks that are left, by the definition.
std::set<int32_t> searched(const Case& c, int64_t head, int64_t first, int64_t end, int64_t candidates, int64_t skipped,
                           int64_t keep, int64_t k_block, int64_t stride, bool centre) {
  struct Part {
    int64_t begin, size;
  };
  std::vector<Part> parts;
  for (int64_t j = 0; j < keep; ++j)
    parts.push_back({j * candidates / keep, (j + 1) * candidates / keep - j * candidates / keep});
  std::set<int64_t> rows;
  for (int64_t r = stride - 1; r < end - first + stride; r += stride) rows.insert(std::min(first + r, end - 1));
  const auto single = [](const Part& p) { return p.size <= 1; };
  do {
    std::vector<Part> halves;
    std::vector<double> score;
    for (const Part& p : parts)
      for (const Part& half : {Part{p.begin, p.size / 2}, Part{p.begin + p.size / 2, p.size - p.size / 2}}) {
        if (half.size == 0) continue;
        halves.push_back(half);
        const int64_t block = skipped + half.begin + (centre ? half.size / 2 : 0);
        double most = -INFINITY;
        for (int64_t i : rows)
          for (int64_t j = block * k_block; j < (block + 1) * k_block; ++j) most = std::max(most, c.dot(head, i, j));
        score.push_back(most);
      }
    parts.clear();
    for (int32_t x : top(score, keep)) parts.push_back(halves[size_t(x)]);
  } while (!std::all_of(parts.begin(), parts.end(), single));
  std::set<int32_t> out;
  for (const Part& p : parts) out.insert(int32_t(skipped + p.begin));
  return out;
}

TEST_P(Estimates, HipKeepsTheHalvesOfLargestProduct) {
  for (const auto& [s, topk, q_block, k_block, stride, sinks, window, centre] :
       {std::tuple{shape(170, 170), 16, 16, 2, 2, 4, 20, true},
        {shape(61, 203), 24, 8, 4, 3, 5, 9, false},
        {shape(1, 151), 10, 16, 1, 2, 0, 7, true},
        {shape(150, 150), 30, 32, 2, 2, 3, 16, true}}) {
    const Case c(s, 3, 2.0);
    const auto plan = planned(c,
                              "hip(topk=" + std::to_string(topk) + ",q_block=" + std::to_string(q_block) +
                                  ",k_block=" + std::to_string(k_block) + ",q_stride=" + std::to_string(stride) +
                                  ",sinks=" + std::to_string(sinks) + ",window=" + std::to_string(window) +
                                  (centre ? ")" : ",representative=first)"),
                              backend(), q_block, k_block);
    const int64_t tiles = ceil_of(s.n, q_block), skipped = ceil_of(sinks, k_block);
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = t * q_block, end = std::min<int64_t>(s.n, first + q_block), position = c.first() + first,
                      candidates = std::max<int64_t>(
                          0, (position + 1 - window < 0 ? 0 : (position + 1 - window) / k_block) - skipped);
        std::set<int32_t> read;
        if (candidates > 0)
          read = searched(c, head, first, end, candidates, skipped, topk / k_block, k_block, stride, centre);
        for (int64_t b = 0; b * k_block < c.first() + end; ++b) {
          bool seen = b < skipped;
          for (int64_t j = b * k_block; j < (b + 1) * k_block; ++j) seen |= j > position - window;
          if (seen) read.insert(int32_t(b));
        }
        EXPECT_EQ(plan[size_t(head * tiles + t)], sorted(read)) << "head " << head << " tile " << t;
      }
  }
}

/// Whether block `b` of `visible` is the first or among SALE's latest.
bool sale_reads_anyway(int64_t b, int64_t visible, int64_t few, int64_t whole) {
  int64_t latest = few;
  while (visible - 1 - latest > 0 && (visible - 1 - latest) % whole != 0) ++latest;
  return b == 0 || b >= visible - latest;
}

TEST_P(Estimates, SaleReadsBlocksWithAHeavyPair) {
  for (const auto& [s, tau, bits, local, segment] :
       {std::tuple{shape(150, 150), 0.2, 4, 16, 8}, {shape(61, 143), 0.3, 4, 8, 24}, {shape(1, 131), 0.1, 3, 8, 16}}) {
    const int64_t q_block = 8, k_block = 4, levels = (1 << (bits - 1)) - 1;
    const Case c(s, 5, 1.0);
    // Rows less their mean, and what is left of them in so many levels.
    const auto smooth = [&](const Tensor& x, int64_t head, std::vector<double>* mean) {
      Rows rows(size_t(x.size[1]), std::vector<double>(size_t(s.d)));
      mean->assign(size_t(s.d), 0.0);
      for (int64_t i = 0; i < x.size[1]; ++i)
        for (int64_t e = 0; e < s.d; ++e) (*mean)[size_t(e)] += double(x.at<float>(head, i, e)) / double(x.size[1]);
      for (int64_t i = 0; i < x.size[1]; ++i)
        for (int64_t e = 0; e < s.d; ++e)
          rows[size_t(i)][size_t(e)] = double(x.at<float>(head, i, e)) - (*mean)[size_t(e)];
      return rows;
    };
    const auto code = [&](std::vector<double> row) {
      double most = 0;
      for (double x : row) most = std::max(most, std::abs(x));
      for (double& x : row) x = most > 0 ? std::round(x * double(levels) / most) * most / double(levels) : 0;
      return row;
    };
    const auto dot = [](const std::vector<double>& a, const std::vector<double>& b) {
      return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
    };
    const auto plan = planned(c,
                              "sale(dense_len=0,q_block=8,k_block=4,tau=" + number(tau) + ",bits=" + std::to_string(bits) +
                                  ",local=" + std::to_string(local) + ",segment=" + std::to_string(segment) + ")",
                              backend(), q_block, k_block);
    const int64_t tiles = ceil_of(s.n, q_block);
    const double scale = 1 / std::sqrt(double(s.d));
    int64_t skipped = 0, read_besides = 0;
    for (int64_t head = 0; head < s.h; ++head) {
      std::vector<double> q_mean, k_mean;
      const Rows q = smooth(c.q, head, &q_mean), k = smooth(c.k, head / c.group(), &k_mean);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t end = std::min<int64_t>(s.n, (t + 1) * q_block), visible = ceil_of(c.first() + end, k_block);
        std::set<int32_t> read;
        for (int64_t b = 0; b < visible; ++b)
          if (sale_reads_anyway(b, visible, ceil_of(local, k_block), ceil_of(segment, k_block)))
            read.insert(int32_t(b));
        const std::set<int32_t> exact = read;
        for (int64_t i = t * q_block; i < end; ++i) {
          std::vector<double> full = q[size_t(i)];
          for (int64_t e = 0; e < s.d; ++e) full[size_t(e)] += q_mean[size_t(e)];
          double sum = 0;
          for (int64_t j = 0; j <= c.first() + i; ++j)
            if (exact.contains(int32_t(j / k_block))) sum += std::exp(scale * dot(full, k[size_t(j)]));
          for (int64_t j = 0; j <= c.first() + i; ++j) {
            const double logit = dot(code(q[size_t(i)]), code(k[size_t(j)])) + dot(q_mean, k[size_t(j)]);
            if (std::exp(scale * logit) / sum > tau) read.insert(int32_t(j / k_block));
          }
        }
        skipped += visible - int64_t(read.size()), read_besides += int64_t(read.size() - exact.size());
        EXPECT_EQ(plan[size_t(head * tiles + t)], sorted(read)) << "head " << head << " tile " << t;
      }
    }
    EXPECT_GT(skipped, 0);
    EXPECT_GT(read_besides, 0);
  }
}

// Without rounding nothing above tau is missed: what a weight is measured by here is a part of its denominator.
TEST_P(Estimates, SaleMissesNoPairAboveTauWithoutRounding) {
  const Case c(shape(160, 160), 6, 2.0);
  const auto plan = planned(c, "sale(dense_len=0,q_block=8,k_block=4,tau=0.3,bits=24,local=40,segment=4)", backend(), 8, 4);
  int64_t heavy = 0, skipped = 0;
  for (int64_t head = 0; head < c.shape.h; ++head)
    for (int64_t i = 0; i < 160; ++i) {
      const auto p = c.causal(head, i);
      const auto& read = plan[size_t(head * 20 + i / 8)];
      skipped += i / 4 + 1 > int64_t(read.size());
      for (int64_t j = 0; j <= i; ++j) {
        if (p[size_t(j)] < 0.3001) continue;
        heavy += j > 4 && j < i - 44;
        EXPECT_TRUE(std::binary_search(read.begin(), read.end(), int32_t(j / 4)));
      }
    }
  EXPECT_GT(heavy, 0);
  EXPECT_GT(skipped, 0);
}

TEST_P(Estimates, SparseDReadsByTheWeightsOfItsPlanningStep) {
  for (const auto& [s, ratio, generated, causal, other] : {std::tuple{shape(150, 150), 0.3, 40, false, false},
                                                           {shape(90, 90), 0.2, 0, false, true},
                                                           {shape(101, 101), 0.25, 101, false, true},
                                                           {shape(61, 131), 0.3, 30, true, false},
                                                           {shape(1, 1), 0.1, 1, false, false}}) {
    const int64_t block = 16, blocks = ceil_of(s.m, block), tiles = ceil_of(s.n, block);
    const Case c(s, 7, 2.0), planning(s, other ? 70 : 7, 2.0);
    ApplyInput in = c.input(backend());
    in.causal = causal;
    if (other) in.inputs = {{"plan_q", planning.q}, {"plan_k", planning.k}};
    const ApplyOutput out = Case::run(
        "sparsed(block=16,ratio=" + number(ratio) + ",generated=" + std::to_string(generated) + ")", in);
    const auto plan = lists(out, "plan");
    const int64_t first = ceil_of(std::max<int64_t>(0, s.m - generated), block);
    const auto sees = [&, causal = causal](int64_t i, int64_t j) { return !causal || j <= c.first() + i; };
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t end = std::min(s.n, (t + 1) * block), visible = causal ? ceil_of(c.first() + end, block) : blocks;
        std::set<int32_t> read;
        for (const bool late : {false, true}) {
          std::vector<double> mass(size_t(visible), 0.0);
          for (int64_t i = t * block; i < end; ++i) {
            const auto p = planning.weights(head, i,
                                            [&](int64_t j) { return sees(i, j) && (!late || j >= first * block); });
            for (int64_t j = 0; j < std::min(s.m, visible * block); ++j) mass[size_t(j / block)] += p[size_t(j)];
          }
          if (late) mass.erase(mass.begin(), mass.begin() + std::min(first, visible));
          const int64_t count = int64_t(std::floor(double(mass.size()) * ratio)) + 1;
          for (int32_t b : top(mass, count))
            if (late || b < first) read.insert(late ? int32_t(b + first) : b);
        }
        EXPECT_EQ(plan[size_t(head * tiles + t)], sorted(read)) << "head " << head << " tile " << t;
        for (int64_t i = t * block; i < end; ++i) {
          const auto expected = c.output(
              head, c.weights(head, i, [&](int64_t j) { return sees(i, j) && read.contains(int32_t(j / block)); }));
          for (int64_t x = 0; x < s.d_v; ++x)
            EXPECT_NEAR(out.find("out")->view().at<float>(head, i, x), expected[size_t(x)], kExact);
        }
      }
  }
}

/// What the last dense step and a sparse one give, put together as Re-ttention says.
TEST_P(Estimates, RettentionCorrectsByTheLastDenseStep) {
  for (const auto& [s, window, text, causal, step] :
       {std::tuple{shape(90, 90), 9, 5, false, 16}, {shape(40, 77), 4, 0, true, 18}, {shape(1, 1), 0, 0, false, 17}}) {
    const Case c(s, 8), before(s, 80);
    ApplyInput in = c.input(backend());
    in.causal = causal;
    in.inputs = {{"dense_q", before.q}, {"dense_k", before.k}, {"dense_v", before.v}};
    const ApplyOutput out = Case::run("rettention(window=" + std::to_string(window) + ",text=" + std::to_string(text) +
                                          ",step=" + std::to_string(step) + ")",
                                      in);
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t i = 0; i < s.n; ++i) {
        const int64_t at = c.first() + i;
        const auto all = [&, causal = causal](int64_t j) { return !causal || j <= at; };
        const auto some = [&, window = window, text = text](int64_t j) {
          return all(j) && (at < text || j < text || std::abs(at - j) <= window);
        };
        const auto weights = before.weights(head, i, all);
        double share = 0;
        for (int64_t j = 0; j < s.m; ++j) share += some(j) ? weights[size_t(j)] : 0;
        const auto dense = before.output(head, weights), seen = before.output(head, before.weights(head, i, some)),
                   now = c.output(head, c.weights(head, i, some));
        for (int64_t x = 0; x < s.d_v; ++x)
          EXPECT_NEAR(out.find("out")->view().at<float>(head, i, x),
                      (share + 0.04 * double(step - 16)) * now[size_t(x)] + dense[size_t(x)] - share * seen[size_t(x)],
                      kExact);
      }
  }
}

TEST_P(Estimates, RettentionOfTheSameStepIsDense) {
  const Case c(shape(70, 70), 9);
  ApplyInput in = c.input(backend());
  in.inputs = {{"dense_q", c.q}, {"dense_k", c.k}, {"dense_v", c.v}};
  for (const char* spec : {"rettention(window=3)", "rettention(window=3,step=15)", "rettention(window=3,step=20)"})
    EXPECT_LT(c.dense_error(Case::run(spec, in)), kExact) << spec;
  in.inputs["dense_v"] = c.q;
  EXPECT_NE(apply("rettention", in).error().text().find("dense_v"), std::string::npos);
}

/// Rectified SpaAttn's output of one tile, and the blocks that it reads.
struct Rectified {
  std::set<int32_t> read;
  Rows out;
  int64_t paying = 0;
};
Rectified rectified(const Case& c, int64_t head, int64_t t, int64_t block, double remain, int64_t topk, int64_t local,
                    int64_t text, bool causal) {
  const Shape& s = c.shape;
  const int64_t kv = head / c.group(), first = t * block, end = std::min(s.n, first + block),
                own = (c.first() + first) / block,
                visible = causal ? ceil_of(c.first() + end, block) : ceil_of(s.m, block);
  const double scale = 1 / std::sqrt(double(s.d));
  using Row = std::vector<double>;
  const auto mean = [&](const Tensor& x, int64_t of, int64_t a, int64_t b) {
    Row out(size_t(x.size[2]), 0.0);
    for (int64_t i = a; i < b; ++i)
      for (int64_t e = 0; e < x.size[2]; ++e) out[size_t(e)] += double(x.at<float>(of, i, e)) / double(b - a);
    return out;
  };
  const auto off = [&](const Tensor& x, int64_t of, int64_t a, int64_t b) {
    const Row centre = mean(x, of, a, b);
    Row out(size_t(x.size[2]), 0.0);
    for (int64_t i = a; i < b; ++i)
      for (int64_t e = 0; e < x.size[2]; ++e)
        out[size_t(e)] += std::abs(double(x.at<float>(of, i, e)) - centre[size_t(e)]) / double(b - a);
    return out;
  };
  const auto dot = [](const Row& a, const Row& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); };
  const auto last = [&](int64_t b) { return std::min(s.m, (b + 1) * block); };
  const Row q = mean(c.q, head, first, end), q_off = off(c.q, head, first, end);
  // Place 0 is all text; the others are blocks.
  Row weight(size_t(visible), 0.0);
  double total = 0;
  for (int64_t b = 0; b < visible; ++b) {
    if (b * block < text) {
      for (int64_t j = b * block; j < last(b); ++j) weight[0] += std::exp(scale * dot(q, mean(c.k, kv, j, j + 1)));
    } else {
      weight[size_t(b)] = double(last(b) - b * block) * std::exp(scale * dot(q, mean(c.k, kv, b * block, last(b))));
    }
  }
  for (double x : weight) total += x;
  for (double& x : weight) x /= total;
  Rectified out;
  for (int32_t b : top(weight, std::max<int64_t>(topk, holding(weight, double(float(remain)), true))))
    out.read.insert(b);
  for (int64_t b = 0; b < visible; ++b) {
    const bool near = b >= own - local && b <= (c.first() + end - 1) / block + local;
    const bool stays = own * block < text || b * block < text || ((causal || local > 0) && near);
    if (stays) out.read.insert(int32_t(b));
  }
  double paid = 0;
  Row comp(size_t(s.d_v), 0.0);
  for (int64_t b = 0; b < visible; ++b) {
    if (out.read.contains(int32_t(b))) continue;
    const Row k = mean(c.k, kv, b * block, last(b)), k_off = off(c.k, kv, b * block, last(b)),
              v = mean(c.v, kv, b * block, last(b));
    if (std::abs(dot(q, k)) <= std::abs(dot(q_off, k)) + std::abs(dot(q, k_off))) continue;
    paid += weight[size_t(b)], ++out.paying;
    for (int64_t e = 0; e < s.d_v; ++e) comp[size_t(e)] += weight[size_t(b)] * v[size_t(e)];
  }
  for (int64_t i = first; i < end; ++i) {
    Row row = c.output(head, c.weights(head, i, [&](int64_t j) {
      return (!causal || j <= c.first() + i) && out.read.contains(int32_t(j / block));
    }));
    for (int64_t e = 0; e < s.d_v; ++e) row[size_t(e)] = (1 - paid) * row[size_t(e)] + comp[size_t(e)];
    out.out.push_back(row);
  }
  return out;
}

/// Rows of a block are near one another, so that pooled products gain.
Case smooth(const Shape& s, int64_t block, double noise, uint64_t seed) {
  Case c(s, seed, 1.0);
  Random random(seed + 100);
  for (const Buffer* x : {&c.q, &c.k, &c.v}) {
    const Tensor& t = x->view();
    for (int64_t head = 0; head < t.size[0]; ++head)
      for (int64_t b = 0; b * block < t.size[1]; ++b)
        for (int64_t e = 0; e < t.size[2]; ++e) {
          const float centre = float(random.normal());
          for (int64_t i = b * block; i < std::min(t.size[1], (b + 1) * block); ++i) {
            float& y = t.as<float>()[(head * t.size[1] + i) * t.size[2] + e];
            y = centre + float(noise) * y;
          }
        }
  }
  return c;
}

TEST_P(Estimates, RectifiedSpaAttnGivesBackWhatItLeavesOut) {
  int64_t paying = 0;
  for (const auto& [s, remain, topk, local, text, causal] : {std::tuple{shape(150, 150), 0.5, 1, 0, 0, false},
                                                             {shape(90, 90), 0.3, 3, 1, 16, false},
                                                             {shape(150, 150), 0.4, 1, 0, 8, true},
                                                             {shape(61, 131), 0.3, 1, 0, 16, true},
                                                             {shape(1, 1), 0.3, 1, 0, 0, true}}) {
    const int64_t block = 8;
    const Case c = smooth(s, block, 0.3, 10);
    ApplyInput in = c.input(backend());
    in.causal = causal;
    const ApplyOutput out = Case::run("rectified_spaattn(block=8,remain=" + number(remain) + ",topk=" + std::to_string(topk) +
                                          ",local=" + std::to_string(local) + ",text=" + std::to_string(text) + ")",
                                      in);
    const auto plan = lists(out, "plan");
    const int64_t tiles = ceil_of(s.n, block);
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t t = 0; t < tiles; ++t) {
        const Rectified expected = rectified(c, head, t, block, remain, topk, local, text, causal);
        paying += expected.paying;
        EXPECT_EQ(plan[size_t(head * tiles + t)], sorted(expected.read)) << "head " << head << " tile " << t;
        for (size_t r = 0; r < expected.out.size(); ++r)
          for (int64_t e = 0; e < s.d_v; ++e)
            EXPECT_NEAR(out.find("out")->view().at<float>(head, t * block + int64_t(r), e), expected.out[r][size_t(e)],
                        kExact);
      }
  }
  EXPECT_GT(paying, 0);
}

// Blocks of equal rows are exactly what their means say: nothing is lost, however little is read.
TEST_P(Estimates, RectifiedSpaAttnIsExactOnEqualRows) {
  const Case c = smooth(shape(100, 100), 8, 0, 11);
  ApplyInput in = c.input(backend());
  in.causal = false;
  const ApplyOutput out = Case::run("rectified_spaattn(block=8,remain=0)", in);
  EXPECT_LT(out.find("density")->view().at<float>(0), 0.1);
  for (int64_t head = 0; head < c.shape.h; ++head)
    for (int64_t i = 0; i < 100; ++i) {
      const auto dense = c.output(head, c.weights(head, i, [](int64_t) { return true; }));
      for (int64_t e = 0; e < c.shape.d_v; ++e)
        EXPECT_NEAR(out.find("out")->view().at<float>(head, i, e), dense[size_t(e)], kExact);
    }
}

// Where neighbouring keys are alike, the search finds what a tile looks at: far more than as many keys hold on average.
TEST_P(Estimates, HipFindsHeavyKeysAmongLikeOnes) {
  const Case c = smooth(shape(256, 256), 16, 0.2, 13);
  const auto plan = planned(c, "hip(topk=32,q_block=16,k_block=2,sinks=0,window=1)", backend(), 16, 2);
  double held = 0, average = 0;
  for (int64_t head = 0; head < c.shape.h; ++head)
    for (int64_t i = 128; i < 256; ++i) {
      const auto p = c.causal(head, i);
      const auto& read = plan[size_t(head * 16 + i / 16)];
      // Of the keys before its own tile.
      const int64_t before = i / 16 * 16;
      for (int32_t b : read)
        if (b * 2 < before)
          held += p[size_t(b * 2)] + p[size_t(b * 2 + 1)],
              average += 2.0 / double(before) * std::accumulate(p.begin(), p.begin() + before, 0.0);
    }
  EXPECT_GT(held, 2 * average);
}

// Heads that it does not apply to keep what they have.
TEST_P(Estimates, RectifiedSpaAttnLeavesOtherHeadsAlone) {
  const Case c = smooth(shape(64, 64), 8, 0.3, 12);
  const ApplyOutput some = c.run("rectified_spaattn(block=8,remain=0.2,heads=1-)", backend()),
                    dense = c.run("dense", backend()), all = c.run("rectified_spaattn(block=8,remain=0.2)", backend());
  for (int64_t i = 0; i < 64; ++i) {
    EXPECT_NEAR(some.find("out")->view().at<float>(0, i, 0), dense.find("out")->view().at<float>(0, i, 0), kExact);
    EXPECT_NEAR(some.find("out")->view().at<float>(1, i, 0), all.find("out")->view().at<float>(1, i, 0), kExact);
  }
}

TEST_P(Estimates, LightForcingReadsAShareOfTheBlocksOfItsFrames) {
  for (const auto& [s, frame, frames, chunks, block, topk, first, latest, causal] :
       {std::tuple{shape(20, 100), 10, 2, 5, 4, 2, 1, 2, false},
        {shape(24, 141), 7, 4, 6, 8, 3, 2, 1, false},
        {shape(131, 131), 6, 3, 8, 8, 2, 1, 3, true},
        {shape(1, 97), 5, 2, 9, 16, 1, 0, 0, true},
        {shape(1, 1), 1, 1, 2, 4, 1, 1, 1, true}}) {
    const Case c(s, 15, 1.5);
    const double sparsity = 0.8, target = 0.6;
    // Levels fall from 1 to 0, and chunk i (of as many queries as any, i times the keys) reads 1 − σ + level · growth.
    std::vector<double> level{0};
    for (int64_t i = 2; i <= chunks; ++i) level.push_back(chunks > 2 ? double(chunks - i) / double(chunks - 2) : 1.0);
    double pairs = 0, weighed = 0, read_pairs = 0;
    for (int64_t i = 2; i <= chunks; ++i) pairs += double(i), weighed += double(i) * level[size_t(i - 1)];
    const double growth = ((1 - target) - (1 - sparsity)) * pairs / weighed;
    for (int64_t i = 2; i <= chunks; ++i) read_pairs += double(i) * (1 - sparsity + level[size_t(i - 1)] * growth);
    EXPECT_NEAR(read_pairs, (1 - target) * pairs, 1e-9);
    ApplyInput in = c.input(backend());
    in.causal = causal;
    const ApplyOutput out = Case::run("light_forcing(sparsity=0.8,target=0.6,frame=" + std::to_string(frame) +
                                          ",frames=" + std::to_string(frames) + ",chunks=" + std::to_string(chunks) +
                                          ",block=" + std::to_string(block) + ",topk=" + std::to_string(topk) +
                                          ",first=" + std::to_string(first) + ",latest=" + std::to_string(latest) + ")",
                                      in);
    const auto plan = lists(out, "plan");
    const int64_t tiles = ceil_of(s.n, block), blocks = ceil_of(s.m, block), there = ceil_of(s.m, frame);
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = t * block, end = std::min<int64_t>(s.n, begin + block),
                      chunk = (c.first() + begin) / (frame * frames),
                      visible = causal ? ceil_of(c.first() + end, block) : blocks;
        std::set<int32_t> read;
        if (chunk == 0) {
          for (int32_t b = 0; b < visible; ++b) read.insert(b);
        } else {
          std::vector<double> like;
          for (int64_t f = 0; f < there; ++f)
            like.push_back(f >= first && f < chunk * frames - latest
                               ? mean_dot(c, head, begin, end, f * frame, std::min<int64_t>(s.m, (f + 1) * frame))
                               : -INFINITY);
          std::set<int64_t> seen;
          for (int32_t f : top(like, topk))
            if (like[size_t(f)] > -INFINITY) seen.insert(f);
          for (int64_t f = 0; f < there; ++f)
            if (f < first || f >= chunk * frames - latest) seen.insert(f);
          std::vector<double> score;
          int64_t candidates = 0;
          for (int64_t b = 0; b < visible; ++b) {
            const int64_t last = std::min<int64_t>(s.m, (b + 1) * block);
            bool any = false;
            for (int64_t j = b * block; j < last; ++j) any |= seen.contains(j / frame);
            const bool own = causal && b >= (c.first() + begin) / block;
            candidates += any || own;
            score.push_back(own ? INFINITY : any ? mean_dot(c, head, begin, end, b * block, last) : -INFINITY);
          }
          const double share = 1 - sparsity + level[size_t(std::min<int64_t>(chunk, chunks - 1))] * growth;
          const int64_t count = int64_t(std::ceil(std::min(1.0, share) * double(visible) - 1e-6));
          for (int32_t b : top(score, std::min(std::max<int64_t>(1, count), candidates))) read.insert(b);
        }
        EXPECT_EQ(plan[size_t(head * tiles + t)], sorted(read)) << "head " << head << " tile " << t;
      }
  }
}

/// HyperAttention of one head, by its definition and with its draws.
struct Hyper {
  const Case& c;
  int64_t head, min_len, block, sample, planes;
  Rows normal;

  /// Keys (or queries) begin … end − 1 in the order of their codes: place of each.
  std::vector<int64_t> places(const Tensor& x, int64_t of, int64_t begin, int64_t end) const {
    std::vector<int64_t> number;  // of the code in Gray order
    for (int64_t i = begin; i < end; ++i) {
      int64_t code = 0;
      for (int64_t p = 0; p < planes; ++p) {
        double dot = 0;
        for (int64_t e = 0; e < c.shape.d; ++e) dot += double(x.at<float>(of, i, e)) * normal[size_t(p)][size_t(e)];
        code |= int64_t(dot > 0) << p;
      }
      int64_t n = 0;
      while ((n ^ (n >> 1)) != code) ++n;
      number.push_back(n);
    }
    std::vector<int64_t> order(number.size()), place(number.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return number[size_t(a)] < number[size_t(b)]; });
    for (size_t r = 0; r < order.size(); ++r) place[size_t(order[r])] = int64_t(r);
    return place;
  }
  /// Adds to weight[i][j] how often e^logit counts for queries and keys of a pair.
  void pair(int64_t q0, int64_t q1, int64_t k0, int64_t k1, Rows& weight) const {
    const int64_t nk = k1 - k0, before = c.first();
    q0 = std::max(q0, before);
    if (q0 >= q1) return;
    if (nk < min_len) {
      for (int64_t i = q0; i < q1; ++i)
        for (int64_t j = k0; j < k1; ++j) weight[size_t(i - before)][size_t(j)] = 1;
      return;
    }
    const int64_t kv = head / c.group(), drawn = std::min(sample, nk), blocks = ceil_of(nk, block),
                  q_block = ceil_of(q1 - q0, blocks);
    Random random((uint64_t(kv)) * 1000003u + uint64_t(k0));
    std::vector<int64_t> order(static_cast<size_t>(nk));
    std::iota(order.begin(), order.end(), 0);
    for (int64_t i = 0; i < drawn; ++i) std::swap(order[size_t(i)], order[size_t(i + random.below(nk - i))]);
    const std::set<int64_t> samples(order.begin(), order.begin() + drawn);
    const auto q_place = places(c.q, head, q0 - before, q1 - before), k_place = places(c.k, kv, k0, k1);
    for (int64_t i = q0; i < q1; ++i)
      for (int64_t j = k0; j < k1; ++j) {
        double& w = weight[size_t(i - before)][size_t(j)];
        if (k_place[size_t(j - k0)] / block == q_place[size_t(i - q0)] / q_block) w = 1;
        else if (samples.contains(j - k0)) w = double(nk) / double(drawn);
      }
  }
  void halves(int64_t begin, int64_t end, Rows& weight) const {
    if (end - begin <= min_len) {
      for (int64_t i = std::max(begin, c.first()); i < end; ++i)
        for (int64_t j = begin; j <= i; ++j) weight[size_t(i - c.first())][size_t(j)] = 1;
      return;
    }
    const int64_t middle = begin + (end - begin + 1) / 2;
    halves(begin, middle, weight), halves(middle, end, weight);
    pair(middle, end, begin, middle, weight);
  }
};

TEST_P(Estimates, HyperAttentionCountsItsBlockAndItsSamples) {
  for (const auto& [s, min_len, block, sample, planes, causal] : {std::tuple{shape(150, 150), 16, 8, 6, 3, true},
                                                                  {shape(61, 203), 20, 16, 5, 4, true},
                                                                  {shape(90, 90), 30, 8, 10, 7, false},
                                                                  {shape(1, 1), 1, 4, 3, 2, true},
                                                                  {shape(1, 77), 10, 8, 4, 3, true},
                                                                  {shape(40, 71), 8, 8, 9, 2, false}}) {
    const Case c(s, 14, 1.0);
    Random random(0);
    Rows normal(size_t(planes), std::vector<double>(size_t(s.d)));
    for (auto& row : normal)
      for (double& x : row) x = double(float(random.normal()));
    ApplyInput in = c.input(backend());
    in.causal = causal;
    const ApplyOutput out = Case::run("hyperattention(min_len=" + std::to_string(min_len) +
                                          ",block=" + std::to_string(block) + ",sample=" + std::to_string(sample) +
                                          ",planes=" + std::to_string(planes) + ")",
                                      in);
    for (int64_t head = 0; head < s.h; ++head) {
      const Hyper hyper{c, head, min_len, block, sample, planes, normal};
      Rows weight(size_t(s.n), std::vector<double>(size_t(s.m), 0.0));
      if (causal) hyper.halves(0, s.m, weight);
      else hyper.pair(0, s.m, 0, s.m, weight);
      for (int64_t i = 0; i < s.n; ++i) {
        auto& p = weight[size_t(i)];
        double sum = 0;
        for (int64_t j = 0; j < s.m; ++j) sum += p[size_t(j)] *= std::exp(c.dot(head, i, j) / std::sqrt(double(s.d)));
        for (double& x : p) x /= sum;
        const auto expected = c.output(head, p);
        double worst = 0;
        for (int64_t e = 0; e < s.d_v; ++e)
          worst = std::max(worst, std::abs(expected[size_t(e)] - double(out.find("out")->view().at<float>(head, i, e))));
        EXPECT_LT(worst, kExact) << "head " << head << " row " << i;
      }
    }
  }
}

TEST(EstimateErrors, AreSaid) {
  const Case c({2, 2, 64, 64, 16, 16});
  ApplyInput in = c.input("reference");
  in.causal = false;
  for (const char* spec : {"hip", "sale"}) EXPECT_FALSE(apply(spec, in).has_value()) << spec;
  EXPECT_NE(apply("hip(topk=7,k_block=2)", c.input("reference")).error().text().find("topk"), std::string::npos);
  EXPECT_NE(apply("rectified_spaattn(text=7)", c.input("reference")).error().text().find("text"), std::string::npos);
  EXPECT_NE(apply("rettention", c.input("reference")).error().text().find("dense_q"), std::string::npos);
}

}  // namespace
}  // namespace heed::test
