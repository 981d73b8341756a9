#include "base/comm.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/random.h"
#include "base/threads.h"

namespace heed {
namespace {

template <class T>
Tensor view(std::vector<T>& values, std::initializer_list<int64_t> sizes) {
  return Tensor(values.data(), DtypeOf<T>::value, sizes);
}

class Ranks : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Sizes, Ranks, testing::Values(1, 2, 3, 5, 8));

TEST_P(Ranks, RingCarriesEveryShardPastEveryRank) {
  const int size = GetParam();
  run_ranks(size, [&](Comm& comm) {
    std::vector<float> here(7, float(comm.rank())), next(7, NAN);
    for (int s = 1; s < size; ++s) {
      const Comm::Ticket ticket = comm.start_ring(view(here, {7}), view(next, {7}));
      comm.finish(ticket);
      std::swap(here, next);
      ASSERT_EQ(here, std::vector<float>(7, float((comm.rank() - s + size) % size)));
    }
    EXPECT_EQ(comm.sent().elements, 7 * (size - 1));
    EXPECT_EQ(comm.sent().bytes, 28 * (size - 1));
  });
}

TEST_P(Ranks, RingStepsMayBeNegativeAndLong) {
  const int size = GetParam();
  run_ranks(size, [&](Comm& comm) {
    for (int step : {-1, 2, -3, 11}) {
      std::vector<int32_t> mine{comm.rank()}, got{-1};
      comm.ring(view(mine, {1}), view(got, {1}), step);
      EXPECT_EQ(got[0], ((comm.rank() - step) % size + size) % size);
    }
  });
}

TEST_P(Ranks, AllGatherIsRankOrdered) {
  const int size = GetParam();
  run_ranks(size, [&](Comm& comm) {
    std::vector<int64_t> mine{comm.rank() * 10, comm.rank() * 10 + 1}, all(size_t(size) * 2, -1);
    comm.all_gather(view(mine, {2}), view(all, {size, 2}));
    for (int r = 0; r < size; ++r) {
      EXPECT_EQ(all[size_t(r) * 2], r * 10);
      EXPECT_EQ(all[size_t(r) * 2 + 1], r * 10 + 1);
    }
    EXPECT_EQ(comm.sent().elements, 2 * (size - 1));
  });
}

TEST_P(Ranks, AllToAllTransposes) {
  const int size = GetParam();
  run_ranks(size, [&](Comm& comm) {
    std::vector<float> in(size_t(size) * 3), out(size_t(size) * 3, NAN);
    for (int r = 0; r < size; ++r)
      for (int i = 0; i < 3; ++i) in[size_t(r * 3 + i)] = float(comm.rank() * 100 + r * 10 + i);
    comm.all_to_all(view(in, {size, 3}), view(out, {size, 3}));
    for (int r = 0; r < size; ++r)
      for (int i = 0; i < 3; ++i) EXPECT_EQ(out[size_t(r * 3 + i)], float(r * 100 + comm.rank() * 10 + i));
    EXPECT_EQ(comm.sent().elements, 3 * (size - 1));
  });
}

TEST_P(Ranks, AllReduceAddsInRankOrderToTheBit) {
  const int size = GetParam();
  const auto value = [](int rank, int i) {
    return float(Random(uint64_t(rank * 1000 + i)).normal() * std::pow(10.0, i % 9 - 4));
  };
  for (int count : {0, 1, 3, 64, 1001}) {
    std::atomic<int64_t> sent{0};
    run_ranks(size, [&](Comm& comm) {
      std::vector<float> x(static_cast<size_t>(count));
      for (int i = 0; i < count; ++i) x[size_t(i)] = value(comm.rank(), i);
      std::vector<float> top = x;
      comm.all_reduce(view(x, {count}), ReduceOp::Sum);
      sent += comm.sent().elements;
      comm.all_reduce(view(top, {count}), ReduceOp::Max);
      for (int i = 0; i < count; ++i) {
        float sum = value(0, i), most = sum;
        for (int r = 1; r < size; ++r) {
          sum += value(r, i);
          most = std::max(most, value(r, i));
        }
        ASSERT_EQ(x[size_t(i)], sum) << i;
        ASSERT_EQ(top[size_t(i)], most) << i;
      }
    });
    EXPECT_EQ(sent.load(), 2 * (size - 1) * count);  // every element to its owner, and back to all
  }
}

TEST(Comm, AllReduceCountsTwiceTheSharesOfOthers) {
  run_ranks(4, [&](Comm& comm) {
    std::vector<double> x(40, 1.0);
    comm.all_reduce(view(x, {40}), ReduceOp::Sum);
    EXPECT_EQ(comm.sent().elements, 2 * 3 * 10);
    EXPECT_EQ(x[7], 4.0);
  });
}

TEST(Comm, MaxKeepsNaNAndInfinity) {
  run_ranks(3, [&](Comm& comm) {
    const float inf = std::numeric_limits<float>::infinity();
    std::vector<float> x{comm.rank() == 1 ? NAN : 5.0f, -inf, comm.rank() == 2 ? inf : 0.0f};
    comm.all_reduce(view(x, {3}), ReduceOp::Max);
    EXPECT_TRUE(std::isnan(x[0]));
    EXPECT_EQ(x[1], -inf);
    EXPECT_EQ(x[2], inf);
  });
}

TEST(Comm, TransfersOverlapAndFinishInAnyOrder) {
  run_ranks(2, [&](Comm& comm) {
    std::vector<float> a(5, float(comm.rank())), b(5, float(10 + comm.rank())), from_a(5), from_b(5);
    const Comm::Ticket first = comm.start_ring(view(a, {5}), view(from_a, {5}));
    const Comm::Ticket second = comm.start_ring(view(b, {5}), view(from_b, {5}));
    comm.finish(second);
    comm.finish(first);
    EXPECT_EQ(from_a[0], float(1 - comm.rank()));
    EXPECT_EQ(from_b[0], float(11 - comm.rank()));
    EXPECT_THROW(comm.finish(first), Error);
  });
}

TEST(Comm, SplitMakesRowsAndColumnsOfAMesh) {
  run_ranks(6, [&](Comm& comm) {  // 3 rows of 2
    const int row = comm.rank() / 2, column = comm.rank() % 2;
    const auto along_row = comm.split(row, column);
    const auto along_column = comm.split(column, -row);  // keys turn the order round
    ASSERT_EQ(along_row->size(), 2);
    ASSERT_EQ(along_column->size(), 3);
    EXPECT_EQ(along_row->rank(), column);
    EXPECT_EQ(along_column->rank(), 2 - row);
    std::vector<int32_t> sum{comm.rank()};
    along_row->all_reduce(view(sum, {1}), ReduceOp::Sum);
    EXPECT_EQ(sum[0], 4 * row + 1);
    std::vector<int32_t> mine{comm.rank()}, all(3, -1);
    along_column->all_gather(view(mine, {1}), view(all, {3, 1}));
    EXPECT_EQ(all, (std::vector<int32_t>{4 + column, 2 + column, column}));
    comm.barrier();
  });
}

TEST(Comm, BarrierHoldsBackEveryRank) {
  std::atomic<int> arrived{0};
  run_ranks(5, [&](Comm& comm) {
    for (int round = 1; round <= 20; ++round) {
      ++arrived;
      comm.barrier();
      EXPECT_GE(arrived.load(), 5 * round);
      comm.barrier();
    }
  });
}

TEST(Comm, OneRankThatThrowsFreesTheOthers) {
  for (int culprit = 0; culprit < 4; ++culprit) {
    std::atomic<int> told{0};
    try {
      run_ranks(4, [&](Comm& comm) {
        std::vector<float> x(64, 1.0f), y(64);
        if (comm.rank() == culprit) {
          comm.start_ring(view(x, {64}), view(y, {64}));  // left under way
          throw std::runtime_error("the cause");
        }
        try {
          comm.ring(view(x, {64}), view(y, {64}));
          for (;;) comm.all_reduce(view(x, {64}), ReduceOp::Sum);
        } catch (const Error&) {
          ++told;
          throw;
        }
      });
      FAIL() << "nothing was thrown";
    } catch (const std::runtime_error& e) { EXPECT_STREQ(e.what(), "the cause"); }
    EXPECT_EQ(told.load(), 3);
  }
}

TEST(Comm, WaitingForARankThatReturnedIsAnError) {
  EXPECT_THROW(run_ranks(3,
                         [&](Comm& comm) {
                           if (comm.rank() != 1) comm.barrier();
                         }),
               Error);
}

TEST(Comm, RanksThatAllWaitAreAnError) {
  EXPECT_THROW(run_ranks(2,
                         [&](Comm& comm) {
                           std::vector<float> x(1);
                           const Comm::Message receive{1 - comm.rank(), view(x, {1})};
                           comm.finish(comm.start({}, {&receive, 1}));
                         }),
               Error);
}

TEST(Comm, WhatDoesNotFitIsRefused) {
  EXPECT_THROW(run_ranks(0, [](Comm&) {}), Error);
  run_ranks(1, [&](Comm& comm) {
    std::vector<float> x(6), y(6);
    EXPECT_THROW(comm.all_gather(view(x, {6}), view(y, {2, 3})), Error);
    EXPECT_THROW(comm.all_to_all(view(x, {6}), view(y, {1, 6})), Error);
    EXPECT_THROW(comm.ring(view(x, {2, 3}).slice(1, 0, 2), view(y, {4})), Error);
    const Comm::Message nobody{1, view(x, {6})};
    EXPECT_THROW(comm.start({&nobody, 1}, {}), Error);
    EXPECT_THROW(comm.finish(12345), Error);
    std::vector<uint8_t> bytes(4);
    EXPECT_THROW(comm.all_reduce(view(bytes, {4}), ReduceOp::Sum), Error);
  });
  EXPECT_THROW(run_ranks(2,
                         [&](Comm& comm) {  // the two sides disagree
                           std::vector<float> x(4), y(4);
                           comm.ring(view(x, {comm.rank() + 1}), view(y, {comm.rank() + 1}));
                         }),
               Error);
}

TEST(Comm, RanksShareTheThreadsWithoutDeadlock) {
  run_ranks(4, [&](Comm& comm) {
    std::vector<int64_t> part(97);
    int64_t expected = 0;
    for (int round = 0; round < 50; ++round) {
      parallel_for(int64_t(part.size()), [&](int64_t i) { part[size_t(i)] = i * (comm.rank() + 1) + round; });
      std::vector<int64_t> sum{std::accumulate(part.begin(), part.end(), int64_t(0))};
      comm.all_reduce(view(sum, {1}), ReduceOp::Sum);
      expected = 10 * (96 * 97 / 2) + 4 * 97 * round;
      ASSERT_EQ(sum[0], expected);
    }
  });
}

TEST(Comm, CallsInsideAParallelRegionAreRefused) {
  run_ranks(1, [&](Comm& comm) {
    std::vector<float> x(1), y(1);
    EXPECT_THROW(parallel([&](int) { comm.ring(view(x, {1}), view(y, {1})); }), Error);
  });
}

}  // namespace
}  // namespace heed
