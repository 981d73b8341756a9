#include "attention/spec.h"
#include "harness.h"
#include "mechanisms/registry.h"

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
    std::vector<Case> layers;  // prompt and replay: q of the replay, k of both
  };

  FakeRun(Setting setting, const std::string& spec, int64_t length)
      : length_(length), shape_{setting.h, setting.g, 1, length, 16, 16},
        queue_(&backend(setting.backend), *backend(setting.backend).memory) {
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

  void replay(int, std::span<const int32_t> tokens) override {
    const int64_t n = int64_t(tokens.size()), m = length_ + n;
    requests.emplace_back(tokens.begin(), tokens.end());
    Feed& feed = feeds.emplace_back(Feed{n, {}});
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
      mechanism_->observe(at);
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

TEST_P(Drives, KvZipKeepsWhatRepeatingLooksAt) {
  const int64_t length = 100;
  for (const auto& [share, budget] : {std::pair{"all", 0.3}, {"layer", 0.3}, {"head", 0.3}, {"all", 1.0}}) {
    const FakeRun run(GetParam(),
                      "kvzip(chunk=40,sinks=3,share=" + std::string(share) + ",budget=" + std::to_string(budget) + ")",
                      length);
    const int64_t g = GetParam().g, group = GetParam().h / g;
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
              for (int64_t j = begin; j < end; ++j) most[size_t(j)] = std::max(most[size_t(j)], p[size_t(j)]);
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

TEST(DriveErrors, ApplyHasNoModelToDrive) {
  const Case c({2, 2, 16, 16, 16, 16});
  const auto out = apply("kvzip(budget=0.5)", c.input("reference"));
  ASSERT_FALSE(out.has_value());
  EXPECT_EQ(out.error().code, Code::Unsupported);
}

}  // namespace
}  // namespace heed::test
