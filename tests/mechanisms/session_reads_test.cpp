// Readers whose choices last for several tokens, or that move keys in prompts too, step by step in sessions.
#include "session_case.h"

namespace heed::test {
namespace {

// Choices page by page in plain loops: bounds of parts, the newest page, pages born since.
TEST(SessionReads, LServeReadsThePagesOfItsLastChoice) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const auto& [budget, page, part, every, sinks, recent, length] : {std::tuple{24, 8, 4, 4, 6, 10, 70},
                                                                           {12, 4, 4, 3, 0, 1, 53},
                                                                           {40, 8, 2, 1, 8, 8, 83},
                                                                           {30, 2, 1, 5, 3, 7, 40},
                                                                           {8, 16, 8, 2, 4, 5, 20}}) {
      Session session(tiny_model(h, g), in_f32("lserve(budget=" + std::to_string(budget) + ",page=" + std::to_string(page) +
                                               ",part=" + std::to_string(part) + ",every=" + std::to_string(every) +
                                               ",sinks=" + std::to_string(sinks) + ",recent=" + std::to_string(recent) +
                                               ",streaming=" + std::to_string(2 * g) + ")"));
      std::vector<std::vector<int32_t>> held(static_cast<size_t>(h));  // pages of the last choice
      int64_t born = 0;                                                // pages there were then
      int steps = 0, dropped = 0;
      session.tap([&, h = h, g = g, budget = budget, page = page, part = part, every = every, sinks = sinks,
                   recent = recent](LayerView& at) {
        if (at.layer != 2 || !at.decoding()) return;
        const int64_t m = at.store->length(0), pages = ceil_of(m, page);
        const Ragged keys = stored_keys(at);
        const Plan& plan = at.read.plan;
        ASSERT_EQ(plan.form, Plan::Form::Blocks);
        ASSERT_EQ(plan.k_tile, page);
        for (int64_t head = 0; head < h; ++head) {
          const int64_t kv = head * g / h;
          if (at.step() % every == 0) {
            std::vector<double> worth(size_t(pages), -INFINITY);
            for (int64_t b = 0; b * part < m; ++b) {
              double bound = 0;
              for (int64_t c = 0; c < 16; ++c) {
                double best = -INFINITY;
                for (int64_t j = b * part; j < std::min<int64_t>(m, (b + 1) * part); ++j)
                  best = std::max(best, double(at.q.values.at<float>(at.q.begin(head), c)) *
                                            double(keys.values.at<float>(keys.begin(kv) + j, c)));
                bound += best;
              }
              double& of_page = worth[size_t(b * part / page)];
              of_page = std::max(of_page, bound);
            }
            worth.back() = INFINITY;
            held[size_t(head)] = top(worth, std::max<int64_t>(3, ceil_of(std::min<int64_t>(budget, m), page)));
          }
          std::vector<int32_t> expected;
          for (int32_t b = 0; b < pages; ++b) {
            const bool streams = kv == 0, near = b * page < sinks || (b + 1) * page > m - recent;
            const auto& own = held[size_t(head)];
            const int64_t before = at.step() % every == 0 ? pages : born;
            if (streams ? near : std::binary_search(own.begin(), own.end(), b) || b >= before) expected.push_back(b);
          }
          std::vector<int32_t> read;
          for (int64_t e = plan.begin(head); e < plan.end(head); ++e) read.push_back(plan.index.at<int32_t>(e));
          EXPECT_EQ(read, expected) << "head " << head << " step " << at.step();
          dropped += int(int64_t(read.size()) < pages);
        }
        if (at.step() % every == 0) born = pages;
        ++steps;
      });
      session.prefill(text(length, 4));
      for (int32_t i = 0; i < 11; ++i) session.decode(i * 5 % 61);
      EXPECT_EQ(steps, 11);
      EXPECT_TRUE(dropped > 0 || length < 40);
    }
}

