// The store's page lists against vectors: what every segment holds through appends, evictions, forks and truncations.
#include "attention/store.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "attention/numbers.h"
#include "backends.h"
#include "base/random.h"

namespace heed::test {
namespace {

struct Mirror {
  std::vector<std::vector<std::pair<int32_t, float>>> held;  // position and key of each entry, segment by segment
  std::vector<int64_t> next;                                 // of each sequence
};

class Stores : public testing::TestWithParam<const char*> {
 protected:
  static constexpr int g = 2, sequences = 3, d = 8;
  Stores() : queue((guarded_kernels(), &kernels_named(GetParam())), *kernels_named(GetParam()).memory) {}

  StoreOptions options() const {
    StoreOptions o;
    o.k.kind = o.v.kind = PageType::Kind::F32;
    return o;
  }
  Mirror empty() const {
    return {std::vector<std::vector<std::pair<int32_t, float>>>(g * sequences), std::vector<int64_t>(sequences, 0)};
  }

  void append(Queue& q, Store& store, Mirror& mirror, std::vector<int64_t> rows) {
    const Scratch scope(q.scratch);
    std::vector<int64_t> offsets{0};
    std::vector<float> keys;
    std::vector<int32_t> positions;
    for (int s = 0; s < sequences; ++s)
      for (int head = 0; head < g; ++head) {
        offsets.push_back(offsets.back() + rows[size_t(s)]);
        for (int64_t i = 0; i < rows[size_t(s)]; ++i) {
          const float x = float(random.normal());
          positions.push_back(int32_t(mirror.next[size_t(s)] + i));
          keys.insert(keys.end(), d, x);
          mirror.held[size_t(s * g + head)].emplace_back(positions.back(), x);
        }
      }
    for (int s = 0; s < sequences; ++s) mirror.next[size_t(s)] += rows[size_t(s)];
    const int64_t count = offsets.back();
    const Tensor values = q.upload(keys).reshape({count, d});
    const Ragged k{values, q.upload(offsets), {}, g, count};
    const int64_t waits = q.host_waits;
    store.layer(0).append(q, k, k, q.upload(positions), rows);
    EXPECT_EQ(q.host_waits, waits);
  }

  void evict(Queue& q, Store& store, Mirror& mirror, int64_t most) {
    const Scratch scope(q.scratch);
    const int64_t capacity = std::max<int64_t>(1, store.layer(0).longest());
    std::vector<int32_t> index(size_t(capacity) * mirror.held.size(), 0), count;
    std::vector<int64_t> bound;
    int64_t together = 0;
    for (size_t s = 0; s < mirror.held.size(); ++s) {
      auto& held = mirror.held[s];
      std::vector<std::pair<int32_t, float>> left;
      const int64_t wanted = std::min<int64_t>(int64_t(held.size()), random.below(most + 1));
      std::vector<int32_t> chosen;
      for (size_t i = 0; i < held.size(); ++i) chosen.push_back(int32_t(i));
      for (size_t i = chosen.size(); i > 1; --i) std::swap(chosen[i - 1], chosen[size_t(random.below(int64_t(i)))]);
      chosen.resize(size_t(wanted));
      std::sort(chosen.begin(), chosen.end());
      std::copy(chosen.begin(), chosen.end(), index.begin() + int64_t(s) * capacity);
      for (int32_t i : chosen) left.push_back(held[size_t(i)]);
      held = left;
      count.push_back(int32_t(wanted)), bound.push_back(most), together += wanted;
    }
    const int64_t waits = q.host_waits;
    store.layer(0).compact(q, q.upload(index), q.upload(count), capacity, bound, together);
    EXPECT_EQ(q.host_waits, waits);
  }

  void check(Queue& q, Store& store, const Mirror& mirror, bool inherits = false) {
    const Scratch scope(q.scratch);
    LayerStore& layer = store.layer(0);
    const int64_t bound = layer.entries();
    int64_t total = 0, pages = 0;
    const Ragged k{q.scratch.take(Dtype::F32, {bound, d}), layer.offsets(q), {}, g, bound};
    if (bound > 0) q.run->page_read(q, layer.pages(), nullptr, k, {}, {});
    const Buffer offsets = q.read_back(k.offsets), keys = q.read_back(k.values);
    for (size_t s = 0; s < mirror.held.size(); ++s) {
      const auto& held = mirror.held[s];
      std::vector<int32_t> positions;
      for (size_t i = 0; i < held.size(); ++i) {
        positions.push_back(held[i].first);
        ASSERT_EQ(keys->at<float>(offsets->at<int64_t>(int64_t(s)) + int64_t(i), d - 1), held[i].second);
      }
      EXPECT_EQ(layer.positions(int64_t(s)), positions);
      EXPECT_LE(int64_t(held.size()), layer.length(int64_t(s)));
      total += int64_t(held.size()), pages += int64_t(held.size() + 63) / 64;
    }
    const SlotOptions& slots = store.options().slots;
    if (slots.group == 0) {
      EXPECT_EQ(store.bytes(), pages * layer.pages().layouts[0].bytes) << "what is reported is what is held";
    }
    store.sync();
    EXPECT_EQ(layer.entries(), total);
    if (slots.group == 0) return;
    const int64_t stride = kPageHeader + layer.pages().layouts[0].bytes;
    int64_t groups = 0;
    const Buffer table = q.read_back(layer.pages().table);
    for (size_t s = 0; s < mirror.held.size(); ++s) {
      const int64_t held = int64_t(mirror.held[s].size());
      groups += ((held + slots.ahead + 63) / 64 * stride + slots.group - 1) / slots.group;
      for (int64_t p = 1; p < (held + 63) / 64; ++p)
        EXPECT_EQ(table->at<uint64_t>(int64_t(s), p), table->at<uint64_t>(int64_t(s), 0) + uint64_t(p * stride));
    }
    if (inherits) EXPECT_GE(layer.bytes(), groups * slots.group) << "of a slot that was longer";
    else EXPECT_EQ(layer.bytes(), groups * slots.group);
  }

