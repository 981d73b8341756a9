// Sessions against recomputation: a plain forward pass of the whole text in which each key may be seen until the step
// that evicted it.
#include "model/session.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "backends.h"
#include "base/random.h"
#include "model/transformer.h"

namespace heed {
namespace {

std::shared_ptr<const Model> tiny(std::vector<int64_t> windows = {0, 24, 0}, int h = 6, int g = 2) {
  ModelInfo shape;
  shape.layers = int(windows.size()), shape.h = h, shape.g = g, shape.d = shape.d_v = 16, shape.hidden = 48,
  shape.vocabulary = 97;
  shape.windows = windows;
  return Model::random(shape, 64, Dtype::F32, 7);
}

std::vector<int32_t> text(int64_t length, uint64_t seed = 1) {
  Random random(seed);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < length; ++i) ids.push_back(int32_t(random.below(97)));
  return ids;
}

std::vector<float> row(Tensor logits, int64_t r) {
  const float* p = logits.as<float>() + r * logits.size[1];
  return {p, p + logits.size[1]};
}

// Tables that multiply in f32: others round activations, which no mask explains.
std::vector<std::string> exact_backends() {
  std::vector<std::string> names{"reference"};
  for (const Kernels* table : cpu_kernels())
    if (!table->rounds) names.push_back(table->name);
  if (const std::string chosen = test::backend_or(""); !chosen.empty()) names.push_back(chosen);
  return names;
}

SessionOptions options(const std::string& attention, const std::string& backend = "") {
  SessionOptions o;
  o.attention = attention, o.backend = backend.empty() ? exact_backends().back() : backend;
  o.k.kind = o.v.kind = PageType::Kind::F32;
  return o;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) most = std::max(most, std::abs(double(a[i]) - double(b[i])));
  return a.size() == b.size() && !std::isnan(most) ? most : 1e9;
}

// until[layer][KV head][position]: the last position whose query sees the key.
using Until = std::vector<std::vector<std::vector<int32_t>>>;

// The whole text at once through the reference kernels, masked by `until`: logits of every row.
std::vector<std::vector<float>> recompute(const Model& model, const std::vector<int32_t>& ids, const Until& until) {
  Queue queue;
  queue.run = &reference_kernels();
  const auto weights = model.place(queue);
  const ModelInfo& m = model.info();
  const int64_t n = int64_t(ids.size());
  std::vector<int32_t> positions(static_cast<size_t>(n)), tokens = ids;
  for (int64_t i = 0; i < n; ++i) positions[size_t(i)] = int32_t(i);
  std::vector<int64_t> first{0, n};
  const Tensor ends(first.data(), Dtype::I64, {2}), at(positions.data(), Dtype::I32, {n});
  Buffer x(Dtype::F32, {n, m.hidden});
  queue.run->embed(queue, model.embedding(), Tensor(tokens.data(), Dtype::I32, {n}), 1, x);
  auto heads = [&](int64_t count, const Buffer& values) {
    static std::vector<std::vector<int64_t>> keep;
    keep.emplace_back();
    for (int64_t s = 0; s <= count; ++s) keep.back().push_back(s * n);
    return Ragged{values, Tensor(keep.back().data(), Dtype::I64, {count + 1}), {}, count, count * n};
  };
  for (int l = 0; l < m.layers; ++l) {
    Buffer q(Dtype::F32, {n, m.h, m.d}), k(Dtype::F32, {n, m.g, m.d}), v(Dtype::F32, {n, m.g, m.d});
    project(queue, *weights, model.architecture(), l, x, n, q->reshape({n, m.h * m.d}), k->reshape({n, m.g * m.d}),
            v->reshape({n, m.g * m.d}));
    Buffer qh(Dtype::F32, {m.h * n, m.d}), kh(Dtype::F32, {m.g * n, m.d}), vh(Dtype::F32, {m.g * n, m.d}),
        out(Dtype::F32, {m.h * n, m.d});
    const Heads split[] = {{q, {}, m.rope(l), at, heads(m.h, qh)},
                           {k, {}, m.rope(l), at, heads(m.g, kh)},
                           {v, {}, nullptr, {}, heads(m.g, vh)}};
    queue.run->split_heads(queue, ends, 0, std::span(split));
    std::vector<int32_t> seen;
    for (int g = 0; g < m.g; ++g)
      seen.insert(seen.end(), until[size_t(l)][size_t(g)].begin(), until[size_t(l)][size_t(g)].end());
    Mods mods;
    mods.window = m.window(l);
    mods.until = Tensor(seen.data(), Dtype::I32, {m.g * n});
    queue.run->attend(queue, heads(m.h, qh), heads(m.g, kh), heads(m.g, vh), {}, mods, out, {});
    Buffer merged(Dtype::F32, {n, int64_t(m.h) * m.d});
    queue.run->merge_heads(queue, heads(m.h, out), ends, merged);
    finish(queue, *weights, model.architecture(), l, merged, n, x);
  }
  Buffer y(Dtype::F32, {n, m.vocabulary});
  logits(queue, *weights, model.architecture(), x, y);
  std::vector<std::vector<float>> rows;
  for (int64_t i = 0; i < n; ++i) rows.push_back(row(y, i));
  return rows;
}

