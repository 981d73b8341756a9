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

TEST_F(OnModel, PairsAreSharedOutAndNotRunTwice) {
  const auto pairs = [&](const std::vector<std::string>& more) {
    std::vector<std::string> all = {"pairs", "-m",      model_, "-f",       text_, "-c",
                                    "64",    "--score", "8",    "--budget", "50%", "--json"};
    all.insert(all.end(), more.begin(), more.end());
    return heed(all);
  };
  const std::vector<std::string> some = {"--with", "quest", "--shard", "2/20", "--rows", path("rows.jsonl")};
  const Outcome first = pairs(some);
  ASSERT_EQ(first.status, 0) << first.err;
  const auto at = first.json()["budgets"][0];
  EXPECT_GT(at["ran"], 0);
  EXPECT_EQ(at["failed"], 0);
  EXPECT_EQ(at["ran"].get<int>() + at["refused"].get<int>(), at["pairs"]);
  for (const auto& row : at["rows"])
    EXPECT_NE(row["attention"].get<std::string>().find("quest(budget=50%)"), std::string::npos);
  EXPECT_EQ(pairs(some).out, first.out) << "with the seconds of the first time";
  expect_complaint(pairs({"--budget", "half"}), 2, "half");
  for (const char* shard : {"0/3", "4/3", "3", "1/2x"}) EXPECT_EQ(pairs({"--shard", shard}).status, 2) << shard;
  EXPECT_EQ(pairs({"--with", "quests"}).status, 2);
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

TEST_F(OnModel, RunStopsWhereTheContextIsFull) {
  for (const char* limit : {"1000", "-1"}) {
    const auto json = heed({"run", "-m", model_, "-f", text_, "-n", limit, "--ignore-eos", "--json"}).json();
    EXPECT_EQ(json["stop"], "context");
    EXPECT_EQ(json["prompt_tokens"].get<int>() + int(json["tokens"].size()), 512 + 1) << "the last is not read";
  }
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

/// A model with room for long prompts, and a book with a dictionary at its end.
class OnBook : public OnModel {
 protected:
  OnBook() {
    TinyModel longer;
    longer.context = 8192;
    longer.write(model_);
    Random random(5);
    std::string book;
    for (int paragraph = 0; paragraph < 60; ++paragraph) {
      for (int word = 0; word < 40; ++word) {
        for (int i = 0; i < 5; ++i) book += char('a' + random.below(4));
        book += word % 10 == 9 ? ". " : " ";
      }
      book += "\n\n";
    }
    for (int i = 0; i < 30; ++i)
      book += "   :term" + std::to_string(i) + ": n.\n\n   The number " + std::to_string(i * 7 + 1) +
              " in a row of many. See {term" + std::to_string((i + 1) % 30) + "}.\n\n";
    write("book.txt", book);
  }
  std::vector<std::string> eval(std::vector<std::string> more) const {
    std::vector<std::string> all = {"eval", "-m", model_, "-f", path("book.txt"), "--json"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
};

TEST_F(OnBook, EvalAsksRulersTasks) {
  const Outcome outcome = heed(eval({"--tasks", "niah_single_1,qa_2,vt", "-c", "3000", "--count", "2", "--query", "both",
                                     "--attention", "streaming-llm(sinks=2,window=60)", "--samples", path("s.jsonl")}));
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const auto rows = outcome.json()["tasks"];
  ASSERT_EQ(rows.size(), 6u);
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto& row = rows[i];
    EXPECT_EQ(row["query"], i % 2 ? "aware" : "blind");
    EXPECT_EQ(row["samples"], 2);
    EXPECT_EQ(row["length"], 3000);
    EXPECT_LE(row["low"].get<double>(), row["score"].get<double>());
    EXPECT_GE(row["high"].get<double>(), row["score"].get<double>());
    EXPECT_EQ(row["at_chance"], true) << "a random model knows nothing";
    EXPECT_LT(row["density"].get<double>(), 0.1);
    EXPECT_TRUE(row["not_exercised"].is_string()) << "too short a prompt";
  }
  // What was kept tells the same story.
  std::ifstream file(path("s.jsonl"));
  int lines = 0;
  for (std::string line; std::getline(file, line); ++lines) {
    const auto sample = nlohmann::json::parse(line);
    for (const char* field : {"model", "attention", "text", "task", "query", "length", "seed", "index", "prompt",
                              "answer", "expected", "score", "chance", "metric"})
      EXPECT_TRUE(sample.contains(field)) << field;
    double found = 0;
    for (const std::string e : sample["expected"])
      found += sample["answer"].get<std::string>().find(e) != std::string::npos;
    EXPECT_DOUBLE_EQ(sample["score"].get<double>(), found / double(sample["expected"].size()));
  }
  EXPECT_EQ(lines, 12);
}

TEST_F(OnBook, EvalTakesFinishedSamplesFromItsFile) {
  const std::string samples = path("s.jsonl");
  const auto ask = [&](const char* count, const char* seed) {
    return heed(eval({"--tasks", "niah_single_2", "-c", "1500", "--count", count, "--samples", samples, "--seed", seed}));
  };
  ASSERT_EQ(ask("2", "1").status, 0);
  // A score that no run would give shows that the sample was not run again.
  std::string kept = read(samples);
  for (size_t at = 0; (at = kept.find("\"score\":0.0", at)) != std::string::npos;)
    kept.replace(at, 11, "\"score\":0.5");
  write("s.jsonl", kept);
  EXPECT_EQ(ask("2", "1").json()["tasks"][0]["score"], 0.5);
  EXPECT_EQ(read(samples), kept);
  EXPECT_EQ(ask("4", "1").json()["tasks"][0]["score"], 0.25);
  EXPECT_EQ(ask("2", "2").json()["tasks"][0]["score"], 0.0) << "another seed, other samples";
  const std::string all = read(samples);
  EXPECT_EQ(std::count(all.begin(), all.end(), '\n'), 6);
  write("s.jsonl", all + "nonsense\n");
  expect_complaint(ask("2", "1"), 2, "s.jsonl:7");
}

TEST_F(OnBook, AnInterruptedEvaluationKeepsItsSamples) {
  const std::string samples = path("s.jsonl"), out = path("out.json");
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stderr) || !std::freopen(out.c_str(), "w", stdout)) _exit(99);
    execl(HEED_PROGRAM, HEED_PROGRAM, "eval", "-m", model_.c_str(), "-f", path("book.txt").c_str(), "--tasks",
          "niah_single_1,niah_single_2", "-c", "1500", "--count", "100000", "--samples", samples.c_str(), "--json", nullptr);
    _exit(98);
  }
  while (!std::filesystem::exists(samples) && waitpid(child, nullptr, WNOHANG) == 0) usleep(1000);
  kill(child, SIGINT);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 130);
  const auto json = nlohmann::json::parse(read(out));
  EXPECT_EQ(json["interrupted"], true);
  ASSERT_EQ(json["tasks"].size(), 1u);
  const std::string all = read(samples);
  EXPECT_EQ(json["tasks"][0]["samples"], std::count(all.begin(), all.end(), '\n'));
  EXPECT_EQ(all.back(), '\n');
}

