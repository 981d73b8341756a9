#include "attention/spec.h"
#include "base/random.h"
#include "mechanisms/registry.h"
#include "session_case.h"

namespace heed::test {
namespace {

class Drives : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Drives);

/// A model of two layers that holds random keys of a prompt, and answers every replay with random queries and keys.
class FakeRun final : public Run {
 public:
  static constexpr int kLayers = 2;
  struct Feed {
    int64_t count;
    std::vector<Case> layers;       // prompt and replay: q of the replay, k of both
    std::vector<Buffer> gradients;  // of each layer's output matrix's rows [count, kHidden], where they are asked for
  };
  static constexpr int kHidden = 24;

  FakeRun(Setting setting, const std::string& spec, int64_t length)
      : length_(length), shape_{setting.h, setting.g, 1, length, 16, 16},
        queue_(&backend(setting.backend), *backend(setting.backend).memory) {
    info_.hidden = kHidden;
    for (int l = 0; l < kLayers; ++l) {
      Random random{uint64_t(70 + l)};
      output.emplace_back(Dtype::F32, std::initializer_list<int64_t>{kHidden, setting.h * 16});
      for (float& x : output.back()->span<float>()) x = float(random.normal());
    }
    info_.layers = kLayers, info_.h = int(setting.h), info_.g = int(setting.g), info_.d = info_.d_v = 16;
    mechanism_ = value_or_throw(make_mechanism(value_or_throw(parse_spec(spec))[0], registry()));
    state_ = mechanism_->open(info_);
    StoreOptions options;
    options.k.kind = options.v.kind = PageType::Kind::F32;
    options.columns = mechanism_->needs(info_).columns;
    const std::vector<StoreShape> shapes(kLayers, StoreShape{int(setting.g), 16, 16});
    store_ = std::make_unique<Store>(queue_, shapes, options);
    for (int32_t i = 0; i < length; ++i) tokens_.push_back(i);
    for (int l = 0; l < kLayers; ++l) {
      prompt_.emplace_back(shape_, uint64_t(20 + l));
      append(l, prompt_.back(), 0, length);
    }
    mechanism_->drive(*this);
  }

  const ModelInfo& model() const override { return info_; }
  int sequences() const override { return 1; }
  std::span<const int32_t> tokens(int) const override { return tokens_; }
  State* state() override { return state_.get(); }
  std::vector<int32_t> tokenize(const std::string&) const override { return {7, 7, 7}; }

  Queue& queue() override { return queue_; }
  void append(int, const Tensor&, const Adapter*) override { ADD_FAILURE() << "no rows were given"; }
  void feed(int, std::span<const int32_t>) override { ADD_FAILURE() << "the prompt has been read"; }

  void replay(int, std::span<const int32_t> tokens, int) override { read(tokens, nullptr); }
  void replay_backward(int, std::span<const int32_t> tokens, const Objective& objective) override {
    read(tokens, &objective);
  }