struct Case {
  std::string attention;
  int64_t chunk = 0;
};

class EvictionTest : public testing::TestWithParam<Case> {};

// After an eviction, 24 further tokens give what a mask over the whole text gives: positions are true, and what each
// head dropped is gone for it alone. Layer 1 has a sliding window of 24.
TEST_P(EvictionTest, EqualsTheUntilMask) {
  const auto model = tiny();
  const ModelInfo& m = model->info();
  const int64_t prefix = 70, length = 94;
  const std::vector<int32_t> ids = text(length);
  for (const std::string& backend : exact_backends()) {
    SessionOptions o = options(GetParam().attention, backend);
    o.chunk = GetParam().chunk;
    Session session(model, o);
    Until until(size_t(m.layers), std::vector(size_t(m.g), std::vector<int32_t>(size_t(length), -1)));
    int64_t fed = 0;
    bool shorter = false;
    session.tap([&](LayerView& at) {
      if (at.phase == Phase::Replay) return;
      const int64_t rows = at.rows[0];
      if (at.layer == 0) fed += rows;
      for (int g = 0; g < m.g; ++g) {
        const std::vector<int32_t> held = at.store->positions(g);
        EXPECT_TRUE(std::is_sorted(held.begin(), held.end()));
        EXPECT_EQ(held.back(), fed - 1);
        shorter |= int64_t(held.size()) < fed;
        for (int32_t position : held) until[size_t(at.layer)][size_t(g)][size_t(position)] = int32_t(fed - 1);
      }
    });
    std::vector<std::vector<float>> got;
    got.push_back(row(session.prefill(std::span(ids).first(size_t(prefix))), 0));
    for (int64_t i = prefix; i < length; ++i) got.push_back(row(session.decode(ids[size_t(i)]), 0));
    EXPECT_TRUE(shorter) << "nothing was evicted";
    const auto expected = recompute(*model, ids, until);
    for (size_t i = 0; i < got.size(); ++i)
      ASSERT_LT(distance(got[i], expected[size_t(prefix) - 1 + i]), 2e-4)
          << GetParam().attention << " on " << backend << ", row " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Policies, EvictionTest,
    testing::Values(
        Case{"snapkv(budget=20,window=4)"}, Case{"snapkv(budget=20,window=4,when=every(3))"},
        Case{"snapkv(budget=24,window=4,when=chunk)", 30}, Case{"pyramidkv(budget=20,window=4)"},
        Case{"adakv(snapkv(budget=20,window=4))"}, Case{"h2o(budget=16)"}, Case{"h2o(budget=16)", 25},
        Case{"knorm(budget=16)"}, Case{"knorm(budget=20,sinks=2,when=every(1))", 33}, Case{"adakv(knorm(budget=20))"},
        Case{"a2sf(budget=16)"}, Case{"a2sf(budget=16,alpha=0.8,window=3)", 25}, Case{"observed-attention(budget=16)"},
        Case{"observed-attention(budget=16,when=every(2))", 25}, Case{"keydiff(budget=16)"},
        Case{"keydiff(budget=20,when=chunk)", 25}, Case{"cur(budget=16)"}, Case{"lagkv(budget=30,lag=12)"},
        Case{"noncausal(budget=20,tile=16)"}, Case{"noncausal(budget=20,tile=16)", 30},
        Case{"expected-attention(budget=16)"}, Case{"expected-attention(budget=20,when=chunk)", 30},
        Case{"random(budget=16)"}, Case{"random(budget=16,when=every(3))"}, Case{"duo-attention(sinks=2,recent=12)"},
        Case{"duo-attention(sinks=2,recent=12,heads=1)", 25}, Case{"simlayerkv(threshold=0,recent=14)"},
        Case{"chunkkv(snapkv(budget=20,window=4),chunk=5)"}, Case{"entropy-chunk(snapkv(budget=20,window=4),chunk=5,few=2)"},
        Case{"squeeze-attention(snapkv(budget=20,window=4))"}, Case{"squeeze-attention(knorm(budget=20))", 30},
        Case{"ov-evict(budget=20,block=4,sinks=4,recent=8)"}, Case{"ov-evict(budget=20,block=4,sinks=4,recent=8)", 25},
        Case{"lu-kv(knorm(budget=16),lost=[0.8,0.7,0.9,0.5,0.6,0.75])"}, Case{"kvcompose(budget=0.3)"},
        Case{"fastgen(recovered=0.2,frequent=0.2,local=0.1)"}, Case{"kvcompose(budget=20,structured=false)", 30},
        Case{"kvcrush(budget=16,block=4,sinks=4,recent=4,rescued=2)"},
        Case{"kvcrush(budget=12,block=3,sinks=3,recent=3,rescued=1)", 25},
        Case{"merge-evict(snapkv(budget=20,window=4),least=1)"}, Case{"cam(snapkv(budget=20,window=4))"},
        Case{"critical-ada(snapkv(budget=20,window=4))"}, Case{"critical-ada(h2o(budget=16))"},
        Case{"adaptive-rkv(budget=20,block=4,sinks=4,recent=8)"}, Case{"trimmed-llama(budget=0.1)"},
        Case{"trimmed-llama(budget=0.05)", 25}, Case{"caote(h2o(budget=16))"},
        Case{"caote(snapkv(budget=20,window=4))"}, Case{"dms(keydiff,threshold=0,window=8)"},
        Case{"adakv(keydiff(budget=20))"}, Case{"headkv(snapkv(budget=20,window=4),window=4,scores=[1,3,2,2,5,1])"},
        Case{"tova(budget=16)"}, Case{"tova(budget=20)", 33}, Case{"snapkv(budget=20,window=4,heads=1)"},
        Case{"snapkv(budget=20,window=4,layers=1-)"}, Case{"criticalkv(snapkv(budget=20,window=4))"},
        Case{"criticalkv(adakv(h2o(budget=16)))"}, Case{"defensivekv(budget=20,window=4)"},
        Case{"defensivekv(budget=24,window=4,when=chunk)", 30}, Case{"leverage(budget=16,sketch=8)"},
        Case{"leverage(budget=16,when=every(5))"}, Case{"compactor(budget=20,tile=16)"},
        Case{"compactor(budget=20,tile=16)", 30}, Case{"finch(budget=20,window=5)"}, Case{"cake(budget=20,window=4)"},
        Case{"cake(budget=20,window=4)", 30}, Case{"capkv(budget=16)"}, Case{"spatten(budget=0.4)"},
        Case{"spatten(budget=0.4,when=every(2))", 25}, Case{"moa(alpha=[4,9,1,20,3,5],beta=[0.1],sinks=2,block=4)"},
        Case{"zipvl(tau=0.7)"}, Case{"chunk-local(knorm(budget=0.3),chunk=10)"},
        Case{"block-evict(keydiff(budget=20),block=8)"}, Case{"block-evict(keydiff(budget=20,when=chunk),block=8)", 25},
        Case{"block-evict(snapkv(budget=20,window=4),block=8)"}, Case{"block-evict(h2o(budget=16),block=9)"},
        Case{"r-kv(budget=20,window=4,when=every(3))"}, Case{"r-kv(budget=20,window=4,when=every(1))", 25},
        Case{"q-filters(budget=16)"}, Case{"q-filters(budget=16,when=chunk)", 30}, Case{"spec-kv(budget=20,window=4)"},
        Case{"forcing-kv(frame=6,share=0.4)"}, Case{"forcing-kv(frame=6,share=0.4,static=[2,5],when=every(3))", 25},
        Case{"swa-cache"}, Case{"swa-cache(when=every(3),spare=2)", 25}, Case{"kvzip(budget=20,chunk=32,sinks=2)"},
        Case{"kvgrad(budget=20,chunk=32,sinks=2)"}, Case{"kvzip(budget=0.3,chunk=32,share=layer)", 40}),
    [](const auto& info) {
      std::string name = info.param.attention + (info.param.chunk ? "_chunk" : "");
      for (char& c : name)
        if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
      return name;
    });

// Decoding at cache positions, step by step with nothing but lists: keys lie unrotated and are turned to their places in
// the cache anew for every query.
struct CacheOracle {
  struct Entry {
    int32_t position;
    std::vector<double> k, v;
  };
  const Model& model;
  int64_t sinks, budget;
  bool halves;  // a full cache drops the older half behind its sinks; else what is too much, before the next token
  std::vector<std::vector<std::vector<Entry>>> cache;  // [layer][KV head]
  int64_t fed = 0;

  CacheOracle(const Model& m, int64_t sinks, int64_t budget, bool halves)
      : model(m), sinks(sinks), budget(budget), halves(halves),
        cache(size_t(m.info().layers), std::vector(size_t(m.info().g), std::vector<Entry>())) {}

  void cut(std::vector<Entry>& entries, int64_t count) const {
    if (int64_t(entries.size()) > count) entries.erase(entries.begin() + sinks, entries.end() - (count - sinks));
  }
  std::vector<double> turned(std::vector<double> x, int64_t place) const {
    const Rope& rope = *model.info().rope(0);
    const size_t half = size_t(rope.dims) / 2;
    for (size_t i = 0; i < half; ++i) {
      const double angle = double(place) * double(rope.inv_freq.at<float>(int64_t(i))), a = x[i], b = x[i + half];
      x[i] = a * std::cos(angle) - b * std::sin(angle), x[i + half] = a * std::sin(angle) + b * std::cos(angle);
    }
    return x;
  }
  static std::vector<double> numbers(const Buffer& t, int64_t row, int64_t first, int64_t count) {
    std::vector<double> out;
    for (int64_t c = 0; c < count; ++c) out.push_back(double(t->at<float>(row, first + c)));
    return out;
  }

  /// Logits of the last of the tokens.
  std::vector<float> feed(std::vector<int32_t> tokens, bool prompt) {
    Queue queue;
    queue.run = &reference_kernels();
    const auto weights = model.place(queue);
    const ModelInfo& m = model.info();
    const int64_t n = int64_t(tokens.size()), d = m.d;
    Buffer x(Dtype::F32, {n, m.hidden});
    queue.run->embed(queue, weights->embedding, Tensor(tokens.data(), Dtype::I32, {n}), 1, x);
    for (int l = 0; l < m.layers; ++l) {
      Buffer q(Dtype::F32, {n, m.h * d}), k(Dtype::F32, {n, m.g * d}), v(Dtype::F32, {n, m.g * d}),
          out(Dtype::F32, {n, m.h * d});
      project(queue, *weights, model.architecture(), l, x, n, q, k, v);
      for (int g = 0; g < m.g; ++g) {
        auto& entries = cache[size_t(l)][size_t(g)];
        if (!prompt && !halves) cut(entries, budget - n);
        const int64_t held = int64_t(entries.size());
        for (int64_t i = 0; i < n; ++i)
          entries.push_back({int32_t(fed + i), numbers(k, i, g * d, d), numbers(v, i, g * d, d)});
        for (int h = g * m.group(); h < (g + 1) * m.group(); ++h)
          for (int64_t i = 0; i < n; ++i) {
            const auto query = turned(numbers(q, i, h * d, d), held + i);
            std::vector<double> sum(size_t(d), 0.0);
            double total = 0;
            for (int64_t j = 0; j <= held + i; ++j) {
              const Entry& e = entries[size_t(j)];
              if (m.window(l) > 0 && fed + i - e.position >= m.window(l)) continue;
              const auto key = turned(e.k, j);
              double logit = 0;
              for (int64_t c = 0; c < d; ++c) logit += query[size_t(c)] * key[size_t(c)];
              const double w = std::exp(logit / std::sqrt(double(d)));
              total += w;
              for (int64_t c = 0; c < d; ++c) sum[size_t(c)] += w * e.v[size_t(c)];
            }
            for (int64_t c = 0; c < d; ++c) out->at<float>(i, h * d + c) = float(sum[size_t(c)] / total);
          }
        if (!halves) cut(entries, budget);
        while (halves && int64_t(entries.size()) >= budget)
          entries.erase(entries.begin() + sinks, entries.begin() + sinks + (budget - sinks) / 2);
      }
      finish(queue, *weights, model.architecture(), l, out, n, x);
    }
    fed += n;
    Buffer y(Dtype::F32, {n, m.vocabulary});
    logits(queue, *weights, model.architecture(), x, y);
    return row(y, n - 1);
  }
};

TEST(Session, CachePositionsAreThoseOfTheCache) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}}) {
    const auto model = tiny({0, 24, 0}, h, g);
    for (const auto& [prompt, budget, halves] : {std::tuple{70, 16, false},
                                                 {9, 16, false},
                                                 {40, 33, false},
                                                 {70, 16, true},
                                                 {16, 16, true},
                                                 {15, 16, true},
                                                 {9, 17, true},
                                                 {40, 33, true}}) {
      const std::vector<int32_t> ids = text(int64_t(prompt) + 24);
      CacheOracle oracle(*model, 3, budget, halves);
      Session session(model, options((halves ? "context-shift(sinks=3,budget=" : "streaming-llm(sinks=3,budget=") +
                                     std::to_string(budget) + ")"));
      EXPECT_LT(distance(row(session.prefill(std::span(ids).first(size_t(prompt))), 0),
                         oracle.feed({ids.begin(), ids.begin() + prompt}, true)),
                2e-4);
      for (size_t i = size_t(prompt); i < ids.size(); ++i)
        ASSERT_LT(distance(row(session.decode(ids[i]), 0), oracle.feed({ids[i]}, false)), 2e-4)
            << session.composition().text() << " " << h << " " << g << " " << prompt << " " << i;
    }
  }
}

