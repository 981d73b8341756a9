// Every mechanism on a real model: identities leave its predictions alone, and budgets of a third leave most of them.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "backends.h"
#include "cases.h"
#include "learnt_rows.h"
#include "mechanisms/registry.h"
#include "model/session.h"

namespace heed::test {
namespace {

const char* kText =
    "The lighthouse keeper climbed the stairs every evening at the same hour. There were one hundred and ninety-nine "
    "of them, and he counted "
    "each one, though he had known the number for thirty years. At the top he lit the lamp, wound the clock that "
    "turned it, and sat down with "
    "his back to the sea. Ships passed in the night; he heard their engines and never looked. In the mornings his "
    "daughter Clara brought bread "
    "and the news from the village: who had married, who had died, whose boat had come home without fish. He listened "
    "to her as he listened to "
    "the engines. One winter the lamp went out. Nobody could say when, because nobody had been watching, but in the "
    "morning a schooner lay on "
    "the rocks with her mast broken, and forty sacks of flour floated in the bay like a flock of white birds. The "
    "keeper was not in the tower. "
    "His chair stood with its back to the sea, and the clock was wound. Clara searched the cliffs until dark, then "
    "climbed the stairs herself, "
    "counted one hundred and ninety-nine of them, lit the lamp, and sat down with her face to the";

class RealModel : public testing::TestWithParam<std::string> {
 protected:
  static void SetUpTestSuite() {
    const std::string path = std::string(HEED_MODELS) + "/smollm2-135m.gguf";
    if (std::filesystem::exists(path)) model_ = value_or_throw(Model::load(path));
  }
  static void TearDownTestSuite() { model_.reset(), dense_.clear(); }
  void SetUp() override {
    if (!model_) GTEST_SKIP() << "models/smollm2-135m.gguf is not there";
    ids_ = model_->tokenizer()->encode(kText);
    ids_.resize(std::min(ids_.size(), tokens()));
    if (dense_.empty()) dense_ = predict("dense");
  }
  virtual size_t tokens() const { return SIZE_MAX; }

  /// Log probabilities of the last `steps` tokens' rows, fed one by one behind the rest.
  std::vector<std::vector<double>> predict(const std::string& spec, int steps = 8) {
    SessionOptions o;
    o.attention = spec, o.backend = backend_or("auto");
    Session session(model_, o);
    session.prefill(std::span(ids_).first(ids_.size() - size_t(steps)));
    std::vector<std::vector<double>> out;
    for (size_t i = ids_.size() - size_t(steps); i < ids_.size(); ++i) {
      const Tensor logits = session.decode(ids_[i]);
      std::vector<double> row(logits.as<float>(), logits.as<float>() + logits.size[1]);
      double most = -INFINITY, sum = 0;
      for (double x : row) most = std::max(most, x);
      for (double x : row) sum += std::exp(x - most);
      for (double& x : row) x -= most + std::log(sum);
      out.push_back(std::move(row));
    }
    return out;
  }
  static double divergence(const std::vector<std::vector<double>>& p, const std::vector<std::vector<double>>& q) {
    double sum = 0;
    for (size_t i = 0; i < p.size(); ++i)
      for (size_t c = 0; c < p[i].size(); ++c) sum += std::exp(p[i][c]) * (p[i][c] - q[i][c]);
    return sum / double(p.size());
  }