  void read(std::span<const int32_t> tokens, const Objective* objective) {
    const int64_t n = int64_t(tokens.size()), m = length_ + n;
    requests.emplace_back(tokens.begin(), tokens.end());
    Feed& feed = feeds.emplace_back(Feed{n, {}, {}});
    for (int l = 0; l < kLayers; ++l) {
      Shape shape = shape_;
      shape.n = n, shape.m = m;
      Case& c = feed.layers.emplace_back(shape, 100 * feeds.size() + uint64_t(l), 2.0);
      for (int64_t kv = 0; kv < shape.g; ++kv)
        copy(prompt_[size_t(l)].k->select(0, kv), c.k->select(0, kv).slice(0, 0, length_));
      append(l, c, length_, m);
      const Scratch scratch(queue_.scratch);
      LayerView at(info_, queue_, l, Phase::Replay);
      at.enter(state_.get());
      at.prompt = {length_}, at.store = &store_->layer(l), at.stores = store_.get();
      at.rows = {n}, at.key_rows.assign(size_t(shape.g), m);
      const Tensor q_offsets = queue_.upload(steps(shape.h, n)), k_offsets = queue_.upload(steps(shape.g, m));
      at.q = {queue_.upload(c.q->reshape({shape.h * n, 16})), q_offsets, {}, shape.h, shape.h * n};
      at.k = {queue_.upload(c.k->reshape({shape.g * m, 16})), k_offsets, {}, shape.g, shape.g * m};
      at.v = {queue_.upload(c.v->reshape({shape.g * m, 16})), k_offsets, {}, shape.g, shape.g * m};
      const int64_t waits = queue_.host_waits;
      if (objective) {
        Buffer& rows = feed.gradients.emplace_back(Dtype::F32, std::initializer_list<int64_t>{n, kHidden});
        Random random(900 * feeds.size() + uint64_t(l));
        for (float& x : rows->span<float>()) x = float(random.normal() * random.uniform());
        const std::vector<int64_t> first{0, n};
        at.first = queue_.upload(first);
        const Gradients gradients{queue_.upload(rows), {}, {}, {}};
        at.gradients = &gradients;
        mechanism_->gradient(at);
      } else {
        mechanism_->observe(at);
      }
      EXPECT_EQ(queue_.host_waits, waits);
    }
    store_->truncate(queue_, 0, length_);
    store_->sync();
  }

  void evict() override {
    const auto& policy = static_cast<const KeepPolicy&>(*mechanism_);
    std::vector<Ragged> scores;
    std::vector<LayerView> views;
    for (int l = 0; l < kLayers; ++l) {
      LayerView& at = views.emplace_back(info_, queue_, l, Phase::Prompt);
      at.enter(state_.get());
      at.prompt = {length_}, at.store = &store_->layer(l), at.stores = store_.get();
      at.output_matrix = queue_.upload(output[size_t(l)]);
      scores.push_back(policy.score(at));
    }
    const std::vector<int64_t> prompt{length_};
    const Tensor counts = policy.allocate({queue_, info_, 0, scores, prompt, policy.kept()});
    for (int l = 0; l < kLayers; ++l) heed::evict(views[size_t(l)], policy, scores[size_t(l)], counts.select(0, l));
    for (int l = 0; l < kLayers; ++l)
      for (int64_t kv = 0; kv < shape_.g; ++kv) kept.push_back(store_->layer(l).positions(kv));
  }

  /// Keys and values of the prompt.
  const Case& prompt(int l) const { return prompt_[size_t(l)]; }

  std::vector<std::vector<int32_t>> requests, kept;
  std::vector<Feed> feeds;
  std::vector<Buffer> output;  // each layer's W_O

 private:
  static Buffer steps(int64_t count, int64_t step) {
    Buffer out(Dtype::I64, {count + 1});
    for (int64_t s = 0; s <= count; ++s) out->at<int64_t>(s) = s * step;
    return out;
  }
  void append(int l, const Case& c, int64_t from, int64_t to) {
    const int64_t g = shape_.g, m = c.shape.m;
    Buffer offsets = steps(g, m), ends(Dtype::I64, {g}), positions(Dtype::I32, {g * m});
    for (int64_t kv = 0; kv < g; ++kv) offsets->at<int64_t>(kv) += from, ends->at<int64_t>(kv) = kv * m + to;
    for (int64_t r = 0; r < g * m; ++r) positions->at<int32_t>(r) = int32_t(r % m);
    const Scratch scratch(queue_.scratch);
    const Tensor begin = queue_.upload(offsets), end = queue_.upload(ends);
    const Ragged k{queue_.upload(c.k->reshape({g * m, 16})), begin, end, g, g * m},
        v{queue_.upload(c.v->reshape({g * m, 16})), begin, end, g, g * m};
    const int64_t rows = to - from;
    store_->layer(l).append(queue_, k, v, queue_.upload(positions), std::span(&rows, 1));
  }