// What no later query can see is not worth an entry, and what the window shows is kept whatever a repetition sees of it.
TEST(Session, KvZipLeavesWindowsOutOfThePool) {
  const auto model = tiny({24, 0, 24, 0});
  Session session(model, options("kvzip(budget=30,chunk=32,sinks=2)"));
  session.prefill(text(100));
  int64_t whole = 0;
  for (int l = 0; l < 4; ++l)
    for (int64_t g = 0; g < 2; ++g) {
      const std::vector<int32_t> held = session.store().layer(l).positions(g);
      if (l % 2) {
        whole += int64_t(held.size());
        continue;
      }
      ASSERT_EQ(held.size(), 24u);
      EXPECT_EQ(held.front(), 76);
    }
  EXPECT_EQ(whole, 2 * 2 * 30);
}

// A batch of unequal sequences gives what each gives alone.
TEST(Session, BatchEqualsEachAlone) {
  const auto model = tiny();
  for (const char* attention : {"dense", "snapkv(budget=12,window=4)", "h2o(budget=12)", "streaming-llm(budget=12)"}) {
    const std::vector<std::vector<int32_t>> texts = {text(41, 3), text(1, 4), text(17, 5)};
    SessionOptions o = options(attention);
    o.sequences = 3;
    Session batch(model, o);
    std::vector<std::vector<float>> together;
    Tensor y = batch.prefill({texts[0], texts[1], texts[2]});
    for (int s = 0; s < 3; ++s) together.push_back(row(y, s));
    const std::vector<int32_t> next{5, 6, 7};
    y = batch.decode(next);
    for (int s = 0; s < 3; ++s) together.push_back(row(y, s));
    for (int s = 0; s < 3; ++s) {
      Session alone(model, options(attention));
      EXPECT_LT(distance(row(alone.prefill(texts[size_t(s)]), 0), together[size_t(s)]), 1e-5) << attention << s;
      EXPECT_LT(distance(row(alone.decode(next[size_t(s)]), 0), together[size_t(3 + s)]), 1e-5) << attention << s;
    }
  }
}

