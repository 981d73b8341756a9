#include "lab/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace heed {

Progress::Progress(std::string label)
    : label_(std::move(label)), terminal_(isatty(STDERR_FILENO) == 1), begin_(std::chrono::steady_clock::now()) {}

Progress::~Progress() { clear(); }

void Progress::at(double share, const std::string& detail) {
  if (!terminal_) return;
  const auto now = std::chrono::steady_clock::now();
  // Ten lines a second are smooth to the eye and cost nothing.
  if (shown_ && now - last_ < std::chrono::milliseconds(100)) return;
  last_ = now, shown_ = true;
  share = std::clamp(share, 0.0, 1.0);
  const double spent = std::chrono::duration<double>(now - begin_).count();
  std::string left;
  if (share > 0.02 && spent > 1) left = ", " + std::to_string(int64_t(spent / share * (1 - share) + 0.5)) + " s left";
  std::fprintf(stderr, "\r\033[K%s %3d%%%s%s%s", label_.c_str(), int(share * 100), left.c_str(),
               detail.empty() ? "" : "  ", detail.c_str());
  std::fflush(stderr);
}

void Progress::clear() {
  if (shown_) std::fputs("\r\033[K", stderr), std::fflush(stderr);
  shown_ = false;
}

}  // namespace heed
