// Mechanisms against other programs on the same tensors: kvpress 0.5.5 (tests/data/make/kvpress_scores.py) and authors' own
// code (golden_authors.py beside it, which draws what Case draws).
#include "base/npy.h"
#include "keep_case.h"
#include "mechanisms/registry.h"
#include "plan_case.h"

namespace heed::test {
namespace {

class Golden : public testing::TestWithParam<std::string> {
 protected:
  static Buffer read(const std::string& name) {
    return value_or_throw(read_npy(std::string(HEED_TEST_DATA) + "/golden/" + name + ".npy"));
  }
  /// Where a row of bytes is not 0.
  static std::vector<int32_t> ones(const Tensor& row) {
    std::vector<int32_t> out;
    for (int32_t j = 0; j < int32_t(row.size[0]); ++j)
      if (row.at<uint8_t>(j)) out.push_back(j);
    return out;
  }
  static void fill(const std::string& name, Buffer& with) { copy(read(name), with); }
  static Buffer drawn(Random& random, std::initializer_list<int64_t> sizes) {
    Buffer out(Dtype::F32, sizes);
    for (float& x : out->span<float>()) x = float(random.normal());
    return out;
  }
};
INSTANTIATE_TEST_SUITE_P(All, Golden, testing::Values("reference", "cpu"));

/// The tensors of kvpress_scores.py.
struct KvpressCase : Case {
  KvpressCase() : Case({6, 2, 150, 150, 16, 16}) {
    for (const auto& [name, to] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}})
      copy(value_or_throw(read_npy(std::string(HEED_TEST_DATA) + "/golden/kvpress/" + name + ".npy")), *to);
  }
};

TEST_P(Golden, KeepsWhatKvpressScoresHighest) {
  const KvpressCase c;
  for (const int64_t budget : {90, 60, 110})
    for (const auto& [file, slug, parameters] : {std::tuple{"knorm", "knorm", ""},
                                                 {"keydiff", "keydiff", ""},
                                                 {"cur", "cur", ""},
                                                 {"lagkv", "lagkv", ",lag=32"},
                                                 {"lagkv_cross", "lagkv", ",lag=32,cross=true"},
                                                 {"noncausal", "noncausal", ",tile=50"},
                                                 {"expected_attention", "expected-attention", ""},
                                                 {"expected_attention_eps", "expected-attention", ",eps=0.01"},
                                                 {"observed_attention", "observed-attention", ""},
                                                 {"snapkv", "snapkv", ",window=32"},
                                                 {"tova", "tova", ",force_last=true"}}) {
      // Sinks, the last whole partition and the tail tie in the library: below what they are, any choice is right there.
      if (slug == std::string("lagkv") && budget < 60) continue;
      const Buffer scores = read(std::string("kvpress/") + file);
      const std::string spec = std::string(slug) + "(budget=" + std::to_string(budget) + parameters + ")";
      const auto held = kept(c, spec, GetParam());
      for (int64_t kv = 0; kv < 2; ++kv) {
        const float* row = scores->as<float>() + kv * 150;
        expect_top(held[size_t(kv)], {row, row + 150}, budget, spec);
      }
    }
}

TEST_P(Golden, KeepsTheChunksOfKvpress) {
  const KvpressCase c;
  const Buffer stayed = read("kvpress/chunkkv");
  std::vector<int32_t> expected;
  for (int32_t j = 0; j < 150; ++j)
    if (stayed->at<float>(0, j) > 0) expected.push_back(j);
  const auto held = kept(c, "chunkkv(snapkv(budget=" + std::to_string(expected.size()) + ",window=32))", GetParam());
  for (const auto& list : held) EXPECT_EQ(list, expected);
}