/// Layer 2 of a session holds the outputs of keys read `apart(i, j)` positions before their queries, in prompts at once, in
/// parts, and token by token. Returns how far outputs are from those at true distances.
template <class Apart>
double read_apart(int h, int g, const std::string& spec, int64_t length, int64_t chunk, Apart apart) {
  const auto model = tiny_model(h, g);
  Session session(model, in_f32(spec, chunk));
  PlainRows rows(model->info());
  int64_t checked = 0;
  double moved = 0, worst = 0;
  session.tap([&](LayerView& at) {
    if (at.layer != 2) return;
    rows.take(at);
    const int64_t all = int64_t(rows.q[0].size()), n = at.rows[0];
    for (int64_t head = 0; head < h; ++head)
      for (int64_t i = all - n; i < all; ++i) {
        std::vector<double> sum(16, 0.0), plain(16, 0.0);
        double total = 0, plain_total = 0;
        for (int64_t j = 0; j <= i; ++j) {
          const double w = std::exp(rows.dot(size_t(head), size_t(i), size_t(j), double(apart(i, j))) / 4);
          const double own = std::exp(rows.dot(size_t(head), size_t(i), size_t(j), double(i - j)) / 4);
          total += w, plain_total += own;
          for (size_t c = 0; c < 16; ++c) {
            const double v = rows.v[rows.kv_of(size_t(head))][size_t(j)][c];
            sum[c] += w * v, plain[c] += own * v;
          }
        }
        for (size_t c = 0; c < 16; ++c) {
          const double difference = std::abs(sum[c] / total - at.out.at<float>(head * n + i - (all - n), int64_t(c)));
          moved = std::max(moved, std::abs(sum[c] / total - plain[c] / plain_total));
          worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
        }
      }
    checked += n;
  });
  session.prefill(text(length, 6));
  for (int32_t i = 0; i < 6; ++i) session.decode(i * 5 % 61);
  EXPECT_EQ(checked, length + 6);
  EXPECT_LT(worst, 1e-5) << spec;
  return moved;
}

TEST(SessionReads, SelfExtendDividesFarPositions) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const auto& [group, window, length, chunk] :
         {std::tuple{3, 8, 60, 0}, {4, 10, 83, 25}, {7, 1, 40, 0}, {16, 30, 50, 20}, {2, 100, 40, 0}}) {
      const std::string spec = "self-extend(group=" + std::to_string(group) + ",window=" + std::to_string(window) + ")";
      const double moved = read_apart(h, g, spec, length, chunk, [group = group, window = window](int64_t i, int64_t j) {
        return i - j < window ? i - j : i / group + window - window / group - j / group;
      });
      if (window < length) { EXPECT_GT(moved, 1e-4); }
    }
}

// Three places for a query, one for a key; true distances among the latest, and none beyond c.
TEST(SessionReads, DualChunksKeepDistancesShort) {
  const std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> cases{
      {12, 4, 61, 0}, {20, 5, 83, 25}, {2, 1, 40, 0}, {30, 15, 50, 20}, {24, 0, 70, 7}, {9, 2, 1, 0}, {100, 20, 60, 0}};
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const auto& [c, w, length, chunk] : cases) {
      const int64_t s = c - (w > 0 ? w : c / 12), near = c - s;
      const std::string spec = "dca(chunk=" + std::to_string(c) + ",local=" + std::to_string(w) + ")";
      int64_t most = 0;
      const double moved = read_apart(h, g, spec, length, chunk, [&, c = c](int64_t i, int64_t j) {
        const int64_t chunks = i / s - j / s;
        const int64_t query = chunks == 0   ? i % s
                              : chunks == 1 ? std::min<int64_t>(i % s + s, c)
                                            : std::min<int64_t>(2 * s - 1, c);
        if (i - j < near) { EXPECT_EQ(query - j % s, i - j); }
        most = std::max(most, query - j % s);
        return query - j % s;
      });
      EXPECT_LE(most, c);
      if (length > 2 * s) { EXPECT_GT(moved, 1e-4) << spec; }
      if (length + 6 <= s) { EXPECT_LT(moved, 1e-9) << spec; }
    }
}

/// Σ or max over the group of the weights that the last query pays to the entries of the first KV head, over all of them.
std::vector<double> paid(LayerView& at, Observe::Heads heads) {
  Observe how;
  how.rows = Observe::Rows::Last, how.heads = heads;
  const Ragged columns = at.observe(at.last_queries(1), how);
  std::vector<double> out;
  for (int64_t j = columns.begin(0); j < columns.end(0); ++j) out.push_back(columns.values.at<float>(j));
  return out;
}