TEST_F(OnBook, EvalShowsHeadsPositionsAndAgreement) {
  const std::string page = path("page.html");
  const Outcome outcome = heed(eval({"--tasks",     "position,kld,heads,agreement,grid",
                                     "-c",          "800",
                                     "--score",     "40",
                                     "--chunks",    "2",
                                     "--generate",  "12",
                                     "--count",     "1",
                                     "--depths",    "2",
                                     "--lengths",   "1400,1500",
                                     "--attention", "streaming-llm(sinks=2,window=30)",
                                     "--report",    page}));
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  const auto json = outcome.json();
  ASSERT_EQ(json["heads"]["layers"], nlohmann::json({0, 1}));
  for (const auto& layer : json["heads"]["mass"]) {
    ASSERT_EQ(layer.size(), 4u);
    for (double mass : layer) {
      EXPECT_GT(mass, 0);
      EXPECT_LT(mass, 1);
    }
  }
  for (const auto& layer : json["heads"]["output_error"])
    for (double error : layer) EXPECT_GT(error, 0);
  ASSERT_EQ(json["position"].size(), 8u);
  EXPECT_EQ(json["position"][0]["tokens"], 2 * 99);
  double kld = 0;
  for (const auto& part : json["kld"]["by_position"]) kld += part["kld"].get<double>() / 8;
  EXPECT_NEAR(kld, json["kld"]["kld_mean"].get<double>(), 1e-4 * kld);
  EXPECT_GE(json["kld"]["kld_high"].get<double>(), json["kld"]["kld_mean"].get<double>());
  EXPECT_EQ(json["agreement"]["tokens"], 12);
  EXPECT_LE(json["agreement"]["first_difference"].get<double>(), 12);
  ASSERT_EQ(json["tasks"].size(), 4u);
  EXPECT_EQ(json["tasks"][3]["depth"], 1.0);
  const std::string html = read(page);
  EXPECT_NE(html.find("<svg"), std::string::npos);
  EXPECT_NE(html.find("1500 tokens, depth 100 %"), std::string::npos);
  EXPECT_EQ(html.find("http"), std::string::npos);
  EXPECT_EQ(html.find("<script"), std::string::npos);

  // Dense is at no distance from itself.
  const auto dense =
      heed(eval({"--tasks", "heads,agreement", "-c", "300", "--score", "20", "--generate", "8", "--count", "1"})).json();
  for (const auto& layer : dense["heads"]["mass"])
    for (double mass : layer) EXPECT_EQ(mass, 1);
  for (const auto& layer : dense["heads"]["output_error"])
    for (double error : layer) EXPECT_EQ(error, 0);
  EXPECT_EQ(dense["agreement"]["first_difference"], 8.0);
}

