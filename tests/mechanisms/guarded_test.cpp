// The whole catalogue on memory that the host may not touch: the same results as in ordinary memory, no host wait inside
// a layer, and a bounded number of uploads and launches.
#include <algorithm>

#include "harness.h"
#include "learnt_rows.h"
#include "mechanisms/registry.h"
#include "model/session.h"

namespace heed::test {
namespace {

const std::vector<std::string> kSpecs = {
    "dense",
    "streaming-llm(budget=12)",
    "streaming-llm(window=12)",
    "snapkv(budget=16,window=4)",
    "snapkv(budget=16,window=4,heads=1,when=every(2))",
    "pyramidkv(budget=16,window=4)",
    "adakv(snapkv(budget=16,window=4))",
    "adakv(h2o(budget=10))",
    "adakv(knorm(budget=16),port=true)",
    "h2o(budget=10)",
    "h2o(budget=10,when=chunk)+quest(budget=8,page=4,dense=0)",
    "tova(budget=7)",
    "knorm(budget=12,sinks=2)",
    "quest(budget=16,page=8,dense=1)",
    "quest(budget=0.2,page=4,heads=-1)",
    "tidal-decode(budget=9,selection=1,correction=2)",
    "xattention(block=8,stride=4,threshold=0.3)",
    "xattention(block=8,stride=4,threshold=0.3,as_released=true,heads=0)",
    "moba(block=8,topk=2)",
    "minference(block=8,columns=40,slashes=101)",
    "minference(block=8,columns=30,slashes=50,streams=0-7,blocks=8-13,topk=2,local=9)",
    "minference(pattern=block-sparse,block=8,topk=2)",
    "infllm_v2(dense_len=0,topk=4,block=8,stride=4,local_blocks=1)",
    "infllm_v2(dense_len=50,topk=4,block=8,stride=4,local_blocks=1)",
    "sample_attention(alpha=0.5,rows=0.2,tile=8)",
    "spargeattn(q_block=16,k_block=8,theta=0.1,tau=0.6)",
    "vggt_block_sparse(q_block=16,k_block=8,cdf=0.5,sparse_ratio=0.8)",
    "bra(region=8,topk=2)",
    "dhsa(q_block=16,k_block=8,density=0.3,last=4)",
    "proxyattn(block=8,stride=2,gamma=0.5,min_budget=0,proxies=2)",
    "hip(topk=16,q_block=16,k_block=2,sinks=3,window=10,dense=1)",
    "sale(dense_len=0,tau=0.05,q_block=16,k_block=8,local=8,segment=16)",
    "sparsed(ratio=0.3,block=8,generated=20)",
    "rectified_spaattn(block=8,remain=0.3,text=8)",
    "rectified_spaattn(block=8,remain=0.3,heads=1-2)",
    "landmark(block=8,topk=2)",
    "light_forcing(frame=6,frames=2,chunks=8,topk=2,latest=2,block=4,sparsity=0.8,target=0.6)",
    "hyperattention(min_len=16,block=8,sample=6,planes=3)",
    "hyperattention(min_len=16,block=8,sample=6,planes=3,heads=1-2)",
    "moba(block=100,topk=1)",
    "flexprefill(block=8,gamma=0.3,min_budget=8)",
    "flexprefill(block=8,gamma=0.6,min_budget=8,tau=1)",
    "kvzip(budget=0.2,chunk=32)",
    "kvzip(budget=0.2,chunk=32,share=layer)",
    "kvgrad(budget=0.2,chunk=32)",
    "restorekv(budget=0.3,chunk=32,weights=@" + learnt_rows(4, 48, 64) + ")",
    "kivi(residual=0)",
    "kivi(bits=4,residual=8,heads=1)",
    "act(threshold=0.02,skip_first=0,skip_last=0)",
    "act(threshold=0.02,skip_first=0,skip_last=0,heads=1-2)",
    "ring(ranks=3)",
    "a2sf(budget=10,alpha=0.8,window=3)",
    "observed-attention(budget=12)",
    "keydiff(budget=12)",
    "cur(budget=12)",
    "lagkv(budget=24,lag=8)",
    "noncausal(budget=14,tile=16)",
    "expected-attention(budget=12)",
    "random(budget=12)",
    "duo-attention(sinks=2,recent=10,heads=1)",
    "simlayerkv(threshold=0,recent=14)",
    "chunkkv(snapkv(budget=16,window=4),chunk=5)",
    "entropy-chunk(snapkv(budget=16,window=4),chunk=5,few=2)",
    "squeeze-attention(snapkv(budget=16,window=4))",
    "think(share=0.7,window=4,heads=1)",
    "ov-evict(budget=12,block=4,sinks=4,recent=4)",
    "lu-kv(knorm(budget=10),lost=[0.8,0.9,0.5,0.7,1,0.3,0.9,0.6])",
    "kvcompose(budget=0.2)",
    "fastgen(recovered=0.2,frequent=0.2,local=0.1)",
    "kvcompose(budget=0.2,structured=false,norm=true)",
    "gemfilter(budget=0.5,layer=2,recent=2)",
    "context-cutoff(threshold=0.5,question=4,probes=7,weights=[3,-1,4,1,-5,9,-2,6,5,-3,5,8,9,-7,9,3])",
    "gemfilter(budget=40)+snapkv(budget=16,window=4)",
    "lserve(budget=16,page=8,part=4,streaming=[1,4],sinks=2,local=9,recent=6)",
    "lserve(budget=16,page=4,part=2,every=3)+h2o(budget=30)",
    "self-extend(group=3,window=8)",
    "dca(chunk=12,local=3)",
    "h2o(budget=30)+dca(chunk=12,local=3)",
    "snapkv(budget=30,window=4)+self-extend(group=3,window=8)",
    "kvcrush(budget=12,block=4,sinks=4,recent=4,rescued=2)",
    "kvcrush(budget=12,block=3,sinks=3,recent=3,rescued=2,anchor=mean)",
    "merge-evict(snapkv(budget=16,window=4))",
    "merge-evict(adakv(h2o(budget=10)),least=0.2,share=0.5)",
    "cam(knorm(budget=12,when=every(2)),window=4)",
    "critical-ada(snapkv(budget=16,window=4))",
    "adaptive-rkv(budget=12,block=4,sinks=4,recent=4,mass=0.5)",
    "trimmed-llama(budget=0.1)",
    "caote(h2o(budget=10))",
    "dms(keydiff,threshold=0,window=8)",
    "headkv(snapkv(budget=20,window=4),window=4,scores=[1,3,2,2,5,1,1,1])",
    "cake(budget=16,window=4)",
    "capkv(budget=12)",
    "chunk-local(knorm(budget=0.3),chunk=10)",
    "block-evict(keydiff(budget=16),block=10)",
    "gist(token=23,count=2,when=chunk)",
    "gist(token=11,heads=1)",
    "activation-beacon(window=12,ratio=3)",
    "activation-beacon(window=12,ratio=3,when=every(2),heads=1)",
    "spec-attn(p=0.5,rows=3,dense=1)",
    "block-evict(h2o(budget=16,when=chunk),block=9)",
    "block-evict(snapkv(budget=0.3,window=4),block=7)",
    "sage(codes=int4,smooth_q=16)",
    "sage(scales=block,q_block=16,weights=f16,smooth_v=true,heads=1-2)+snapkv(budget=16,window=4)",
    "compactor(budget=16,tile=16,sketch=8)",
    "criticalkv(adakv(snapkv(budget=16,window=4)))",
    "criticalkv(h2o(budget=10))",
    "defensivekv(budget=16,window=4)",
    "finch(budget=16,window=4)",
    "leverage(budget=12,sketch=8)",
    "moa(alpha=[4],beta=[0.1],sinks=2,block=4)",
    "spatten(budget=0.3)",
    "spatten(budget=0.3,when=every(2))",
    "r-kv(budget=16,window=3,when=every(2))",
    "rerotate(snapkv(budget=16,window=4,when=every(2)))",
    "zipvl(tau=0.7)",
    "twilight(p=0.7,dense=0)",
    "kinetics(budget=24,block=8,local=6,dense=0)",
    "h2o(budget=30)+kinetics(budget=24,block=4,local=6,dense=1)",
    "shadowkv(budget=16,outliers=2,latest=1)",
    "double-sparsity(budget=9,factor=4,dense=0)",
    "clusterkv(budget=12,tokens=6,sinks=2,rounds=3,dense=1)",
    "ltri_llm(budget=12,sinks=2,local=4,stretch=16,longest=6,dense=1)",
    "h2o(budget=30)+ltri_llm(budget=12,sinks=2,local=4,stretch=16,longest=6)",
    "pqcache(topk=0.1,recent=0.05,centroids=5,rounds=2,sinks=2)",
    "rocketkv(budget=9,page=4)",
    "token-select(budget=6,sinks=2,local=4,dense=1)",
    "long-heads(chunk=4,chunks=4,dense=1)",
    "infllm(budget=8,sinks=2,local=8,block=4,representatives=2,dense=1)",
    "razor-attention(sinks=2,recent=8,share=0)",
    "razor-attention(sinks=2,recent=8,share=0,when=every(2),heads=1)",
    "hylra(budget=9,full=[0,2])",
    "lychee-decode(budget=9,retrieval=[4,7])",
    "recycled-attention(budget=9,stride=4)",
    "omnikv(budget=6,filters=1,wait=0)",
    "a-shape(sinks=2,local=9)",
    "tri-shape(sinks=2,local=9,last=3)",
    "triangle-mix(sinks=2,local=9,last=3,from=2)",
    "power(block=16,local=2)",
    "star(block=10,query=4)",
    "gna(window=8,stride=2,dilation=2)",
    "stochastic-sa(window=16)",
    "fna(width=8,window=3)",
    "freeswim(width=5,height=3,half_width=1,half_height=1)",
    "halo(width=8,block=4,halo=1)",
    "clear-disc(width=8,radius=3,text=4)",
    "tkl(chunk=10,overlap=3)",
    "radial(frame=20,block=8)",
    "block_attention(block=16,query=5)",
    "blockrank(instruction=5,block=16,query=5)",
    "loki(budget=9,rounds=3,dense=1)",
    "loki(budget=9,rounds=3,keys=plain,heads=1-2)",
    "retrieval-attention(topk=5,sinks=2,recent=4)",
    "magicpig(tables=20,bits=3,sinks=2,local=6,dense=2)",
    "magicpig(tables=20,bits=3,sinks=2,local=6,dense=0,heads=1-2)",
    "squeezed-attention(threshold=0.01,tokens=6,recent=5,rounds=3)",
    "triforce(budget=16)",
    "sinklora(groups=3)",
    "knot-forcing(frame=5,frames=2,window=2)",
    "q-filters(budget=12,rounds=3)",
    "spec-kv(budget=16,window=4)",
    "spec-kv(budget=16,window=4,look=3)",
    "forcing-kv(frame=6,share=0.4)",
    "forcing-kv(frame=6,parts=2,share=0.4,static=[2,5],when=every(2))",
    "swa-cache(when=every(2),spare=3)",
    "kv-q8",
    "kv-q4(residual=8,heads=1)",
    "kv-hadamard(bits=8)",
    "turboquant(bits=2)",
    "turboquant(residual=8,layers=1-2)",
    "context-shift(budget=16,sinks=3)",
    "polar-rope(residual=8,group=16)",
    "polar-rope(residual=0,values=4,bits=8,layers=1-2)",
    "polarquant",
    "qjl(residual=8,group=8,outliers=3)",
    "qjl(residual=0,values=0,outliers=0,bits=4,layers=1-2)",
    "kvquant(first=0)",
    "kvquant(first=0,bits=2,outliers=3,residual=8,layers=1-2)",
    "xkv(size=2,rank=20,value_rank=16)",
    "minicache(from=0)",
    "minicache(from=1,retention=0,heads=1)+quest(budget=9,page=8,dense=1)",
    "vattention(page=8,context=512,ahead=3)",
    "vattention(page=4,context=512)+adakv(snapkv(budget=16,window=4))+quest(budget=9,page=8,dense=1)",
};

std::shared_ptr<const Model> tiny() {
  ModelInfo shape;
  shape.layers = 4, shape.h = 6, shape.g = 2, shape.d = shape.d_v = 16, shape.hidden = 48, shape.vocabulary = 61;
  shape.windows = {0, 24, 0, 0};
  return Model::random(shape, 64, Dtype::F32, 5);
}

struct Walk {
  std::vector<float> logits;
  std::vector<int64_t> bytes;
  std::vector<std::vector<double>> density, reads;
  int64_t waits = 0;                  // inside steps, between the first layer and the last
  int64_t launches = 0, uploads = 0;  // most between two layers of a decode step
};

/// Prompts, a second prompt behind it, decoding with idle sequences, a fork that goes its own way, a truncation.
Walk walk(const std::shared_ptr<const Model>& model, const std::string& spec, const std::string& backend, int64_t chunk) {
  guarded_kernels();
  SessionOptions o;
  o.attention = spec, o.sequences = 2, o.chunk = chunk, o.backend = backend;
  o.k.kind = o.v.kind = PageType::Kind::F32;
  Session session(model, o);
  Walk out;
  int64_t waits = 0, launches = 0, uploads = 0;
  session.tap([&](LayerView& at) {
    if (at.layer > 0) {
      out.waits += at.queue.host_waits - waits;
      if (at.decoding())
        out.launches = std::max(out.launches, at.queue.launches - launches),
        out.uploads = std::max(out.uploads, at.queue.uploads - uploads);
    }
    waits = at.queue.host_waits, launches = at.queue.launches, uploads = at.queue.uploads;
  });
  auto take = [&](const Tensor& t) { out.logits.insert(out.logits.end(), t.as<float>(), t.as<float>() + t.numel()); };
  auto note = [&](Session& s) {
    for (int l = 0; l < model->info().layers; ++l) out.bytes.push_back(s.store().layer(l).bytes());
  };
  take(session.prefill({text(83, 1), text(30, 2)}));
  note(session);
  for (int32_t i = 0; i < 4; ++i)
    take(session.decode(std::vector<int32_t>{(i * 13) % 61, i % 3 == 2 ? -1 : (i * 7) % 61}));
  take(session.prefill({text(9, 3), text(70, 4)}));
  auto fork = session.fork();
  take(session.decode(std::vector<int32_t>{3, 4}));
  take(fork->decode(std::vector<int32_t>{5, 6}));
  fork->truncate(0, 60);
  take(fork->decode(std::vector<int32_t>{7, -1}));
  fork.reset();
  take(session.decode(std::vector<int32_t>{8, 9}));
  note(session);
  out.density = session.density(), out.reads = session.read_tokens();
  return out;
}

TEST(Guarded, TheWholeCatalogueIsListed) {
  for (const Entry& e : registry()) {
    if (e.kind != "mechanism" || has(e.roles, Role::State)) continue;
    // What needs tensors that no model gives runs on guarded memory in its formula test alone.
    if (!e.wrapper && !value_or_throw(make_mechanism(Spec{e.name, {}, {}, 0}, registry()))->needs({}).inputs.empty())
      continue;
    if (e.name == "slim-attention")
      continue;  // refuses grouped heads; SlimAttention.MakesValuesOfKeys is guarded itself
    const bool there = std::any_of(kSpecs.begin(), kSpecs.end(), [&](const std::string& s) {
      const size_t at = s.find(e.name);
      return at != std::string::npos && (at == 0 || !std::isalnum(static_cast<unsigned char>(s[at - 1])));
    });
    EXPECT_TRUE(there) << e.name << " runs on no guarded memory";
  }
}

TEST(Guarded, SessionsGiveWhatTheyGiveInOrdinaryMemory) {
  const auto model = tiny();
  guarded_kernels();
  int64_t chunk = 0;
  for (const std::string& spec : kSpecs) {
    chunk = 25 - chunk;  // whole prompts and pieces of them by turns: memory is closed and opened around every kernel
    SCOPED_TRACE(spec + " chunk " + std::to_string(chunk));
    Walk plain, guarded;
    ASSERT_NO_THROW(plain = walk(model, spec, "cpu", chunk));
    ASSERT_NO_THROW(guarded = walk(model, spec, "guarded", chunk));
    ASSERT_EQ(plain.logits.size(), guarded.logits.size());
    double worst = 0;
    for (size_t i = 0; i < plain.logits.size(); ++i)
      worst = std::max(worst, std::abs(double(plain.logits[i]) - double(guarded.logits[i])));
    EXPECT_LT(worst, 1e-5);
    EXPECT_EQ(plain.bytes, guarded.bytes);
    EXPECT_EQ(plain.reads, guarded.reads);
    EXPECT_EQ(plain.density, guarded.density);
    EXPECT_EQ(guarded.waits, 0);
    EXPECT_LE(guarded.launches, 80);
    EXPECT_LE(guarded.uploads, 6);
  }
}

SessionOptions guarded_options(const std::string& spec, bool record) {
  guarded_kernels();  // known by its name from here on
  SessionOptions o;
  o.attention = spec, o.backend = "guarded", o.record = record;
  o.k.kind = o.v.kind = PageType::Kind::F32;
  return o;
}

/// Decoding in all the ways in which a recording may come to its end: an idle sequence, a second prompt, a fork, a
/// truncation.
std::vector<float> course(const std::shared_ptr<const Model>& model, const std::string& spec, bool record) {
  SessionOptions o = guarded_options(spec, record);
  o.sequences = 2;
  Session session(model, o);
  std::vector<float> out;
  auto take = [&](const Tensor& t) { out.insert(out.end(), t.as<float>(), t.as<float>() + t.numel()); };
  auto decode = [&](Session& s, int32_t count) {
    for (int32_t i = 0; i < count; ++i) take(s.decode(std::vector<int32_t>{(i * 13) % 61, (i * 7) % 61}));
  };
  take(session.prefill({text(57, 1), text(1, 2)}));
  decode(session, 12);
  take(session.decode(std::vector<int32_t>{3, -1}));
  decode(session, 3);
  take(session.prefill({text(9, 3), text(33, 4)}));
  decode(session, 5);
  {
    auto fork = session.fork();
    decode(*fork, 3);
    decode(session, 3);
    fork->truncate(0, 40);
    decode(*fork, 3);
  }
  decode(session, 4);
  session.truncate(1, 30);
  decode(session, 5);
  const auto reads = session.read_tokens();
  for (const auto& layer : reads) out.insert(out.end(), layer.begin(), layer.end());
  for (int l = 0; l < model->info().layers; ++l) out.push_back(float(session.store().layer(l).bytes()));
  return out;
}

double farthest(const std::vector<float>& a, const std::vector<float>& b) {
  double most = a.size() == b.size() ? 0 : 1e9;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    most = std::max(most, std::abs(double(a[i]) - double(b[i])));
  return most;
}

TEST(Recording, ReplayedStepsGiveWhatStepsGive) {
  const auto model = tiny();
  int met = 0;
  for (const std::string& spec : kSpecs) {
    SCOPED_TRACE(spec);
    const auto parsed = value_or_throw(Composition::parse(spec, model->info(), registry()));
    const bool decodes = std::any_of(parsed.parts().begin(), parsed.parts().end(), [](const Composition::Part& part) {
      return has(part.roles, Role::Keep) || has(part.roles, Role::Read);
    });
    if (!decodes && spec != "dense") continue;  // a planner's steps are dense ones
    if (met++ % 3 != 0) continue;               // each takes a second: memory is closed and opened around every kernel
    const std::vector<float> plain = course(model, spec, false);
    const int64_t before = replays();
    EXPECT_LT(farthest(plain, course(model, spec, true)), 1e-5);
    // These ask for the step or keep something of their own on the host; KIVI takes pages as it goes.
    const char* const differ[] = {"recycled",   "kivi",    "r-kv",       "spatten",   "shadowkv",   "clusterkv",
                                  "pqcache",    "lychee",  "long-heads", "retrieval", "magicpig",   "squeezed",
                                  "forcing-kv", "cam(",    "lserve",     "kv-",       "turboquant", "polar",
                                  "xkv",        "kvquant", "qjl"};
    const bool differs = std::any_of(std::begin(differ), std::end(differ),
                                     [&](const char* name) { return spec.starts_with(name); });
    if (!differs) { EXPECT_GE(replays() - before, 20); }
  }
}

TEST(Recording, OutgrownBoundsAreRecordedAnew) {
  const auto model = tiny();
  for (const char* spec :
       {"dense", "h2o(budget=40)", "quest(budget=16,page=8,dense=1)", "random(budget=20,when=every(3))"}) {
    SCOPED_TRACE(spec);
    std::vector<float> got[2];
    int64_t count = 0;
    for (bool record : {false, true}) {
      Session session(model, guarded_options(spec, record));
      session.prefill(text(3, 9));
      const int64_t before = replays();
      for (int32_t i = 0; i < 300; ++i) {
        const Tensor y = session.decode((i * 29) % 61);
        got[record].insert(got[record].end(), y.as<float>(), y.as<float>() + y.numel());
      }
      count = replays() - before;
    }
    EXPECT_LT(farthest(got[0], got[1]), 1e-5);
    EXPECT_GE(count, std::string(spec).starts_with("random") ? 195 : 298);
  }
}

// A fork's first token copies the pages that it writes; from then on it appends to pages of its own.
TEST(Recording, ForksAreRecordedFromTheirSecondTokenOn) {
  const auto model = tiny();
  for (const char* spec : {"dense", "quest(budget=16,page=8,dense=1)", "twilight(p=0.8,dense=1)", "h2o(budget=40)"}) {
    SCOPED_TRACE(spec);
    std::vector<float> got[2];
    for (bool record : {false, true}) {
      Session session(model, guarded_options(spec, record));
      session.prefill(text(70, 9));
      const auto decode = [&](Session& s, int32_t seed) {
        for (int32_t i = 0; i < 6; ++i) {
          const Tensor y = s.decode((i * 29 + seed) % 61);
          got[record].insert(got[record].end(), y.as<float>(), y.as<float>() + y.numel());
        }
      };
      const auto one = session.fork(), two = session.fork();
      const int64_t before = replays();
      decode(*one, 1), decode(*two, 2), decode(*one, 3), decode(session, 4);
      if (record) { EXPECT_GE(replays() - before, 20); }
    }
    EXPECT_LT(farthest(got[0], got[1]), 1e-5);
  }
}

TEST(Guarded, ADenseStepUploadsItsTokensAlone) {
  const Walk dense = walk(tiny(), "dense", "guarded", 0);
  EXPECT_EQ(dense.uploads, 0) << "in a layer";
  EXPECT_LE(dense.launches, 24) << "in a layer";
}

}  // namespace
}  // namespace heed::test