TEST(Sessions, RecycledAttentionReadsTheLastFullStepsBest) {
  SessionOptions o;
  o.attention = "recycled-attention(budget=9,stride=4)", o.backend = "reference";
  Session session(tiny_model(6, 2), o);
  std::vector<double> scores;
  int full = 0, partial = 0;
  session.tap([&](LayerView& at) {
    if (at.layer != 2) return;
    if (!at.decoding()) {
      scores = paid(at, Observe::Heads::GroupMax);
      return;
    }
    scores.push_back(INFINITY);  // a new token has no score yet and stays
    if (at.read.plan.form == Plan::Form::Dense) {
      scores = paid(at, Observe::Heads::GroupMax);
      ++full;
    } else {
      EXPECT_EQ(first_row(at.read.plan), top(scores, 9));
      ++partial;
    }
  });
  session.prefill(text(60, 4));
  for (int32_t i = 0; i < 12; ++i) session.decode(i * 5 % 61);
  EXPECT_EQ(full, 3);
  EXPECT_EQ(partial, 9);
}

// The second filter that is named has a sliding window, and leaves the choice to the next layer.
TEST(Sessions, OmniKvHandsTheFiltersChoiceOn) {
  for (const auto& [spec, filter, first] :
       {std::tuple{"omnikv(budget=7,filters=0,wait=1)", 0, 2}, {"omnikv(budget=7,filters=1,wait=0)", 2, 3}}) {
    SessionOptions o;
    o.attention = spec, o.backend = "reference";
    Session session(tiny_model(6, 2), o);
    std::vector<double> most;
    int handed = 0;
    session.tap([&, filter = filter, first = first](LayerView& at) {
      if (!at.decoding()) return;
      if (at.layer < first) { EXPECT_EQ(at.read.plan.form, Plan::Form::Dense); }
      if (at.layer == filter) {
        Observe how;
        how.rows = Observe::Rows::Last, how.heads = Observe::Heads::Each;
        const Ragged each = at.observe(at.q, how);
        const int64_t length = each.length(0), group = at.model.group();
        most.assign(size_t(length), 0.0);
        for (int64_t s = 0; s < each.segments(); ++s)
          for (int64_t j = 0; j < length; ++j)
            for (int64_t member = 0; member < group; ++member)
              most[size_t(j)] = std::max(most[size_t(j)], double(each.values.at<float>(each.begin(s) + j, member)));
        for (int64_t j = 50; j < length; ++j) most[size_t(j)] = INFINITY;  // generated
      }
      if (at.layer < first) return;
      EXPECT_EQ(first_row(at.read.plan), top(most, 7 + at.step() + 1));
      EXPECT_EQ(at.read.plan.scope, Plan::Scope::Layer);
      ++handed;
    });
    session.prefill(text(50, 4));
    for (int32_t i = 0; i < 5; ++i) session.decode(i * 5 % 61);
    EXPECT_EQ(handed, 5 * (4 - first)) << spec;
  }
}

// Of the two layers that are named, the one with a sliding window names nothing.
TEST(Sessions, HyLraHandsTheFullLayersChoiceOn) {
  for (const auto& [spec, full] : {std::pair{"hylra(budget=7,full=1)", 0}, {"hylra(budget=7,full=[1,2])", 2}}) {
    SessionOptions o;
    o.attention = spec, o.backend = "reference";
    Session session(tiny_model(6, 2), o);
    std::vector<double> mean;
    int handed = 0;
    session.tap([&, full = full](LayerView& at) {
      if (!at.decoding()) return;
      if (at.layer <= 1 || at.layer == full) {
        EXPECT_EQ(at.read.plan.form, Plan::Form::Dense);
      } else {
        EXPECT_EQ(first_row(at.read.plan), top(mean, 7));
        EXPECT_EQ(at.read.plan.scope, Plan::Scope::KvHead);
        ++handed;
      }
      if (at.layer != full) return;
      mean = paid(at, Observe::Heads::GroupMean);
      mean.back() = INFINITY;  // the newest is always named
    });
    session.prefill(text(50, 4));
    for (int32_t i = 0; i < 5; ++i) session.decode(i * 5 % 61);
    EXPECT_EQ(handed, full == 0 ? 10 : 5) << spec;
  }
}