  int64_t length_;
  Shape shape_;
  ModelInfo info_;
  Queue queue_;
  std::unique_ptr<Mechanism> mechanism_;
  std::unique_ptr<State> state_;
  std::unique_ptr<Store> store_;
  std::vector<int32_t> tokens_;
  std::vector<Case> prompt_;
};

TEST_P(Drives, KvZipRepeatsThePromptPartByPart) {
  const FakeRun run(GetParam(), "kvzip(budget=0.3,chunk=40)", 100);
  ASSERT_EQ(run.requests.size(), 3u);
  EXPECT_EQ(run.requests[0].size(), 3u + 40);
  EXPECT_EQ(run.requests[0].back(), 39);
  EXPECT_EQ(run.requests[1].size(), 3u + 8 + 3 + 40) << "the last 8 tokens of the part before lead in";
  EXPECT_EQ(run.requests[1][3], 32);
  EXPECT_EQ(run.requests[2].back(), 99);
}

/// What KVzip and its kin keep when a row's weights are worth `row` and an entry `entry`.
template <class Row, class Value>
void expect_repeated(Setting setting, const std::string& name, Row row, Value entry) {
  const int64_t length = 100;
  for (const auto& [share, budget] : {std::pair{"all", 0.3}, {"layer", 0.3}, {"head", 0.3}, {"all", 1.0}}) {
    const FakeRun run(
        setting, name + "(chunk=40,sinks=3,share=" + std::string(share) + ",budget=" + std::to_string(budget) + ")", length);
    const int64_t g = setting.g, group = setting.h / g;
    std::vector<std::vector<double>> scores;  // [layer · g]
    for (int l = 0; l < FakeRun::kLayers; ++l)
      for (int64_t kv = 0; kv < g; ++kv) {
        auto& most = scores.emplace_back(size_t(length), 0.0);
        for (size_t part = 0; part < 3; ++part) {
          const Case& c = run.feeds[part].layers[size_t(l)];
          const int64_t begin = int64_t(part) * 40, end = std::min<int64_t>(length, begin + 40);
          for (int64_t head = kv * group; head < (kv + 1) * group; ++head)
            for (int64_t i = 0; i < c.shape.n; ++i) {
              const auto p = c.weights(head, i, [&](int64_t j) {
                return j < std::min<int64_t>(3, begin) || (j >= begin && j < end) || (j >= length && j <= length + i);
              });
              for (int64_t j = begin; j < end; ++j)
                most[size_t(j)] = std::max(most[size_t(j)], p[size_t(j)] * row(run, part, l, i) * entry(run, l, head, j));
            }
        }
        std::fill_n(most.begin(), 3, INFINITY);
      }
    const int64_t each = int64_t(double(length) * budget + 1e-9);
    std::vector<std::vector<int32_t>> expected(scores.size());
    const size_t pool = std::string(share) == "all" ? scores.size() : std::string(share) == "layer" ? size_t(g) : 1;
    for (size_t first = 0; first < scores.size(); first += pool) {
      std::vector<double> joined;
      for (size_t s = first; s < first + pool; ++s) joined.insert(joined.end(), scores[s].begin(), scores[s].end());
      for (int32_t i : top(joined, each * int64_t(pool)))
        expected[first + size_t(i / length)].push_back(int32_t(i % length));
    }
    EXPECT_EQ(run.kept, expected) << share;
  }
}

TEST_P(Drives, KvZipKeepsWhatRepeatingLooksAt) {
  expect_repeated(
      GetParam(), "kvzip", [](const FakeRun&, size_t, int, int64_t) { return 1.0; },
      [](const FakeRun&, int, int64_t, int64_t) { return 1.0; });
}

TEST_P(Drives, KvGradKeepsWhatMovesTheEnd) {
  const int64_t group = GetParam().h / GetParam().g;
  expect_repeated(
      GetParam(), "kvgrad",
      [](const FakeRun& run, size_t part, int l, int64_t i) {
        double sum = 0;
        for (int64_t c = 0; c < FakeRun::kHidden; ++c)
          sum += std::pow(double(run.feeds[part].gradients[size_t(l)]->at<float>(i, c)), 2);
        return std::sqrt(sum);
      },
      [group](const FakeRun& run, int l, int64_t head, int64_t j) {
        double sum = 0;
        for (int64_t o = 0; o < FakeRun::kHidden; ++o) {
          double y = 0;
          for (int64_t c = 0; c < 16; ++c)
            y += double(run.output[size_t(l)]->at<float>(o, head * 16 + c)) *
                 double(run.prompt(l).v->at<float>(head / group, j, c));
          sum += y * y;
        }
        return std::sqrt(sum);
      });
}

TEST_P(Drives, KvComposeKeepsWhatASecondReadingLooksAt) {
  const int64_t length = 100, g = GetParam().g, group = GetParam().h / g;
  for (const auto& [spec, norm, structured, budget] : {std::tuple{"kvcompose(budget=0.3)", false, true, 0.3},
                                                       {"kvcompose(budget=0.2,norm=true)", true, true, 0.2},
                                                       {"kvcompose(budget=0.3,structured=false)", false, false, 0.3},
                                                       {"kvcompose(budget=1.0)", false, true, 1.0}}) {
    const FakeRun run(GetParam(), spec, length);
    ASSERT_EQ(run.requests.size(), 1u);
    EXPECT_EQ(run.requests[0], all_of(length));
    std::vector<std::vector<double>> score;  // [layer · g]
    std::vector<double> pool, composite;
    for (int l = 0; l < FakeRun::kLayers; ++l) {
      const Case& c = run.feeds[0].layers[size_t(l)];
      std::vector<double> mean(size_t(length), 0.0);
      for (int64_t kv = 0; kv < g; ++kv) {
        auto& own = score.emplace_back(size_t(length), 0.0);
        for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
          std::vector<double> most(size_t(length), 0.0);
          for (int64_t i = 0; i < length; ++i) {
            const auto p = c.causal(head, i);
            for (size_t j = 0; j < most.size(); ++j) most[j] = std::max(most[j], p[j]);
          }
          for (size_t j = 0; j < most.size(); ++j) own[j] += most[j] / double(group);
        }
        for (int64_t j = 0; j < length && norm; ++j) own[size_t(j)] *= test::norm(run.prompt(l).v, kv, j);
        for (size_t j = 0; j < mean.size(); ++j) mean[j] += own[j] / double(g);
      }
      std::vector<double> ranked(size_t(length), 0.0);
      for (int64_t kv = 0; kv < g; ++kv) {
        auto& own = score[size_t(l * g + kv)];
        for (size_t j = 0; j < mean.size(); ++j) own[j] += mean[j];
        pool.insert(pool.end(), own.begin(), own.end());
        std::vector<double> sorted = own;
        std::sort(sorted.rbegin(), sorted.rend());
        for (size_t r = 0; r < sorted.size(); ++r) ranked[r] += sorted[r] / double(g);
      }
      composite.insert(composite.end(), ranked.begin(), ranked.end());
    }
    for (size_t i = size_t(length); i < composite.size(); ++i)
      composite[i % size_t(length)] = std::max(composite[i % size_t(length)], composite[i]);
    const int64_t each = int64_t(budget * double(length) + 1e-9);
    std::vector<int64_t> count(score.size(), 0);
    if (structured) {
      for (int32_t i : top(composite, each * FakeRun::kLayers))
        for (int64_t kv = 0; kv < g; ++kv) ++count[size_t(i / length * g + kv)];
    } else {
      for (int32_t i : top(pool, each * int64_t(score.size()))) ++count[size_t(i / length)];
    }
    for (size_t s = 0; s < score.size(); ++s) {
      EXPECT_EQ(run.kept[s], top(score[s], count[s])) << spec << " head " << s;
      if (structured) { EXPECT_EQ(run.kept[s].size(), run.kept[s / size_t(g) * size_t(g)].size()); }
    }
    if (structured) { EXPECT_GE(run.kept[0].size(), run.kept.back().size()); }
  }
}

