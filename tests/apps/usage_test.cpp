// What needs no model: help, the catalogue, and command lines that are wrong.
#include <set>

#include "apps/program.h"

namespace heed {
namespace {

using Usage = ProgramTest;

TEST_F(Usage, EveryCommandHasHelpWithExamples) {
  const Outcome all = heed({"--help"});
  EXPECT_EQ(all.status, 0);
  EXPECT_EQ(heed({}).out, all.out);
  for (const char* command : {"run", "compare", "eval", "pairs", "trace", "apply", "tokenize", "list", "info", "heads",
                              "calibrate", "bench"}) {
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
  expect_complaint(heed({"run", "--hepl"}), 2, "did you mean --help");
  expect_complaint(heed({"-x"}), 2, "argument of `heed`");
  expect_complaint(heed({"info", "snapkv", "-m", "x"}), 2, "excludes");
  expect_complaint(heed({"info", "-m", ""}), 2, "heed: '': ");
  expect_complaint(heed({"run", "-m", "x", "-n", "many"}), 2, "many");
  expect_complaint(heed({"eval", "-m", "x", "-f", "y", "--tasks", "pll"}), 2, "pll");
  expect_complaint(heed({"bench", "-m", "x", "-o", "xml"}), 2, "xml");
  expect_complaint(heed({"list", "superfluous"}), 2, "superfluous");
  for (const char* number : {"-1", "x", "99999999999999999999", "1.5"})
    expect_complaint(heed({"trace", "-m", "x", "-c", number, "-o", "y"}), 2,
                     std::string("'") + number + "' is no whole number ≥ 1");
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

TEST_F(Usage, ThePageTellsEveryMechanismAndItsRows) {
  const std::string rows =
      R"json([{"attention": "dense", "ppl": 2.5}, {"attention": "adakv(snapkv(budget=5%))", "ppl": 2.75, "kv_bytes": 1048576},
          {"attention": "tova(budget=9)", "ppl": 2.625, "front_memory": true, "not_exercised": null}])json";
  const Outcome outcome = heed({"list", "--page", "--results", write("small.json", rows)});
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const std::string& page = outcome.out;
  const auto section = [&](const std::string& name) {
    const size_t at = page.find("\n## " + name + "\n");
    EXPECT_NE(at, std::string::npos) << name;
    return at == std::string::npos ? "" : page.substr(at, page.find("\n## ", at + 1) - at);
  };
  for (const auto& entry : heed({"list", "--json"}).json()) {
    const std::string text = section(entry["name"]);
    for (const auto& p : entry["parameters"]) {
      const std::string name = p["name"];
      if (name == "layers" || name == "heads") continue;
      EXPECT_NE(text.find("| `" + name + "` |"), std::string::npos) << entry["name"] << " " << name;
    }
  }
  EXPECT_NE(section("snapkv").find("`adakv(snapkv(budget=5%))` | 2.750"), std::string::npos);
  EXPECT_NE(section("adakv").find("1.0 MiB"), std::string::npos);
  EXPECT_EQ(section("kvzip").find("budget=5%"), std::string::npos);
  EXPECT_LT(page.find("`tova(budget=9)`"), page.find("`adakv(snapkv(budget=5%))`"));  // by perplexity
  expect_complaint(heed({"list", "--page", "--results", write("other.json", "{}")}), 2, "other.json");
  expect_complaint(heed({"list", "--page", "--results", path("none.json")}), 2, "none.json");
}

// `heed list --page --results docs/results/*.json > docs/mechanisms.md` makes it.
TEST_F(Usage, TheCommittedPageIsTheCataloguesOwn) {
  const std::filesystem::path docs = std::filesystem::path(HEED_TEST_DATA) / "../../docs";
  std::vector<std::string> arguments = {"list", "--page"};
  std::set<std::string> results;
  if (std::filesystem::exists(docs / "results"))
    for (const auto& file : std::filesystem::directory_iterator(docs / "results"))
      if (file.path().extension() == ".json") results.insert(file.path().string());
  for (const std::string& file : results) arguments.insert(arguments.end(), {"--results", file});
  EXPECT_EQ(read((docs / "mechanisms.md").string()), heed(arguments).out);
}

// A mechanism is said to be measured when a row of docs/results has its speed on a model, or its times on tensors.
TEST_F(Usage, WhatIsSaidToBeMeasuredHasARow) {
  const std::filesystem::path results = std::filesystem::path(HEED_TEST_DATA) / "../../docs/results";
  std::set<std::string> measured;
  const auto enter = [&](const nlohmann::json& row) {
    const bool speeds = row.value("prefill_tps", nlohmann::json()).is_number() &&
                        row.value("decode_tps", nlohmann::json()).is_number();
    if (!speeds && !row.contains("ms")) return;
    const std::string spec = row["attention"];
    for (size_t at = 0, end; at < spec.size(); at = end + 1) {
      end = std::min(spec.find_first_of("(),+=", at), spec.size());
      measured.insert(spec.substr(at, end - at));
    }
  };
  for (const auto& file : std::filesystem::directory_iterator(results)) {
    std::ifstream text(file.path());
    if (file.path().extension() == ".json")
      for (const auto& row : nlohmann::json::parse(text)) enter(row);
    else if (file.path().filename().string().starts_with("tensors-"))
      for (std::string line; std::getline(text, line);) enter(nlohmann::json::parse(line));
  }
  for (const auto& entry : heed({"list", "--json"}).json()) {
    const std::vector<std::string> verified = entry["verified"];
    EXPECT_EQ(std::ranges::count(verified, "bench") > 0, measured.contains(entry["name"])) << entry["name"];
  }
}

TEST_F(Usage, InfoTellsWhatToGiveWithItsShape) {
  const auto inputs = [&](const char* name) { return heed({"info", name, "--json"}).json()["inputs"]; };
  EXPECT_EQ(inputs("snapkv"), nlohmann::json::array());
  EXPECT_EQ(inputs("gdn")[1], "beta [h, n]: step in (0, 1)");
  EXPECT_EQ(inputs("critical-ada")[0], "output [hidden, h·d_v]: the output matrix") << "a wrapper";
  EXPECT_NE(heed({"info", "gdn"}).out.find("state [h, d, d_v]"), std::string::npos);
  // Whatever the catalogue says is to be given is there with a shape.
  for (const auto& entry : heed({"list", "--json"}).json()) {
    const std::string needs = entry["needs"];
    for (size_t at = 0; (at = needs.find("--input ", at)) != std::string::npos; at += 8) {
      const std::string name = needs.substr(at + 8, needs.find('=', at) - at - 8);
      bool told = false;
      for (const std::string line : entry["inputs"]) told |= line.find(name + " [") != std::string::npos;
      EXPECT_TRUE(told) << entry["name"] << " " << name;
    }
  }
}

TEST_F(Usage, InfoTellsAMechanismAndTheMachine) {
  EXPECT_EQ(heed({"info", "snapkv", "--json"}).json()["name"], "snapkv");
  EXPECT_NE(heed({"info", "snapkv"}).out.find("budget"), std::string::npos);
  expect_complaint(heed({"info", "snapkw"}), 2, "snapkv");
  expect_complaint(heed({"info", "nothingofthekind"}), 2, "heed list");
  const auto machine = heed({"info", "--json"}).json();
  EXPECT_GE(machine["threads"].get<int>(), 1);
  EXPECT_FALSE(machine["kernels"].empty());
}

}  // namespace
}  // namespace heed
