// Slots against the rules that they follow: how much is mapped, which free one is taken, what happens when memory is short.
#include "attention/slots.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/error.h"

namespace heed::test {
namespace {

constexpr int64_t kGroup = 65536, kStride = 10000;

TEST(Slots, MapWholeGroups) {
  SlotPool pool(cpu_memory(), {.group = kGroup}, 100, kStride);
  const int slot = pool.take(0);
  char* base = pool.base(slot);
  for (int64_t pages : {0, 1, 6, 7, 13, 14, 100}) {
    const int64_t groups = (pages * kStride + kGroup - 1) / kGroup, before = pool.mapped(slot) / kGroup;
    EXPECT_TRUE(pages == 0 || before == groups || !pool.holds(slot, pages));
    EXPECT_EQ(pool.map(slot, pages), groups - before);
    EXPECT_TRUE(pool.holds(slot, pages));
    EXPECT_EQ(pool.mapped(slot), groups * kGroup);
    EXPECT_EQ(pool.base(slot), base);
    std::memset(base, 1, size_t(pages * kStride));
  }
  EXPECT_EQ(pool.map(slot, 3), 0) << "nothing is given back by asking for less";
  pool.trim(slot, 14);
  EXPECT_EQ(pool.mapped(slot), 3 * kGroup);
  EXPECT_EQ(base[3 * kGroup - 1], 1) << "what is left is what it was";
  EXPECT_THROW(pool.map(slot, 101), Error);
}

TEST(Slots, TheLeastThatSufficesIsTaken) {
  SlotPool pool(cpu_memory(), {.group = kGroup}, 100, kGroup);
  std::vector<int> slots;
  for (int64_t pages : {9, 3, 5, 7}) slots.push_back(pool.take(0)), pool.map(slots.back(), pages);
  for (int slot : slots) pool.give(slot);
  EXPECT_EQ(pool.idle(), 24 * kGroup);
  EXPECT_EQ(pool.take(4), slots[2]);
  EXPECT_EQ(pool.take(4), slots[3]);
  EXPECT_EQ(pool.take(20), slots[0]) << "none suffices: the one that lacks least";
  EXPECT_EQ(pool.take(0), slots[1]);
  EXPECT_EQ(pool.idle(), 0);
  const int fresh = pool.take(0);
  EXPECT_EQ(std::count(slots.begin(), slots.end(), fresh), 0);
}

TEST(Slots, FreeOnesGiveWayWhenMemoryIsShort) {
  SlotPool pool(cpu_memory(), {.group = kGroup, .most = 10 * kGroup + 1}, 100, kGroup);
  const int one = pool.take(0), two = pool.take(0);
  pool.map(one, 6), pool.map(two, 4);
  EXPECT_THROW(pool.map(two, 5), Error);
  EXPECT_EQ(pool.mapped(two), 4 * kGroup);
  pool.give(one);
  EXPECT_EQ(pool.map(two, 6), 2);
  EXPECT_EQ(pool.idle(), 4 * kGroup) << "no more than was needed";
  EXPECT_EQ(pool.map(two, 10), 4);
  EXPECT_THROW(pool.map(two, 11), Error);
}

TEST(Slots, SayWhereTheyCannotBe) {
  EXPECT_THROW(SlotPool(cpu_memory(), {.group = 1000}, 1, 64), Error);
  Memory bare;
  EXPECT_THROW(SlotPool(bare, {.group = kGroup}, 1, 64), Error);
}

}  // namespace
}  // namespace heed::test
