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

// Two positions for each pair of tokens, in prompts at once, in parts, and token by token.
TEST(SessionReads, SelfExtendDividesFarPositions) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const auto& [group, window, length, chunk] :
         {std::tuple{3, 8, 60, 0}, {4, 10, 83, 25}, {7, 1, 40, 0}, {16, 30, 50, 20}, {2, 100, 40, 0}}) {
      const auto model = tiny_model(h, g);
      Session session(
          model, in_f32("self-extend(group=" + std::to_string(group) + ",window=" + std::to_string(window) + ")", chunk));
      PlainRows rows(model->info());
      int64_t checked = 0;
      double moved = 0;  // how far outputs are from those at true distances
      session.tap([&, h = h, group = group, window = window](LayerView& at) {
        if (at.layer != 2) return;
        rows.take(at);
        const int64_t all = int64_t(rows.q[0].size()), n = at.rows[0];
        for (int64_t head = 0; head < h; ++head)
          for (int64_t i = all - n; i < all; ++i) {
            std::vector<double> sum(16, 0.0), plain(16, 0.0);
            double total = 0, plain_total = 0;
            for (int64_t j = 0; j <= i; ++j) {
              const int64_t apart = i - j < window ? i - j : i / group + window - window / group - j / group;
              const double w = std::exp(rows.dot(size_t(head), size_t(i), size_t(j), double(apart)) / 4);
              const double own = std::exp(rows.dot(size_t(head), size_t(i), size_t(j), double(i - j)) / 4);
              total += w, plain_total += own;
              for (size_t c = 0; c < 16; ++c) {
                const double v = rows.v[rows.kv_of(size_t(head))][size_t(j)][c];
                sum[c] += w * v, plain[c] += own * v;
              }
            }
            for (size_t c = 0; c < 16; ++c) moved = std::max(moved, std::abs(sum[c] / total - plain[c] / plain_total));
            for (size_t c = 0; c < 16; ++c)
              ASSERT_NEAR(sum[c] / total, at.out.at<float>(head * n + i - (all - n), int64_t(c)), 1e-5)
                  << "head " << head << " row " << i;
          }
        checked += n;
      });
      session.prefill(text(length, 6));
      for (int32_t i = 0; i < 6; ++i) session.decode(i * 5 % 61);
      EXPECT_EQ(checked, length + 6);
      if (window < length) { EXPECT_GT(moved, 1e-4); }
    }
}

}  // namespace
}  // namespace heed::test
