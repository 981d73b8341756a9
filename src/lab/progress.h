// One line on a terminal that says how far long work has come. Silent when stderr is no terminal.
#pragma once
#include <chrono>
#include <string>

namespace heed {

class Progress {
 public:
  explicit Progress(std::string label);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  /// `share` of the work is done, 0 … 1; `detail` stands behind it.
  void at(double share, const std::string& detail = {});
  void label(std::string label) { label_ = std::move(label); }
  /// Takes the line off the terminal.
  void clear();

 private:
  std::string label_;
  bool terminal_, shown_ = false;
  std::chrono::steady_clock::time_point begin_, last_;
};

/// Seconds since an arbitrary moment, never going back.
inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace heed
