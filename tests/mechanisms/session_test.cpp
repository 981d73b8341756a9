// Every mechanism inside sessions: its identity is dense in all phases, and small budgets run on what nobody tuned for.
#include "mechanisms/registry.h"
#include "session_case.h"

namespace heed::test {
namespace {

/// Logits of every decoded step of two sequences of unequal length, one of them idle at times, the prompt in parts of `chunk`.
std::vector<float> logits(const std::shared_ptr<const Model>& model, const std::string& spec, int64_t chunk) {
  SessionOptions o;
  o.attention = spec, o.sequences = 2, o.chunk = chunk, o.backend = backend_or("cpu");
  o.k.kind = o.v.kind = PageType::Kind::F32;
  Session session(model, o);
  const auto a = text(83, 1), b = text(30, 2);
  std::vector<float> out;
  auto take = [&](const Tensor& t) { out.insert(out.end(), t.as<float>(), t.as<float>() + t.numel()); };
  take(session.prefill({a, b}));
  for (int32_t i = 0; i < 6; ++i) {
    const std::vector<int32_t> next{(i * 13) % 61, i % 3 == 2 ? -1 : (i * 7) % 61};
    take(session.decode(next));
  }
  return out;
}

/// Heads, KV heads and the size of a prompt's parts: tests of their own, so that shards share them.
class EveryIdentity : public testing::TestWithParam<std::tuple<int, int, int64_t>> {};

TEST_P(EveryIdentity, IsDense) {
  const auto& [h, g, chunk] = GetParam();
  const auto model = tiny_model(h, g);
  const auto dense = logits(model, "dense", chunk);
  for (const Entry& e : registry())
    EXPECT_LT(distance(dense, logits(model, e.identity, chunk)), 1e-4) << e.identity << " chunk " << chunk;
}
INSTANTIATE_TEST_SUITE_P(Sessions, EveryIdentity,
                         testing::Values(std::tuple{6, 2, 0}, std::tuple{6, 2, 25}, std::tuple{3, 3, 0},
                                         std::tuple{3, 3, 25}));

// Streaming heads whose keys are turned to their places are StreamingLLM: it makes room before a step for what these cut
// behind it.
TEST(Sessions, RerotateReadsWhatStaysAtItsPlace) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}}) {
    const auto model = tiny_model(h, g);
    const auto moved = logits(model, "rerotate(duo-attention(sinks=2,recent=12))", 0);
    EXPECT_LT(distance(moved, logits(model, "streaming-llm(sinks=2,window=13)", 0)), 1e-5);
    EXPECT_GT(distance(moved, logits(model, "duo-attention(sinks=2,recent=12)", 0)), 1e-4);
  }
}

// Entries' own biases count where a reader's edit makes the output.
TEST(Sessions, MagicPigSeesTheBiasOfAnEntry) {
  const auto model = tiny_model(6, 2);
  const std::string razor = "razor-attention(sinks=2,recent=8,share=0";
  const auto own = logits(model, razor + ")", 0);
  EXPECT_LT(distance(own, logits(model, razor + ")+magicpig(local=1000,dense=0)", 0)), 1e-4);
  EXPECT_GT(distance(own, logits(model, razor + ",compensation=false)", 0)), 1e-4);
}

// A part as large as its page, chosen anew at every token, is Quest's bound.
TEST(Sessions, LServeOfWholePagesIsQuest) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}}) {
    const auto model = tiny_model(h, g);
    const auto pages = logits(model, "lserve(budget=32,page=8,part=8,every=1)", 0);
    EXPECT_LT(distance(pages, logits(model, "quest(budget=32,page=8,dense=0)", 0)), 1e-5);
    EXPECT_GT(distance(pages, logits(model, "dense", 0)), 1e-4);
  }
}

// A store that keeps keys plain gives policies the same keys, rotated or not, as one that keeps them rotated.
TEST(Sessions, PoliciesSeeTheSameKeysHoweverTheyAreKept) {
  const auto model = tiny_model(6, 2);
  for (int64_t chunk : {0, 25})
    for (const std::string spec : {"leverage(budget=20)", "leverage(budget=20,sketch=8)", "keydiff(budget=20)"}) {
      const auto kept = held(model, spec, chunk), moved = held(model, "rerotate(" + spec + ")", chunk);
      ASSERT_EQ(kept.size(), moved.size());
      std::vector<int32_t> odd;  // turning keys back rounds: scores may tie
      for (size_t i = 0; i < kept.size(); ++i)
        std::set_symmetric_difference(kept[i].begin(), kept[i].end(), moved[i].begin(), moved[i].end(),
                                      std::back_inserter(odd));
      EXPECT_LE(odd.size(), 2u) << spec << " chunk " << chunk;
    }
}

