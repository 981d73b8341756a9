#pragma once
#include "attention/mechanism.h"

namespace heed::mechanisms {

// KVzip (Kim et al., 2025): behind the prompt the model is asked to repeat it, part by part, and an entry is worth the most
// attention that it gets while it is repeated; the lowest go, over all layers and heads together. The first `sinks`
// entries always stay (the library's rule; the authors keep the system prompt). The request ends in an empty line, where
// both take the ending of the model's chat template. In a sliding-window layer a repetition
// behind the prompt sees nothing of what it repeats, so scores say nothing there: such a layer stays out of the pool and
// keeps the newest entries, as many as its own share grants and its window can still show.
struct KVzip : KeepPolicy {
  /// The part of the prompt that is being repeated.
  struct Part : State {
    int64_t begin = 0, end = 0;
    std::unique_ptr<State> clone() const override { return std::make_unique<Part>(*this); }
  };

  int chunk, sinks;
  Choice share;

  static std::vector<ParamInfo> params() { return params(2048); }
  /// tokens: how many are repeated at a time, unless said otherwise.
  static std::vector<ParamInfo> params(int tokens);
  std::string check() const override;
  Needs needs(const ModelInfo&) const override;
  std::unique_ptr<State> open(const ModelInfo&) const override;
  void drive(Run& run) const override;
  void observe(LayerView& at) const override;
  Ragged score(LayerView& at) const override;
  Tensor allocate(const Allocation& a) const override;

 protected:
  /// Reads a request to repeat a part of the prompt, part included.
  virtual void repeat(Run& run, int sequence, const std::vector<int32_t>& request) const {
    run.replay(sequence, request);
  }
  /// When a sequence's prompt has been repeated, before anything goes.
  virtual void behind(Run&, int /*sequence*/) const {}
  /// The latest entries that always stay.
  virtual int64_t newest() const { return 0; }
  /// What such a reading sees: the sinks, its part of the prompt and itself.
  Plan seen(const LayerView& at) const;
};

}  // namespace heed::mechanisms