  Random random{5};
  Queue queue;
};
INSTANTIATE_TEST_SUITE_P(All, Stores, testing::Values("reference", "guarded"));

TEST_P(Stores, HoldWhatWasLeftInThem) {
  const StoreShape shape{g, d, d};
  Store store(queue, std::span(&shape, 1), options(), sequences);
  Mirror mirror = empty();
  for (int round = 0; round < 12; ++round) {
    append(queue, store, mirror, {random.below(150), random.below(3), round % 3 ? 0 : 64});
    if (round % 2) evict(queue, store, mirror, 10 + random.below(120));
    if (round % 5 == 4) {
      store.truncate(queue, 0, mirror.next[0] - 20);
      mirror.next[0] -= 20;
      for (int head = 0; head < g; ++head)
        std::erase_if(mirror.held[size_t(head)], [&](const auto& e) { return e.first >= mirror.next[0]; });
    }
    check(queue, store, mirror);
  }
}

// Forks share pages until one of them writes, and neither sees what the other does; whoever is left frees what is left.
TEST_P(Stores, ForksGoTheirOwnWay) {
  const StoreShape shape{g, d, d};
  for (bool original_first : {false, true}) {
    auto store = std::make_unique<Store>(queue, std::span(&shape, 1), options(), sequences);
    Mirror mirror = empty();
    append(queue, *store, mirror, {200, 64, 33});
    Queue beside(&queue);
    auto fork = std::make_unique<Store>(beside, *store);
    Mirror other = mirror;
    check(beside, *fork, other);
    for (int round = 0; round < 6; ++round) {
      append(queue, *store, mirror, {1, 70, 0});
      append(beside, *fork, other, {5, 0, 1});
      if (round == 2) evict(beside, *fork, other, 90);
      if (round == 4) evict(queue, *store, mirror, 40);
      check(queue, *store, mirror), check(beside, *fork, other);
    }
    if (original_first) store.reset();
    else fork.reset();
    Store& left = original_first ? *fork : *store;
    Mirror& its = original_first ? other : mirror;
    Queue& on = original_first ? beside : queue;
    for (int round = 0; round < 3; ++round)
      append(on, left, its, {90, 90, 90}), evict(on, left, its, 100), check(on, left, its);
  }
}

// A page turned to another layout keeps its entries, and takes new ones again behind a truncation into it.
// A fork keeps what its origin writes over, and what lies beside a rewritten entry stays with both.
TEST_P(Stores, RewrittenEntriesKeepWhatLiesBesideThem) {
  const StoreShape shape{g, d, d};
  StoreOptions o = options();
  o.bias = true;
  o.columns = {{.name = "a"}, {.name = "bounds", .keeps = Column::Keeps::KeyMax, .block = 16}, {.name = "b", .width = 3}};
  Store store(queue, std::span(&shape, 1), o, sequences);
  Mirror mirror = empty();
  append(queue, store, mirror, {70, 1, 129});
  LayerStore& layer = store.layer(0);
  const int64_t all = layer.entries();
  auto beside = [&](int64_t width) {
    return Ragged{queue.scratch.take(Dtype::F32, {all, width}), layer.offsets(queue), {}, g, all};
  };
  const std::vector<std::pair<int, int64_t>> columns = {{kBiasColumn, 1}, {store.column("a"), 1}, {store.column("b"), 3}};
  for (const auto& [column, width] : columns) {
    const Ragged values = beside(width);
    compute(queue, index() * 0.25 + column, values.values);
    layer.write_column(queue, column, values);
  }
  Store fork(queue, store);
  const Mirror before = mirror;
  // Of every second segment two entries from its first one on, if it has them.
  std::vector<int64_t> offsets{0};
  std::vector<float> keys;
  std::vector<int32_t> positions, first;
  for (size_t s = 0; s < mirror.held.size(); ++s) {
    auto& held = mirror.held[s];
    const int32_t at = s % 4 == 0 ? 0 : int32_t(held.size()) - 2;
    first.push_back(std::max(0, at));
    for (int32_t e = at; s % 2 == 0 && held.size() > 1 && e < at + 2; ++e) {
      held[size_t(e)].second = float(random.normal());
      positions.push_back(held[size_t(e)].first), keys.insert(keys.end(), d, held[size_t(e)].second);
    }
    offsets.push_back(int64_t(positions.size()));
  }
  const int64_t count = int64_t(positions.size());
  ASSERT_EQ(count, 4);
  const Ragged k{queue.upload(keys).reshape({count, d}), queue.upload(offsets), {}, g, count};
  layer.rewrite(queue, queue.upload(first), k, k, queue.upload(positions));
  check(queue, store, mirror);
  check(queue, fork, before);
  for (Store* which : {&store, &fork})
    for (const auto& [column, width] : columns) {
      const Ragged values = beside(width);
      queue.run->column_read(queue, which->layer(0).pages(), column, values);
      const Buffer back = queue.read_back(values.values);
      for (int64_t i = 0; i < all * width; ++i)
        ASSERT_EQ(back->as<float>()[i], float(i) * 0.25f + float(column)) << "column " << column << " number " << i;
    }
}

TEST_P(Stores, PagesTurnToAnotherLayoutAndBack) {
  const StoreShape shape{g, d, d};
  Store store(queue, std::span(&shape, 1), options(), sequences);
  PageType half;
  half.kind = PageType::Kind::F16;
  ASSERT_EQ(store.add_layout(half, half), 1);
  Mirror mirror = empty();
  append(queue, store, mirror, {300, 64, 10});
  const int64_t before = store.bytes();
  const Num old = floor_div(load(store.layer(0).pages().length, index()), 64);
  const Tensor first = compute(queue, Dtype::I32, {g * sequences}, 0),
               last = compute(queue, Dtype::I32, {g * sequences}, old);
  store.layer(0).convert(queue, first, last, 1, g * 5);
  store.layer(0).convert(queue, first, last, 1, g * 5);  // twice is once
  const int64_t turned = g * (4 + 1), exact = store.layer(0).pages().layouts[0].bytes,
                small = store.layer(0).pages().layouts[1].bytes;
  EXPECT_EQ(store.bytes(), before - turned * (exact - small));
  store.truncate(queue, 0, 100);
  EXPECT_EQ(store.bytes(), g * (small + exact + small + exact)) << "the page that is cut takes exact entries again";
  EXPECT_EQ(store.layer(0).positions(0).size(), 100u);
}

// Pages of a segment end to end whatever happens to it, mapped by whole groups, and where they were at first.
TEST_P(Stores, PagesInSlotsLieEndToEnd) {
  const StoreShape shape{.kv_heads = g, .d = d, .d_v = d, .slots = true};
  for (const auto& [group, ahead] : {std::pair{4096, 0}, {8192, 0}, {8192, 1}}) {
    StoreOptions o = options();
    o.slots = {.group = group, .entries = 2000, .ahead = ahead};
    o.columns = {{.name = "bounds", .keeps = Column::Keeps::KeyMax, .block = 16}};
    auto store = std::make_unique<Store>(queue, std::span(&shape, 1), o, sequences);
    Mirror mirror = empty();
    Buffer first;
    for (int round = 0; round < 10; ++round) {
      append(queue, *store, mirror, {1 + random.below(150), 1 + random.below(3), round % 3 ? 1 : 64});
      const Buffer table = queue.read_back(store->layer(0).pages().table);
      if (!first) first = queue.read_back(store->layer(0).pages().table);
      for (int64_t s = 0; s < g * sequences; ++s) EXPECT_EQ(table->at<uint64_t>(s, 0), first->at<uint64_t>(s, 0));
      if (round % 2) evict(queue, *store, mirror, 10 + random.below(120));
      if (round % 5 == 4) {
        store->truncate(queue, 0, mirror.next[0] - 1);
        --mirror.next[0];
        for (int head = 0; head < g; ++head)
          std::erase_if(mirror.held[size_t(head)], [&](const auto& e) { return e.first >= mirror.next[0]; });
      }
      check(queue, *store, mirror);
    }
    Queue beside(&queue);
    int64_t idle = 0;
    for (bool again : {false, true}) {  // what a fork leaves mapped, the next one takes
      auto fork = std::make_unique<Store>(beside, *store);
      Mirror other = mirror;
      check(beside, *fork, other, again);
      EXPECT_EQ(store->bytes() - store->layer(0).bytes(), 0);
      append(beside, *fork, other, {1, 70, 0}), append(queue, *store, mirror, {0, 1, 1});
      check(queue, *store, mirror), check(beside, *fork, other, again);
      fork.reset();
      if (!again) idle = store->bytes() - store->layer(0).bytes();
    }
    EXPECT_GT(idle, 0) << "what is left stays mapped";
    check(queue, *store, mirror);
  }
  StoreOptions o = options();
  o.slots = {.group = 4096, .entries = 100};
  Store narrow(queue, std::span(&shape, 1), o, sequences);
  Mirror mirror = empty();
  EXPECT_THROW(append(queue, narrow, mirror, {200, 1, 1}), Error) << "more than is reserved";
}

}  // namespace
}  // namespace heed::test