TEST(Sessions, SmallBudgetsChangeLogitsAndStayFinite) {
  const auto model = tiny_model(6, 2);
  for (int64_t chunk : {0, 25}) {
    const auto dense = logits(model, "dense", chunk);
    for (const char* spec : {"streaming-llm(window=12)",
                             "snapkv(budget=16,window=4)",
                             "snapkv(budget=0.1)",
                             "pyramidkv(budget=16,window=4)",
                             "pyramidkv(budget=20,window=4,rule=authors)",
                             "adakv(snapkv(budget=16,window=4))",
                             "adakv(pyramidkv(budget=16,window=4),port=true)",
                             "adakv(h2o(budget=10))",
                             "h2o(budget=10)",
                             "h2o(budget=10,when=chunk)+quest(budget=8,page=4,dense=0)",
                             "tova(budget=7)",
                             "quest(budget=16,page=8,dense=1)",
                             "tidal-decode(budget=9,selection=1,correction=2)",
                             "xattention(block=8,stride=4,threshold=0.3)",
                             "moba(block=8,topk=2)",
                             "flexprefill(block=8,gamma=0.3,min_budget=8)",
                             "kvzip(budget=0.2,chunk=32)",
                             "kvzip(budget=0.2,chunk=32,share=layer)",
                             "kvgrad(budget=0.2,chunk=32)",
                             "kivi(residual=0)",
                             "act(threshold=0.02,skip_first=0,skip_last=0)",
                             "a2sf(budget=10)",
                             "observed-attention(budget=10)",
                             "keydiff(budget=10)",
                             "cur(budget=10)",
                             "lagkv(budget=12,lag=4)",
                             "noncausal(budget=10,tile=8)",
                             "expected-attention(budget=10)",
                             "random(budget=10)",
                             "duo-attention(sinks=2,recent=6)",
                             "simlayerkv(threshold=0,recent=6)",
                             "chunkkv(tova(budget=10),chunk=4)",
                             "caote(tova(budget=7))",
                             "dms(keydiff,threshold=0,window=4)",
                             "adakv(expected-attention(budget=12,eps=0.01))",
                             "recycled-attention(budget=8,stride=4)",
                             "omnikv(budget=6,filters=1,wait=0)",
                             "twilight(p=0.6,dense=1)",
                             "headkv(snapkv(budget=16,window=4),window=4,scores=[1,2,3,4,5,6,7,8])",
                             "a-shape(sinks=2,local=9)",
                             "tri-shape(sinks=2,local=9,last=3)",
                             "triangle-mix(sinks=2,local=9,last=3,from=2)",
                             "power(block=4,local=1)",
                             "star(block=10,query=4)",
                             "gna(window=8,stride=2,dilation=2)",
                             "stochastic-sa(window=16)",
                             "cake(budget=16,window=4)",
                             "capkv(budget=12)",
                             "chunk-local(knorm(budget=0.3),chunk=10)",
                             "block-evict(keydiff(budget=16),block=10)",
                             "gist(token=23,count=2)",
                             "activation-beacon(window=12,ratio=3)",
                             "spec-attn(p=0.5,rows=3)",
                             "block-evict(snapkv(budget=16,window=4),block=9)",
                             "sage",
                             "compactor(budget=16,tile=16)",
                             "criticalkv(adakv(snapkv(budget=16,window=4)))",
                             "defensivekv(budget=16,window=4)",
                             "finch(budget=16,window=4)",
                             "leverage(budget=12)",
                             "moa(alpha=[4],beta=[0.1],sinks=2,block=4)",
                             "r-kv(budget=16,window=3,when=every(2))",
                             "rerotate(snapkv(budget=16,window=4))",
                             "spatten(budget=0.3,when=every(2))",
                             "zipvl(tau=0.7)",
                             "token-select(budget=6,sinks=2,local=4)",
                             "long-heads(chunk=4,chunks=3)",
                             "entropy-chunk(snapkv(budget=16,window=4),chunk=5,few=2)",
                             "squeeze-attention(snapkv(budget=16,window=4))",
                             "think(share=0.7,window=4)",
                             "ov-evict(budget=12,block=4,sinks=4,recent=4)",
                             "lu-kv(knorm(budget=10),lost=[0.8,0.9,0.5,0.7,1,0.3,0.9,0.6])",
                             "kvcompose(budget=0.2)",
                             "gemfilter(budget=40,layer=2)",
                             "fastgen(recovered=0.2,frequent=0.2,local=0.1)",
                             "fastgen(recovered=0.2,frequent=0.2,local=0.1)",
                             "kvcompose(budget=0.2,structured=false,norm=true)",
                             "lserve(budget=16,page=8,part=4,streaming=[1,4],sinks=2,local=9,recent=6)",
                             "self-extend(group=3,window=8)",
                             "dca(chunk=12,local=3)",
                             "kvcrush(budget=12,block=4,sinks=4,recent=4,rescued=2)",
                             "merge-evict(snapkv(budget=16,window=4))",
                             "cam(knorm(budget=12,when=every(3)),window=4)",
                             "critical-ada(snapkv(budget=16,window=4))",
                             "adaptive-rkv(budget=12,block=4,sinks=4,recent=4,mass=0.5)",
                             "trimmed-llama(budget=0.1)",
                             "ltri_llm(budget=9,sinks=2,local=3,stretch=16,longest=6)",
                             "infllm(budget=8,sinks=2,local=8,block=4,representatives=2)",
                             "razor-attention(sinks=2,recent=8,share=0)",
                             "loki(budget=9)",
                             "retrieval-attention(topk=4,sinks=2,recent=4)",
                             "magicpig(tables=20,bits=3,sinks=2,local=6,dense=0)",
                             "squeezed-attention(threshold=0.03,tokens=6,recent=5)",
                             "triforce(budget=16)",
                             "sinklora(groups=3)",
                             "knot-forcing(frame=5,frames=2,window=2)",
                             "q-filters(budget=10)",
                             "spec-kv(budget=16,window=4)",
                             "forcing-kv(frame=6,share=0.3)",
                             "kv-q4",
                             "turboquant(bits=2)",
                             "context-shift(budget=16,sinks=3)",
                             "polar-rope(residual=0,bits=2)",
                             "minicache(from=0)",
                             "polarquant",
                             "qjl(residual=0)",
                             "kvquant(first=0,bits=2)",
                             "xkv(size=2,rank=8,value_rank=8)",
                             "xattention(block=8,threshold=0.3,layers=1-)+adakv(snapkv(budget=12,window=2),layers=-2)+"
                             "h2o(budget=5,layers=3,heads=0)+quest(budget=4,page=1)+ring(ranks=3)"}) {
      const double changed = distance(dense, logits(model, spec, chunk));
      EXPECT_GT(changed, 1e-4) << spec << " chunk " << chunk;
      EXPECT_LT(changed, 100) << spec << " chunk " << chunk;
    }
  }
}

