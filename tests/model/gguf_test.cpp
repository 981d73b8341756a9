// The GGUF reader: a file by another writer, every truncation of it, and files that lie.
#include "model/gguf.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace heed {
namespace {

/// Writes a GGUF file piece by piece, right or wrong.
struct Bytes {
  std::string data;
  template <class T>
  Bytes& put(T value) {
    data.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  Bytes& text(std::string_view s) {
    put(uint64_t(s.size()));
    data += s;
    return *this;
  }
  Bytes& head(uint64_t tensors, uint64_t keys, uint32_t version = 3) {
    data += "GGUF";
    return put(version).put(tensors).put(keys);
  }
  Bytes& tensor(std::string_view name, std::vector<uint64_t> dims, uint32_t type, uint64_t offset) {
    text(name).put(uint32_t(dims.size()));
    for (const uint64_t d : dims) put(d);
    return put(type).put(offset);
  }
  Bytes& pad(size_t to) {
    data.resize((data.size() + to - 1) / to * to);
    return *this;
  }
};

Result<Gguf> parse(const std::string& data) { return Gguf::parse(std::as_bytes(std::span(data))); }

/// The message of a file that must be refused.
std::string refusal(const Bytes& bytes, Code code = Code::Corrupt) {
  const auto result = parse(bytes.data);
  if (result) return "accepted";
  EXPECT_EQ(result.error().code, code) << result.error().text();
  EXPECT_FALSE(result.error().remedy.empty());
  return result.error().text();
}

std::string small_file() {
  std::ifstream in(HEED_TEST_DATA "/gguf/small.gguf", std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

TEST(Gguf, ReadsWhatTheGgufPackageWrote) {
  const auto file = Gguf::open(HEED_TEST_DATA "/gguf/small.gguf");
  ASSERT_TRUE(file) << file.error().text();
  EXPECT_EQ(file->version(), 3u);
  EXPECT_EQ(file->alignment(), 64u);
  EXPECT_EQ(file->string("general.architecture").value(), "tiny");
  EXPECT_EQ(file->integer("one.u8").value(), 255);
  EXPECT_EQ(file->integer("one.i8").value(), -128);
  EXPECT_EQ(file->integer("one.u16").value(), 65535);
  EXPECT_EQ(file->integer("one.i16").value(), -32768);
  EXPECT_EQ(file->integer("one.u32").value(), 4294967295);
  EXPECT_EQ(file->integer("one.i32").value(), -2147483648ll);
  EXPECT_EQ(file->integer("one.i64").value(), INT64_MIN);
  EXPECT_EQ(file->number("one.f32").value(), double(0.1f));
  EXPECT_EQ(file->number("one.f64").value(), 0.1);
  EXPECT_EQ(file->number("one.u64").value(), 18446744073709551615.0);
  EXPECT_EQ(file->boolean("one.bool").value(), true);
  EXPECT_EQ(file->string("one.string").value(), "naïve ☕");
  EXPECT_EQ(file->integers("many.i32").value(), (std::vector<int64_t>{1, -2, 3}));
  EXPECT_EQ(file->integers("many.bool").value(), (std::vector<int64_t>{1, 0}));
  EXPECT_EQ(file->integers("one.u8").value(), (std::vector<int64_t>{255}));
  EXPECT_EQ(file->numbers("many.f32").value(), (std::vector<float>{0.5f, -1.5f}));
  const auto strings = file->strings("many.strings").value();
  ASSERT_EQ(strings.size(), 3u);
  EXPECT_EQ(strings[2], "βγ");
  const Gguf::Value* nested = file->find("many.nested");
  ASSERT_TRUE(nested && nested->values.size() == 2);
  EXPECT_EQ(nested->values[1].count, 3u);

  const Tensor* f32 = file->tensor("f32");
  ASSERT_TRUE(f32);
  EXPECT_EQ(f32->shape(), "[3, 4]");
  EXPECT_EQ(f32->at<float>(2, 1), 9.0f);
  EXPECT_EQ(float(file->tensor("f16")->at<f16>(1, 2)), 5.0f);
  EXPECT_EQ(file->tensor("i32")->at<int32_t>(4), 4);
  const auto q8 = file->tensor("q8_0", {2, 32});
  ASSERT_TRUE(q8) << q8.error().text();
  EXPECT_EQ(q8->type, Dtype::Q8_0);
  EXPECT_EQ(q8->bytes(), 68);
  EXPECT_EQ(file->tensors().size(), 4u);
}

TEST(Gguf, ReadsOfTheWrongTypeNameKeyAndType) {
  const auto file = Gguf::open(HEED_TEST_DATA "/gguf/small.gguf");
  ASSERT_TRUE(file);
  const auto text = [](const auto& result) { return result ? std::string("accepted") : result.error().text(); };
  EXPECT_NE(text(file->integer("one.string")).find("one.string is string, not an integer"), std::string::npos);
  EXPECT_NE(text(file->integer("one.u64")).find("u64"), std::string::npos);
  EXPECT_NE(text(file->integer("one.f32")).find("f32"), std::string::npos);
  EXPECT_NE(text(file->number("many.f32")).find("array of f32"), std::string::npos);
  EXPECT_NE(text(file->boolean("one.u8")).find("bool"), std::string::npos);
  EXPECT_NE(text(file->string("one.u8")).find("string"), std::string::npos);
  EXPECT_NE(text(file->strings("many.i32")).find("array of strings"), std::string::npos);
  EXPECT_NE(text(file->integers("many.strings")).find("array of integers"), std::string::npos);
  EXPECT_EQ(file->integer("absent").error().code, Code::NotFound);
  EXPECT_EQ(file->integer("absent", 5).value(), 5);
  EXPECT_EQ(file->string("absent", "x").value(), "x");
  EXPECT_FALSE(file->integer("one.string", 5));
  EXPECT_EQ(file->tensor("absent"), nullptr);
  EXPECT_EQ(file->tensor("absent", {1}).error().code, Code::NotFound);
  EXPECT_NE(text(file->tensor("f32", {4, 3})).find("[3, 4], not [4, 3]"), std::string::npos);
}

TEST(Gguf, EveryTruncationIsRefused) {
  const std::string whole = small_file();
  ASSERT_TRUE(parse(whole));
  size_t last = 0;  // the last byte that some tensor needs
  const auto file = parse(whole);
  for (const auto& entry : file->tensors()) {
    const auto end = static_cast<const char*>(entry.tensor.data) + entry.tensor.bytes();
    last = std::max(last, size_t(end - reinterpret_cast<const char*>(file->file().data())));
  }
  for (size_t n = 0; n < last; ++n) EXPECT_FALSE(parse(whole.substr(0, n))) << n;
  EXPECT_TRUE(parse(whole.substr(0, last)));
}

TEST(Gguf, MovingKeepsViewsAndHash) {
  auto first = Gguf::open(HEED_TEST_DATA "/gguf/small.gguf");
  ASSERT_TRUE(first);
  const uint64_t hash = first->hash();
  const Gguf second = std::move(*first);
  EXPECT_EQ(second.hash(), hash);
  EXPECT_EQ(second.tensor("f32")->at<float>(0, 3), 3.0f);
  EXPECT_EQ(parse(small_file())->hash(), hash);

  std::string other = small_file();
  const auto* data = static_cast<const char*>(second.tensor("i32")->data);
  other[size_t(data - reinterpret_cast<const char*>(second.file().data()))] ^= 1;
  EXPECT_NE(parse(other)->hash(), hash);
  other = small_file();
  other[other.find("tiny")] = 'T';
  EXPECT_NE(parse(other)->hash(), hash);
}

TEST(Gguf, RefusesWhatItCannotRead) {
  EXPECT_NE(refusal(Bytes{}).find("not a GGUF file"), std::string::npos);
  EXPECT_NE(refusal(Bytes{"PK\3\4 and so on"}).find("not a GGUF file"), std::string::npos);
  EXPECT_NE(refusal(Bytes{}.head(0, 0, 1), Code::Unsupported).find("version 1"), std::string::npos);
  EXPECT_NE(refusal(Bytes{}.head(0, 0, 0x03000000), Code::Unsupported).find("big-endian"), std::string::npos);
  EXPECT_TRUE(parse(Bytes{}.head(0, 0).data));
  EXPECT_TRUE(parse(Bytes{}.head(0, 0, 2).data));
  EXPECT_EQ(Gguf::open("/nowhere/model.gguf").error().code, Code::NotFound);
  EXPECT_EQ(Gguf::open("/").error().code, Code::Invalid);
}

TEST(Gguf, RefusesMetadataThatLies) {
  constexpr auto string = uint32_t(Gguf::Type::String), array = uint32_t(Gguf::Type::Array), u32 = uint32_t(Gguf::Type::U32);
  EXPECT_NE(refusal(Bytes{}.head(0, ~0ull)).find("do not fit"), std::string::npos);
  EXPECT_NE(refusal(Bytes{}.head(0, 1).put(~0ull).put(~0ull)).find("remain"), std::string::npos);
  EXPECT_NE(refusal(Bytes{}.head(0, 1).text("k").put(99u).put(0ull)).find("unknown type 99"), std::string::npos);
  EXPECT_NE(refusal(Bytes{}.head(0, 1).text("k").put(string).put(1ull << 63)).find("remain"), std::string::npos);
  EXPECT_NE(refusal(Bytes{}.head(0, 1).text("k").put(array).put(u32).put(1ull << 62)).find("does not fit"),
            std::string::npos);
  EXPECT_NE(refusal(Bytes{}.head(0, 1).text("k").put(array).put(string).put(1ull << 61)).find("does not fit"),
            std::string::npos);
  EXPECT_NE(refusal(Bytes{}.head(0, 2).text("k").put(u32).put(1u).text("k").put(u32).put(1u)).find("twice"),
            std::string::npos);
  for (const uint32_t alignment : {0u, 1u, 4u, 33u, 48u}) {
    const auto bytes = Bytes{}.head(0, 1).text("general.alignment").put(u32).put(alignment);
    EXPECT_NE(refusal(bytes).find("power of two"), std::string::npos);
  }
  EXPECT_NE(refusal(Bytes{}.head(0, 1).text("general.alignment").put(string).text("32")).find("u32"), std::string::npos);
  Bytes deep;
  deep.head(0, 1).text("k").put(array);
  for (int i = 0; i < 1000; ++i) deep.put(array).put(uint64_t(1));
  EXPECT_NE(refusal(deep).find("nested too deeply"), std::string::npos);
}

TEST(Gguf, RefusesTensorsThatLie) {
  EXPECT_NE(refusal(Bytes{}.head(~0ull, 0)).find("do not fit"), std::string::npos);
  const auto one = [](std::vector<uint64_t> dims, uint32_t type, uint64_t offset) {
    return Bytes{}.head(1, 0).tensor("t", std::move(dims), type, offset).pad(32).pad(256);
  };
  EXPECT_NE(refusal(one({}, 0, 0)).find("0 dimensions"), std::string::npos);
  EXPECT_NE(refusal(one({1, 1, 1, 1, 1}, 0, 0)).find("5 dimensions"), std::string::npos);
  EXPECT_NE(refusal(one({4, 0}, 0, 0)).find("impossible dimension"), std::string::npos);
  EXPECT_NE(refusal(one({~0ull}, 0, 0)).find("impossible dimension"), std::string::npos);
  EXPECT_NE(refusal(one({1ull << 32, 1ull << 32}, 0, 0)).find("impossible dimension"), std::string::npos);
  EXPECT_NE(refusal(one({1ull << 62}, 0, 0)).find("past the end"), std::string::npos);
  EXPECT_NE(refusal(one({4}, 0, 1ull << 40)).find("past the end"), std::string::npos);
  EXPECT_NE(refusal(one({4}, 0, ~31ull)).find("past the end"), std::string::npos);
  EXPECT_NE(refusal(one({4}, 0, 8)).find("not aligned"), std::string::npos);
  EXPECT_NE(refusal(one({40}, 8, 0)).find("multiple of 32"), std::string::npos);
  EXPECT_NE(refusal(one({32}, 23, 0), Code::Unsupported).find("IQ4_XS"), std::string::npos);
  EXPECT_NE(refusal(one({32}, 77, 0), Code::Unsupported).find("77"), std::string::npos);
  EXPECT_TRUE(parse(one({4, 2}, 0, 32).data));
  EXPECT_NE(refusal(Bytes{}.head(2, 0).tensor("t", {4}, 0, 0).tensor("t", {4}, 0, 0).pad(256)).find("twice"),
            std::string::npos);
}

TEST(Gguf, OpensRealModels) {
  const std::filesystem::path folder = HEED_MODELS;
  bool any = false;
  for (const char* name : {"smollm2-135m.gguf", "gemma3-270m.gguf"}) {
    if (!std::filesystem::exists(folder / name)) continue;
    any = true;
    const auto file = Gguf::open(folder / name);
    ASSERT_TRUE(file) << file.error().text();
    EXPECT_TRUE(file->tensor("token_embd.weight"));
    EXPECT_TRUE(file->strings("tokenizer.ggml.tokens"));
  }
  if (!any) GTEST_SKIP() << "no models in " << folder;
}

}  // namespace
}  // namespace heed
