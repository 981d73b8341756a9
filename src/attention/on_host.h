// What a step left behind, made readable for the host: for exports, pictures and analyses, never inside a role.
#pragma once
#include <deque>

#include "attention/mechanism.h"

namespace heed {

/// Copies of device tensors in host memory, which live as long as this; tensors of the host are handed through. Every
/// copy waits for the device.
class OnHost {
 public:
  explicit OnHost(Queue& queue) : queue_(queue) {}
  Tensor operator()(const Tensor& t);
  /// Offsets and ends only; values are left where they are.
  Ragged segments(const Ragged& r);
  Plan operator()(const Plan& plan);
  /// q_pos, k_pos and until, which say what a plan's rows see.
  Mods positions(const Mods& mods);

 private:
  Queue& queue_;
  std::deque<Buffer> copies_;
};

}  // namespace heed