TEST(Session, ForkGoesItsOwnWay) {
  const auto model = tiny();
  for (const char* attention : {"dense", "snapkv(budget=70,window=4)", "h2o(budget=30)"}) {
    const std::vector<int32_t> ids = text(75);
    Session session(model, options(attention));
    session.prefill(ids);
    session.decode(1);
    auto fork = session.fork();
    const std::vector<float> here = row(session.decode(2), 0);
    const std::vector<float> other = row(fork->decode(3), 0);
    fork->decode(4);
    Session again(model, options(attention));
    again.prefill(ids);
    again.decode(1);
    auto copy = again.fork();
    EXPECT_EQ(distance(row(copy->decode(3), 0), other), 0);
    EXPECT_EQ(distance(row(again.decode(2), 0), here), 0);
    EXPECT_EQ(distance(row(session.decode(9), 0), row(again.decode(9), 0)), 0)
        << attention << ": the fork wrote into its origin";
  }
}

// Statistics lie beside their entries in pages that forks share: what one adds to them is not the other's.
TEST(Session, ForksKeepTheirStatistics) {
  const auto model = tiny();
  const std::vector<int32_t> ids = text(200);
  for (const char* attention : {"h2o(budget=150)", "a2sf(budget=150)", "cake(budget=150)"}) {
    Session alone(model, options(attention)), session(model, options(attention));
    alone.prefill(ids), session.prefill(ids);
    const auto fork = session.fork();
    for (int i = 0; i < 12; ++i) {
      fork->decode(7 * i % 90);
      EXPECT_EQ(distance(row(session.decode(i), 0), row(alone.decode(i), 0)), 0) << attention << " token " << i;
    }
    for (int l = 0; l < session.store().layers(); ++l)
      for (int64_t s = 0; s < session.store().layer(l).segments(); ++s)
        EXPECT_EQ(session.store().layer(l).positions(s), alone.store().layer(l).positions(s)) << attention;
  }
}