TEST_P(Golden, RunsTheNetworksOfKvpress) {
  const KvpressCase c;
  constexpr int64_t width = 12, inner = 20;
  Random random(29);
  const Buffer x = drawn(random, {150, width}), w = drawn(random, {2, width}), b = drawn(random, {2}),
               w1 = drawn(random, {inner, width}), b1 = drawn(random, {inner}), w2 = drawn(random, {2, inner}),
               b2 = drawn(random, {2});
  ApplyInput in = c.input(GetParam());
  for (const bool deep : {false, true}) {
    in.inputs = {{"x", x}, {"w1", deep ? w1 : w}, {"b1", deep ? b1 : b}};
    if (deep) in.inputs["w2"] = w2, in.inputs["b2"] = b2;
    const Buffer scores = read(deep ? "kvpress/kvzap_mlp" : "kvpress/kvzap");
    const auto held = lists(Case::run("kvzap(budget=60)", in), "kept");
    for (int64_t kv = 0; kv < 2; ++kv) {
      const float* row = scores->as<float>() + kv * 150;
      expect_top(held[size_t(kv)], {row, row + 150}, 60, "kvzap");
    }
  }
  const Buffer w_q = drawn(random, {6 * 16, width}), b_q = drawn(random, {6 * 16}),
               w_k = drawn(random, {2 * 16, width}), bias = drawn(random, {6}), fixed = drawn(random, {2, 16, 16}),
               q_norm = drawn(random, {16}), k_norm = drawn(random, {16});
  in.inputs = {{"x", x},    {"w_q", w_q},       {"b_q", b_q},       {"w_k", w_k},
               {"b", bias}, {"fixed_k", fixed}, {"q_norm", q_norm}, {"k_norm", k_norm}};
  const Buffer stayed = read("kvpress/fast_kvzip");
  const auto held = lists(Case::run("fast-kvzip(budget=60)", in), "kept");
  for (int64_t kv = 0; kv < 2; ++kv) EXPECT_EQ(held[size_t(kv)], ones(stayed->select(0, kv)));
}

// Authors' code, as it is released: the same entries.
TEST_P(Golden, KeepsWhatAuthorsKeep) {
  const Case each({4, 4, 150, 150, 16, 16}, 17), grouped({6, 2, 150, 150, 16, 16}, 19), shared({6, 2, 150, 150, 16, 16}, 21);
  Case steep({4, 4, 150, 150, 16, 16}, 17);
  for (int64_t i = 2 * 150 * 16; i < 4 * 150 * 16; ++i) steep.k->as<float>()[i] *= 3;
  const std::string snap = "snapkv(budget=60,window=16,kernel=7)";
  for (const auto& [file, c, spec] :
       {std::tuple<std::string, const Case*, std::string>{"snapkv", &each, "snapkv(budget=60,window=16)"},
        {"h2o", &each, "h2o(budget=60,when=prompt)"},
        {"adakv-0.2", &steep, "adakv(" + snap + ")"},
        {"adakv-0.5", &steep, "adakv(" + snap + ",alpha=0.5)"},
        {"headkv", &each, "headkv(" + snap + ",scores=[0.1,0.2,0.3,0.4],window=16)"},
        {"r-kv", &grouped, "r-kv(budget=60,when=prompt)"},
        {"tova", &shared, "tova(budget=60,when=prompt)"}}) {
    const Buffer stayed = read("authors/" + file);
    const auto held = kept(*c, spec, GetParam());
    for (int64_t kv = 0; kv < c->shape.g; ++kv)
      EXPECT_EQ(held[size_t(kv)], ones(stayed->select(0, kv))) << spec << " KV head " << kv;
  }
}

TEST_P(Golden, DividesLayersAsPyramidKVsAuthorsDo) {
  const Case c({4, 4, 150, 150, 16, 16}, 17);
  ModelInfo model;
  model.layers = 3, model.h = model.g = 4, model.d = model.d_v = 16;
  const Composition parsed = value_or_throw(
      Composition::parse("pyramidkv(budget=60,window=16,beta=5,rule=authors)", model, registry()));
  const auto& policy = static_cast<const KeepPolicy&>(*parsed.parts()[0].mechanism);
  for (int layer = 0; layer < 3; ++layer) {
    const Buffer stayed = read("authors/pyramidkv-" + std::to_string(layer));
    const int64_t count = policy.entries(policy.kept(), model, layer, 150);
    const auto held = kept(c, "snapkv(budget=" + std::to_string(count) + ",window=16)", GetParam());
    for (int64_t kv = 0; kv < 4; ++kv) EXPECT_EQ(held[size_t(kv)], ones(stayed->select(0, kv))) << "layer " << layer;
  }
}

