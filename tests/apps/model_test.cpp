// Commands on a small random model, and on files that are no models.
#include <cmath>
#include <csignal>

#include "apps/program.h"
#include "apps/tiny_model.h"
#include "base/npy.h"

namespace heed {
namespace {

std::string prose(int64_t bytes) {
  static const char* const words[] = {"the ", "harbour ", "was ", "quiet; ", "nobody ", "saw ", "a ", "ship.\n"};
  std::string out;
  Random random(3);
  while (int64_t(out.size()) < bytes) out += words[random.below(8)];
  out.resize(size_t(bytes));
  return out;
}

class OnModel : public ProgramTest {
 protected:
  OnModel() {
    TinyModel().write(model_);
    write("text.txt", prose(300));
  }
  std::string model_ = path("tiny.gguf"), text_ = path("text.txt");
};

TEST_F(OnModel, TokenizeGivesIdsAndPieces) {
  const auto json = heed({"tokenize", "-m", model_, "-p", "the<|im_end|>", "--json"}).json();
  std::string joined;
  for (const auto& piece : json["pieces"]) joined += piece.get<std::string>();
  EXPECT_EQ(joined, "the<|im_end|>");
  EXPECT_EQ(json["ids"].size(), json["pieces"].size());
  EXPECT_GT(json["ids"].size(), 5u);
  const auto special = heed({"tokenize", "-m", model_, "-p", "a<|im_end|>", "--special", "--json"}).json();
  EXPECT_EQ(special["ids"].back(), 258);
  EXPECT_EQ(special["ids"].size(), 2u);
}

TEST_F(OnModel, RunIsDeterministicAndKeepsToItsStreams) {
  const std::vector<std::string> arguments = {"run", "-m", model_, "-f",           text_,   "-p",
                                              "the", "-n", "12",   "--ignore-eos", "--json"};
  const Outcome outcome = heed(arguments);
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const auto json = outcome.json();
  EXPECT_EQ(json["tokens"].size(), 12u);
  EXPECT_EQ(json["stop"], "length");
  EXPECT_EQ(heed(arguments).json()["tokens"], json["tokens"]);
  const Outcome plain = heed({"run", "-m", model_, "-f", text_, "-p", "the", "-n", "12", "--ignore-eos"});
  EXPECT_EQ(plain.status, 0);
  EXPECT_NE(plain.err.find("t/s"), std::string::npos);
  EXPECT_EQ(plain.out.find("t/s"), std::string::npos);
}

TEST_F(OnModel, RunDrawsByItsSeed) {
  const auto draw = [&](const char* seed) {
    return heed({"run", "-m", model_, "-p", "the", "-n", "16", "--temp", "1.5", "--seed", seed, "--ignore-eos",
                 "--json"})
        .json()["tokens"];
  };
  EXPECT_EQ(draw("1"), draw("1"));
  EXPECT_NE(draw("1"), draw("2"));
}

TEST_F(OnModel, EvalGivesPerplexity) {
  const Outcome outcome = heed(
      {"eval", "-m", model_, "--tasks", "ppl", "-f", text_, "-c", "64", "--chunks", "2", "--json"});
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const auto json = outcome.json();
  EXPECT_EQ(json["tokens"], 2 * (64 - 32 - 1));
  EXPECT_NEAR(json["ppl"].get<double>(), std::exp(json["nll"].get<double>()), 1e-6 * json["ppl"].get<double>());
}

TEST_F(OnModel, EvalGoesOnFromItsState) {
  const std::string state = path("state.json");
  const auto eval = [&](const char* chunks, const char* context = "64") {
    return heed({"eval", "-m", model_, "-f", text_, "-c", context, "--chunks", chunks, "--state", state, "--json"});
  };
  const double once = heed({"eval", "-m", model_, "-f", text_, "-c", "64", "--chunks", "3", "--json"}).json()["nll"];
  ASSERT_EQ(eval("1").status, 0);
  EXPECT_EQ(eval("3").json()["nll"], once);
  expect_complaint(eval("3", "32"), 2, "state.json");
  write("state.json", "{\"key\": 1");
  expect_complaint(eval("3"), 2, "state.json");
}

TEST_F(OnModel, EvalComparesWithDense) {
  const auto json = heed({"eval", "-m", model_, "--tasks", "kld,mass,niah", "-f", text_, "-c", "200", "--score", "20",
                          "--attention", "streaming-llm(sinks=2,window=14)", "--json"})
                        .json();
  EXPECT_GT(json["kld"]["kld_mean"].get<double>(), 0);
  EXPECT_LT(json["mass"]["decode"].get<double>(), 1);
  EXPECT_EQ(json["niah"]["runs"], 5);
}

TEST_F(OnModel, CompareGivesOneObjectAMechanism) {
  const std::string page = path("page.html");
  const Outcome outcome = heed({"compare", "-m", model_, "-f", text_, "-c", "200", "--score", "24", "--attention",
                                "streaming-llm(sinks=2,window=14)", "--attention", "dense", "--tasks", "niah",
                                "--report", page, "--json"});
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const auto rows = outcome.json();
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0]["attention"], "dense");
  for (const auto& row : rows)
    for (const char* field : {"attention", "prefill_tps", "decode_tps", "kv_bytes", "peak_bytes", "ppl", "kld_mean",
                              "kld_p99", "top1_agree", "density", "tasks"})
      EXPECT_TRUE(row.contains(field)) << field;
  EXPECT_EQ(rows[0]["kld_mean"], 0.0);
  EXPECT_LT(rows[1]["kv_bytes"], rows[0]["kv_bytes"]);
  EXPECT_TRUE(rows[1]["tasks"].contains("niah"));
  const std::string html = read(page);
  EXPECT_NE(html.find("streaming-llm(sinks=2,window=14)"), std::string::npos);
  EXPECT_EQ(html.find("src=\"http"), std::string::npos);
}

