#include "attention/spec.h"

#include <gtest/gtest.h>

#include <fstream>

#include "mechanisms/registry.h"

namespace heed {
namespace {

ModelInfo model() {
  ModelInfo m;
  m.layers = 6, m.h = 4, m.g = 2, m.d = m.d_v = 64;
  return m;
}

Composition composed(const std::string& text) { return value_or_throw(Composition::parse(text, model(), registry())); }

std::string refused(const std::string& text, Code* code = nullptr) {
  auto out = Composition::parse(text, model(), registry());
  if (out) return "accepted";
  if (code) *code = out.error().code;
  return out.error().text();
}

TEST(Spec, TakesTextApart) {
  const auto specs = value_or_throw(
      parse_spec(" xattention( threshold = 0.9 , layers=[0-3, 7] ) +adakv(snapkv(budget=10%), alpha=0.5)+ h2o()"));
  ASSERT_EQ(specs.size(), 3u);
  EXPECT_EQ(specs[0].name, "xattention");
  EXPECT_EQ(specs[0].settings[0].key, "threshold");
  EXPECT_EQ(specs[0].settings[0].value, "0.9");
  EXPECT_EQ(specs[0].settings[1].value, "[0-3, 7]");
  EXPECT_EQ(specs[1].inner[0].name, "snapkv");
  EXPECT_EQ(specs[1].text(), "adakv(snapkv(budget=10%),alpha=0.5)");
  EXPECT_EQ(specs[2].text(), "h2o");
  EXPECT_TRUE(value_or_throw(parse_spec("  ")).empty());
}

TEST(Spec, TextParsesToItself) {
  for (const char* text : {"dense", "quest(budget=512)",
                           "adakv(snapkv(budget=0.5,when=every(4)),alpha=0)+xattention(layers=2-)+ring(ranks=2)"}) {
    const auto once = value_or_throw(parse_spec(text));
    std::string joined;
    for (const Spec& s : once) joined += (joined.empty() ? "" : "+") + s.text();
    EXPECT_EQ(joined, text);
  }
}

TEST(Spec, ErrorsPointAtTheCharacter) {
  for (const auto& [text, at] : {std::pair{"snapkv(budget=3", 7},
                                 {"snapkv(budget=)", 15},
                                 {"snapkv)(", 7},
                                 {"+snapkv", 1},
                                 {"snapkv+", 8},
                                 {"snapkv(=3)", 8},
                                 {"a(b=[1,2)", 9},
                                 {"snapkv budget", 8},
                                 {"h2o(budget=1,)", 14},
                                 {"h2o(\xff)", 5}}) {
    const auto out = parse_spec(text);
    ASSERT_FALSE(out.has_value()) << text;
    EXPECT_NE(out.error().where.find("character " + std::to_string(at) + " "), std::string::npos)
        << text << ": " << out.error().text();
  }
}

TEST(Spec, NamesTheNearest) {
  Code code{};
  EXPECT_NE(refused("snapvk(budget=3)", &code).find("'snapkv'"), std::string::npos);
  EXPECT_EQ(code, Code::NotFound);
  EXPECT_NE(refused("stream").find("'streaming-llm'"), std::string::npos);
  EXPECT_NE(refused("snapkv(budgte=64)").find("'budget'"), std::string::npos);
  EXPECT_NE(refused("zzzzzzzzzz").find("`heed list`"), std::string::npos);
  EXPECT_EQ(composed("Streaming_LLM(window=8)").parts().size(), 1u);
}

TEST(Spec, ValuesAreChecked) {
  for (const auto& [text, word] : {std::pair{"snapkv(budget=0)", "budget"},  {"snapkv(budget=1.5)", "budget"},
                                   {"snapkv(budget=-3)", "budget"},          {"snapkv(budget=1e400)", "budget"},
                                   {"snapkv(window=0)", "window"},           {"snapkv(window=2.5)", "window"},
                                   {"snapkv(window=nan)", "window"},         {"snapkv(pool=min)", "avg, max"},
                                   {"snapkv(when=later)", "every(n)"},       {"snapkv(when=every(0))", "every(n)"},
                                   {"snapkv(budget=64,budget=65)", "twice"}, {"adakv", "exactly one"},
                                   {"adakv(snapkv,h2o)", "exactly one"},     {"adakv(quest)", "no keep policy"},
                                   {"snapkv(h2o)", "holds no other"},        {"adakv(snapkv(layers=1))", "outermost"},
                                   {"snapkv(layers=9)", "layer 9"},          {"snapkv(heads=2)", "KV heads"},
                                   {"moba(heads=4)", "query heads"},         {"snapkv(layers=3-1)", "ends before"},
                                   {"snapkv(layers=x)", "layers"},           {"quest(page=24)", "page"},
                                   {"tova(force_last=maybe)", "true"}})
    EXPECT_NE(refused(text).find(word), std::string::npos) << text << " → " << refused(text);
}

TEST(Spec, RolesComposeOrConflict) {
  const Composition c = composed("xattention(layers=2-)+adakv(snapkv(budget=64))+quest+ring+act");
  EXPECT_EQ(c.owner(Role::Plan, 0), -1);
  EXPECT_EQ(c.owner(Role::Plan, 2), 0);
  EXPECT_EQ(c.owner(Role::Keep, 5), 1);
  EXPECT_EQ(c.owner(Role::Read, 0), 2);
  EXPECT_EQ(c.edits(3), (std::vector<int>{3, 4}));
  EXPECT_EQ(c.text(), "xattention(layers=2-)+adakv(snapkv(budget=64))+quest+ring+act" + std::string());
  Code code{};
  const std::string text = refused("snapkv+h2o", &code);
  EXPECT_EQ(code, Code::Conflict);
  EXPECT_NE(text.find("snapkv and h2o both decide what is kept in layer 0"), std::string::npos) << text;
  EXPECT_NE(text.find("layers="), std::string::npos);
  EXPECT_EQ(composed("snapkv(layers=-2)+h2o(layers=3-)").owner(Role::Keep, 3), 1);
  EXPECT_NE(refused("snapkv(layers=-3)+h2o(layers=3-)").find("layer 3"), std::string::npos);
  EXPECT_NE(refused("quest+tidal-decode").find("both decide what decoding reads"), std::string::npos);
  EXPECT_NE(refused("quest+streaming-llm").find("rotat"), std::string::npos);
  EXPECT_NE(refused("tidal-decode+snapkv").find("drops entries"), std::string::npos);
  EXPECT_EQ(composed("tidal-decode+kivi").parts().size(), 2u);
  EXPECT_NE(refused("kivi(bits=2,layers=0-2)+kivi(bits=4,layers=3-)").find("different quantised pages"), std::string::npos);
}

TEST(Spec, DenseHasNoParts) {
  for (const char* text : {"", "dense", "  dense ", "dense+dense"}) EXPECT_TRUE(composed(text).parts().empty());
  EXPECT_EQ(composed("dense+quest").parts().size(), 1u);
  EXPECT_EQ(composed("").text(), "dense");
}

TEST(Spec, RangesHoldWhatTheySay) {
  auto in = [](const std::string& text) {
    const Range r = value_or_throw(Range::parse(text));
    std::string out;
    for (int i = 0; i < 6; ++i) out += r.holds(i, 6) ? '1' : '0';
    return out;
  };
  EXPECT_EQ(in(""), "111111");
  EXPECT_EQ(in("2-"), "001111");
  EXPECT_EQ(in("-2"), "111000");
  EXPECT_EQ(in("1-3"), "011100");
  EXPECT_EQ(in("last"), "000001");
  EXPECT_EQ(in("[0, 3-4,last]"), "100111");
  EXPECT_EQ(in("4-last"), "000011");
  for (const char* bad : {"-", "[", "[]", "1--2", "1,,2", "last-2", "99999999999", "1-2-3"})
    EXPECT_FALSE(Range::parse(bad).has_value()) << bad;
}

TEST(Spec, BudgetsRoundDown) {
  auto entries = [](const char* text, int64_t length) { return value_or_throw(Budget::parse(text)).entries(length); };
  EXPECT_EQ(entries("512", 10), 512);
  EXPECT_EQ(entries("1", 10), 1);
  EXPECT_EQ(entries("1.0", 10), 10);
  EXPECT_EQ(entries("10%", 1000), 100);
  EXPECT_EQ(entries("0.29", 100), 29);
  EXPECT_EQ(entries("0.999", 10), 9);
  EXPECT_EQ(entries("0.001", 10), 1);
}

class Profile : public testing::Test {
 protected:
  std::string write(const std::string& text) {
    path_ = testing::TempDir() + "heed_profile_test.json";
    std::ofstream(path_) << text;
    return "@" + path_;
  }
  void TearDown() override { std::remove(path_.c_str()); }
  std::string path_;
};

TEST_F(Profile, NamesLayersBesideItsSpecs) {
  EXPECT_EQ(composed(write(R"j({"attention": "quest(budget=64)+snapkv"})j")).parts().size(), 2u);
  const Composition c = composed(write(
      R"j({"attention": [{"spec": "snapkv(budget=64)", "layers": "0-2"}, {"spec": "h2o+quest", "layers": [3, "4-"], "heads": 1}]})j"));
  EXPECT_EQ(c.owner(Role::Keep, 2), 0);
  EXPECT_EQ(c.owner(Role::Keep, 5), 1);
  EXPECT_EQ(c.owner(Role::Read, 2), -1);
  EXPECT_TRUE(c.parts()[1].mechanism->heads.holds(1, 2));
  EXPECT_FALSE(c.parts()[1].mechanism->heads.holds(0, 2));
}

TEST_F(Profile, ErrorsSayWhatIsWrong) {
  EXPECT_NE(refused("@/nowhere/at/all.json").find("cannot be opened"), std::string::npos);
  for (const auto& [text, word] :
       {std::pair{"{", "not JSON"},
        {"[]", "attention"},
        {R"j({"attention": 3})j", "neither"},
        {R"j({"attention": [{}]})j", "spec"},
        {R"j({"attention": "@other.json"})j", "another profile"},
        {R"j({"attention": "snapvk"})j", "snapkv"},
        {R"j({"attention": [{"spec": "snapkv(layers=1)", "layers": "2"}]})j", "leave one out"},
        {R"j({"attention": [{"spec": "snapkv", "layers": [[1]]}]})j", "list inside a list"}})
    EXPECT_NE(refused(write(text)).find(word), std::string::npos) << text << " → " << refused(write(text));
}

TEST(Registry, EveryEntryIsWhole) {
  std::string last;
  for (const Entry& e : registry()) {
    EXPECT_FALSE(e.title.empty() || e.paper.empty() || e.equation.empty()) << e.name;
    EXPECT_GT(e.year, 2010) << e.name;
    EXPECT_NE(e.identity.empty(), e.no_identity.empty()) << e.name << ": an identity, or why there is none";
    if (e.name != "dense") {
      EXPECT_LT(last, e.name) << "sorted by name";
      last = e.name;
    }
    if (e.kind != "mechanism") continue;
    auto made = make_mechanism(
        {e.wrapper ? value_or_throw(parse_spec(e.name + "(snapkv)"))[0] : Spec{e.name, {}, {}, 0}}, registry());
    ASSERT_TRUE(made.has_value()) << made.error().text();
    EXPECT_TRUE(e.identity.empty() || Composition::parse(e.identity, model(), registry()).has_value()) << e.identity;
    for (const ParamInfo& p : e.params) EXPECT_FALSE(p.help.empty() || p.range.empty()) << e.name << " " << p.name;
  }
}

}  // namespace
}  // namespace heed
