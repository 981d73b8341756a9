#include "base/threads.h"

#include <gtest/gtest.h>

#include <atomic>
#include <limits>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/error.h"

namespace heed {
namespace {

class Threads : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { set_threads(GetParam()); }
  void TearDown() override { set_threads(0); }
};
INSTANTIATE_TEST_SUITE_P(Counts, Threads, testing::Values(1, 2, 3, 8));

TEST_P(Threads, EveryWorkerRunsTheBodyOnce) {
  EXPECT_EQ(threads(), GetParam());
  for (int round = 0; round < 300; ++round) {
    std::vector<int> calls(size_t(GetParam()), 0);
    parallel([&](int worker) { ++calls[size_t(worker)]; });
    ASSERT_EQ(calls, std::vector<int>(size_t(GetParam()), 1));
  }
}

TEST_P(Threads, WorkerZeroIsTheCaller) {
  std::thread::id zero;
  parallel([&](int worker) {
    if (worker == 0) zero = std::this_thread::get_id();
  });
  EXPECT_EQ(zero, std::this_thread::get_id());
}

TEST_P(Threads, ForVisitsEveryIndexOnce) {
  for (int64_t count : {0, 1, 2, 7, 1000}) {
    std::vector<int> visits(static_cast<size_t>(count), 0);
    parallel_for(count, [&](int64_t i) { ++visits[size_t(i)]; });
    EXPECT_EQ(visits, std::vector<int>(size_t(count), 1));
    parallel_for(count, 3, [&](int, int64_t i) { ++visits[size_t(i)]; }, Deal::Stretches);
    EXPECT_EQ(visits, std::vector<int>(size_t(count), 2));
  }
  parallel_for(-5, [](int64_t) { FAIL(); });
}

TEST_P(Threads, ForVisitsMoreThanATicketCounts) {
  const int64_t count = (int64_t(1) << 21) + 3;
  std::vector<uint8_t> visits(size_t(count), 0);
  parallel_for(count, [&](int64_t i) { ++visits[size_t(i)]; });
  EXPECT_EQ(visits, std::vector<uint8_t>(size_t(count), 1));
  parallel_for(count, 100, [&](int, int64_t i) { ++visits[size_t(i)]; }, Deal::Stretches);
  EXPECT_EQ(visits, std::vector<uint8_t>(size_t(count), 2));
}

TEST_P(Threads, AWorkerHeldUpByOneItemLeavesTheRestToOthers) {
  if (GetParam() == 1) return;
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> done{0};
    parallel_for(40, [&](int64_t i) {
      if (i == 1)
        while (done.load() < 39) std::this_thread::yield();
      ++done;
    });
    ASSERT_EQ(done.load(), 40);
  }
}

/// A worker that never comes leaves its stretch to the others, from its beginning.
TEST_P(Threads, AHeldUpWorkersStretchIsTakenOver) {
  if (GetParam() == 1) return;
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> done{0};
    parallel_for(
        40, GetParam(),
        [&](int worker, int64_t) {
          if (worker == 1)
            while (done.load() < 39) std::this_thread::yield();
          ++done;
        },
        Deal::Stretches);
    ASSERT_EQ(done.load(), 40);
  }
}

TEST_P(Threads, NoMoreWorkersThanAskedFor) {
  for (int most : {1, 2, 100})
    for (int round = 0; round < 50; ++round) {
      std::vector<std::atomic<int>> inside(size_t(GetParam() + 1));
      std::atomic<int> wrong{0};
      parallel_for(50, most, [&](int worker, int64_t) {
        if (worker < 0 || worker >= most || worker >= GetParam()) {
          ++wrong;
          return;
        }
        if (inside[size_t(worker)]++ != 0) ++wrong;  // a worker's memory is its own
        inside[size_t(worker)]--;
      });
      ASSERT_EQ(wrong.load(), 0);
    }
}

TEST_P(Threads, SleepingWorkersWakeUp) {
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));  // longer than a worker spins
    std::atomic<int> calls{0};
    parallel([&](int) { ++calls; });
    ASSERT_EQ(calls.load(), GetParam());
  }
}

TEST_P(Threads, NestedRegionsRunOnTheWorkerAlone) {
  std::atomic<int> inner{0};
  std::atomic<int> wrong{0};
  EXPECT_FALSE(inside_parallel());
  parallel([&](int) {
    const auto self = std::this_thread::get_id();
    if (!inside_parallel() || threads() != 1) ++wrong;
    parallel([&](int worker) {
      if (worker != 0 || std::this_thread::get_id() != self) ++wrong;
      ++inner;
    });
    parallel_for(10, [&](int64_t) {
      if (std::this_thread::get_id() != self) ++wrong;
    });
    if (!inside_parallel()) ++wrong;
  });
  EXPECT_FALSE(inside_parallel());
  EXPECT_EQ(inner.load(), GetParam());
  EXPECT_EQ(wrong.load(), 0);
}

TEST_P(Threads, AnExceptionReachesTheCallerAndThePoolGoesOn) {
  for (int culprit = 0; culprit < GetParam(); ++culprit) {
    EXPECT_THROW(parallel([&](int worker) {
                   if (worker == culprit) throw std::runtime_error("worker");
                 }),
                 std::runtime_error);
    EXPECT_FALSE(inside_parallel());
    std::atomic<int> calls{0};
    parallel([&](int) { ++calls; });
    EXPECT_EQ(calls.load(), GetParam());
  }
  EXPECT_THROW(parallel_for(100,
                            [](int64_t i) {
                              if (i % 7 == 3) throw std::runtime_error("index");
                            }),
               std::runtime_error);
  EXPECT_THROW(parallel([](int) { parallel([](int) { throw std::logic_error("nested"); }); }), std::logic_error);
}

TEST_P(Threads, SeveralCallersTakeTurns) {
  std::vector<int64_t> sums(4, 0);
  std::vector<std::thread> callers;
  for (size_t c = 0; c < sums.size(); ++c)
    callers.emplace_back([&, c] {
      for (int round = 0; round < 50; ++round) {
        std::vector<int64_t> parts(33, 0);
        parallel_for(33, [&](int64_t i) { parts[size_t(i)] = i + round; });
        sums[c] += std::accumulate(parts.begin(), parts.end(), int64_t(0));
      }
    });
  for (std::thread& t : callers) t.join();
  EXPECT_EQ(sums, std::vector<int64_t>(4, 50 * (32 * 33 / 2) + 33 * (49 * 50 / 2)));
}

#if defined(__x86_64__) || defined(__aarch64__)
TEST_P(Threads, DenormalsAreFlushedInsideAndKeptOutside) {
  volatile float tiny = std::numeric_limits<float>::min(), half = 0.5f;
  std::atomic<int> kept{0};
  parallel([&](int) {
    if (tiny * half != 0) ++kept;
  });
  EXPECT_EQ(kept.load(), 0);
  EXPECT_NE(tiny * half, 0);
  EXPECT_THROW(parallel([](int) { throw std::runtime_error("out"); }), std::runtime_error);
  EXPECT_NE(tiny * half, 0);
}
#endif

TEST(SetThreads, IsRefusedInsideARegion) {
  EXPECT_THROW(parallel([](int) { set_threads(2); }), Error);
  set_threads(0);
  EXPECT_GE(threads(), 1);
}

}  // namespace
}  // namespace heed