TEST_F(OnModel, TraceWritesTheArrays) {
  const std::string out = path("t.npz");
  const Outcome outcome = heed({"trace", "-m", model_, "-f", text_, "-c", "100", "--prefill", "80", "--attention",
                                "streaming-llm(sinks=2,window=14)", "-o", out, "--json"});
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const auto arrays = value_or_throw(read_npz(out));
  EXPECT_EQ(arrays.at("nll")->shape(), "[99]");
  EXPECT_EQ(arrays.at("kept_offsets")->at<int64_t>(4), 4 * 16);
  EXPECT_EQ(arrays.at("tokens")->type, Dtype::I32);

  // The same tokens as ids give the same losses.
  const std::string ids = path("ids.npy");
  value_or_throw(write_npy(ids, arrays.at("tokens")));
  ASSERT_EQ(heed({"trace", "-m", model_, "--tokens", ids, "--prefill", "80", "--attention",
                  "streaming-llm(sinks=2,window=14)", "-o", path("u.npz")})
                .status,
            0);
  const auto again = value_or_throw(read_npz(path("u.npz")));
  for (int64_t i = 0; i < 99; ++i) EXPECT_EQ(arrays.at("nll")->at<float>(i), again.at("nll")->at<float>(i));
}

TEST_F(OnModel, HeadsGivesSharesOfAttention) {
  TinyModel longer;
  longer.context = 2048;
  longer.write(model_);
  write("text.txt", prose(1200));
  const Outcome outcome = heed({"heads", "-m", model_, "-f", text_, "-c", "512", "--prompts", "2", "--json"});
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const auto json = outcome.json();
  ASSERT_EQ(json["heads"].size(), 8u);
  for (const auto& head : json["heads"]) {
    const double sink = head["sink"], local = head["local"];
    EXPECT_GT(sink, 0);
    EXPECT_GT(local, 0);
    EXPECT_LE(sink + local, 1.001);
    EXPECT_LT(head["distance"].get<double>(), 512);
    EXPECT_LE(head["entropy"].get<double>(), std::log(512.0));
  }
  expect_complaint(heed({"heads", "-m", model_, "-f", text_, "-c", "1000000"}), 2, "1000000");
}

