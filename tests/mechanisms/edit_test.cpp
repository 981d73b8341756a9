#include <atomic>

#include "harness.h"
#include "kernels/kernels.h"
#include "mechanisms/edit/ring.h"

namespace heed::test {
namespace {

class Edits : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Edits);

TEST_P(Edits, IdentityIsDense) {
  for (const Shape s : {shape(60, 60), shape(7, 40), shape(1, 1)}) {
    const Case c(s);
    for (const char* spec :
         {"act(beta=1)", "act(threshold=1000000)", "ring(ranks=1)", "ring(ranks=3)", "ring(ranks=4)+act(beta=1)"})
      EXPECT_LT(c.dense_error(c.run(spec, backend())), kExact) << spec;
  }
}

// The explicit map: sinks times beta, what is freed to the others in proportion.
TEST_P(Edits, ActIsTheExplicitMap) {
  for (const Shape s : {shape(48, 48), shape(20, 50)}) {
    Case c(s, 3, 2.5);
    // Two keys that draw attention, and the first of them is not edited.
    for (int64_t kv = 0; kv < s.g; ++kv)
      for (int64_t j : {0, 5, 17})
        for (int64_t x = 0; x < s.d; ++x) c.k->at<float>(kv, j, x) = 0;
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t i = 0; i < s.n; ++i) c.q->at<float>(head, i, 0) = 5;
    for (int64_t kv = 0; kv < s.g; ++kv)
      c.k->at<float>(kv, 0, 0) = c.k->at<float>(kv, 5, 0) = c.k->at<float>(kv, 17, 0) = 3;
    const double threshold = 0.08, beta = 0.4;
    const ApplyOutput out = c.run("act(threshold=0.08,beta=0.4)", backend());
    double worst = 0;
    int edited = 0;
    for (int64_t head = 0; head < s.h; ++head) {
      Rows p;
      for (int64_t i = 0; i < s.n; ++i) p.push_back(c.causal(head, i));
      std::vector<int64_t> sinks;
      for (int64_t j = 0; j < s.m; ++j) {
        double sum = 0;
        for (const auto& row : p) sum += row[size_t(j)];
        if (sum / double(std::min(s.n, s.m - j)) > threshold) sinks.push_back(j);
      }
      if (!sinks.empty()) sinks.erase(sinks.begin());
      edited += int(sinks.size());
      for (int64_t i = 0; i < s.n; ++i) {
        auto row = p[size_t(i)];
        double held = 0;
        for (int64_t j : sinks) held += row[size_t(j)];
        for (double& x : row) x *= 1 + (1 - beta) * held / (1 - held);
        for (int64_t j : sinks) row[size_t(j)] = beta * p[size_t(i)][size_t(j)];
        EXPECT_NEAR(std::accumulate(row.begin(), row.end(), 0.0), 1, 1e-9);
        const auto expected = c.output(head, row);
        for (int64_t x = 0; x < s.d_v; ++x)
          worst = std::max(worst, std::abs(double(out.find("out")->view().at<float>(head, i, x)) - expected[size_t(x)]));
      }
    }
    EXPECT_GT(edited, 0) << "the case has no sinks";
    EXPECT_LT(worst, kExact);
  }
}

TEST_P(Edits, ActLeavesOtherHeadsAlone) {
  const Case c(shape(40, 40), 5, 3);
  const ApplyOutput out = c.run("act(threshold=0.05,heads=0)", backend()), dense = c.run("dense", backend());
  double same = 0, other = 0;
  for (int64_t i = 0; i < 40; ++i)
    for (int64_t x = 0; x < c.shape.d_v; ++x) {
      other = std::max(other, std::abs(double(out.find("out")->view().at<float>(0, i, x)) -
                                       double(dense.find("out")->view().at<float>(0, i, x))));
      same = std::max(same, std::abs(double(out.find("out")->view().at<float>(1, i, x)) -
                                     double(dense.find("out")->view().at<float>(1, i, x))));
    }
  EXPECT_GT(other, 1e-3);
  EXPECT_LT(same, kExact);
}

TEST_P(Edits, RingIsExactForAnyNumberOfRanks) {
  for (const Shape s : {shape(60, 60), shape(13, 60), shape(3, 3)})
    for (int ranks : {1, 2, 3, 5, 7, 12}) {
      const Case c(s, 8);
      const std::string spec = "ring(ranks=" + std::to_string(ranks) + ")";
      EXPECT_LT(c.dense_error(c.run(spec, backend())), kExact) << spec;
      ApplyInput in = c.input(backend());
      in.causal = false;
      const ApplyOutput out = Case::run(spec, in);
      double worst = 0;
      for (int64_t head = 0; head < s.h; ++head)
        for (int64_t i = 0; i < s.n; ++i) {
          const auto expected = c.output(head, c.weights(head, i, [](int64_t) { return true; }));
          for (int64_t x = 0; x < s.d_v; ++x)
            worst = std::max(worst, std::abs(double(out.find("out")->view().at<float>(head, i, x)) - expected[size_t(x)]));
        }
      EXPECT_LT(worst, kExact) << spec;
    }
}

TEST(Ring, SendsEachShardPastEveryRank) {
  const Case c({6, 2, 48, 48, 16, 24});
  for (int ranks : {1, 2, 3, 4, 6, 8}) {
    const mechanisms::Shards shards{48, 48, ranks};
    const int64_t share = 48 / ranks;
    run_ranks(ranks, [&](Comm& comm) {
      Queue queue;
      queue.run = &reference_kernels();
      Buffer q(Dtype::F32, {6, share, 16}), k(Dtype::F32, {2, share, 16}), v(Dtype::F32, {2, share, 24}),
          out(Dtype::F32, {6, share, 24}), lse(Dtype::F32, {6, share});
      const int64_t first = comm.rank() * share;
      copy(c.q->slice(1, first, first + share), q), copy(c.k->slice(1, first, first + share), k),
          copy(c.v->slice(1, first, first + share), v);
      mechanisms::ring_attention(comm, queue, shards, q, k, v, {}, true, out, lse);
      EXPECT_EQ(comm.sent().elements, (ranks - 1) * share * 2 * (16 + 24));
      for (int64_t head = 0; head < 6; ++head)
        for (int64_t i = 0; i < share; ++i) {
          const auto expected = c.output(head, c.causal(head, first + i));
          for (int64_t x = 0; x < 24; ++x) ASSERT_NEAR(out->at<float>(head, i, x), expected[size_t(x)], kExact);
        }
    });
  }
}

}  // namespace
}  // namespace heed::test