TEST_P(Golden, PrunesTheChannelsOfThink) {
  const Case c({4, 4, 150, 150, 16, 16}, 17);
  Case pruned({4, 4, 150, 150, 16, 16}, 17);
  const Buffer stays = read("authors/think");
  for (int64_t kv = 0; kv < 4; ++kv)
    for (int64_t j = 0; j < 150 - 32; ++j)
      for (int64_t x = 0; x < 16; ++x)
        if (!stays->at<uint8_t>(kv, x)) pruned.k->at<float>(kv, j, x) = 0;
  EXPECT_LT(kept_error(pruned, c.run("think(share=0.4)", GetParam())), kExact);
}

// Plans: the same blocks.
TEST_P(Golden, ReadsTheBlocksThatAuthorsRead) {
  Case alike({2, 1, 256, 256, 16, 16});
  fill("authors/spargeattn.q", alike.q), fill("authors/spargeattn.k", alike.k);
  const Case anti({4, 2, 500, 500, 16, 16}, 3, 3), flex({4, 2, 512, 512, 16, 16}, 5, 2);
  const std::string sparge = "spargeattn(q_block=32,k_block=16,theta=0.4,",
                    x = "xattention(block=32,as_released=true,threshold=",
                    prefill = "flexprefill(block=32,min_budget=64,tau=";
  for (const auto& [file, c, spec, rows, cols] :
       {std::tuple<std::string, const Case*, std::string, int64_t, int64_t>{"xattention-0.6", &anti, x + "0.6)", 32, 32},
        {"xattention-0.9", &anti, x + "0.9)", 32, 32},
        {"flexprefill-0.0", &flex, prefill + "0)", 32, 32},
        {"flexprefill-0.2", &flex, prefill + "0.2)", 32, 32},
        {"spargeattn-cdf", &alike, sparge + "tau=0.9)", 32, 16},
        {"spargeattn-topk", &alike, sparge + "topk=0.3)", 32, 16}}) {
    const Buffer blocks = read("authors/" + file);
    const auto plan = planned(*c, spec, GetParam(), rows, cols);
    const int64_t tiles = blocks->size[1];
    ASSERT_EQ(plan.size(), size_t(c->shape.h * tiles)) << spec;
    for (int64_t head = 0; head < c->shape.h; ++head)
      for (int64_t t = 0; t < tiles; ++t)
        ASSERT_EQ(plan[size_t(head * tiles + t)], ones(blocks->select(0, head).select(0, t)))
            << spec << " " << head << ", " << t;
  }
}

TEST_P(Golden, RoundsAsKivi) {
  const Case c({4, 2, 192, 192, 32, 32}, 31);
  const Buffer expected = read("authors/kivi");
  const ApplyOutput applied = c.run("kivi(residual=64)", GetParam());
  const Tensor out = applied.find("kept_out")->view();
  for (int64_t head = 0; head < 4; ++head)
    for (int64_t x = 0; x < 32; ++x)
      EXPECT_NEAR(out.at<float>(head, x), expected->at<float>(head, x), 2e-3);  // scales in f16
}

TEST_P(Golden, KeepsWhatDefensiveKvsAuthorsKeep) {
  const Case c({6, 2, 150, 150, 16, 16}, 25, 3);
  Random random(26);
  const Buffer output = drawn(random, {12, 96});
  ApplyInput in = c.input(GetParam());
  in.inputs = {{"output", output}};
  const auto held = lists(Case::run("defensivekv(budget=60,window=16,as_released=true)", in), "kept");
  const Buffer stayed = read("authors/defensivekv");
  for (int64_t kv = 0; kv < 2; ++kv) EXPECT_EQ(held[size_t(kv)], ones(stayed->select(0, kv)));
}

