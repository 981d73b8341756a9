// `heed bench kernels`.
#pragma once
#include "apps/command.h"

namespace heed::apps {

/// Prints a table (md), JSON or CSV of every kernel whose name begins with `prefix`; returns the exit status.
int bench_kernels(const std::string& prefix, const std::string& backend, int threads, const std::string& format);

}  // namespace heed::apps
