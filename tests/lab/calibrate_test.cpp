#include "lab/calibrate.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/hash.h"
#include "lab/files.h"
#include "mechanisms/registry.h"

namespace heed {
namespace {

/// Two layers of four query heads over two KV heads, and a layer with a window between them.
ModelInfo shape() {
  ModelInfo m;
  m.architecture = "llama", m.layers = 3, m.h = 4, m.g = 2, m.d = m.d_v = 16, m.windows = {0, 64, 0}, m.hash = 0xabcdefull;
  return m;
}

/// Query head 3 of layer 0 and 0 of layer 2 retrieve; query head 2 of layer 2 looks far.
HeadStudy study(int counted) {
  HeadStudy out;
  out.views.assign(3, std::vector<HeadView>(4, {.sink = 0.5, .local = 0.4}));
  out.views[2][2].local = 0.1;
  out.retrieval.layers = 3, out.retrieval.heads = 4, out.retrieval.counted = counted;
  out.retrieval.score.assign(12, 0);
  out.retrieval.score[3] = 0.25, out.retrieval.score[8] = 0.75, out.retrieval.score[4] = 1;  // the last in the window
  return out;
}

Spec spec(const std::string& text) { return value_or_throw(parse_spec(text))[0]; }

TEST(Calibrate, RanksKvHeadsByTheirBestQueryHead) {
  EXPECT_EQ(by_retrieval(shape(), study(4)), (std::vector<int>{4, 1, 5, 0})) << "2 and 3 have a window";
  EXPECT_EQ(by_retrieval(shape(), study(0)), (std::vector<int>{5, 0, 1, 4})) << "no needle found: by how far they look";
}

/// Whether the mechanism of a profile, read back from its file, applies to a KV head of a layer.
std::vector<int> applies(const nlohmann::ordered_json& profile) {
  const std::string path = testing::TempDir() + "/heed_calibrated.json";
  value_or_throw(write_file(path, profile.dump()));
  const ModelInfo m = shape();
  const Composition c = value_or_throw(Composition::parse("@" + path, m, registry()));
  std::vector<int> out;
  for (int kv = 0; kv < m.layers * m.g; ++kv)
    for (const Composition::Part& part : c.parts())
      if (part.mechanism->layers.holds(kv / m.g, m.layers) && part.mechanism->heads.holds(kv % m.g, m.g))
        out.push_back(kv);
  return out;
}

TEST(Calibrate, HeadsThatDoNotRetrieveStream) {
  for (const std::string name : {"duo-attention(recent=8)", "razor-attention(recent=8)"}) {
    EXPECT_EQ(applies(calibrate(spec(name), shape(), study(4), 0.5)), (std::vector<int>{0, 5})) << name;
    EXPECT_EQ(applies(calibrate(spec(name), shape(), study(4), 0)), (std::vector<int>{0, 1, 4, 5})) << name;
    EXPECT_EQ(applies(calibrate(spec(name), shape(), study(4), 1)), std::vector<int>()) << name;
    EXPECT_EQ(applies(calibrate(spec(name), shape(), study(4), 0.01)), (std::vector<int>{0, 1, 5})) << "rounded up";
  }
}

TEST(Calibrate, ScoresAndListsBecomeParameters) {
  EXPECT_EQ(calibrate(spec("headkv(snapkv(budget=64))"), shape(), study(4), 1)["attention"],
            "headkv(snapkv(budget=64),scores=[0,0.25,1,0,0.75,0])");
  EXPECT_EQ(calibrate(spec("lychee-decode(budget=9)"), shape(), study(4), 0.5)["attention"],
            "lychee-decode(budget=9,retrieval=[1,4])");
  EXPECT_EQ(calibrate(spec("lychee-decode"), shape(), study(4), 0)["attention"], "lychee-decode");
}

TEST(Calibrate, WhatCannotBeFoundIsToldWithWhatCan) {
  const auto unknown = find_calibrated("snapkv");
  ASSERT_FALSE(unknown);
  EXPECT_NE(unknown.error().remedy.find("duo-attention"), std::string::npos);
  EXPECT_THROW(calibrate(spec("duo-attention(heads=1)"), shape(), study(4), 0.5), Error);
  EXPECT_THROW(calibrate(spec("lychee-decode(retrieval=2)"), shape(), study(4), 0.5), Error);
}

TEST(Calibrate, AProfileServesItsOwnModelAlone) {
  const auto profile = calibrate(spec("duo-attention"), shape(), study(4), 0.5);
  EXPECT_EQ(profile["model"], hexadecimal(shape().hash));
  const std::string path = testing::TempDir() + "/heed_calibrated.json";
  value_or_throw(write_file(path, profile.dump()));
  ModelInfo other = shape();
  other.hash = 7;
  const auto refused = Composition::parse("@" + path, other, registry());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Code::Invalid);
  EXPECT_NE(refused.error().what.find(hexadecimal(7)), std::string::npos) << refused.error().what;
  other.hash = 0;  // tensors without a model
  EXPECT_TRUE(Composition::parse("@" + path, other, registry()));
  value_or_throw(write_file(path, R"({"attention": "snapkv", "model": "x\u001b"})"));
  EXPECT_FALSE(Composition::parse("@" + path, other, registry()));
}

}  // namespace
}  // namespace heed
