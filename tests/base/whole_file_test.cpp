#include "base/whole_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

namespace heed {
namespace {

class WholeFile : public testing::Test {
 protected:
  WholeFile() {
    std::string pattern = (std::filesystem::temp_directory_path() / "whole-XXXXXX").string();
    folder_ = mkdtemp(pattern.data());
  }
  ~WholeFile() override { std::filesystem::remove_all(folder_); }
  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  static std::string read(const std::string& file) {
    std::ifstream in(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  static std::span<const char> bytes(std::string_view text) { return text; }
  int64_t files() const { return std::distance(std::filesystem::directory_iterator(folder_), {}); }
  std::string folder_;
};

TEST_F(WholeFile, IsThePartsInOrder) {
  const std::string file = path("a");
  for (const char* text : {"first", "another", ""}) {
    ASSERT_TRUE(write_whole(file, {bytes("<"), bytes(text), bytes(">")}));
    EXPECT_EQ(read(file), "<" + std::string(text) + ">");
  }
  EXPECT_EQ(files(), 1);
}

TEST_F(WholeFile, FollowsLinks) {
  ASSERT_TRUE(write_whole(path("a"), {bytes("old")}));
  std::filesystem::create_symlink("a", path("link"));
  ASSERT_TRUE(write_whole(path("link"), {bytes("new")}));
  EXPECT_TRUE(std::filesystem::is_symlink(path("link")));
  EXPECT_EQ(read(path("a")), "new");
  EXPECT_EQ(regular_target(path("link")).value(), std::filesystem::canonical(path("a")).string());
}

TEST_F(WholeFile, WritesToWhatIsNoFileAsItIs) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const std::string there = "/proc/self/fd/" + std::to_string(ends[1]);
  EXPECT_TRUE(can_be_written(there));
  ASSERT_TRUE(write_whole(there, {bytes("through"), bytes(" a pipe")}));
  char got[32] = {};
  EXPECT_EQ(::read(ends[0], got, sizeof got), 14);
  EXPECT_STREQ(got, "through a pipe");
  EXPECT_EQ(regular_target(there).error().code, Code::Invalid);
  close(ends[0]), close(ends[1]);

  const auto full = write_whole("/dev/full", {bytes("x")});
  ASSERT_FALSE(full);
  EXPECT_EQ(full.error().code, Code::Io);
  struct stat about{};
  ASSERT_EQ(stat("/dev/full", &about), 0);
  EXPECT_TRUE(S_ISCHR(about.st_mode)) << "it is still the device";
}

TEST_F(WholeFile, SaysWhereNoneCanBe) {
  std::filesystem::create_directory(path("folder"));
  for (const std::string& file : {path("folder"), path("none/a"), path("folder/"), std::string("/proc/self/status/a")})
    for (const Result<void>& result : {can_be_written(file), write_whole(file, {bytes("x")})}) {
      ASSERT_FALSE(result) << file;
      EXPECT_EQ(result.error().exit_status(), 2) << file;
      EXPECT_EQ(result.error().where, file);
    }
  EXPECT_TRUE(can_be_written(path("a")));
  EXPECT_EQ(files(), 1) << "asking leaves nothing";
}

TEST_F(WholeFile, StaysTheOldOneWhereThereIsNoRoom) {
  const std::string file = path("a"), large(10000, 'x');
  ASSERT_TRUE(write_whole(file, {bytes("old")}));
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 100;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto result = write_whole(file, {bytes(large)});
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().exit_status(), 1);
  EXPECT_EQ(read(file), "old");
  EXPECT_EQ(files(), 1);
}

}  // namespace
}  // namespace heed
