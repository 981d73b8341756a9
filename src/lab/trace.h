// What a mechanism did to a model on a text: the arrays of `heed trace`.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "model/session.h"

namespace heed {

/// Named arrays in the order and with the shapes that interfaces fix: tokens, nll, kept_offsets, kept_index, kv_bytes,
/// density, read_tokens.
using Arrays = std::vector<std::pair<std::string, Buffer>>;

/// Prefills the first `prefill` tokens, then feeds the rest one at a time. Throws Error(Invalid) unless
/// 1 ≤ prefill ≤ tokens. `progress` gets shares of the work. Interrupted behind the prefill, it returns the arrays of
/// the text up to where it came.
Arrays trace(std::shared_ptr<const Model> model, const SessionOptions& options, std::span<const int32_t> tokens,
             int64_t prefill, const std::function<void(double)>& progress = {});

}  // namespace heed
