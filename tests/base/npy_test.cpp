// npy and npz against files that numpy wrote (tests/data/make/npy.py).
#include "base/npy.h"

#include <gtest/gtest.h>

#include <unistd.h>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace heed {
namespace {

std::string data(const std::string& name) { return HEED_TEST_DATA "/npy/" + name; }

std::string bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::span<const std::byte> as_file(const std::string& text) { return std::as_bytes(std::span(text)); }

/// A folder that is gone after the test.
struct Folder {
  std::filesystem::path path = std::filesystem::temp_directory_path() / ("heed-npy-" + std::to_string(::getpid()));
  Folder() { std::filesystem::create_directories(path); }
  ~Folder() { std::filesystem::remove_all(path); }
  std::string operator/(const char* name) const { return (path / name).string(); }
  size_t files() const { return size_t(std::distance(std::filesystem::directory_iterator(path), {})); }
};

template <class T>
void expect_ramp(const Tensor& array, int first) {
  ASSERT_EQ(array.shape(), "[2, 3, 4]");
  ASSERT_EQ(array.type, DtypeOf<T>::value);
  for (int i = 0; i < 24; ++i) EXPECT_EQ(double(array.as<T>()[i]), double(i + first));
}

TEST(Npy, ReadsWhatNumpyWrote) {
  expect_ramp<f16>(read_npy(data("f2.npy")).value(), -5);
  expect_ramp<float>(read_npy(data("f4.npy")).value(), -5);
  expect_ramp<double>(read_npy(data("f8.npy")).value(), -5);
  expect_ramp<int8_t>(read_npy(data("i1.npy")).value(), -5);
  expect_ramp<uint8_t>(read_npy(data("u1.npy")).value(), 0);
  expect_ramp<int32_t>(read_npy(data("i4.npy")).value(), -5);
  expect_ramp<int64_t>(read_npy(data("i8.npy")).value(), -5);
  expect_ramp<uint64_t>(read_npy(data("u8.npy")).value(), 0);
  expect_ramp<float>(read_npy(data("v2.npy")).value(), -5);
  expect_ramp<float>(read_npy(data("v3.npy")).value(), -5);
  const auto flags = read_npy(data("bool.npy"));
  EXPECT_EQ(flags->view().at<uint8_t>(0, 1, 1), 0);
  EXPECT_EQ(flags->view().at<uint8_t>(1, 2, 3), 1);
  const auto scalar = read_npy(data("scalar.npy"));
  EXPECT_EQ(scalar->view().rank, 0);
  EXPECT_EQ(*scalar->view().as<float>(), 2.5f);
  EXPECT_EQ(read_npy(data("empty.npy"))->view().shape(), "[0, 7]");
}

TEST(Npy, WritesTheBytesThatNumpyWrites) {
  for (const char* name : {"f2", "f4", "f8", "i1", "u1", "i4", "i8", "u8", "scalar", "vector", "empty"}) {
    const std::string path = data(std::string(name) + ".npy");
    const auto array = read_npy(path);
    ASSERT_TRUE(array) << array.error().text();
    EXPECT_EQ(npy_bytes(*array).value(), bytes(path)) << name;
  }
}

TEST(Npy, WritesViewsAndFilesWhole) {
  const Folder folder;
  const auto array = read_npy(data("f4.npy"));
  const Tensor column = array->view().slice(2, 1, 2);
  ASSERT_TRUE(write_npy(folder / "x.npy", column));
  const auto back = read_npy(folder / "x.npy");
  ASSERT_TRUE(back) << back.error().text();
  EXPECT_EQ(back->view().shape(), "[2, 3, 1]");
  EXPECT_EQ(back->view().at<float>(1, 2, 0), array->view().at<float>(1, 2, 1));
  EXPECT_EQ(folder.files(), 1u);
  EXPECT_EQ(write_npy(folder / "none/x.npy", column).error().code, Code::Invalid);
  float value = 0;
  EXPECT_EQ(npy_bytes(Tensor(&value, Dtype::BF16, {1})).error().code, Code::Unsupported);
}

TEST(Npy, RefusesInWords) {
  const auto refusal = [](const char* name) {
    const auto result = read_npy(data(name));
    if (result) return std::string("accepted");
    EXPECT_EQ(result.error().code, Code::Unsupported);
    EXPECT_FALSE(result.error().remedy.empty());
    return result.error().text();
  };
  EXPECT_NE(refusal("fortran.npy").find("Fortran order"), std::string::npos);
  EXPECT_NE(refusal("big.npy").find("big-endian"), std::string::npos);
  EXPECT_NE(refusal("text.npy").find("<U2"), std::string::npos);
  EXPECT_NE(refusal("complex.npy").find("<c8"), std::string::npos);
  EXPECT_NE(refusal("fields.npy").find("structured"), std::string::npos);
  EXPECT_NE(refusal("deep.npy").find("6 dimensions"), std::string::npos);
  EXPECT_NE(refusal("deep.npy").find("deep.npy"), std::string::npos);
  EXPECT_EQ(read_npy(data("absent.npy")).error().code, Code::NotFound);
}

TEST(Npy, EveryTruncationIsRefused) {
  const std::string whole = bytes(data("f4.npy"));
  ASSERT_TRUE(parse_npy(as_file(whole)));
  for (size_t n = 0; n < whole.size(); ++n) {
    const std::string part = whole.substr(0, n);
    const auto result = parse_npy(as_file(part));
    ASSERT_FALSE(result) << n;
    EXPECT_EQ(result.error().code, Code::Corrupt) << n;
  }
}

TEST(Npy, RefusesHeadersThatLie) {
  const auto with = [](const std::string& header) {
    std::string file("\x93NUMPY\x01\x00", 8);
    file += char(header.size() & 255);
    file += char(header.size() >> 8);
    file += header + std::string(64, '\0');
    return parse_npy(as_file(file));
  };
  EXPECT_TRUE(with("{'descr': '<f4', 'fortran_order': False, 'shape': (4,4)}"));
  EXPECT_TRUE(with(" {\"shape\":(16,), \"descr\":\"<f4\",\"fortran_order\":False,}\n"));
  EXPECT_FALSE(with("{'descr': '<f4', 'fortran_order': False, 'shape': (17,)}"));
  EXPECT_FALSE(with("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"));
  EXPECT_FALSE(with("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296,4294967296,4)}"));
  EXPECT_FALSE(with("{'descr': '<f4', 'fortran_order': False, 'shape': (0,9223372036854775807,9223372036854775807)}"));
  EXPECT_FALSE(with("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}"));
  EXPECT_FALSE(with("{'descr': '<f4', 'fortran_order': False}"));
  EXPECT_FALSE(with("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': ()}"));
  EXPECT_FALSE(with("{'descr': '<f4', 'fortran_order': None, 'shape': ()}"));
  EXPECT_FALSE(with("{'descr': '<f4', 'fortran_order': False, 'shape': (), 'more': 1}"));
  EXPECT_FALSE(with("{'descr': '<f4"));
  EXPECT_FALSE(with("{'descr': '<f4', 'fortran_order': False, 'shape': ()} x"));
  EXPECT_FALSE(with(""));
}

TEST(Npz, ReadsWhatNumpyWrote) {
  const auto stored = read_npz(data("stored.npz"));
  ASSERT_TRUE(stored) << stored.error().text();
  ASSERT_EQ(stored->size(), 2u);
  expect_ramp<float>(stored->at("a"), -5);
  EXPECT_EQ(stored->at("b").view().at<int64_t>(2), 2);
  const auto deflated = read_npz(data("deflated.npz"));
  ASSERT_TRUE(deflated) << deflated.error().text();
  expect_ramp<float>(deflated->at("a"), -5);
  EXPECT_EQ(deflated->at("zeros").view().shape(), "[50, 40]");
}

TEST(Npz, WritesWhatItReads) {
  const Folder folder;
  const auto arrays = read_npz(data("stored.npz"));
  Buffer empty(Dtype::I32, {0, 3});
  const Tensor strided = arrays->at("a").view().slice(1, 1, 3);
  for (const bool compress : {false, true}) {
    const auto written = write_npz(folder / "x.npz", {{"out", arrays->at("a")}, {"part", strided}, {"none", empty}}, compress);
    ASSERT_TRUE(written) << written.error().text();
    const auto back = read_npz(folder / "x.npz");
    ASSERT_TRUE(back) << back.error().text();
    ASSERT_EQ(back->size(), 3u);
    expect_ramp<float>(back->at("out"), -5);
    EXPECT_EQ(back->at("part").view().shape(), "[2, 2, 4]");
    EXPECT_EQ(back->at("part").view().at<float>(1, 1, 3), strided.at<float>(1, 1, 3));
    EXPECT_EQ(back->at("none").view().shape(), "[0, 3]");
    const std::string first = bytes(folder / "x.npz");
    ASSERT_TRUE(write_npz(folder / "x.npz", {{"out", arrays->at("a")}, {"part", strided}, {"none", empty}}, compress));
    EXPECT_EQ(bytes(folder / "x.npz"), first);
  }
  EXPECT_EQ(folder.files(), 1u);
}

TEST(Npz, FailedWritesLeaveTheOldFile) {
  const Folder folder;
  const auto array = read_npy(data("f4.npy"));
  ASSERT_TRUE(write_npz(folder / "x.npz", {{"a", *array}}));
  const std::string before = bytes(folder / "x.npz");
  EXPECT_EQ(write_npz(folder / "x.npz", {{"a", *array}, {"a", *array}}).error().code, Code::Invalid);
  float value = 0;
  EXPECT_EQ(write_npz(folder / "x.npz", {{"a", Tensor(&value, Dtype::BF16, {1})}}).error().code, Code::Unsupported);
  EXPECT_EQ(bytes(folder / "x.npz"), before);
  EXPECT_EQ(write_npz(folder / "none/x.npz", {{"a", *array}}).error().code, Code::Io);
  ASSERT_TRUE(write_npz(folder / "empty.npz", {}));
  EXPECT_TRUE(read_npz(folder / "empty.npz")->empty());
  EXPECT_EQ(folder.files(), 2u);
}

TEST(Npz, RefusesDamage) {
  const std::string whole = bytes(data("deflated.npz"));
  for (size_t n = 0; n < whole.size(); ++n) {
    const std::string part = whole.substr(0, n);
    EXPECT_FALSE(parse_npz(as_file(part))) << n;
  }
  // Any one byte changed either still reads or is refused, and the numbers read are those written.
  for (size_t n = 0; n < whole.size(); ++n) {
    std::string other = whole;
    other[n] = char(other[n] ^ 0x41);
    const auto result = parse_npz(as_file(other));
    if (!result || !result->contains("a") || result->at("a").view().shape() != "[2, 3, 4]") continue;
    expect_ramp<float>(result->at("a"), -5);
  }
  EXPECT_EQ(read_npz(data("f4.npy")).error().code, Code::Corrupt);
  EXPECT_EQ(read_npz(data("absent.npz")).error().code, Code::NotFound);
}

}  // namespace
}  // namespace heed