/// What GemFilter reads of a prompt whose queries and keys in the ranking layer are those at hand.
std::vector<int32_t> gems(const LayerView& at, int sequence, int64_t count, int kernel, int64_t recent) {
  const int64_t g = at.model.g, group = at.model.group(), m = at.k.length(sequence * g);
  std::vector<double> sum(size_t(m), 0.0), smooth(size_t(m), 0.0);
  for (int64_t head = 0; head < at.model.h; ++head) {
    const int64_t segment = sequence * at.model.h + head, kv = sequence * g + head / group;
    for (int64_t j = 0; j < m; ++j)
      for (int64_t c = 0; c < at.model.d; ++c)
        sum[size_t(j)] += double(at.q.values.at<float>(at.q.end(segment) - 1, c)) *
                          double(at.k.values.at<float>(at.k.begin(kv) + j, c));
  }
  for (int64_t j = 0; j < m; ++j)
    for (int64_t i = j - kernel / 2; i <= j + kernel / 2; ++i)
      if (i >= 0 && i < m) smooth[size_t(j)] += sum[size_t(i)] / kernel;
  for (int64_t j = std::max<int64_t>(0, m - recent); j < m; ++j) smooth[size_t(j)] = INFINITY;
  return top(smooth, count);
}

TEST(GemFilter, ReadsTheTokensThatTheLastQueryOfALayerLikes) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const auto& [layer, ranks, kernel, recent, budget] :
         {std::tuple{2, 2, 5, 0, "30"}, {1, 0, 1, 3, "7"}, {13, 3, 9, 1, "0.5"}, {0, 0, 3, 0, "1"}}) {
      const auto model = tiny_model(h, g);
      const std::string spec = "gemfilter(budget=" + std::string(budget) + ",layer=" + std::to_string(layer) +
                               ",kernel=" + std::to_string(kernel) + ",recent=" + std::to_string(recent) + ")";
      SCOPED_TRACE(spec);
      const Budget grants = value_or_throw(Budget::parse(budget));
      SessionOptions o = in_f32(spec), plain = in_f32("dense");
      o.sequences = plain.sequences = 2;
      Session session(model, o);
      const std::vector<std::vector<int32_t>> prompts{text(83, 1), text(20, 2)};
      std::vector<std::vector<int32_t>> expected{all_of(83), all_of(20)};
      int deepest = -1;
      session.tap([&, ranks = ranks, kernel = kernel, recent = recent](LayerView& at) {
        if (at.phase != Phase::Replay) return;
        deepest = std::max(deepest, at.layer);
        if (at.layer != ranks) return;
        for (int s = 0; s < 2; ++s)
          if (at.rows[size_t(s)] > 0)
            expected[size_t(s)] = gems(at, s, grants.entries(at.rows[size_t(s)]), kernel, recent);
      });
      std::vector<float> got, wanted;
      const auto take = [](std::vector<float>& to, const Tensor& t) {
        to.insert(to.end(), t.as<float>(), t.as<float>() + t.numel());
      };
      take(got, session.prefill({prompts[0], prompts[1]}));
      EXPECT_EQ(deepest, ranks) << "layers behind the one that ranks have nothing to do";
      std::vector<std::vector<int32_t>> read(2);
      for (size_t s = 0; s < 2; ++s) {
        ASSERT_EQ(int64_t(expected[s].size()), std::min<int64_t>(grants.entries(s ? 20 : 83), s ? 20 : 83));
        for (int32_t i : expected[s]) read[s].push_back(prompts[s][size_t(i)]);
        const auto there = session.tokens(int(s));
        EXPECT_EQ(std::vector<int32_t>(there.begin(), there.end()), read[s]);
        EXPECT_EQ(session.origins(3, int64_t(s) * g), expected[s]);
      }
      // Pairs of both readings, among those of the whole prompts.
      const double a = double(read[0].size()), b = double(read[1].size());
      const double pairs = (83 * a * (a + 1) / (83 * 84) + 20 * b * (b + 1) / (20 * 21)) / 103;
      const double first = (83 * (a < 83) + 20 * (b < 20)) / 103.0;
      EXPECT_NEAR(session.density()[0][0], pairs + first, 1e-9);
      if (ranks < 3) { EXPECT_NEAR(session.density()[3][0], pairs, 1e-9); }
      Session dense(model, plain);
      take(wanted, dense.prefill({read[0], read[1]}));
      for (int32_t token : {4, 17, 55}) {
        take(got, session.decode(std::vector<int32_t>{token, token + 1}));
        take(wanted, dense.decode(std::vector<int32_t>{token, token + 1}));
      }
      EXPECT_EQ(session.origins(0, 0).back(), 85) << "what follows the prompt follows all of it";
      take(got, session.prefill({text(9, 5), text(70, 6)}));
      take(wanted, dense.prefill({text(9, 5), text(70, 6)}));
      EXPECT_LT(distance(got, wanted), 1e-6) << "behind the prompt nothing is left out";
    }
}

