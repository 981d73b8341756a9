// Policies that take a text up block by block, against the same rounds in plain loops.
#include "keep_case.h"
#include "session_case.h"

namespace heed::test {
namespace {

class KeepBlocks : public Mechanisms {};
HEED_ON_ALL_SETTINGS(KeepBlocks);

/// What is left of keys 0 … m − 1 when blocks are taken up and cut to `budget`: score(held, first key of the round).
template <class Score>
std::vector<int32_t> by_blocks(int64_t m, int64_t budget, int64_t block, Score score) {
  std::vector<int32_t> held;
  int64_t end = 0;
  while (end < m) {
    const int64_t begin = end;
    end = std::min(m, begin + block + (begin == 0 ? budget : 0));
    for (int64_t j = begin; j < end; ++j) held.push_back(int32_t(j));
    std::vector<int32_t> next;
    for (int32_t at : top(score(held, begin), budget)) next.push_back(held[size_t(at)]);
    held = next;
  }
  return held;
}

std::vector<double> keydiff_scores(const Case& c, int64_t kv, const std::vector<int32_t>& held) {
  std::vector<double> mean(size_t(c.shape.d), 0.0), out;
  for (int32_t j : held)
    for (int64_t e = 0; e < c.shape.d; ++e) mean[size_t(e)] += double(c.k->at<float>(kv, j, e)) / norm(c.k, kv, j);
  double size = 0;
  for (double x : mean) size += x * x;
  for (int32_t j : held) {
    double dot = 0;
    for (int64_t e = 0; e < c.shape.d; ++e) dot += mean[size_t(e)] * double(c.k->at<float>(kv, j, e));
    out.push_back(-dot / norm(c.k, kv, j) / std::sqrt(size));
  }
  return out;
}

TEST_P(KeepBlocks, KeyDiffSeesWhatIsHeldAndTheBlock) {
  for (const Shape s : {shape(107, 107), shape(33, 90), shape(1, 70), shape(1, 1)})
    for (const auto& [budget, block] : {std::pair<int64_t, int64_t>{20, 16}, {7, 1}, {30, 200}, {64, 5}, {2, 3}}) {
      const Case c(s, 8);
      const std::string spec = "block-evict(keydiff(budget=" + std::to_string(budget) +
                               "),block=" + std::to_string(block) + ")";
      const ApplyOutput out = c.run(spec, backend());
      EXPECT_LT(c.dense_error(out), kExact) << spec;
      EXPECT_LT(kept_error(c, out), kExact) << spec;
      for (int64_t kv = 0; kv < s.g; ++kv)
        EXPECT_EQ(lists(out, "kept")[size_t(kv)],
                  by_blocks(s.m, std::min(budget, s.m), block,
                            [&](const std::vector<int32_t>& held, int64_t) { return keydiff_scores(c, kv, held); }))
            << spec << " of " << s.m;
    }
}

// The block's own queries vote, over what is held then.
TEST_P(KeepBlocks, SnapKvVotesWithTheBlocksQueries) {
  const int64_t budget = 24, block = 13, window = 4;
  for (const Shape s : {shape(100, 100), shape(80, 80)}) {
    const Case c(s, 5);
    const auto held = lists(c.run("block-evict(snapkv(budget=24,window=4,kernel=1),block=13)", backend()), "kept");
    for (int64_t kv = 0; kv < s.g; ++kv) {
      const auto expected = by_blocks(s.m, budget, block, [&](const std::vector<int32_t>& entries, int64_t begin) {
        std::vector<double> votes(entries.size(), 0.0);
        const int64_t end = entries.back() + 1;
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
          for (int64_t i = std::max(begin, end - window); i < end; ++i) {
            const auto p = c.weights(head, i, [&](int64_t j) {
              return j <= i && std::binary_search(entries.begin(), entries.end(), int32_t(j));
            });
            for (size_t e = 0; e < entries.size(); ++e) votes[e] += p[size_t(entries[e])];
          }
        for (size_t e = entries.size() - size_t(window); e < entries.size(); ++e) votes[e] = INFINITY;
        return votes;
      });
      EXPECT_EQ(held[size_t(kv)], expected);
    }
  }
}

TEST_P(KeepBlocks, WhatScoresAloneOrAtOnceIsCutAtOnce) {
  const Case c(shape(120, 120), 6);
  const auto lists_of = [&](const std::string& spec) { return lists(c.run(spec, backend()), "kept"); };
  for (const char* block : {"1", "16", "119"})
    EXPECT_EQ(lists_of(std::string("block-evict(knorm(budget=0.3),block=") + block + ")"),
              lists_of("knorm(budget=0.3)"));
  for (const std::string inner :
       {"snapkv(budget=30,window=8)", "expected-attention(budget=30)", "lagkv(budget=60,lag=16)",
        "h2o(budget=30,when=prompt)", "adakv(snapkv(budget=30,window=8))", "tova(budget=30)"})
    EXPECT_EQ(lists_of("block-evict(" + inner + ",block=100)"), lists_of(inner)) << inner;
  // What entries carry beside them goes with them: sums of attention are those of the whole prompt.
  EXPECT_EQ(lists_of("block-evict(h2o(budget=20,recent=0,when=prompt),block=9)"),
            lists_of("h2o(budget=20,recent=0,when=prompt)"));
}

// Sequences of unequal length take unequally many rounds, and each is cut as it would be alone.
TEST(KeepBlocksInSessions, SequencesDoNotMeet) {
  const auto model = tiny_model(6, 2);
  for (const std::string spec :
       {"block-evict(keydiff(budget=16),block=10)", "block-evict(snapkv(budget=0.3,window=4),block=7)"}) {
    const std::vector<std::vector<int32_t>> texts = {text(83, 1), text(30, 2), text(11, 3)};
    SessionOptions o = in_f32(spec);
    o.backend = backend_or("cpu");
    std::vector<std::vector<int32_t>> alone;
    for (const auto& t : texts) {
      Session one(model, o);
      one.prefill(t);
      for (int l = 0; l < 4; ++l)
        for (int kv = 0; kv < 2; ++kv) alone.push_back(one.store().layer(l).positions(kv));
    }
    o.sequences = 3;
    Session all(model, o);
    all.prefill({texts[0], texts[1], texts[2]});
    for (int s = 0; s < 3; ++s)
      for (int l = 0; l < 4; ++l)
        for (int kv = 0; kv < 2; ++kv)
          EXPECT_EQ(all.store().layer(l).positions(s * 2 + kv), alone[size_t(s * 8 + l * 2 + kv)])
              << spec << " sequence " << s;
  }
}

}  // namespace
}  // namespace heed::test