// Dense attention written out, on a causal group of two heads, each reading its own KV head.
TEST_F(OnModel, ApplyGivesAttentionOfArrays) {
  const int64_t h = 2, n = 7, d = 4;
  Random random(5);
  std::vector<std::vector<float>> x(3, std::vector<float>(size_t(h * n * d)));
  const char* const names[] = {"q.npy", "k.npy", "v.npy"};
  for (size_t i = 0; i < 3; ++i) {
    for (float& value : x[i]) value = float(random.normal());
    value_or_throw(write_npy(path(names[i]), Buffer::of<float>({h, n, d}, x[i])));
  }
  const auto apply = [&](std::vector<std::string> more) {
    std::vector<std::string> arguments = {"apply",       "dense", "--q",         path("q.npy"), "--k",
                                          path("k.npy"), "--v",   path("v.npy"), "-o",          path("o.npz")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return heed(arguments);
  };
  for (const bool causal : {true, false}) {
    const Outcome outcome = apply(causal ? std::vector<std::string>{"--json"}
                                         : std::vector<std::string>{"--no-causal", "--json"});
    ASSERT_EQ(outcome.status, 0) << outcome.err;
    const auto arrays = value_or_throw(read_npz(path("o.npz")));
    for (int64_t head = 0; head < h; ++head)
      for (int64_t i = 0; i < n; ++i) {
        double total = 0;
        std::vector<double> sum(size_t(d), 0.0);
        for (int64_t j = 0; j < (causal ? i + 1 : n); ++j) {
          double dot = 0;
          for (int64_t c = 0; c < d; ++c)
            dot += double(x[0][size_t((head * n + i) * d + c)]) * x[1][size_t((head * n + j) * d + c)];
          const double weight = std::exp(dot / 2);
          total += weight;
          for (int64_t c = 0; c < d; ++c) sum[size_t(c)] += weight * x[2][size_t((head * n + j) * d + c)];
        }
        for (int64_t c = 0; c < d; ++c)
          EXPECT_NEAR(arrays.at("out")->at<float>(head, i, c), sum[size_t(c)] / total, 1e-4);
        EXPECT_NEAR(arrays.at("lse")->at<float>(head, i), std::log(total), 1e-4);
      }
  }
  std::filesystem::remove(path("o.npz"));
  expect_complaint(apply({"--input", "g"}), 2, "NAME=FILE");
  expect_complaint(apply({"--backend", "abacus"}), 2, "abacus");
  value_or_throw(write_npy(path("k.npy"), Buffer::of<float>({h, n - 1, d}, std::span(x[1]).first(size_t(h * (n - 1) * d)))));
  expect_complaint(apply({}), 2, "v");
  EXPECT_FALSE(std::filesystem::exists(path("o.npz")));
}

TEST_F(OnModel, BenchUsesTheFieldNamesOfLlamaBench) {
  const Outcome outcome = heed({"bench", "-m", model_, "-p", "16,32", "-n", "4", "-d", "0,8", "-r", "2", "-o", "json"});
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const auto rows = outcome.json();
  ASSERT_EQ(rows.size(), 6u);
  for (const auto& row : rows)
    for (const char* field : {"n_prompt", "n_gen", "n_depth", "avg_ts", "stddev_ts", "avg_ns", "n_threads",
                              "model_type", "attention", "type_k"})
      EXPECT_TRUE(row.contains(field)) << field;
  EXPECT_EQ(rows[0]["samples_ts"].size(), 2u);
  EXPECT_EQ(heed({"bench", "-m", model_, "-p", "0", "-n", "2", "-r", "1", "-o", "csv"}).out.rfind("build_commit,", 0), 0u);
}

TEST_F(OnModel, BrokenModelsAreRefusedByName) {
  const std::string whole = read(model_);
  for (size_t size : {size_t(0), size_t(3), size_t(20), size_t(1000), whole.size() / 2, whole.size() - 1}) {
    const std::string file = write("cut.gguf", whole.substr(0, size));
    const Outcome outcome = heed({"run", "-m", file, "-p", "the", "-n", "1"});
    expect_complaint(outcome, 2, "cut.gguf");
  }
  TinyModel wrong;
  wrong.wrong_rows = 4;
  wrong.write(path("wrong.gguf"));
  expect_complaint(heed({"info", "-m", path("wrong.gguf")}), 2, "blk.0.attn_q.weight");
  TinyModel strange;
  strange.architecture = "abacus";
  strange.write(path("strange.gguf"));
  const Outcome outcome = heed({"info", "-m", path("strange.gguf")});
  expect_complaint(outcome, 2, "abacus");
  EXPECT_NE(outcome.err.find("llama"), std::string::npos);
  TinyModel mute;
  mute.tokenizer = false;
  mute.write(path("mute.gguf"));
  expect_complaint(heed({"run", "-m", path("mute.gguf"), "-p", "the"}), 2, "vocabulary");
}

TEST_F(OnModel, AnInterruptionKeepsWhatWasDone) {
  const std::string state = path("state.json"), out = path("out.json");
  const std::string long_text = write("long.txt", prose(2'000'000));
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stderr) || !std::freopen(out.c_str(), "w", stdout)) _exit(99);
    execl(HEED_PROGRAM, HEED_PROGRAM, "eval", "-m", model_.c_str(), "-f", long_text.c_str(), "-c", "64", "--state",
          state.c_str(), "--json", nullptr);
    _exit(98);
  }
  // The first chunk is done when there is a state; thousands of others are not.
  while (!std::filesystem::exists(state) && waitpid(child, nullptr, WNOHANG) == 0) usleep(1000);
  kill(child, SIGINT);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 130);
  const auto json = nlohmann::json::parse(read(out));
  EXPECT_GE(json["chunks"].get<int64_t>(), 1);
  EXPECT_LT(json["chunks"].get<int64_t>(), 20000);
  EXPECT_EQ(json["interrupted"], true);
  EXPECT_EQ(nlohmann::json::parse(read(state))["chunks"], json["chunks"]);
}

