// What stays of a prompt in a small model, and what the model says behind it, against kvpress 0.5.5 around the same
// model in transformers (tests/data/make/kvpress_model.py). DuoAttention's heads stream on while decoding; the library's
// hold what they held.
#include "base/npy.h"
#include "session_case.h"

namespace heed::test {
namespace {

struct Policy {
  const char *file, *spec;
  enum { Both, Kept, Said } what = Both;  // keys rotated anew, and dense attention, have no file of what is kept
  int32_t learnt = 0;                     // rows that were read behind the prompt and stay
};
void PrintTo(const Policy& p, std::ostream* out) { *out << p.file; }

class GoldenModel : public testing::TestWithParam<Policy> {};

Buffer read(const std::string& name) {
  return value_or_throw(read_npy(std::string(HEED_TEST_DATA) + "/golden/model/" + name + ".npy"));
}

TEST_P(GoldenModel, KeepsAndSaysTheSame) {
  static const auto model = value_or_throw(Model::load(std::string(HEED_TEST_DATA) + "/golden/model/model.gguf"));
  const auto& [name, spec, what, learnt] = GetParam();
  const Buffer ids = read("tokens");
  const std::span<const int32_t> tokens(ids->as<int32_t>(), size_t(ids->size[0]));
  constexpr size_t prompt = 150;

  Session session(model, in_f32(spec));
  session.prefill(tokens.first(prompt));
  if (what != Policy::Said) {
    const Buffer stayed = read(name);
    for (int l = 0; l < model->info().layers; ++l)
      for (int kv = 0; kv < model->info().g; ++kv) {
        std::vector<int32_t> expected;
        for (int32_t j = 0; j < int32_t(prompt); ++j)
          if (stayed->at<uint8_t>(l, kv, j)) expected.push_back(j);
        for (int32_t j = 0; j < learnt; ++j) expected.push_back(int32_t(prompt) + j);
        EXPECT_EQ(session.store().layer(l).positions(kv), expected) << "layer " << l << ", KV head " << kv;
      }
  }
  if (what == Policy::Kept) return;
  const Buffer logits = read(std::string(name) + ".logits");
  Tensor said;
  for (const int32_t id : tokens.subspan(prompt)) said = session.decode(id);
  for (int64_t i = 0; i < logits->numel(); ++i)
    ASSERT_NEAR(said.at<float>(0, i), logits->at<float>(i), 1e-3) << "token " << i;
}

INSTANTIATE_TEST_SUITE_P(
    Kvpress, GoldenModel,
    testing::Values(
        Policy{"dense", "dense", Policy::Said}, Policy{"knorm", "knorm(budget=60)"},
        Policy{"keydiff", "keydiff(budget=60)"}, Policy{"cur", "cur(budget=60)"},
        Policy{"lagkv", "lagkv(budget=60,lag=32)"}, Policy{"noncausal", "noncausal(budget=60,tile=50)"},
        Policy{"leverage", "leverage(budget=60)"}, Policy{"compactor", "compactor(budget=60,tile=46)"},
        Policy{"expected-attention", "expected-attention(budget=60)"}, Policy{"capkv", "capkv(budget=60)"},
        Policy{"expected-attention-stats",
               "expected-attention-stats(budget=60,stats=@" HEED_TEST_DATA "/golden/model/queries.npz)"},
        Policy{"snapkv", "snapkv(budget=60,window=32)"}, Policy{"tova", "tova(budget=60,force_last=true,when=prompt)"},
        Policy{"observed-attention", "observed-attention(budget=60,when=prompt)"},
        Policy{"streaming-llm", "streaming-llm(budget=60,when=prompt)", Policy::Said},
        Policy{"rerotate", "rerotate(snapkv(budget=60,window=32))", Policy::Said},
        Policy{"finch", "finch(budget=60,window=32)"},
        Policy{"finch-rerotated", "rerotate(finch(budget=60,window=32))", Policy::Said},
        Policy{"pyramidkv", "pyramidkv(budget=60,window=8,beta=4)"},
        Policy{"adakv", "adakv(snapkv(budget=60,window=32),port=true)"},
        Policy{"criticalkv", "criticalkv(snapkv(budget=60,window=32))"},
        Policy{"critical-ada", "critical-ada(snapkv(budget=60,window=32))"},
        Policy{"chunkkv", "chunkkv(snapkv(budget=50,window=32))"},
        Policy{"entropy-chunk", "entropy-chunk(snapkv(budget=60,window=32))"},
        Policy{"block-evict", "block-evict(keydiff(budget=60),block=32)"},
        Policy{"block-evict-many", "block-evict(keydiff(budget=60),block=5)"},
        Policy{"chunk-local", "chunk-local(knorm(budget=60),chunk=64)"},
        Policy{"merge-evict", "merge-evict(snapkv(budget=60,window=32))"},
        Policy{"merge-evict-some", "merge-evict(snapkv(budget=60,window=32),least=0.52,share=0.5)"},
        Policy{"simlayerkv", "simlayerkv(threshold=0.185,recent=40)"},
        Policy{"dms", "dms(knorm(budget=60),threshold=-4.2,window=20)"},
        Policy{"duo-attention", "duo-attention(sinks=8,recent=40,heads=1)", Policy::Kept},
        Policy{"lu-kv", "lu-kv(expected-attention(budget=60,eps=0.02),lost=[0.5,0.77,0.31,0.82,0.6,0.6])"},
        Policy{"q-filters", "q-filters(budget=60,rounds=1000)"}, Policy{"kvzip", "kvzip(budget=0.4,chunk=64)"},
        Policy{"kvzip-layer", "kvzip(budget=0.4,share=layer)"},
        Policy{"restorekv", "restorekv(budget=0.4,weights=@" HEED_TEST_DATA "/golden/model/restore.npz)", Policy::Both, 8},
        Policy{"kvgrad", "kvgrad(budget=0.4,chunk=64)"},
        Policy{"kvgrad-layer", "kvgrad(budget=0.4,chunk=40,share=layer)"}, Policy{"kvcompose", "kvcompose(budget=0.4)"},
        Policy{"knorm-decoding", "knorm(budget=60,when=every(2))"},
        Policy{"keydiff-decoding", "keydiff(budget=60,when=every(3))"},
        Policy{"tova-decoding", "tova(budget=60,force_last=true)"}),
    [](const auto& info) {
      std::string name = info.param.file;
      std::replace(name.begin(), name.end(), '-', '_');
      return name;
    });

}  // namespace
}  // namespace heed::test
