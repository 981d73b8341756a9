// Lists of pages that grow, are shared, converted and given back: the same steps on the oracle and on a table, each in its
// own memory; what a store says of itself must agree after each.
#include "kernels/harness.h"

namespace heed::test {
namespace {

/// The tables whose page lists are tested where their memory is: no coat.
std::vector<const Kernels*> own_tables() {
  std::vector<const Kernels*> out{&reference_kernels()};
  if (cuda_kernels()) out.push_back(cuda_kernels());
  return out;
}

constexpr int64_t kSegments = 4, kCapacity = 8, kSupply = 200;
constexpr int kD = 64;

/// One side's stores: a parent, and a child that shares its pages.
struct Side {
  const Kernels& run;
  Queue queue;
  std::vector<Buffer> memory;
  Pages pages[2];

  explicit Side(const Kernels& table) : run(table), queue(&table, *table.memory) {
    static const std::vector<Column> columns{{"score", Column::Keeps::User, 2, 1, 0.5f},
                                             {"low", Column::Keeps::KeyMin, 1, 16}};
    Pages& p = pages[0];
    const PageType plain{PageType::Kind::BF16}, small{PageType::Kind::Q8, PageType::Axis::Token, 32};
    p.layouts = {page_layout(kD, kD, plain, plain, table.v_transposed, true, columns),
                 page_layout(kD, kD, small, plain, table.v_transposed, false, columns)};
    p.columns = &columns;
    p.kv_heads = 2;
    p.length_bound = kCapacity * kPage;
    for (const PageLayout& layout : p.layouts) {
      PageSupply supply{zeros(Dtype::U64, {kSupply}), zeros(Dtype::I32, {1}), layout.bytes};
      run.page_supply(queue, supply, zeros(Dtype::U8, {kSupply * (kPageHeader + layout.bytes)}));
      p.supply.push_back(supply);
    }
    pages[1] = p;
    for (Pages& store : pages) {
      store.table = zeros(Dtype::U64, {kSegments, kCapacity});
      store.layout = zeros(Dtype::U8, {kSegments, kCapacity});
      store.length = zeros(Dtype::I32, {kSegments});
    }
  }
  Tensor zeros(Dtype type, std::initializer_list<int64_t> sizes) {
    memory.emplace_back(type, sizes, *run.memory);
    queue.fill(memory.back(), 0);
    return memory.back();
  }
  template <class T>
  Tensor numbers(const std::vector<T>& values) {
    memory.emplace_back(DtypeOf<T>::value, std::initializer_list<int64_t>{int64_t(values.size())}, *run.memory);
    queue.upload(Tensor(const_cast<T*>(values.data()), DtypeOf<T>::value, {int64_t(values.size())}), memory.back());
    return memory.back();
  }
  void append(int store, const std::vector<int64_t>& offsets, const std::vector<float>& k,
              const std::vector<int32_t>& positions) {
    const int64_t rows = offsets.back();
    Ragged keys{numbers(k), numbers(offsets), {}, 2, rows};
    keys.values = keys.values.reshape({std::max<int64_t>(1, rows), kD});
    const Tensor first = zeros(Dtype::I32, {kSegments});
    run.page_grow(queue, pages[store], keys, first);
    // page_write looks at lengths before the new rows or after them: either bounds what is held.
    run.page_write(queue, pages[store], keys, keys, numbers(positions), first);
  }
  void fork() {
    for (auto [from, to] : {std::pair{&pages[0].table, &pages[1].table},
                            {&pages[0].layout, &pages[1].layout},
                            {&pages[0].length, &pages[1].length}})
      queue.move(*from, *to);
    run.page_hold(queue, pages[1]);
  }
  /// Lengths, layouts of pages that hold entries, and what lies free.
  std::vector<int64_t> shape() {
    std::vector<int64_t> out;
    for (Pages& store : pages) {
      const Buffer length = queue.read_back(store.length), layout = queue.read_back(store.layout);
      for (int64_t s = 0; s < kSegments; ++s) {
        out.push_back(length->at<int32_t>(s));
        for (int64_t p = 0; p * kPage < out.back(); ++p) out.push_back(layout->at<uint8_t>(s, p));
      }
    }
    for (const PageSupply& supply : pages[0].supply) out.push_back(queue.read_back(supply.top)->at<int32_t>(0));
    return out;
  }
  /// Keys and positions of a store, and its User column.
  std::vector<float> contents(int store) {
    const Buffer length = queue.read_back(pages[store].length);
    std::vector<int64_t> offsets{0};
    for (int64_t s = 0; s < kSegments; ++s) offsets.push_back(offsets.back() + length->at<int32_t>(s));
    const int64_t rows = offsets.back();
    std::vector<float> out;
    if (rows == 0) return out;
    const Ragged k{zeros(Dtype::F32, {rows, kD}), numbers(offsets), {}, 2, rows},
        v{zeros(Dtype::F32, {rows, kD}), k.offsets, {}, 2, rows},
        score{zeros(Dtype::F32, {rows, 2}), k.offsets, {}, 2, rows};
    const Tensor positions = zeros(Dtype::I32, {rows});
    run.page_read(queue, pages[store], nullptr, k, v, positions);
    run.column_read(queue, pages[store], 0, score);
    for (const Tensor& t : {k.values, v.values, score.values}) {
      const Buffer host = queue.read_back(t);
      out.insert(out.end(), host->as<float>(), host->as<float>() + host->numel());
    }
    const Buffer host = queue.read_back(positions);
    for (int64_t r = 0; r < rows; ++r) out.push_back(float(host->at<int32_t>(r)));
    return out;
  }
};

class PageLists : public testing::TestWithParam<const Kernels*> {};
INSTANTIATE_TEST_SUITE_P(Tables, PageLists, testing::ValuesIn(own_tables()),
                         [](const auto& table) { return table.param->name; });

TEST_P(PageLists, StepsEqualTheOracles) {
  Random random(41);
  for (int i = 0; i < cases(20); ++i) {
    Side want(reference_kernels()), got(*GetParam());
    want.queue.run = &reference_kernels();
    auto both = [&](auto step) { step(want), step(got); };
    auto compare = [&](const char* what, double bound) {
      SCOPED_TRACE(std::string(what) + " in case " + std::to_string(i));
      EXPECT_EQ(want.shape(), got.shape());
      for (int store = 0; store < 2; ++store) {
        const std::vector<float> a = want.contents(store), b = got.contents(store);
        ASSERT_EQ(a.size(), b.size());
        for (size_t j = 0; j < a.size(); ++j) ASSERT_NEAR(a[j], b[j], bound) << "store " << store << ", number " << j;
      }
    };
    auto append = [&](int store, int64_t most) {
      std::vector<int64_t> offsets{0};
      for (int64_t s = 0; s < kSegments; ++s)
        offsets.push_back(offsets.back() + (chance(random, 0.2) ? 0 : random.below(most)));
      std::vector<float> k(size_t(std::max<int64_t>(1, offsets.back()) * kD));
      for (float& x : k) x = float(random.normal());
      std::vector<int32_t> positions(size_t(std::max<int64_t>(1, offsets.back())));
      for (int32_t& x : positions) x = int32_t(random.below(1000));
      both([&](Side& side) { side.append(store, offsets, k, positions); });
    };
    auto limits = [&](int64_t most) {
      std::vector<int32_t> out;
      for (int64_t s = 0; s < kSegments; ++s) out.push_back(int32_t(random.below(most)));
      return out;
    };
    append(0, 200);
    append(0, 70);
    compare("grown", 0);
    both([](Side& side) { side.fork(); });
    append(1, 70);
    append(0, 70);
    compare("forked and grown apart", 0);
    const std::vector<int32_t> until = limits(300);
    both([&](Side& side) { side.run.page_own(side.queue, side.pages[1], side.numbers(until)); });
    compare("owned", 0);
    const std::vector<int32_t> first = limits(3), last = limits(6);
    const bool again = chance(random, 0.5);
    const int layout = int(random.below(2));
    for (int to : {1, layout})
      both([&](Side& side) {
        side.run.page_convert(side.queue, side.pages[0], side.numbers(first), side.numbers(last), to, again);
      });
    compare("converted", 0.1);  // a code that falls the other way, twice
    const std::vector<int32_t> left = limits(250);
    both([&](Side& side) { side.run.page_shrink(side.queue, side.pages[0], side.numbers(left)); });
    compare("shrunk", 0.1);
    append(0, 60);
    compare("grown again", 0.1);
    for (int store = 0; store < 2; ++store)
      both([&](Side& side) { side.run.page_shrink(side.queue, side.pages[store], side.zeros(Dtype::I32, {kSegments})); });
    compare("emptied", 0);
    EXPECT_EQ(got.shape().back(), kSupply);
  }
}

}  // namespace
}  // namespace heed::test