TEST(GemFilter, SaysWhatItCannotDo) {
  const auto model = tiny_model(6, 2);
  Session session(model, in_f32("gemfilter(budget=30,layer=2)"));
  try {
    session.prefill(text(83, 1), Session::Logits::All);
    FAIL() << "tokens that are not read have no logits";
  } catch (const Error& e) { EXPECT_EQ(e.failure().code, Code::Unsupported); }
  EXPECT_EQ(session.store().entries(), 0);
  EXPECT_EQ(session.prefill(text(25, 1), Session::Logits::All).size[0], 25)
      << "a prompt within the budget is read whole";
  for (const char* spec : {"gemfilter(kernel=4)", "gemfilter(layers=2-)", "gemfilter(budget=8,recent=9)",
                           "gemfilter(budget=0)", "gemfilter(layer=-1)", "gemfilter(recent=-1)"})
    EXPECT_THROW(Session(model, in_f32(spec)), Error) << spec;
}

/// "[a,b,…]".
template <class Values>
std::string list_text(const Values& values) {
  std::string out;
  for (const auto& x : values) out += (out.empty() ? "[" : ",") + std::to_string(x);
  return out + "]";
}

TEST(ContextCutoff, StopsWhereTheProbeSaysSo) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const auto& [piece, question, sharpness, length] :
         {std::tuple{0.1, 7, 1.0, 83}, {0.3, 1, 4.0, 61}, {0.05, 20, 2.0, 77}, {1.0, 3, 1.0, 40}, {0.5, 100, 1.0, 50}}) {
      const auto model = tiny_model(h, g);
      const std::vector<int> probes{h + 1, 3 * h};
      std::vector<double> weights;
      Random random(uint64_t(7 * length));
      for (int c = 0; c < 32; ++c) weights.push_back(std::round(random.normal() * sharpness * 1e3) / 1e3);
      const std::vector<std::vector<int32_t>> prompts{text(length, 1), text(30, 2)};
      // What a probe would say behind every token, from one reading of the whole.
      SessionOptions plain = in_f32("dense");
      plain.sequences = 2;
      Session whole(model, plain);
      std::vector<std::vector<double>> z(2);
      for (size_t s = 0; s < 2; ++s) z[s].assign(prompts[s].size(), 0.0);
      whole.tap([&, h = h](LayerView& at) {
        for (size_t i = 0; i < 2; ++i) {
          if (at.layer != probes[i] / h) continue;
          for (int s = 0; s < 2; ++s) {
            const int64_t first = at.q.begin(int64_t(s) * h + probes[i] % h);
            double sum = 0;
            for (int64_t t = 0; t < at.rows[size_t(s)]; ++t) {
              for (int64_t c = 0; c < 16; ++c)
                sum += weights[i * 16 + size_t(c)] * double(at.out.at<float>(first + t, c));
              z[size_t(s)][size_t(t)] += sum / double(t + 1);
            }
          }
        }
      });
      whole.prefill({prompts[0], prompts[1]});
      whole.tap({});
      double most = -INFINITY;
      std::vector<std::vector<int64_t>> asked(2);
      for (size_t s = 0; s < 2; ++s) {
        const int64_t all = int64_t(prompts[s].size()), step = int64_t(std::ceil(piece * double(all)));
        for (int64_t t = step; t < all - question; t += step) {
          asked[s].push_back(t);
          if (s == 0) most = std::max(most, z[s][size_t(t - 1)]);
        }
      }
      // The best of the first prompt's pieces is exactly enough, by a little.
      const double bias = std::isfinite(most) ? std::round((1.0 - most) * 1e4) / 1e4 : 0, threshold = 0.72;
      std::vector<std::vector<int32_t>> read(2);
      bool cut = false;
      for (size_t s = 0; s < 2; ++s) {
        const int64_t all = int64_t(prompts[s].size());
        int64_t stop = all;
        for (int64_t t : asked[s])
          if (1 / (1 + std::exp(-(z[s][size_t(t - 1)] + bias))) >= threshold) {
            stop = t;
            break;
          }
        for (int64_t i = 0; i < all; ++i)
          if (i < stop || i >= all - question) read[s].push_back(prompts[s][size_t(i)]);
        cut |= read[s].size() < prompts[s].size();
      }
      if (piece < 0.5) { EXPECT_TRUE(cut); }
      const std::string spec = "context-cutoff(threshold=0.72,piece=" + std::to_string(piece) +
                               ",question=" + std::to_string(question) + ",probes=" + list_text(probes) +
                               ",weights=" + list_text(weights) + ",bias=" + std::to_string(bias) + ")";
      SCOPED_TRACE(spec);
      SessionOptions o = in_f32(spec);
      o.sequences = 2;
      Session session(model, o), dense(model, plain);
      std::vector<float> got, wanted;
      const auto take = [](std::vector<float>& to, const Tensor& t) {
        to.insert(to.end(), t.as<float>(), t.as<float>() + t.numel());
      };
      take(got, session.prefill({prompts[0], prompts[1]}));
      take(wanted, dense.prefill({read[0], read[1]}));
      for (size_t s = 0; s < 2; ++s) {
        const auto there = session.tokens(int(s));
        EXPECT_EQ(std::vector<int32_t>(there.begin(), there.end()), read[s]);
      }
      take(got, session.decode(std::vector<int32_t>{4, 17}));
      take(wanted, dense.decode(std::vector<int32_t>{4, 17}));
      EXPECT_LT(distance(got, wanted), 1e-4);
      // What was not read cost nothing.
      double pairs = 0, rows = 0;
      for (size_t s = 0; s < 2; ++s) {
        const double a = double(read[s].size()), b = double(prompts[s].size());
        pairs += a * (a + 1) / (b + 1), rows += b;
      }
      EXPECT_NEAR(session.density()[0][0], pairs / rows, 1e-6);
    }
}