TEST(Session, TruncateForgets) {
  const auto model = tiny();
  const std::vector<int32_t> ids = text(150);
  for (int64_t cut : {149, 128, 65, 1}) {
    Session session(model, options("dense"));
    session.prefill(ids);
    session.decode(3);
    session.truncate(0, cut);
    Session fresh(model, options("dense"));
    fresh.prefill(std::span(ids).first(size_t(cut)));
    EXPECT_EQ(session.store().bytes(), fresh.store().bytes());
    EXPECT_LT(distance(row(session.decode(8), 0), row(fresh.decode(8), 0)), 1e-5) << cut;
  }
}

TEST(Session, ChunksAndTilesChangeNothing) {
  const auto model = tiny();
  const std::vector<int32_t> ids = text(133);
  Session whole(model, options("dense"));
  const std::vector<float> expected = row(whole.prefill(ids), 0);
  for (int64_t chunk : {1, 7, 64, 200})
    for (int64_t ubatch : {1, 50}) {
      SessionOptions o = options("dense");
      o.chunk = chunk, o.ubatch = ubatch;
      Session session(model, o);
      EXPECT_LT(distance(row(session.prefill(ids), 0), expected), 1e-4) << chunk << " " << ubatch;
    }
}

TEST(Session, MemoryFollowsTheBudget) {
  const auto model = tiny({0, 0});
  Session dense(model, options("dense")), small(model, options("snapkv(budget=64,window=8)"));
  const std::vector<int32_t> ids = text(1000);
  dense.prefill(ids);
  small.prefill(ids);
  EXPECT_EQ(small.store().entries(), 2 * 2 * 64);
  EXPECT_EQ(dense.store().entries(), 2 * 2 * 1000);
  EXPECT_EQ(dense.store().bytes(), small.store().bytes() * 16);  // ⌈1000 / 64⌉ pages against one
}

