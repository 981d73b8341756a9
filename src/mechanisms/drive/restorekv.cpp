#include <algorithm>

#include "attention/array_file.h"
#include "attention/select.h"
#include "mechanisms/drive/kvzip.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// RestoreKV (2026): KVzip, and a few learnt rows that read the whole prompt once, behind it and before anything goes, under
// low-rank changes of the model's matrices. Their keys and values stay, in the place of as many entries of each KV head;
// what follows stands behind them. Once that has happened later prompts of a session are not cut.
struct RestoreKV final : KVzip {
  ArrayFile weights;

  static std::vector<ParamInfo> params() {
    std::vector<ParamInfo> all = KVzip::params();
    all.push_back(
        array_file_param(&RestoreKV::weights, "weights",
                         "embeddings [n, hidden]; for q, k, v, o, gate, up, down NAME.a [layers, rank, in] and NAME.b "
                         "[layers, out, rank], scale included, rows as the GGUF file has them. Without: KVzip"));
    return all;
  }
  std::string check() const override { return too_small(budget, sinks + newest(), "sinks and learnt rows together"); }

  // A prompt too short for the budget to hold what always stays keeps that.
  int64_t entries(const Budget& kept, const ModelInfo& m, int layer, int64_t length) const override {
    return weights ? std::max(KVzip::entries(kept, m, layer, length), sinks + newest())
                   : KVzip::entries(kept, m, layer, length);
  }

  struct Once final : Part {
    bool over = false;
    std::unique_ptr<State> clone() const override { return std::make_unique<Once>(*this); }
  };
  std::unique_ptr<State> open(const ModelInfo& m) const override {
    if (weights) {
      weights.check_model(m), weights.array("embeddings", {newest(), m.hidden});
      for (const char* name : kMatrices)
        if (const auto& [a, b] = both(name); a)
          require(a.rank == 3 && b.rank == 3 && a.type == Dtype::F32 && b.type == Dtype::F32 && a.size[0] == m.layers &&
                      b.size[0] == m.layers && a.size[1] == b.size[2],
                  weights.path.c_str(),
                  std::string(name) + ".a and .b are f32 [layers, rank, in] and [layers, out, rank], not " + a.shape() +
                      " and " + b.shape());
    }
    return std::make_unique<Once>();
  }

  void drive(Run& run) const override {
    auto& once = static_cast<Once&>(*run.state());
    if (once.over) return;
    KVzip::drive(run);
    once.over = bool(weights);
  }

  void behind(Run& run, int sequence) const override {
    if (!weights || run.tokens(sequence).empty()) return;
    Queue& queue = run.queue();
    const Scratch scope(queue.scratch);
    Adapter adapter;
    for (int l = 0; l < run.model().layers; ++l) {
      Adapter::Layer& layer = adapter.layers.emplace_back();
      Adapter::Pair* pairs[] = {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down};
      for (size_t i = 0; i < std::size(pairs); ++i)
        if (const auto& [a, b] = both(kMatrices[i]); a)
          *pairs[i] = {queue.upload(a.select(0, l)), queue.upload(b.select(0, l))};
    }
    run.append(sequence, weights.arrays->at("embeddings"), &adapter);
  }

 protected:
  static constexpr const char* kMatrices[] = {"q", "k", "v", "o", "gate", "up", "down"};
  /// What changes a matrix, in all layers; empty: nothing does.
  std::pair<Tensor, Tensor> both(const std::string& name) const {
    const auto a = weights.arrays->find(name + ".a"), b = weights.arrays->find(name + ".b");
    if (a == weights.arrays->end() || b == weights.arrays->end()) return {};
    return {a->second, b->second};
  }
  int64_t newest() const override {
    if (!weights) return 0;
    const auto found = weights.arrays->find("embeddings");
    return found == weights.arrays->end() || found->second->rank == 0 ? 0 : found->second->size[0];
  }
};

}  // namespace

Entry restorekv() {
  Entry e = entry<RestoreKV>("restorekv", "RestoreKV", "2026, arXiv 2608.01247", 2026, Role::Keep | Role::Drive);
  e.equation =
      "rows e_1 … e_8 at positions L … L + 7 read the whole prompt under W + b a, and their entries stay; "
      "kvzip's scores keep ⌊B⌋ − 8 of the prompt's for each KV head";
  e.needs = "learnt rows and low-rank matrices (weights=@FILE.npz), and the prompt fed again, part by part";
  e.identity = "restorekv(budget=1.0)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