TEST(ContextCutoff, SaysWhatItCannotDo) {
  const auto model = tiny_model(6, 2);
  const std::string probe = ",probes=3,weights=" + list_text(std::vector<double>(16, 1.0)) + ")";
  EXPECT_NO_THROW(Session(model, in_f32("context-cutoff(threshold=0.9" + probe)));
  for (const std::string& spec :
       {std::string("context-cutoff"), "context-cutoff(threshold=3" + probe, "context-cutoff(piece=0" + probe,
        "context-cutoff(question=0" + probe, "context-cutoff(layers=1" + probe,
        std::string("context-cutoff(probes=3,weights=[1,2])"),
        "context-cutoff(probes=24,weights=[1])+" + std::string("dense"), std::string("context-cutoff(weights=[1])")}) {
    try {
      Session(model, in_f32(spec));
      ADD_FAILURE() << spec;
    } catch (const Error& e) { EXPECT_EQ(e.failure().exit_status(), 2) << spec; }
  }
}

TEST(DriveErrors, ApplyHasNoModelToDrive) {
  const Case c({2, 2, 16, 16, 16, 16});
  const auto out = apply("kvzip(budget=0.5)", c.input("reference"));
  ASSERT_FALSE(out.has_value());
  EXPECT_EQ(out.error().code, Code::Unsupported);
}

}  // namespace
}  // namespace heed::test
