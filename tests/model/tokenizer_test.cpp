// Token ids against llama.cpp's (tests/data/make/tokenizer.py), and what must hold for any text.
#include "model/tokenizer.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <thread>

#include "base/npy.h"
#include "base/random.h"
#include "base/utf8.h"
#include "model/tokenizer_split.h"

namespace heed {
namespace {

std::string read_file(const std::string& name) {
  std::ifstream in(HEED_TEST_DATA "/tokenizer/" + name, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

Tokenizer tokenizer(const std::string& file) {
  return value_or_throw(Tokenizer::from(value_or_throw(Gguf::parse(std::as_bytes(std::span(file))))));
}

/// bpe.gguf with another pre-tokenizer: lengths stand before strings, and nothing in the file is counted from its start.
std::string bpe_file(const std::string& pre) {
  std::string file = read_file("bpe.gguf");
  const std::string key = "tokenizer.ggml.pre";
  const size_t at = file.find(key) + key.size() + sizeof(uint32_t);
  const uint64_t length = pre.size();
  file.replace(at, sizeof length + std::strlen("default"),
               std::string(reinterpret_cast<const char*>(&length), sizeof length) + pre);
  return file;
}

std::vector<int32_t> golden(const std::map<std::string, Buffer>& all, const std::string& name) {
  const auto ids = all.at(name).view().span<int32_t>();
  return {ids.begin(), ids.end()};
}

/// Equal, or where they part: a difference of two long vectors says nothing.
void expect_ids(const std::vector<int32_t>& got, const std::vector<int32_t>& want, const std::string& what) {
  const auto [a, b] = std::mismatch(got.begin(), got.end(), want.begin(), want.end());
  EXPECT_TRUE(a == got.end() && b == want.end()) << what << ": " << got.size() << " ids, " << want.size()
                                                 << " wanted, the first different is number " << a - got.begin();
}

/// `text` with a space for every U+2581.
std::string with_spaces(const std::string& text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const bool mark = text.compare(at, 3, "\u2581") == 0;
    out += mark ? ' ' : text[at];
    at += mark ? 3 : 1;
  }
  return out;
}

std::vector<std::string> pieces(const std::string& pre, const std::string& text) {
  std::vector<std::string> out;
  Splitter::named(pre)->split(text, [&](std::string_view piece) { out.emplace_back(piece); });
  return out;
}

using Words = std::vector<std::string>;

TEST(Tokenizer, SmallVocabulariesGiveLlamaCppsIds) {
  const auto all = read_npz(HEED_TEST_DATA "/tokenizer/small.npz");
  ASSERT_TRUE(all) << all.error().text();
  const std::string text = read_file("hostile.txt");
  ASSERT_GT(text.size(), 10000u);
  for (const char* pre :
       {"default", "gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "falcon", "deepseek-coder", "dbrx"}) {
    expect_ids(tokenizer(bpe_file(pre)).encode(text), golden(*all, pre), pre);
  }
  expect_ids(tokenizer(read_file("bpe.gguf")).encode(text, {.special = true}), golden(*all, "default_special"),
             "default, special");
  const Tokenizer spm = tokenizer(read_file("spm.gguf"));
  expect_ids(spm.encode(text), golden(*all, "spm"), "spm");
  expect_ids(spm.encode(text, {.special = true}), golden(*all, "spm_special"), "spm, special");
}

TEST(Tokenizer, ModelsGiveLlamaCppsIds) {
  const std::filesystem::path folder = HEED_MODELS;
  const auto all = read_npz(HEED_TEST_DATA "/tokenizer/models.npz");
  ASSERT_TRUE(all) << all.error().text();
  bool any = false;
  for (const std::string model : {"smollm2-135m", "gemma3-270m"}) {
    const auto file = Gguf::open(folder / (model + ".gguf"));
    if (!file) continue;
    any = true;
    const Tokenizer t = value_or_throw(Tokenizer::from(*file));
    const std::string plain = read_file("plain.txt"), hostile = read_file("hostile.txt");
    expect_ids(t.encode(plain), golden(*all, model + ".plain"), model + " plain");
    expect_ids(t.encode(hostile), golden(*all, model + ".hostile"), model + " hostile");
    expect_ids(t.encode(hostile, {.special = true}), golden(*all, model + ".special"), model + " special");
    EXPECT_EQ(t.decode(t.encode(plain)), plain);
  }
  if (!any) GTEST_SKIP() << "no models in " << folder;
}

TEST(Tokenizer, DecodingGivesTheTextBack) {
  const Tokenizer bpe = tokenizer(read_file("bpe.gguf")), spm = tokenizer(read_file("spm.gguf"));
  const std::string hostile = read_file("hostile.txt"), valid = valid_utf8(hostile);
  EXPECT_EQ(bpe.decode(bpe.encode(hostile)), valid);
  EXPECT_EQ(spm.decode(spm.encode("x y")), "x y");
  EXPECT_EQ(spm.decode(spm.encode("   x<table> y")), "   x<table> y");
  // A space that follows a character cut short, or U+2581 itself, comes back as the other of the two.
  EXPECT_EQ(with_spaces(spm.decode(spm.encode(hostile))), with_spaces(hostile));

  Random random(3);
  for (int round = 0; round < 200; ++round) {
    std::string bytes;
    for (int64_t n = random.below(60); n > 0; --n) bytes += char(random.below(256));
    EXPECT_EQ(bpe.decode(bpe.encode(bytes)), valid_utf8(bytes));
    for (char& c : bytes) c = c == ' ' || c == '\n' || c == '\xe2' ? 'x' : c;
    EXPECT_EQ(spm.decode(spm.encode(bytes)), bytes);
  }
}

TEST(Tokenizer, ControlTokensNeedAskingFor) {
  const Tokenizer t = tokenizer(read_file("bpe.gguf"));
  const int32_t start = t.find("<|im_start|>"), end = t.find("<|im_end|>");
  ASSERT_GE(start, 0);
  ASSERT_GE(end, 0);
  const auto plain = t.encode("a<|im_end|>b");
  EXPECT_EQ(std::count(plain.begin(), plain.end(), end), 0);
  EXPECT_EQ(t.decode(plain), "a<|im_end|>b");
  const auto special = t.encode("a<|im_end|>b", {.special = true});
  EXPECT_EQ(special, (std::vector<int32_t>{t.find("a"), end, t.find("b")}));
  EXPECT_EQ(t.decode(special), "ab");
  EXPECT_EQ(t.decode(special, true), "a<|im_end|>b");
  EXPECT_TRUE(t.is_end(end));
  EXPECT_TRUE(t.is_control(end));
  EXPECT_FALSE(t.is_end(t.find("a")));
  EXPECT_EQ(t.bos(), start);
  EXPECT_EQ(t.eos(), end);
  EXPECT_EQ(t.eot(), end);
  EXPECT_EQ(t.encode("", {.bos = true}), std::vector<int32_t>{start});
  EXPECT_TRUE(t.encode("").empty());
  // A user-defined token is found in any text.
  EXPECT_EQ(t.encode("  x").size(), 1u);
  EXPECT_EQ(t.piece(-1), "");
  EXPECT_EQ(t.piece(int32_t(t.size())), "");
}

TEST(Tokenizer, LongRunsOfOneThingComeBack) {
  // Texts on which a quadratic step would not end: no word boundary, no merge, no newline, only newlines.
  const Tokenizer bpe = tokenizer(bpe_file("llama-bpe")), gpt = tokenizer(bpe_file("gpt-2")),
                  spm = tokenizer(read_file("spm.gguf"));
  for (const std::string unit : {"a", " ", "\n", "!", "9", "\t ", "'s", "é", "\xff", "ab\n", "\u0301"}) {
    std::string text;
    while (text.size() < 150000) text += unit;
    for (const Tokenizer* t : {&bpe, &gpt}) EXPECT_TRUE(t->decode(t->encode(text)) == valid_utf8(text)) << unit;
    EXPECT_TRUE(spm.decode(spm.encode(text)) == text) << unit;
  }
}

TEST(Tokenizer, ThreadsShareOne) {
  const Tokenizer t = tokenizer(bpe_file("qwen2"));
  const std::string text = read_file("plain.txt");
  const auto want = t.encode(text);
  std::vector<std::vector<int32_t>> got(4);
  std::vector<std::thread> workers;
  for (auto& mine : got) workers.emplace_back([&] { mine = t.encode(text); });
  for (auto& worker : workers) worker.join();
  for (const auto& mine : got) EXPECT_EQ(mine, want);
}

TEST(Tokenizer, SplitsAsTheirAuthorsWrote) {
  EXPECT_EQ(pieces("gpt-2", "I'll  pay 2024!\n\nOK"), (Words{"I", "'ll", " ", " pay", " 2024", "!", "\n", "\n", "OK"}));
  EXPECT_EQ(pieces("smollm", "a 12 b"), (Words{"a", " ", "1", "2", " b"}));
  EXPECT_EQ(pieces("llama-bpe", "I'LL 12345\r\n\n x"), (Words{"I", "'LL", " ", "123", "45", "\r\n\n", " x"}));
  EXPECT_EQ(pieces("qwen2", "(word) 12  \n  y"), (Words{"(word", ")", " ", "1", "2", "  \n", " ", " y"}));
  EXPECT_EQ(pieces("default", "a+b 1234"), (Words{"a", "+", "b", " ", "123", "4"}));
  EXPECT_EQ(pieces("gpt-2", "\u180ea\u3000b"), (Words{"\u180e", "a", "\u3000", "b"}));
  EXPECT_TRUE(pieces("gpt-2", "").empty());
}

TEST(Tokenizer, RefusesInWords) {
  const auto refusal = [](const std::string& file) {
    const auto result = Tokenizer::from(value_or_throw(Gguf::parse(std::as_bytes(std::span(file)))));
    return result ? std::string("accepted") : result.error().text();
  };
  EXPECT_NE(refusal(bpe_file("martian")).find("'martian' is not known"), std::string::npos);
  EXPECT_NE(refusal(bpe_file("martian")).find("llama-bpe"), std::string::npos);
  std::string other = read_file("spm.gguf");
  other.replace(other.find("tokenizer.ggml.model") + 20 + 4 + 8, 5, "bertx");
  EXPECT_NE(refusal(other).find("'bertx' is not known"), std::string::npos);
  other = read_file("spm.gguf");
  other.replace(other.find("tokenizer.ggml.tokens"), 21, "tokenizer.ggml.absent");
  EXPECT_NE(refusal(other).find("no key tokenizer.ggml.tokens"), std::string::npos);
  other = read_file("bpe.gguf");
  other.replace(other.find("tokenizer.ggml.merges"), 21, "tokenizer.ggml.absent");
  EXPECT_NE(refusal(other).find("no key tokenizer.ggml.merges"), std::string::npos);
}

}  // namespace
}  // namespace heed