TEST_F(OnModel, BadRequestsSayWhatToDo) {
  expect_complaint(heed({"run", "-m", model_, "-p", "the", "--attention", "snapkw"}), 2, "snapkv");
  expect_complaint(heed({"run", "-m", model_, "-p", "the", "--attention", "streaming-llm(window=-4)"}), 2, "window");
  expect_complaint(heed({"run", "-m", model_, "-p", "the", "--attention", "streaming-llm("}), 2, "streaming-llm");
  expect_complaint(heed({"run", "-m", model_, "-p", "the", "--kv", "q3"}), 2, "q3");
  expect_complaint(heed({"run", "-m", model_, "-p", "the", "--backend", "abacus"}), 2, "abacus");
  expect_complaint(heed({"run", "-m", model_, "-f", write("long.txt", prose(4000)), "-n", "1"}), 2, "context");
  expect_complaint(heed({"run", "-m", model_, "-f", write("empty.txt", "")}), 2, "empty");
  expect_complaint(heed({"run", "-m", model_}), 2, "prompt");
  expect_complaint(heed({"run", "-m", model_, "-p", "the", "--temp", "-1"}), 2, "temp");
  expect_complaint(heed({"compare", "-m", model_, "-f", text_, "-c", "100000"}), 2, "100000");
  expect_complaint(heed({"eval", "-m", model_, "-f", text_, "-c", "5000"}), 2, "chunk");
}

TEST_F(OnModel, FailuresLeaveNothingHalfWritten) {
  const auto before = files();
  EXPECT_NE(heed({"trace", "-m", model_, "-f", text_, "--prefill", "9999", "-o", path("t.npz")}).status, 0);
  EXPECT_NE(heed({"trace", "-m", model_, "-f", text_, "-o", path("no/such/folder/t.npz")}).status, 0);
  EXPECT_NE(heed({"compare", "-m", model_, "-f", text_, "-c", "64", "--report", path("no/such/page.html")}).status, 0);
  EXPECT_EQ(files(), before);
}

}  // namespace
}  // namespace heed