// The layer that is named has a sliding window, and selects for one that looks back further.
TEST(Sessions, TidalDecodeSelectsWhereAllIsSeen) {
  const auto model = tiny_model(6, 2);
  const auto selected = logits(model, "tidal-decode(budget=1.0,selection=1,correction=9)", 0);
  EXPECT_LT(distance(logits(model, "dense", 0), selected), 1e-5);
}

TEST(Sessions, AForkGoesOnAsTheOriginalDoes) {
  const auto model = tiny_model(6, 2);
  for (const char* spec : {"tidal-decode(budget=9,selection=1,correction=2)",
                           "h2o(budget=10)",
                           "kivi(residual=0)",
                           "polar-rope(residual=0)",
                           "qjl(residual=0)",
                           "kvquant(first=0)",
                           "minicache(from=0)",
                           "xkv(size=2,rank=8,value_rank=8)",
                           "vattention+h2o(budget=10)",
                           "quest(budget=8,page=4,dense=0)",
                           "a2sf(budget=10)",
                           "recycled-attention(budget=8,stride=4)",
                           "omnikv(budget=6,filters=1,wait=0)",
                           "caote(h2o(budget=10))",
                           "random(budget=10,when=every(2))",
                           "r-kv(budget=16,window=3,when=every(2))",
                           "spatten(budget=0.4,when=every(2))",
                           "criticalkv(h2o(budget=10))",
                           "ltri_llm(budget=9,sinks=2,local=3,stretch=16,longest=6)",
                           "infllm(budget=8,sinks=2,local=8,block=4,representatives=2)",
                           "razor-attention(sinks=2,recent=8,share=0,when=every(2))",
                           "ov-evict(budget=12,block=4,sinks=4,recent=4)",
                           "adaptive-rkv(budget=12,block=4,sinks=4,recent=4)",
                           "trimmed-llama(budget=0.1)",
                           "long-heads(chunk=4,chunks=3)",
                           "squeeze-attention(h2o(budget=16,when=prompt))",
                           "loki(budget=9)",
                           "magicpig(tables=20,bits=3,sinks=2,local=6)",
                           "squeezed-attention(threshold=0.03,tokens=6,recent=5)",
                           "triforce(budget=16)",
                           "spec-attn(p=0.5,rows=3)",
                           "activation-beacon(window=12,ratio=3)",
                           "gist(token=17)",
                           "block-evict(knorm(budget=12),block=8)",
                           "forcing-kv(frame=6,when=every(2))",
                           "merge-evict(h2o(budget=10))",
                           "cam(h2o(budget=10,when=every(2)))",
                           "kvcrush(budget=12,block=4,sinks=4,recent=4,rescued=2)",
                           "kvcompose(budget=0.2)",
                           "gemfilter(budget=30,layer=2)",
                           "lserve(budget=16,page=8,part=4,every=3,streaming=[1,4],sinks=2,recent=6)",
                           "self-extend(group=3,window=8)",
                           "dca(chunk=12,local=3)"}) {
    SessionOptions o;
    o.attention = spec, o.backend = backend_or("reference");
    Session session(model, o);
    session.prefill(text(70, 3));
    session.decode(4);
    const auto other = session.fork();
    for (int32_t token : {9, 17, 3}) {
      const Tensor a = session.decode(token);
      const std::vector<float> x(a.as<float>(), a.as<float>() + a.numel());
      const Tensor b = other->decode(token);
      EXPECT_EQ(x, std::vector<float>(b.as<float>(), b.as<float>() + b.numel())) << spec;
    }
  }
}

}  // namespace
}  // namespace heed::test
