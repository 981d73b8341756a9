// Files and streams that cannot be written, said before any work, and what was finished kept.
#include "apps/program.h"
#include "apps/tiny_model.h"
#include "base/npy.h"

namespace heed {
namespace {

class Files : public ProgramTest {
 protected:
  Files() {
    TinyModel().write(model_);
    std::string text;
    while (text.size() < 400) text += "the harbour was quiet and nobody saw the ship. ";
    write("text.txt", text);
  }
  std::string model_ = path("tiny.gguf"), text_ = path("text.txt");
};

TEST_F(Files, OutputsThatCannotBeAreRefusedFirst) {
  // The model is not there: it would be complained of if it were opened first.
  const std::string none = path("none.gguf"), bad = path("no/such/out");
  const auto before = files();
  for (const std::vector<std::string>& command :
       std::vector<std::vector<std::string>>{{"trace", "-m", none, "-f", text_, "-o", bad},
                                             {"compare", "-m", none, "-f", text_, "--report", bad},
                                             {"eval", "-m", none, "-f", text_, "--report", bad},
                                             {"eval", "-m", none, "-f", text_, "--state", bad},
                                             {"calibrate", "duo-attention", "-m", none, "-f", text_, "-o", bad},
                                             {"apply", "dense", "--q", none, "--k", none, "--v", none, "-o", bad}})
    expect_complaint(heed(command), 2, bad);
  expect_complaint(heed({"trace", "-m", none, "-f", text_, "-o", folder_}), 2, "directory");
  expect_complaint(heed({"calibrate", "expected-attention-stats", "-m", none, "-f", text_, "-o", path("s.npz")}), 2,
                   "s.npz");
  expect_complaint(heed({"eval", "-m", model_, "-f", text_, "--tasks", "niah_single_2", "--samples", bad}), 2, bad);
  expect_complaint(heed({"pairs", "-m", model_, "-f", text_, "-c", "64", "--score", "8", "--rows", bad}), 2, bad);
  EXPECT_EQ(files(), before);
}

TEST_F(Files, ADeviceStaysADevice) {
  std::filesystem::create_symlink("/dev/full", path("full"));
  expect_complaint(heed({"trace", "-m", model_, "-f", text_, "-o", path("full")}), 2, "regular file");
  const Outcome outcome = heed({"compare", "-m", model_, "-f", text_, "-c", "64", "--report", path("full"), "--json"});
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(outcome.json().size(), 1u) << "the rows are not lost";
  EXPECT_NE(outcome.err.find("No space left"), std::string::npos) << outcome.err;
  EXPECT_TRUE(std::filesystem::is_character_file(path("full")));
}

TEST_F(Files, StandardOutputThatCannotBeWrittenIsSaid) {
  for (const char* to : {"/dev/full", ""}) {
    for (const std::vector<std::string>& command :
         std::vector<std::vector<std::string>>{{"list"},
                                               {"info", "--json"},
                                               {"tokenize", "-m", model_, "-f", text_},
                                               {"run", "-m", model_, "-p", "the", "-n", "2"}}) {
      const Outcome outcome = heed(command, to);
      EXPECT_EQ(outcome.status, 1) << command[0];
      EXPECT_NE(outcome.err.find("standard output cannot be written"), std::string::npos) << outcome.err;
    }
    // What goes to a file is whole, and holds nothing of what was to be printed.
    EXPECT_EQ(heed({"trace", "-m", model_, "-f", text_, "-c", "20", "-o", path("t.npz")}, to).status, 1);
    EXPECT_EQ(value_or_throw(read_npz(path("t.npz"))).size(), 7u);
  }
}

TEST_F(Files, AnEvaluationThatFailsLateTellsWhatItFound) {
  // The passage of kld has no room for what is to be scored.
  const Outcome outcome = heed(
      {"eval", "-m", model_, "-f", text_, "--tasks", "ppl,kld", "-c", "64", "--score", "64", "--json"});
  EXPECT_EQ(outcome.status, 2);
  EXPECT_NE(outcome.err.find("--score"), std::string::npos) << outcome.err;
  EXPECT_GT(outcome.json()["ppl"].get<double>(), 1);
}

TEST_F(Files, AStateOfAnotherTextOrWithoutSenseIsRefused) {
  const std::string state = path("state.json");
  const std::vector<std::string> eval = {"eval", "-m",       model_, "-f",      text_, "-c",
                                         "32",   "--chunks", "2",    "--state", state};
  ASSERT_EQ(heed(eval).status, 0);
  const std::string good = read(state), text = read(text_);
  write("text.txt", text.substr(0, text.size() - 1) + "?");  // as many tokens
  expect_complaint(heed(eval), 2, "another");
  write("text.txt", text);
  EXPECT_EQ(heed(eval).status, 0);
  const auto whole = nlohmann::ordered_json::parse(good);
  for (const char* field : {"chunks", "tokens"}) {
    auto negative = whole;
    negative[field] = -1;
    write("state.json", negative.dump());
    expect_complaint(heed(eval), 2, "damaged");
  }
  std::filesystem::remove(state);
  std::filesystem::create_directory(state);
  expect_complaint(heed(eval), 2, state);
}

}  // namespace
}  // namespace heed
