// Loss by place: how much more a model knows of a token the more text stands before it.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "lab/interval.h"
#include "model/session.h"

namespace heed {

struct PositionBucket {
  int64_t first = 0, end = 0;  // tokens that stand at first … end − 1 of their chunk
  std::vector<double> losses;  // nats
  double nll() const;
  Interval interval() const { return normal_interval(losses); }
};

/// The text is cut into chunks of `context` tokens as for perplexity(), and every token but a chunk's first is scored in
/// one of `buckets` equal parts. chunks < 0: all there are. Ends early, with what is done, when interrupted.
std::vector<PositionBucket> loss_by_position(std::shared_ptr<const Model> model, const SessionOptions& options,
                                             std::span<const int32_t> tokens, int64_t context, int64_t chunks,
                                             int buckets, const std::function<void(double share)>& done = {});

}  // namespace heed
