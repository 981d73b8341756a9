// Runs the program and catches what it says.
#pragma once
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace heed {

struct Outcome {
  int status = -1;
  std::string out, err;
  nlohmann::json json() const { return nlohmann::json::parse(out); }
};

/// A folder that is gone when the test ends.
class ProgramTest : public testing::Test {
 protected:
  ProgramTest() {
    std::string pattern = (std::filesystem::temp_directory_path() / "heed-XXXXXX").string();
    folder_ = mkdtemp(pattern.data());
  }
  ~ProgramTest() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path(name), std::ios::binary) << bytes;
    return path(name);
  }
  static std::string read(const std::string& file) {
    std::ifstream in(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  /// No shell between: arguments arrive as they are. `to`: where standard output goes; empty: it is closed.
  Outcome heed(std::vector<std::string> arguments, std::optional<std::string> to = {}) const {
    const std::string out = path(".out"), err = path(".err");
    const pid_t child = fork();
    if (child == 0) {
      if (!std::freopen("/dev/null", "r", stdin) ||
          !std::freopen(to && !to->empty() ? to->c_str() : out.c_str(), "w", stdout) ||
          !std::freopen(err.c_str(), "w", stderr) || (to && to->empty() && close(STDOUT_FILENO) != 0))
        _exit(99);
      arguments.insert(arguments.begin(), HEED_PROGRAM);
      std::vector<char*> argv;
      for (std::string& a : arguments) argv.push_back(a.data());
      argv.push_back(nullptr);
      execv(HEED_PROGRAM, argv.data());
      _exit(98);
    }
    int status = 0;
    waitpid(child, &status, 0);
    Outcome outcome{WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), read(out), read(err)};
    std::filesystem::remove(out), std::filesystem::remove(err);
    return outcome;
  }

  /// Names of the files in the test's folder.
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
  }

  std::string folder_;
};

/// The error is one line that begins as promised and names `what`.
inline void expect_complaint(const Outcome& outcome, int status, const std::string& what) {
  EXPECT_EQ(outcome.status, status) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  EXPECT_EQ(outcome.err.rfind("heed: ", 0), 0u) << outcome.err;
  EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
  EXPECT_NE(outcome.err.find(what), std::string::npos) << outcome.err;
}

}  // namespace heed