TEST_F(OnBook, EvalTakesLongBenchFiles) {
  const std::string file = write(
      "l.jsonl", "{\"input\": \"Who?\", \"context\": \"<b>The cat.</b>\", \"answers\": [\"the cat\"]}\n");
  const auto bench = [&](std::vector<std::string> more) {
    std::vector<std::string> all = {"eval", "-m", model_, "--longbench", file, "-c", "400", "--json"};
    all.insert(all.end(), more.begin(), more.end());
    return heed(all);
  };
  const Outcome outcome = bench({"--metric", "qa_f1", "-n", "6"});
  ASSERT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(outcome.json()["tasks"][0]["metric"], "qa_f1");
  EXPECT_FALSE(outcome.json().contains("ppl"));
  expect_complaint(bench({}), 2, "--metric");
  expect_complaint(bench({"--metric", "bleu"}), 2, "bleu");
  expect_complaint(bench({"--metric", "qa_f1", "--template", "nothing"}), 2, "--template");
  write("l.jsonl", "{\"input\": \"Who?\"}\n");
  expect_complaint(bench({"--metric", "qa_f1"}), 2, "l.jsonl:1");
  write("l.jsonl", "");
  expect_complaint(bench({"--metric", "qa_f1"}), 2, "no examples");
}

TEST_F(OnBook, EvalSaysWhatItCannotAsk) {
  expect_complaint(heed(eval({"--tasks", "cwe", "-c", "600"})), 2, "cwe");
  expect_complaint(heed({"eval", "-m", model_, "--tasks", "qa_1", "-f", text_, "-c", "2000"}), 2, "dictionary");
  expect_complaint(heed({"eval", "-m", model_, "--tasks", "ppl"}), 2, "--file");
  // A group leaves out what cannot be asked, and says so.
  const auto json = heed(eval({"--tasks", "ruler", "-c", "1500", "--count", "1"})).json();
  ASSERT_TRUE(json.contains("skipped") && json.contains("tasks"));
  EXPECT_TRUE(json["skipped"].contains("niah_multikey_3"));
  EXPECT_EQ(json["tasks"].size() + json["skipped"].size(), 13u);
  EXPECT_EQ(json["ruler"][0]["tasks"], json["tasks"].size());
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

TEST_F(OnModel, CompareDoesNotRunAgainWhatItsFileHas) {
  const std::string file = path("rows.jsonl"), page = path("page.html");
  const auto compare = [&](const std::vector<std::string>& more) {
    std::vector<std::string> all = {"compare", "-m",          model_,   "-f",     text_, "-c",      "200",  "--score",
                                    "8",       "--attention", "moba()", "--rows", file,  "--tasks", "niah", "--json"};
    all.insert(all.end(), more.begin(), more.end());
    return heed(all);
  };
  const Outcome first = compare({}), second = compare({"--report", page});
  ASSERT_EQ(first.status, 0) << first.err;
  EXPECT_EQ(second.out, first.out) << "with the times of the first";
  EXPECT_NE(read(page).find("moba()"), std::string::npos);
  const std::string kept = read(file);
  EXPECT_EQ(std::count(kept.begin(), kept.end(), '\n'), 2);
  // Another mechanism stands beside them; what any run depends on makes others of all.
  const auto three = compare({"--attention", "knorm(budget=40)"}).json();
  ASSERT_EQ(three.size(), 3u);
  EXPECT_EQ(three[0]["decode_tps"], first.json()[0]["decode_tps"]);
  const std::string lines = read(file);
  EXPECT_EQ(lines.substr(0, kept.size()), kept);
  for (const std::vector<std::string>& other : {std::vector<std::string>{"--kv", "q8"},
                                                {"--ubatch", "32"},
                                                {"--chunk", "64"},
                                                {"-t", "1"},
                                                {"--tasks", "niah-aware"},
                                                {"--seed", "7"}}) {
    const std::string before = read(file);
    ASSERT_EQ(compare(other).status, 0);
    const std::string after = read(file);
    EXPECT_EQ(std::count(after.begin(), after.end(), '\n'), std::count(before.begin(), before.end(), '\n') + 2) << other[0];
  }
  write("rows.jsonl", kept + "{\"model\": \"m\"}\n");
  expect_complaint(compare({}), 2, "rows.jsonl:3");
}

TEST_F(OnModel, CompareAllRunsWhatTheModelCanRun) {
  const Outcome outcome = heed(
      {"compare", "-m", model_, "-f", text_, "-c", "160", "--score", "8", "--all", "--budget", "40,50%", "--json"});
  const auto rows = outcome.json();
  std::map<std::string, int> seen;
  int on_memory = 0;
  for (const auto& row : rows) {
    const std::string spec = row["attention"];
    ++seen[spec.substr(0, spec.find('('))];
    on_memory += row["front_memory"].get<bool>();
    EXPECT_TRUE(std::isfinite(row["ppl"].get<double>())) << spec;
  }
  EXPECT_EQ(seen["dense"], 1);
  EXPECT_EQ(seen["snapkv"], 2);
  EXPECT_EQ(seen["adakv"], 2);  // a wrapper stands around SnapKV
  EXPECT_EQ(seen["moba"], 1);   // no budget: its defaults
  EXPECT_GE(on_memory, 1);
  // Every mechanism of the catalogue is there or is told of.
  for (const auto& entry : heed({"list", "--json"}).json()) {
    if (entry["kind"] != "mechanism") continue;
    const std::string name = entry["name"];
    EXPECT_TRUE(seen.count(name) || outcome.err.find(name) != std::string::npos) << name;
  }
  EXPECT_NE(outcome.err.find("left out: gdn"), std::string::npos) << outcome.err;
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

TEST_F(OnModel, CalibrateMakesAProfileThatItsModelRuns) {
  TinyModel longer;
  longer.context = 2048;
  longer.write(model_);
  write("text.txt", prose(1200));
  const std::string profile = path("duo.json");
  const auto calibrate = [&](const std::string& spec, const std::string& to) {
    return heed(
        {"calibrate", spec, "-m", model_, "-f", text_, "-o", to, "-c", "512", "--prompts", "1", "--share", "0.5"});
  };
  const Outcome made = calibrate("duo-attention(sinks=2,recent=20)", profile);
  ASSERT_EQ(made.status, 0) << made.err;
  const std::vector<std::string> run{"run", "-m", model_, "-f", text_, "-n", "4", "--attention", "@" + profile};
  const Outcome ran = heed(run);
  EXPECT_EQ(ran.status, 0) << ran.err;
  longer.layers = 3;  // another model
  longer.write(model_);
  expect_complaint(heed(run), 2, "heed calibrate");
  expect_complaint(calibrate("snapkv", profile), 2, "duo-attention");
  expect_complaint(calibrate("duo-attention(heads=0)", profile), 2, "heads=");
  expect_complaint(calibrate("duo-attention(sinks=x)", profile), 2, "sinks");
  EXPECT_NE(calibrate("duo-attention", path("no/such/folder.json")).status, 0);
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
  EXPECT_FALSE(apply({"--json"}).json().contains("seconds"));
  const auto seconds = apply({"--times", "2", "--json"}).json()["seconds"];
  for (const char* part : {"attend", "dense", "edit"}) EXPECT_TRUE(seconds[part].is_number()) << seconds;
  std::filesystem::remove(path("o.npz"));
  expect_complaint(apply({"--input", "g"}), 2, "NAME=FILE");
  // A name that nothing reads is told; what it was meant for, where it is needed, is then missing.
  const Outcome noted = apply({"--input", "g=" + path("q.npy")});
  EXPECT_EQ(noted.status, 0) << noted.err;
  EXPECT_NE(noted.err.find("--input 'g' is not read: dense takes none"), std::string::npos) << noted.err;
  std::filesystem::remove(path("o.npz"));
  expect_complaint(heed({"apply", "gdn", "--q", path("q.npy"), "--k", path("k.npy"), "--v", path("v.npy"), "-o",
                         path("o.npz"), "--input", "betta=" + path("q.npy")}),
                   2, "g");
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
  usleep(2000);
  kill(child, SIGINT);  // as `timeout -s INT` does, which signals its group too
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
  expect_complaint(heed({"run", "-m", model_, "-p", "the", "-n", "-2"}), 2, "--predict");
  expect_complaint(heed({"eval", "-m", model_, "-f", text_, "--chunks", "0"}), 2, "--chunks");
  expect_complaint(heed({"compare", "-m", model_, "-f", text_, "--budget", "5%"}), 2, "--all");
  expect_complaint(heed({"compare", "-m", model_, "-f", text_, "-c", "64", "--all", "--budget", "half"}), 2, "half");
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
