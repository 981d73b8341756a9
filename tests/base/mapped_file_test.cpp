#include "base/mapped_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

namespace heed {
namespace {

TEST(MappedFile, SeesBytesAndSurvivesMoves) {
  const auto folder = std::filesystem::temp_directory_path() / ("heed-map-" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  const std::string path = folder / "file", empty = folder / "empty", pipe = folder / "pipe";
  std::ofstream(path) << "seven b";
  std::ofstream(empty).flush();
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);

  auto first = MappedFile::open(path);
  ASSERT_TRUE(first) << first.error().text();
  MappedFile second = std::move(*first);
  MappedFile third;
  third = std::move(second);
  ASSERT_EQ(third.bytes().size(), 7u);
  EXPECT_EQ(std::memcmp(third.bytes().data(), "seven b", 7), 0);

  EXPECT_TRUE(MappedFile::open(empty)->bytes().empty());
  EXPECT_EQ(MappedFile::open(pipe).error().code, Code::Invalid);
  EXPECT_EQ(MappedFile::open(folder).error().code, Code::Invalid);
  const auto absent = MappedFile::open(folder / "absent");
  EXPECT_EQ(absent.error().code, Code::NotFound);
  EXPECT_NE(absent.error().text().find("absent"), std::string::npos);
  EXPECT_EQ(MappedFile::open(path + "/below").error().code, Code::NotFound);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace heed
