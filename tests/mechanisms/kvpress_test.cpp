// Policies against the scores of kvpress 0.5.5 on the same tensors (tests/data/make/kvpress_scores.py).
#include "base/npy.h"
#include "keep_case.h"

namespace heed::test {
namespace {

Tensor read(std::vector<Buffer>& owned, const std::string& name) {
  owned.push_back(value_or_throw(read_npy(std::string(HEED_TEST_DATA) + "/kvpress/" + name + ".npy")));
  return owned.back();
}

class Kvpress : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, Kvpress, testing::Values("reference", "cpu"));

TEST_P(Kvpress, KeepsWhatTheLibraryScoresHighest) {
  std::vector<Buffer> owned;
  Case c({6, 2, 150, 150, 16, 16});
  copy(read(owned, "q"), c.q), copy(read(owned, "k"), c.k), copy(read(owned, "v"), c.v);
  for (const int64_t budget : {90, 60, 110})
    for (const auto& [name, parameters] : {std::pair{"knorm", ""},
                                           {"keydiff", ""},
                                           {"cur", ""},
                                           {"lagkv", ",lag=32"},
                                           {"lagkv_cross", ",lag=32,cross=true"},
                                           {"noncausal", ",tile=50"},
                                           {"expected_attention", ""},
                                           {"expected_attention_eps", ",eps=0.01"},
                                           {"observed_attention", ""},
                                           {"snapkv", ",window=32"},
                                           {"tova", ",force_last=true"}}) {
      std::string slug = name;
      if (slug == "lagkv_cross") slug = "lagkv";
      if (slug == "expected_attention_eps" || slug == "expected_attention") slug = "expected-attention";
      if (slug == "observed_attention") slug = "observed-attention";
      // Sinks, the last whole partition and the tail tie in the library: below what they are, any choice is right there.
      if (slug == "lagkv" && budget < 60) continue;
      const Tensor scores = read(owned, name);
      const std::string spec = slug + "(budget=" + std::to_string(budget) + parameters + ")";
      const auto held = kept(c, spec, GetParam());
      for (int64_t kv = 0; kv < 2; ++kv) {
        const float* row = scores.as<float>() + kv * 150;
        expect_top(held[size_t(kv)], {row, row + 150}, budget, spec);
      }
    }
}

TEST_P(Kvpress, KeepsTheSameChunks) {
  std::vector<Buffer> owned;
  Case c({6, 2, 150, 150, 16, 16});
  copy(read(owned, "q"), c.q), copy(read(owned, "k"), c.k), copy(read(owned, "v"), c.v);
  const Tensor stayed = read(owned, "chunkkv");
  std::vector<int32_t> expected;
  for (int32_t j = 0; j < 150; ++j)
    if (stayed.at<float>(0, j) > 0) expected.push_back(j);
  const auto held = kept(c, "chunkkv(snapkv(budget=" + std::to_string(expected.size()) + ",window=32))", GetParam());
  for (const auto& list : held) EXPECT_EQ(list, expected);
}

}  // namespace
}  // namespace heed::test
