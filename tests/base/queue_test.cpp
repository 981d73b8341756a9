#include "base/queue.h"

#include <gtest/gtest.h>

#include <cstring>

namespace heed {
namespace {

TEST(Arena, PiecesAreAlignedAndApart) {
  Arena arena;
  std::vector<Tensor> pieces;
  for (int64_t n : {1, 17, 64, 1000, 300000, 5, 2000000, 3}) {
    pieces.push_back(arena.take(Dtype::F32, {n}));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(pieces.back().data) % 64, 0u);
    EXPECT_EQ(pieces.back().numel(), n);
    std::memset(pieces.back().data, int(pieces.size()), size_t(pieces.back().bytes()));
  }
  for (size_t i = 0; i < pieces.size(); ++i)
    for (int64_t j : {int64_t(0), pieces[i].bytes() - 1}) EXPECT_EQ(pieces[i].as<uint8_t>()[j], i + 1);
}

TEST(Arena, ZeroElementsAreFine) {
  Arena arena;
  EXPECT_EQ(arena.take(Dtype::F32, {0, 64}).numel(), 0);
  EXPECT_EQ(arena.take(Dtype::I64, {}).numel(), 1);
}

TEST(Arena, RewindGivesBackAndReusesTheSameMemory) {
  Arena arena;
  const Tensor kept = arena.take(Dtype::F32, {100});
  const Arena::Mark mark = arena.mark();
  const void* first = arena.take(Dtype::F32, {100}).data;
  arena.take(Dtype::F32, {3000000});
  const int64_t held = arena.bytes();
  for (int round = 0; round < 5; ++round) {
    arena.rewind(mark);
    EXPECT_EQ(arena.take(Dtype::F32, {100}).data, first);
    arena.take(Dtype::F32, {3000000});
    EXPECT_EQ(arena.bytes(), held);  // a steady state allocates nothing
  }
  EXPECT_NE(first, kept.data);
}

TEST(Arena, ABlockTooSmallIsSkippedNotLost) {
  Arena arena;
  const Arena::Mark start = arena.mark();
  arena.take(Dtype::U8, {1000});
  arena.take(Dtype::U8, {5 << 20});
  arena.rewind(start);
  arena.take(Dtype::U8, {5 << 20});  // skips the first block
  const int64_t held = arena.bytes();
  arena.rewind(start);
  arena.take(Dtype::U8, {1000});
  arena.take(Dtype::U8, {5 << 20});
  EXPECT_EQ(arena.bytes(), held);
}

TEST(Scratch, ScopesNest) {
  Arena arena;
  const void* outer_next;
  {
    Scratch outer(arena);
    arena.take(Dtype::F32, {10});
    const Arena::Mark before = arena.mark();
    {
      Scratch inner(arena);
      outer_next = arena.take(Dtype::F32, {10}).data;
    }
    EXPECT_EQ(arena.mark().used, before.used);
    EXPECT_EQ(arena.take(Dtype::F32, {10}).data, outer_next);
  }
  EXPECT_EQ(arena.mark().used, 0);
}

TEST(Queue, ReadBackCopiesAndIsCounted) {
  Queue queue;
  const std::vector<float> from{1, 2, 3};
  float to[3] = {};
  queue.read_back(Buffer::of<float>({3}, from), to);
  EXPECT_EQ(to[2], 3);
  EXPECT_EQ(queue.host_waits, 1);
  const Buffer wide = Buffer::zeros(Dtype::F32, {2, 4});
  EXPECT_THROW(queue.read_back(wide->slice(1, 0, 2), to), Error);
}

}  // namespace
}  // namespace heed