  static std::shared_ptr<const Model> model_;
  static std::vector<std::vector<double>> dense_;
  std::vector<int32_t> ids_;
};
std::shared_ptr<const Model> RealModel::model_;
std::vector<std::vector<double>> RealModel::dense_;
class RealModelIdentity : public RealModel {
  size_t tokens() const override { return 136; }
};

TEST(RealModelTokens, HaveClasses) {
  const std::string path = std::string(HEED_MODELS) + "/smollm2-135m.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "models/smollm2-135m.gguf is not there";
  const auto model = value_or_throw(Model::load(path));
  const ModelInfo& info = model->info();
  ASSERT_EQ(int(info.token_classes.size()), info.vocabulary);
  const auto kind = [&](const char* text) {
    const auto ids = model->tokenizer()->encode(text, {.special = true});
    EXPECT_EQ(ids.size(), 1u) << text;
    return TokenClass(info.token_classes[size_t(ids[0])]);
  };
  for (const char* text : {".", ",", " (", "..."}) EXPECT_EQ(kind(text), TokenClass::Punctuation) << text;
  for (const char* text : {" the", "a", "7", "\n", " "}) EXPECT_EQ(kind(text), TokenClass::Text) << text;
  for (const char* text : {"<|im_end|>", "<|im_start|>"}) EXPECT_EQ(kind(text), TokenClass::Control) << text;
}

std::string test_name(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name;
}

/// Those of a third of the catalogue, all with HEED_CASES above 1: in small models every one is tested (EveryIdentity).
std::vector<std::string> identities() {
  std::vector<std::string> out;
  int met = 0;
  for (const Entry& e : registry())
    if (!e.identity.empty() && (met++ % 3 == 0 || cases(2) > 2)) out.push_back(e.identity);
  return out;
}

TEST_P(RealModelIdentity, PredictsAsDenseDoes) {
  // Rounding alone: keys turned behind their rounding to bf16 (streaming-llm), sums in another order (ring).
  EXPECT_LT(divergence(dense_, predict(GetParam())), 0.02);
}
INSTANTIATE_TEST_SUITE_P(All, RealModelIdentity, testing::ValuesIn(identities()), test_name);

/// A probe that has always seen enough: the first piece and the question are read.
std::string cut_at_once() {
  std::string zeros;
  for (int c = 0; c < 64; ++c) zeros += c ? ",0" : "0";
  return "context-cutoff(threshold=0.5,piece=0.6,question=64,probes=100,weights=[" + zeros + "])";
}

TEST_P(RealModel, AThirdOfTheTextKeepsMostOfThePrediction) {
  const double kld = divergence(dense_, predict(GetParam()));
  EXPECT_GT(kld, 1e-6) << "nothing changed";
  EXPECT_LT(kld, 1.5);
}
INSTANTIATE_TEST_SUITE_P(
    Specs, RealModel,
    testing::Values(
        "streaming-llm(budget=96)", "snapkv(budget=0.33)", "pyramidkv(budget=0.33,beta=2)",
        "adakv(snapkv(budget=0.33))", "h2o(budget=0.33)", "tova(budget=0.33)", "knorm(budget=0.33)",
        "quest(budget=0.33)", "tidal-decode(budget=0.33)", "xattention(block=16,threshold=0.9)", "moba(block=16,topk=6)",
        "flexprefill(block=16,min_budget=64)", "kivi(residual=64)", "kvzip(budget=0.33,chunk=128)",
        "kvgrad(budget=0.33,chunk=128)", "restorekv(budget=0.33,chunk=128,weights=@" + learnt_rows(30, 576, 1536) + ")",
        "act(heads=0)", "a2sf(budget=0.33)", "observed-attention(budget=0.33)", "keydiff(budget=0.33)",
        "cur(budget=0.33)", "lagkv(budget=0.5,lag=32)", "noncausal(budget=0.33,tile=64)",
        "expected-attention(budget=0.33)", "random(budget=0.5,sinks=4)", "duo-attention(sinks=4,recent=64,heads=[0,2])",
        "simlayerkv(recent=64,threshold=0.5)", "chunkkv(snapkv(budget=0.33))", "caote(h2o(budget=0.33))",
        "entropy-chunk(snapkv(budget=0.33))", "squeeze-attention(snapkv(budget=0.33),share=0.8)", "think(share=0.4)",
        "trimmed-llama(budget=0.5)", "ov-evict(budget=96,block=16,sinks=16,recent=32)",
        "lu-kv(expected-attention(budget=0.33,eps=0.02))", "kvcompose(budget=0.33)", "fastgen(recovered=0.8)",
        "lserve(budget=96,page=16,part=4,streaming=[0,4,8,20-30],sinks=16,local=64,recent=64)",
        "self-extend(group=4,window=64)", "dca(chunk=128,local=64)",
        "kvcrush(budget=64,block=16,sinks=16,recent=16,rescued=2)", "merge-evict(snapkv(budget=0.33))",
        "cam(h2o(budget=0.33,when=every(4)))", "critical-ada(snapkv(budget=0.33))",
        "adaptive-rkv(budget=96,block=16,sinks=16,recent=32)", "dms(keydiff,threshold=-0.8,window=32)",
        "a-shape(sinks=4,local=64)", "tri-shape(sinks=4,local=64,last=16)", "triangle-mix(sinks=4,local=64,last=16)",
        "power(block=16,local=2)", "headkv(snapkv(budget=0.33))", "twilight(p=0.9)",
        "recycled-attention(budget=64,stride=4)", "omnikv(budget=64)", "star(block=64,query=16)",
        "criticalkv(snapkv(budget=0.33))", "defensivekv(budget=0.33)", "leverage(budget=0.8)",
        "compactor(budget=0.33,tile=64)", "finch(budget=0.33)", "rerotate(snapkv(budget=0.33))", "cake(budget=0.33)",
        "capkv(budget=0.33)", "zipvl(tau=0.9)", "chunk-local(snapkv(budget=0.33),chunk=64)",
        "block-evict(keydiff(budget=0.33),block=32)", "spec-attn(p=0.8)", "block-evict(snapkv(budget=0.33),block=32)",
        "sage", "sage(codes=int4,smooth_q=128)", "sage(scales=block,q_block=128,weights=f16)", "r-kv(budget=0.33)",
        "moa(alpha=[40],beta=[0.1],sinks=4,block=16)", "spatten(budget=0.7)", "gna(window=64,stride=8)",
        "stochastic-sa(window=128)", "minference(block=16,columns=48,slashes=101)",
        "minference(pattern=block-sparse,block=16,topk=6)", "sample_attention(alpha=0.9,tile=16)",
        "spargeattn(q_block=16,k_block=16,theta=0.3,tau=0.95)",
        "vggt_block_sparse(q_block=16,k_block=16,cdf=0.9,sparse_ratio=0.7)", "bra(region=16,topk=6)",
        "dhsa(q_block=16,k_block=16,density=0.4,last=16,a_shape=true)", "proxyattn(block=16,min_budget=64,gamma=0.9)",
        "kinetics(budget=0.33)", "shadowkv(budget=96,outliers=4)", "double-sparsity(budget=0.33,factor=4)",
        "infllm_v2(dense_len=0,topk=8,block=16,stride=8,local_blocks=1)", "clusterkv(budget=0.33,tokens=16)",
        "token-select(budget=64,sinks=4,local=32)", "ltri_llm(budget=96,sinks=4,local=32)",
        "infllm(budget=64,sinks=4,local=64,block=16)", "long-heads(chunk=16,chunks=6)",
        "razor-attention(sinks=4,recent=96,share=0)", "rocketkv(budget=0.33)", "pqcache(topk=0.2,recent=0.1,sinks=4)",
        "hylra(budget=0.33,full=[0,1,8,16,24])", "lychee-decode(budget=0.33,retrieval=[0-5,24-26,48-50,72-74])",
        "fna(width=16,window=9,text=4)", "freeswim(width=16,height=16,half_width=7,half_height=4,text=4)",
        "halo(width=16,block=8,halo=4)", "clear-disc(width=16,radius=6,text=16)", "tkl(chunk=64,overlap=32)",
        "radial(frame=64,block=16,sink=true)", "block_attention(block=64,query=32)",
        "blockrank(instruction=32,block=64,query=32)", "hip(topk=64,q_block=16,sinks=4,window=32)",
        "sale(dense_len=0,q_block=16,k_block=16,local=32,segment=32)", "sparsed(ratio=0.3,block=16)",
        "hyperattention(min_len=64,block=16,sample=16)",
        "light_forcing(frame=16,frames=2,chunks=10,latest=3,block=8,sparsity=0.8,target=0.5)",
        "rectified_spaattn(block=16,text=16,remain=0.7)", "loki(budget=0.33)",
        "retrieval-attention(topk=64,sinks=4,recent=32)", "magicpig(tables=100,bits=6,sinks=4,local=32)",
        "squeezed-attention(threshold=0.002,recent=32)", "triforce(budget=0.33)", "sinklora(groups=2,shifted=0.5)",
        "knot-forcing(frame=16,frames=2,window=6)", "q-filters(budget=0.5,sinks=4)", "spec-kv(budget=0.33)",
        "forcing-kv(frame=24,share=0.33)", "kv-q8", "kv-q4", "kv-hadamard", "turboquant", "turboquant(bits=2)",
        "context-shift(budget=96,sinks=4)", "polarquant", "kvquant(first=0)", "qjl(residual=0)",
        "xkv(rank=96,value_rank=144)", "polar-rope(residual=0)", "polar-rope(residual=0,values=4)",
        "minicache(from=22)", "gemfilter(budget=0.5)", cut_at_once()),
    test_name);

// Fifteen of Gemma's eighteen layers see 512 positions.
TEST(RealModelWindows, AWindowCachePredictsAsAFullOneDoes) {
  const std::string path = std::string(HEED_MODELS) + "/gemma3-270m.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "models/gemma3-270m.gguf is not there";
  const auto model = value_or_throw(Model::load(path));
  std::vector<int32_t> ids;
  while (ids.size() < 900) {
    const auto more = model->tokenizer()->encode(kText);
    ids.insert(ids.end(), more.begin(), more.end());
  }
  ids.resize(900);
  std::vector<std::vector<float>> logits, first;  // first: what layer 0, whose input is the text alone, makes of it
  std::vector<int64_t> entries;
  for (const char* spec : {"dense", "swa-cache(when=every(1))"}) {
    SessionOptions o;
    o.attention = spec, o.chunk = 300, o.backend = backend_or("auto");
    Session session(model, o);
    std::vector<float>&all = logits.emplace_back(), &outs = first.emplace_back();
    const auto take = [&](const Tensor& t) { all.insert(all.end(), t.as<float>(), t.as<float>() + t.numel()); };
    session.tap([&](LayerView& at) {
      if (at.layer > 0) return;
      const Buffer out = at.queue.read_back(at.out);
      outs.insert(outs.end(), out->as<float>(), out->as<float>() + out->numel());
    });
    take(session.prefill(ids));
    for (int32_t i = 0; i < 3; ++i) take(session.decode(ids[size_t(7 * i)]));
    for (int l = 0; l < model->info().layers; ++l) entries.push_back(session.store().layer(l).length(0));
  }
  const auto farthest = [](const std::vector<std::vector<float>>& of) {
    double worst = 0;
    for (size_t i = 0; i < of[0].size(); ++i) worst = std::max(worst, std::abs(double(of[0][i]) - double(of[1][i])));
    return worst;
  };
  ASSERT_EQ(first[0].size(), first[1].size());
  // Matrix registers and bf16 dots take weights of softmax as bf16, by a maximum that hangs on which keys stand in a block.
  const std::string table = backend(backend_or("auto")).name;
  double largest = 0;
  for (float x : first[0]) largest = std::max(largest, std::abs(double(x)));
  EXPECT_LT(farthest(first), table == "amx" || table == "avx512-bf16" || table == "cuda" ? 0x1p-7 * largest : 1e-4)
      << table << ", outputs up to " << largest;
  EXPECT_LT(farthest(logits), 1.5) << "activations that were rounded to the other side, eighteen layers long";
  const size_t layers = entries.size() / 2;
  for (size_t l = 0; l < layers; ++l) {
    EXPECT_EQ(entries[l], 903);
    EXPECT_EQ(entries[layers + l], model->info().window(int(l)) > 0 ? 511 : 903) << "layer " << l;
  }
}

}  // namespace
}  // namespace heed::test