TEST_P(Golden, OpensTheGatesOfSeerAttention) {
  const Case c({4, 2, 240, 240, 16, 16}, 28);
  Random random(27);
  const Buffer q = drawn(random, {4, 240, 16}), k = drawn(random, {2, 240, 16}), w = drawn(random, {4, 32, 16}),
               gates = read("authors/seer_attention");
  ApplyInput in = c.input(GetParam());
  in.inputs = {{"plain_q", q}, {"plain_k", k}, {"w_k", w}};
  for (const char* threshold : {"0.05", "0.2"}) {
    const auto plan = lists(Case::run(std::string("seer_attention(block=32,threshold=") + threshold + ")", in), "plan");
    for (int64_t head = 0; head < 4; ++head)
      for (int64_t t = 0; t < 8; ++t) {
        std::vector<int32_t> expected;  // heed reads the own block and the last two tiles' in any case
        for (int32_t j = 0; j <= t; ++j)
          if (j == t || t >= 6 || gates->at<float>(head, t, j) > std::stof(threshold)) expected.push_back(j);
        EXPECT_EQ(plan[size_t(head * 8 + t)], expected) << "head " << head << " tile " << t;
      }
  }
}

TEST_P(Golden, ReadsTheBlocksOfMoba) {
  const Case c({4, 2, 300, 300, 16, 16}, 9);
  const Buffer blocks = read("authors/moba");
  const auto plan = lists(c.run("moba(block=32,topk=3)", GetParam()), "plan");
  for (int64_t head = 0; head < 4; ++head)
    for (int64_t i = 0; i < 300; ++i) {
      std::vector<int32_t> expected;
      for (int32_t j = 0; j <= i; ++j)
        if (blocks->at<uint8_t>(head, i, j / 32)) expected.push_back(j);
      ASSERT_EQ(plan[size_t(head * 300 + i)], expected) << "head " << head << " row " << i;
    }
}

TEST_P(Golden, ReadsTheColumnsAndDiagonalsOfMInference) {
  const Case c({4, 2, 300, 300, 16, 16}, 11, 2);
  const Buffer columns = read("authors/minference.columns"), slashes = read("authors/minference.slashes");
  const auto read_keys = lists(c.run("minference(columns=40,slashes=120)", GetParam()), "plan");
  for (int64_t head = 0; head < 4; ++head)
    for (int64_t i = 0; i < 300; ++i) {
      std::set<int32_t> expected;
      for (int64_t x = 0; x < columns->size[1]; ++x)
        if (columns->at<int32_t>(head, x) <= i) expected.insert(columns->at<int32_t>(head, x));
      for (int64_t row = i / 64 * 64; row < std::min<int64_t>(300, i / 64 * 64 + 64); ++row)  // any query of the tile
        for (int64_t x = 0; x < slashes->size[1]; ++x) {
          const int64_t j = row - slashes->at<int32_t>(head, x);
          if (j >= 0 && j <= i) expected.insert(int32_t(j));
        }
      ASSERT_EQ(read_keys[size_t(head * 300 + i)], sorted(expected)) << "head " << head << " row " << i;
    }
}

TEST_P(Golden, ReadsTheTokensOfFlasIndexer) {
  const Case c({4, 2, 100, 100, 16, 16}, 12);
  Random random(13);
  const Buffer q = drawn(random, {8, 100, 6}), k = drawn(random, {100, 6}), tokens = read("authors/dsa");
  Buffer w = drawn(random, {100, 8});
  for (float& x : w->span<float>()) x = std::abs(x);
  ApplyInput in = c.input(GetParam());
  in.inputs = {{"index_q", q}, {"index_k", k}, {"index_w", w}};
  const auto plan = lists(Case::run("dsa(topk=20)", in), "plan");
  for (int64_t head = 0; head < 4; ++head)
    for (int64_t i = 0; i < 100; ++i)
      ASSERT_EQ(plan[size_t(head * 100 + i)], ones(tokens->select(0, i))) << "row " << i;
}

TEST_P(Golden, ReadsThePagesOfQuest) {
  const Case c({4, 2, 1, 288, 16, 16}, 15);
  const Buffer pages = read("authors/quest");
  const auto plan = lists(c.run("quest(budget=96,dense=0)", GetParam()), "read");
  for (int64_t head = 0; head < 4; ++head) {
    std::vector<int32_t> expected;
    for (int32_t j = 0; j < 288; ++j)
      if (j >= 272 || pages->at<uint8_t>(head, j / 16)) expected.push_back(j);
    EXPECT_EQ(plan[size_t(head)], expected);
  }
}

}  // namespace
}  // namespace heed::test