TEST(Sessions, TokenSelectReadsItsChoiceWithoutGaps) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const auto& [length, k, sinks, local] : {std::tuple{70, 9, 2, 5}, {41, 20, 0, 1}, {30, 12, 16, 20}}) {
      const auto model = tiny_model(h, g);
      Session session(model, in_f32("token-select(budget=" + std::to_string(k) + ",sinks=" + std::to_string(sinks) +
                                    ",local=" + std::to_string(local) + ")"));
      PlainRows rows(model->info());
      int steps = 0;
      session.tap([&, k = k, sinks = sinks, local = local](LayerView& at) {
        if (at.layer != 2) return;
        rows.take(at);
        if (!at.decoding()) return;
        const int64_t m = int64_t(rows.k[0].size());
        std::vector<double> votes(size_t(m), 0.0);
        for (size_t head = 0; head < rows.q.size(); ++head) {
          std::vector<double> paid(size_t(m), 0.0);
          double total = 0;
          for (int64_t j = sinks; j < m - local; ++j)
            total += paid[size_t(j)] = std::exp(rows.dot(head, rows.q[head].size() - 1, size_t(j), double(local)));
          for (int64_t j = sinks; j < m - local; ++j) votes[size_t(j)] += paid[size_t(j)] / total;
        }
        for (int64_t j = 0; j < m; ++j)
          if (j < sinks || j >= m - local) votes[size_t(j)] = INFINITY;
        const auto list = top(votes, k + sinks + local);
        EXPECT_EQ(first_row(at.read.plan), list);
        EXPECT_EQ(at.read.plan.scope, Plan::Scope::Layer);
        EXPECT_LT(rows.error(at, list, [&](size_t rank, int32_t) { return double(list.size() - 1 - rank); }), 2e-4);
        ++steps;
      });
      session.prefill(text(length, 6));
      for (int32_t i = 0; i < 6; ++i) session.decode(i * 5 % 61);
      EXPECT_EQ(steps, 6);
    }
}

TEST(Sessions, InfLlmReadsBlocksByWhatWasAskedForAtOneDistance) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const auto& [length, sinks, local, block, kept, budget] :
         {std::tuple{70, 3, 16, 6, 2, 12}, {83, 0, 9, 5, 1, 17}, {40, 4, 1, 3, 3, 6}, {30, 2, 60, 8, 2, 8}})
      for (const int64_t chunk : {0, 25}) {
        const auto model = tiny_model(h, g);
        Session session(model, in_f32("infllm(budget=" + std::to_string(budget) + ",sinks=" + std::to_string(sinks) +
                                          ",local=" + std::to_string(local) + ",block=" + std::to_string(block) +
                                          ",representatives=" + std::to_string(kept) + ")",
                                      chunk));
        PlainRows rows(model->info());
        int steps = 0;
        session.tap([&, sinks = sinks, local = local, block = block, kept = kept, budget = budget](LayerView& at) {
          if (at.layer != 2) return;
          rows.take(at);
          if (!at.decoding()) return;
          const int64_t m = int64_t(rows.k[0].size()), blocks = std::max<int64_t>(0, (m - local - sinks) / block);
          std::vector<double> score(static_cast<size_t>(blocks), 0.0);
          for (size_t head = 0; head < rows.q.size(); ++head)
            for (int64_t b = 0; b < blocks; ++b) {
              std::vector<double> asked;
              for (int64_t j = sinks + b * block; j < sinks + (b + 1) * block; ++j) {
                double& sum = asked.emplace_back(0.0);
                for (int64_t i = j; i < std::min(m - 1, j + local); ++i)
                  sum += rows.dot(head, size_t(i), size_t(j), double(i - j));
              }
              for (int32_t e : top(asked, kept))
                score[size_t(b)] += rows.dot(head, size_t(m - 1), size_t(sinks + b * block + e), double(local - 1));
            }
          std::set<int32_t> list;
          for (int32_t b : top(score, (budget + block - 1) / block))
            for (int32_t e = 0; e < block; ++e) list.insert(sinks + b * block + e);
          for (int64_t j = 0; j < m; ++j)
            if (j < sinks || j >= sinks + blocks * block) list.insert(int32_t(j));
          const std::vector<int32_t> expected(list.begin(), list.end());
          EXPECT_EQ(first_row(at.read.plan), expected);
          EXPECT_LT(
              rows.error(at, expected, [&](size_t, int32_t j) { return double(std::min<int64_t>(m - 1 - j, local - 1)); }),
              2e-4);
          ++steps;
        });
        session.prefill(text(length, 7));
        for (int32_t i = 0; i < 6; ++i) session.decode(i * 5 % 61);
        EXPECT_EQ(steps, 6);
      }
}

