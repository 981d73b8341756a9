// How long a mechanism says the same as dense attention.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "model/session.h"

namespace heed {

struct Agreement {
  int64_t tokens = 0;            // of each continuation
  int64_t first_difference = 0;  // the first place where the two differ; `tokens` when they do not
  double before = 1;             // share of the tokens that stand before it, all of them equal
  double after = 1;              // share of equal tokens from it on, place by place; 1 when nothing differs
};

/// Of two continuations of one length. Throws Error(Invalid) otherwise.
Agreement agreement(std::span<const int32_t> dense, std::span<const int32_t> other);

/// Continues the prompt by `tokens` likeliest tokens, end tokens included, under each of dense and the mechanism of
/// `options`. Throws Error(Interrupted) when stopped.
Agreement generation_agreement(std::shared_ptr<const Model> model, const SessionOptions& options,
                               std::span<const int32_t> prompt, int64_t tokens);

}  // namespace heed