TEST(Session, InterruptionRestores) {
  const auto model = tiny();
  const std::vector<int32_t> ids = text(60);
  Session session(model, options("h2o(budget=20)"));
  session.prefill(ids);
  auto untouched = session.fork();
  session.progress([](int64_t done, int64_t) {
    if (done == 2) interrupt();
  });
  EXPECT_THROW(session.prefill(ids), Error);
  clear_interrupt();
  session.progress({});
  EXPECT_EQ(session.tokens().size(), ids.size());
  EXPECT_EQ(distance(row(session.decode(5), 0), row(untouched->decode(5), 0)), 0);
}

// What reads far keys at shorter distances reads more text than the model was trained for, and says how much more.
TEST(Session, AMechanismMayReachBeyondTheContext) {
  ModelInfo shape;
  shape.layers = 2, shape.h = 6, shape.g = 2, shape.d = shape.d_v = 16, shape.hidden = 48, shape.vocabulary = 97;
  const auto endless = Model::random(shape, 64, Dtype::F32, 7);
  shape.context = 64;
  const auto model = Model::random(shape, 64, Dtype::F32, 7);
  const std::string extended = "self-extend(group=3,window=16)";  // 16 + 3 · 48
  const auto last = [&](const std::shared_ptr<const Model>& m, const std::string& spec, int64_t length) {
    Session session(m, options(spec));
    Tensor logits = session.prefill(text(length - 1));
    logits = session.decode(text(length).back());
    return row(logits, 0);
  };
  EXPECT_EQ(Session(model, options("dense")).reach(), 64);
  EXPECT_EQ(Session(model, options(extended)).reach(), 160);
  EXPECT_EQ(Session(model, options("streaming-llm(sinks=2,window=20)")).reach(), 0);
  EXPECT_EQ(Session(model, options("self-extend(group=3,window=16,layers=1)")).reach(), 64)
      << "the other layer is as ever";
  EXPECT_EQ(Session(endless, options(extended)).reach(), 0);
  EXPECT_EQ(Session(model, options("dca(chunk=64)")).reach(), 1 << 30);
  EXPECT_EQ(Session(model, options("dca(chunk=65)")).reach(), 64) << "its distances are longer than the context";
  EXPECT_EQ(Session(model, options("dca(layers=1)")).reach(), 64);
  EXPECT_THROW(Session(model, options("dca(local=25)")), Error) << "more than half of 48";
  EXPECT_LT(distance(last(model, "dca", 300), last(endless, "dca(chunk=48,local=4)", 300)), 1e-6)
      << "three quarters of the context and a twelfth of them";
  EXPECT_LT(distance(last(model, extended, 160), last(endless, extended, 160)), 1e-6);
  EXPECT_NO_THROW(last(model, "streaming-llm(sinks=2,window=20)", 200));
  for (const auto& [spec, length] : {std::pair<std::string, int64_t>{"dense", 65}, {extended, 161}, {extended, 162}}) {
    try {
      last(model, spec, length);
      ADD_FAILURE() << spec << " read " << length;
    } catch (const Error& e) {
      EXPECT_EQ(e.failure().code, Code::Invalid);
      EXPECT_NE(e.failure().remedy.find("self-extend(group=" + std::to_string(length / 64 + 1) + ")"), std::string::npos)
          << e.failure().remedy;
    }
  }
}

TEST(Session, RefusesWhatItCannotDo) {
  const auto model = tiny();
  EXPECT_THROW(Session(model, options("snapvk")), Error);
  EXPECT_THROW(Session(model, options("snapkv(budget=8,window=32)")), Error);
  EXPECT_THROW(Session(model, options("dense", "no-such-backend")), Error);
  Session session(model, options("dense"));
  EXPECT_THROW(session.prefill(std::vector<int32_t>{97}), Error);
  EXPECT_THROW(session.decode(-1), Error);
}

}  // namespace
}  // namespace heed