std::vector<double> turned(const PlainRows& rows, std::vector<double> x, double place) {
  const size_t half = rows.turn.size();
  for (size_t c = 0; c < half; ++c) {
    const double a = place * rows.turn[c], one = x[c], two = x[c + half];
    x[c] = one * std::cos(a) - two * std::sin(a), x[c + half] = one * std::sin(a) + two * std::cos(a);
  }
  return x;
}

/// softmax(scale · x·y_j) over the rows y, and the mean of the rows by it.
std::vector<double> answer(const std::vector<double>& x, const Rows& y, double scale) {
  std::vector<double> w, out(x.size(), 0.0);
  for (const auto& row : y) w.push_back(std::exp(scale * std::inner_product(x.begin(), x.end(), row.begin(), 0.0)));
  const double total = std::accumulate(w.begin(), w.end(), 0.0);
  for (size_t j = 0; j < y.size(); ++j)
    for (size_t c = 0; c < out.size(); ++c) out[c] += w[j] / total * y[j][c];
  return out;
}

TEST(Sessions, LongHeadsReadsChunksByTheirRepresentatives) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const auto& [length, size, most, part] :
         {std::tuple{83, 8, 5, 0}, {83, 8, 4, 16}, {47, 5, 6, 0}, {9, 1, 4, 3}, {20, 30, 3, 0}}) {
      const auto model = tiny_model(h, g);
      Session session(
          model, in_f32("long-heads(chunk=" + std::to_string(size) + ",chunks=" + std::to_string(most) + ")", part));
      PlainRows rows(model->info());
      int steps = 0;
      session.tap([&, h = h, g = g, size = size, most = most](LayerView& at) {
        if (at.layer != 2) return;
        rows.take(at);
        if (!at.decoding()) return;
        const int64_t m = int64_t(rows.k[0].size()), chunks = (m + size - 1) / size;
        const Plan& plan = at.read.plan;
        ASSERT_EQ(plan.scope, Plan::Scope::KvHead);
        for (int64_t kv = 0; kv < g; ++kv) {
          std::vector<double> score(static_cast<size_t>(chunks), 0.0);
          for (int64_t b = 0; b + 2 < chunks; ++b) {  // the last two are read anyway
            Rows keys;
            for (int64_t j = 0; j < size; ++j)
              keys.push_back(turned(rows, rows.k[size_t(kv)][size_t(b * size + j)], double(j)));
            for (int64_t head = kv * h / g; head < (kv + 1) * h / g; ++head) {
              std::vector<double> mean(16, 0.0);
              for (int64_t i = 0; i < size; ++i) {
                const auto o = answer(turned(rows, rows.q[size_t(head)][size_t(b * size + i)], double(i)), keys, 0.25);
                for (size_t c = 0; c < mean.size(); ++c) mean[c] += o[c] / double(size);
              }
              const auto represented = answer(mean, keys, 0.25);
              score[size_t(b)] += std::inner_product(represented.begin(), represented.end(),
                                                     rows.q[size_t(head)].back().begin(), 0.0);
            }
          }
          score[0] = INFINITY;
          for (int64_t b = std::max<int64_t>(0, chunks - 2); b < chunks; ++b) score[size_t(b)] = INFINITY;
          std::vector<int32_t> expected, list;
          for (int32_t b : top(score, most))
            for (int64_t j = b * size; j < std::min<int64_t>(m, (b + 1) * size); ++j) expected.push_back(int32_t(j));
          for (int64_t e = plan.begin(kv); e < plan.end(kv); ++e) list.push_back(plan.index.at<int32_t>(e));
          EXPECT_EQ(list, expected) << "length " << m << " chunk " << size;
          EXPECT_LT(rows.error(at, list, [&](size_t rank, int32_t) { return double(list.size() - 1 - rank); }, kv), 2e-4);
        }
        ++steps;
      });
      session.prefill(text(length, 11));
      for (int32_t i = 0; i < 12; ++i) session.decode(i * 5 % 61);
      EXPECT_EQ(steps, 12);
    }
}

}  // namespace
}  // namespace heed::test
