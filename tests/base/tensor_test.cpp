#include "base/tensor.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

namespace heed {
namespace {

Buffer counting(std::initializer_list<int64_t> sizes) {
  Buffer b(Dtype::F32, sizes);
  std::iota(b->as<float>(), b->as<float>() + b->numel(), 0.0f);
  return b;
}

TEST(Tensor, ContiguousStridesAreCOrder) {
  const Buffer b = counting({2, 3, 4});
  EXPECT_EQ(b->numel(), 24);
  EXPECT_EQ(b->bytes(), 96);
  EXPECT_TRUE(b->contiguous());
  EXPECT_EQ(b->shape(), "[2, 3, 4]");
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j)
      for (int k = 0; k < 4; ++k) EXPECT_EQ(b->at<float>(i, j, k), float(i * 12 + j * 4 + k));
}

TEST(Tensor, SliceAndSelectAreViews) {
  const Buffer b = counting({2, 3, 4});
  const Tensor s = b->slice(1, 1, 3);
  EXPECT_EQ(s.shape(), "[2, 2, 4]");
  EXPECT_FALSE(s.contiguous());
  EXPECT_EQ(s.at<float>(1, 0, 2), 18.0f);
  const Tensor t = b->select(1, 2);
  EXPECT_EQ(t.shape(), "[2, 4]");
  EXPECT_EQ(t.at<float>(1, 3), 23.0f);
  EXPECT_EQ(b->select(0, 1).select(0, 1).select(0, 1).numel(), 1);
  EXPECT_EQ(b->slice(2, 4, 4).numel(), 0);
}

TEST(Tensor, WhatDoesNotFitIsRefused) {
  const Buffer b = counting({2, 3});
  EXPECT_THROW(b->slice(0, 1, 3), Error);
  EXPECT_THROW(b->slice(0, -1, 1), Error);
  EXPECT_THROW(b->slice(0, 2, 1), Error);
  EXPECT_THROW(b->slice(2, 0, 1), Error);
  EXPECT_THROW(b->select(1, 3), Error);
  EXPECT_THROW(b->reshape({4}), Error);
  EXPECT_THROW(b->slice(1, 0, 2).reshape({4}), Error);
  EXPECT_THROW(Tensor(nullptr, Dtype::F32, {1, 1, 1, 1, 1, 1}), Error);
  EXPECT_THROW(Buffer(Dtype::F32, {-1}), Error);
  EXPECT_THROW(Buffer(Dtype::F64, {int64_t(1) << 40, int64_t(1) << 40}), Error);
  EXPECT_THROW((Buffer::of<float>({3}, std::vector<float>{1, 2})), Error);
}

TEST(Tensor, BlockTypesCountBytesByBlocks) {
  const Tensor t(nullptr, Dtype::Q4_0, {5, 64});
  EXPECT_EQ(t.bytes(), 5 * 36);
  const Tensor k(nullptr, Dtype::Q6_K, {2, 512});
  EXPECT_EQ(k.bytes(), 2 * 2 * 210);
  char memory[5 * 36];
  const Tensor rows(memory, Dtype::Q4_0, {5, 64});
  EXPECT_EQ(static_cast<char*>(rows.slice(0, 3, 4).data) - memory, 3 * 36);
}

TEST(Tensor, SizeOneAxesAreContiguousWhateverTheirStride) {
  const Buffer b = counting({4, 6});
  EXPECT_TRUE(b->slice(0, 2, 3).contiguous());
  EXPECT_FALSE(b->slice(1, 2, 3).contiguous());
}

TEST(Buffer, IsAlignedEvenWhenEmpty) {
  for (int64_t n : {0, 1, 63, 1000}) EXPECT_EQ(reinterpret_cast<uintptr_t>(Buffer(Dtype::BF16, {n})->data) % 64, 0u);
}

TEST(Copy, ConvertsAndFollowsStrides) {
  const Buffer from = counting({3, 4});
  for (Dtype type : {Dtype::F64, Dtype::F16, Dtype::BF16, Dtype::I8, Dtype::U8, Dtype::I32, Dtype::I64}) {
    const Buffer to(type, {3, 4}), back(Dtype::F32, {3, 4});
    copy(from, to);
    copy(to, back);
    for (int i = 0; i < 12; ++i) EXPECT_EQ(back->as<float>()[i], float(i)) << info(type).name;
  }
  const Buffer wide = Buffer::zeros(Dtype::F32, {3, 8});
  copy(from, wide->slice(1, 2, 6));
  EXPECT_EQ(wide->at<float>(2, 5), 11.0f);
  EXPECT_EQ(wide->at<float>(2, 6), 0.0f);
  EXPECT_THROW(copy(from, wide), Error);
  EXPECT_THROW(copy(from, Tensor(wide->data, Dtype::Q4_0, {3, 4})), Error);
  copy(from->slice(0, 0, 0), wide->slice(0, 0, 0).slice(1, 0, 4));
}

TEST(Ragged, EndsMayLeaveGaps) {
  const Buffer values = counting({10, 2});
  const Buffer offsets = Buffer::of<int64_t>({4}, std::vector<int64_t>{0, 4, 4, 10});
  Ragged r{.values = values, .offsets = offsets, .ends = {}, .heads = 3, .bound = 10};
  EXPECT_EQ(r.segments(), 3);
  EXPECT_EQ(r.sequences(), 1);
  EXPECT_EQ(r.length(0), 4);
  EXPECT_EQ(r.length(1), 0);
  EXPECT_EQ(r.segment(2).at<float>(0, 1), 9.0f);
  const Buffer ends = Buffer::of<int64_t>({3}, std::vector<int64_t>{2, 4, 7});
  r.ends = ends;
  EXPECT_EQ(r.length(0), 2);
  EXPECT_EQ(r.segment(2).shape(), "[3, 2]");
}

TEST(Bf16, RoundsToNearestEven) {
  EXPECT_EQ(bf16(1.0f + 0x1.0p-8f).bits, bf16(1.0f).bits);     // a tie goes to the even neighbour
  EXPECT_EQ(float(bf16(1.0f + 0x3.0p-8f)), 1.0f + 0x1.0p-6f);  // the other way round
  EXPECT_EQ(float(bf16(1.0f + 0x1.0p-8f + 0x1.0p-20f)), 1.0f + 0x1.0p-7f);
  EXPECT_TRUE(std::isnan(float(bf16(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_TRUE(std::isnan(float(bf16(std::bit_cast<float>(0x7f800001u)))));  // a NaN whose upper half alone is infinity
  EXPECT_TRUE(std::isinf(float(bf16(std::numeric_limits<float>::max()))));
  EXPECT_EQ(float(bf16(-0.0f)), 0.0f);
}

}  // namespace
}  // namespace heed
