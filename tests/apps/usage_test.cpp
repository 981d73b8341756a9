// What needs no model: help, the catalogue, and command lines that are wrong.
#include "apps/program.h"

namespace heed {
namespace {

using Usage = ProgramTest;

TEST_F(Usage, EveryCommandHasHelpWithExamples) {
  const Outcome all = heed({"--help"});
  EXPECT_EQ(all.status, 0);
  EXPECT_EQ(heed({}).out, all.out);
  for (const char* command :
       {"run", "compare", "eval", "trace", "apply", "tokenize", "list", "info", "heads", "bench"}) {
    EXPECT_NE(all.out.find(std::string("\n  ") + command), std::string::npos) << command;
    const Outcome one = heed({command, "--help"});
    EXPECT_EQ(one.status, 0);
    EXPECT_NE(one.out.find("Examples:\n  heed " + std::string(command)), std::string::npos) << one.out;
    EXPECT_EQ(one.err, "");
  }
  EXPECT_EQ(heed({"--version"}).status, 0);
}

TEST_F(Usage, WrongCommandLinesNameWhatWasMeant) {
  expect_complaint(heed({"cmpare"}), 2, "did you mean `heed compare`");
  expect_complaint(heed({"list", "--jsn"}), 2, "did you mean --json");
  expect_complaint(heed({"run", "-m", "x", "--attenton", "dense"}), 2, "did you mean --attention");
  expect_complaint(heed({"run"}), 2, "--model");
  expect_complaint(heed({"run", "-m", "x", "-n", "many"}), 2, "many");
  expect_complaint(heed({"eval", "-m", "x", "-f", "y", "--tasks", "pll"}), 2, "pll");
  expect_complaint(heed({"bench", "-m", "x", "-o", "xml"}), 2, "xml");
  expect_complaint(heed({"list", "superfluous"}), 2, "superfluous");
}

TEST_F(Usage, MissingFilesAreSaidByName) {
  expect_complaint(heed({"info", "-m", path("none.gguf")}), 2, "none.gguf");
  expect_complaint(
      heed({"apply", "dense", "--q", path("q.npy"), "--k", path("k.npy"), "--v", path("v.npy"), "-o", path("o.npz")}),
      2, "q.npy");
  EXPECT_TRUE(files().empty());
}

TEST_F(Usage, ListGivesTheFieldsPromised) {
  const Outcome outcome = heed({"list", "--json"});
  ASSERT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.err, "");
  const auto list = outcome.json();
  ASSERT_FALSE(list.empty());
  EXPECT_EQ(list[0]["name"], "dense");
  for (const auto& entry : list) {
    for (const char* field : {"name", "title", "paper", "year", "roles", "needs", "parameters", "verified"})
      EXPECT_TRUE(entry.contains(field)) << field;
    EXPECT_TRUE(entry["roles"].is_array());
    EXPECT_TRUE(entry["verified"].is_array());
    for (const auto& p : entry["parameters"])
      for (const char* field : {"name", "type", "default", "range", "help"}) EXPECT_TRUE(p.contains(field)) << field;
  }
}

TEST_F(Usage, InfoTellsAMechanismAndTheMachine) {
  EXPECT_EQ(heed({"info", "snapkv", "--json"}).json()["name"], "snapkv");
  EXPECT_NE(heed({"info", "snapkv"}).out.find("budget"), std::string::npos);
  expect_complaint(heed({"info", "snapkw"}), 2, "snapkv");
  const auto machine = heed({"info", "--json"}).json();
  EXPECT_GE(machine["threads"].get<int>(), 1);
  EXPECT_FALSE(machine["kernels"].empty());
}

}  // namespace
}  // namespace heed
