// Arithmetic on counts: programs of numbers, offsets, tiles of block lists, and how many pairs a plan computes.
#include "kernels/attention_case.h"
#include "kernels/checks.h"
#include "kernels/store_case.h"

namespace heed::test {
namespace {

using Op = Numbers::Op;

/// A random program whose results are finite and, but for a last smooth function, exact on every machine.
struct Program {
  Numbers what;
  std::vector<Buffer> data;
  int depth = 0;

  explicit Program(Random& random) {
    auto push = [&] {
      const Op op = pick(random, {Op::Constant, Op::Index, Op::Segment, Op::Place, Op::Length, Op::Channel});
      step(op).number = double(random.below(40)) - 10;
      ++depth;
    };
    push();
    while (what.count < 30) {
      if (depth < 3 || (depth < Numbers::depth - 2 && chance(random, 0.3))) {
        push();
        continue;
      }
      switch (random.below(7)) {
        case 0: load(random, Op::Load); break;
        case 1: step(pick(random, {Op::Floor, Op::Round})); break;
        case 2: step(Op::Pick), depth -= 2; break;
        case 3:
          if (depth + 3 <= Numbers::depth) find(random);
          break;
        default:
          step(pick(random, {Op::Add, Op::Sub, Op::FloorDiv, Op::Mod, Op::Min, Op::Max, Op::Less, Op::LessEqual, Op::Equal}));
          --depth;
          clamp(-1e6, 1e6);
      }
    }
    while (depth > 1) step(Op::Add), --depth;
    switch (random.below(6)) {
      case 0: clamp(-5, 5), step(Op::Exp); break;
      case 1: clamp(0, 1e9), step(Op::Sqrt); break;
      case 2: clamp(0, 1e9), step(Op::Log1p); break;
      case 3: clamp(1, 1e9), step(Op::Log); break;
      case 4: step(Op::Tanh); break;
      case 5: clamp(-1, 1), step(Op::Acos); break;
      default: clamp(0, 200);
    }
  }

 private:
  Numbers::Step& step(Op op) {
    Numbers::Step& s = what.steps[size_t(what.count++)];
    s = {};
    s.op = op;
    return s;
  }
  void constant(double x) { step(Op::Constant).number = x, ++depth; }
  void clamp(double low, double high) {
    constant(low), step(Op::Max), --depth;
    constant(high), step(Op::Min), --depth;
  }
  void load(Random& random, Op op) {
    const Dtype type = pick(random, {Dtype::F32, Dtype::F64, Dtype::BF16, Dtype::F16, Dtype::I32, Dtype::I64, Dtype::U8});
    const int64_t size = op == Op::Load && chance(random, 0.1) ? 0 : 1 + random.below(30);
    data.emplace_back(type, std::initializer_list<int64_t>{std::max<int64_t>(1, size)});
    double x = 0;
    each(data.back(), [&](auto index) { set(data.back(), index, x += double(random.below(3))); });
    Numbers::Step& s = step(op);
    s.type = type, s.size = size, s.data = data.back()->data;
  }
  /// The row's place among data[begin] … data[end − 1], or how far those two go on alike.
  void find(Random& random) {
    constant(double(random.below(3)));
    constant(double(3 + random.below(5)));
    step(Op::Place), ++depth;
    load(random, pick(random, {Op::Find, Op::Has, Op::Matches}));
    what.steps[size_t(what.count - 1)].size = std::max<int64_t>(8, what.steps[size_t(what.count - 1)].size);
    data.back() = Buffer(what.steps[size_t(what.count - 1)].type, {what.steps[size_t(what.count - 1)].size});
    double x = 0;
    each(data.back(), [&](auto index) { set(data.back(), index, x += double(random.below(4))); });
    what.steps[size_t(what.count - 1)].data = data.back()->data;
    depth -= 2;
  }
};

void compute_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(150); ++i) {
    const Program program(random);
    std::vector<int64_t> lengths;
    for (int64_t s = 1 + random.below(5); s > 0; --s) lengths.push_back(random.below(chance(random, 0.2) ? 300 : 9));
    const int64_t width = pick<int64_t>(random, {0, 1, 3, 140});
    const Dtype type = pick(random, {Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::I32, Dtype::I64, Dtype::U8});
    const RaggedData want = ragged(random, type == Dtype::U8 ? Dtype::I32 : type, lengths, 1, width, Layout::any(random));
    const Poisoned got = want.values.twin();
    const bool over = chance(random, 0.7);
    if (!over && want.view.values.size[0] == 0) continue;
    Queue queue;
    oracle().compute(queue, program.what, over ? &want.view : nullptr, want.values);
    run.compute(queue, program.what, over ? &want.view : nullptr, got);
    SCOPED_TRACE("case " + std::to_string(i) + " of " + info(type).name);
    const double unit = type == Dtype::F64    ? 1e-12
                        : type == Dtype::F32  ? 1e-6
                        : type == Dtype::BF16 ? 1e-2
                        : type == Dtype::F16  ? 2e-3
                                              : 0;
    // A smooth result may fall on either side of a whole number.
    const bool whole = type == Dtype::I32 || type == Dtype::I64 || type == Dtype::U8;
    expect_close("numbers", want.values, got, whole ? 1 : unit * std::max(1.0, largest(want.values)));
  }
}

void offsets_equal_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(30); ++i) {
    const int64_t count = pick<int64_t>(random, {0, 1, 7, 32, 33, 64, 1000, 5000});
    const Poisoned lengths = filled(pick(random, {Dtype::I32, Dtype::I64}), {count},
                                    [&] { return double(random.below(100000)); });
    const Poisoned want(Dtype::I64, {count + 1}), got = want.twin();
    Queue queue;
    oracle().offsets(queue, lengths, want);
    run.offsets(queue, lengths, got);
    expect_close("offsets", want, got, 0);
  }
}

void tile_blocks_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(60); ++i) {
    const int64_t tiles = random.below(6), capacity = 1 + random.below(12);
    const int split = int(pick<int64_t>(random, {1, 2, 4})), q_tile = int(pick<int64_t>(random, {1, 5, 33, 64, 100, 128}));
    std::vector<int64_t> first{0}, rowptr{0};
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t rows = random.below(q_tile + 1);
      first.push_back(first.back() + rows);
      rowptr.push_back(rowptr.back() + split * rows * capacity);
    }
    const int64_t rows = first.back(), room = rowptr.back();
    const Poisoned index(Dtype::I32, {rows * capacity}), count(Dtype::I32, {rows});
    for (int64_t r = 0; r < rows; ++r) {
      int32_t n = 0;
      for (int32_t b = 0; b < 15 && n < capacity; ++b)
        if (chance(random, 0.5)) index->at<int32_t>(r * capacity + n++) = b;
      count->at<int32_t>(r) = n;
    }
    const Buffer starts = Buffer::of<int64_t>({tiles + 1}, first), pointers = Buffer::of<int64_t>({tiles + 1}, rowptr);
    struct Result {
      Poisoned index, mask, count, bits;
      Plan plan;
    };
    auto result = [&] {
      Result out{Poisoned(Dtype::I32, {room}),
                 Poisoned(Dtype::I32, {room}),
                 Poisoned(Dtype::I32, {tiles}),
                 Poisoned(Dtype::I64, {room / split, q_tile, 1}),
                 {}};
      out.plan.form = Plan::Form::Blocks;
      out.plan.q_tile = q_tile;
      out.plan.k_tile = 16;
      out.plan.rowptr = pointers;
      out.plan.index = out.index, out.plan.mask = out.mask, out.plan.count = out.count;
      out.plan.bits = out.bits;
      out.plan.bits.type = Dtype::U64;
      return out;
    };
    const Result want = result(), got = result();
    Queue queue;
    oracle().tile_blocks(queue, index, count, capacity, starts, split, want.plan);
    run.tile_blocks(queue, index, count, capacity, starts, split, got.plan);
    expect_close("count", want.count, got.count, 0);
    expect_close("index", want.index, got.index, 0);
    expect_close("mask", want.mask, got.mask, 0);
    // Bits of −1 are poison's own pattern: compare them as they are.
    EXPECT_TRUE(std::equal(want.bits.bytes().begin(), want.bits.bytes().end(), got.bits.bytes().begin()))
        << "bits differ";
  }
}

/// Lists of ascending numbers below `most`.
struct RandomLists {
  Poisoned index, count;
  KeyLists view;
  RandomLists(Random& random, int64_t lists, int64_t capacity, int64_t most, double density)
      : index(Dtype::I32, {lists * capacity}), count(Dtype::I32, {lists}) {
    for (int64_t l = 0; l < lists; ++l) {
      int32_t n = 0;
      for (int64_t x = 0; x < most && n < capacity; ++x)
        if (chance(random, density)) index->at<int32_t>(l * capacity + n++) = int32_t(x);
      count->at<int32_t>(l) = n;
    }
    view = {index, count, capacity};
  }
};

void unite_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(60); ++i) {
    const int64_t g = 1 + random.below(2), h = g * pick<int64_t>(random, {1, 3}), sequences = 1 + random.below(3);
    const bool long_text = i == 0;  // longer than what a block of threads has bits for
    std::vector<int64_t> q_lengths, k_lengths;
    KeySets sets;
    sets.tile = int(pick<int64_t>(random, {1, 8, 64, 100, 128})), sets.block = int(pick<int64_t>(random, {1, 8, 64, 300}));
    int64_t rows = 0, longest = 1;
    std::vector<int64_t> rowptr{0};
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t n = long_text ? 130 : pick<int64_t>(random, {0, 1, 5, 64, 65, 150}),
                    m = n + (long_text ? pick<int64_t>(random, {65536 - 130, 65600, 140000}) : random.below(400));
      const int64_t tiles = (n + sets.tile - 1) / sets.tile;
      q_lengths.insert(q_lengths.end(), size_t(h), n), k_lengths.insert(k_lengths.end(), size_t(g), m);
      longest = std::max(longest, m);
      for (int64_t r = 0; r < h * tiles; ++r) rowptr.push_back(rowptr.back() + (m + 1) / 2 + random.below(3));
      rows += h * tiles;
    }
    const RaggedData q = ragged(random, Dtype::F32, q_lengths, h, 1, Layout::any(random)),
                     k = ragged(random, Dtype::F32, k_lengths, g, 1, Layout::any(random));
    const auto numbers = [&] {
      return filled(Dtype::I32, {q.view.segments()},
                    [&] { return double(pick<int64_t>(random, {0, 1, random.below(longest + 1), 1 << 30})); });
    };
    const double few = pick(random, {0.0, 0.01, 0.3, 1.0});
    const Poisoned sinks = numbers(), local = numbers();
    const RandomLists keys(random, q.view.segments(), longest, longest, few),
        distances(random, q.view.segments(), longest, longest, few / 8),
        blocks(random, rows, 1 + longest / sets.block, 2 + longest / sets.block, few);
    if (chance(random, 0.3)) sets.sinks = sinks;
    if (chance(random, 0.3)) sets.local = local;
    if (chance(random, 0.7)) sets.keys = keys.view;
    if (chance(random, 0.7)) sets.distances = distances.view;
    if (chance(random, 0.5)) sets.blocks = blocks.view;
    const Buffer pointers = Buffer::of<int64_t>({int64_t(rowptr.size())}, rowptr);
    const Poisoned index(Dtype::I32, {rowptr.back(), 2}), count(Dtype::I32, {rows}), got_index = index.twin(),
                                                                                     got_count = count.twin();
    Plan want;
    want.form = Plan::Form::Interval, want.q_tile = sets.tile, want.rowptr = pointers;
    Plan got = want;
    want.index = index, want.count = count, got.index = got_index, got.count = got_count;
    SCOPED_TRACE("case " + std::to_string(i) + ": heads " + std::to_string(h) + "/" + std::to_string(g) +
                 ", tiles of " + std::to_string(sets.tile) + ", up to " + std::to_string(longest) + " keys");
    Queue queue;
    oracle().unite(queue, q, k, sets, want);
    run.unite(queue, q, k, sets, got);
    expect_close("count", count, got_count, 0);
    expect_close("index", index, got_index, 0);
  }
}

TEST(Reference, UniteOfFiveSets) {
  Random random(0);
  // Seven queries behind three keys, in tiles of four: positions 3 … 6 and 7 … 9.
  const RaggedData q = ragged(random, Dtype::F32, {7}, 1, 1, {}), k = ragged(random, Dtype::F32, {10}, 1, 1, {});
  const auto list = [](std::vector<int32_t> x) { return Buffer::of<int32_t>({int64_t(x.size())}, x); };
  const auto united = [&](const KeySets& sets) {
    const Poisoned index(Dtype::I32, {10, 2}), count(Dtype::I32, {2});
    Plan out;
    out.form = Plan::Form::Interval, out.q_tile = 4, out.index = index, out.count = count;
    const Buffer rowptr = Buffer::of<int64_t>({3}, std::vector<int64_t>{0, 5, 10});
    out.rowptr = rowptr;
    Queue queue;
    oracle().unite(queue, q, k, sets, out);
    std::string text;
    for (int64_t r = 0; r < 2; ++r, text += "|")
      for (int64_t e = out.begin(r); e < out.end(r); ++e)
        text += std::to_string(index->at<int32_t>(e, 0)) + "-" + std::to_string(index->at<int32_t>(e, 1)) + " ";
    return text;
  };
  const Buffer one = list({1}), two = list({2}), keys = list({0, 5}), far = list({6}), blocks = list({0, 7, 1, 2}),
               counts = list({1, 2});
  KeySets sets;
  sets.tile = 4;
  EXPECT_EQ(united(sets), "||");
  sets.sinks = one;
  EXPECT_EQ(united(sets), "0-1 |0-1 |");
  sets.local = two;
  EXPECT_EQ(united(sets), "0-1 2-7 |0-1 6-10 |");
  sets.sinks = sets.local = {};
  sets.keys = {keys, two, 2};
  EXPECT_EQ(united(sets), "0-1 5-6 |0-1 5-6 |");
  sets.keys = {};
  sets.distances = {far, one, 1};
  EXPECT_EQ(united(sets), "0-1 |1-4 |");
  sets.distances = {};
  sets.blocks = {blocks, counts, 2}, sets.block = 3;
  EXPECT_EQ(united(sets), "0-3 |3-9 |");
}

void count_pairs_equals_reference(const Kernels& run, Random random) {
  Ask ask;
  ask.maps = false;
  for (int i = 0; i < cases(60) && !testing::Test::HasFailure(); ++i) {
    const AttentionCase c(random, ask);
    SCOPED_TRACE("case " + std::to_string(i) + ": " + c.text());
    Queue queue;
    const Poisoned want = filled(Dtype::F64, {c.h}, [] { return 0.5; }),
                   got = filled(Dtype::F64, {c.h}, [] { return 0.5; });
    oracle().count_pairs(queue, c.plan.plan, c.q, {&c.k.view, nullptr, nullptr}, c.mods, want);
    run.count_pairs(queue, c.plan.plan, c.q, {&c.k.view, nullptr, nullptr}, c.mods, got);
    expect_close("pairs", want, got, 0);
  }
}

}  // namespace

std::vector<Check> count_checks() {
  using enum Check::Against;
  return {{Reference, "compute", compute_equals_reference},
          {Reference, "offsets", offsets_equal_reference},
          {Reference, "tile_blocks", tile_blocks_equals_reference},
          {Reference, "unite", unite_equals_reference},
          {Reference, "count_pairs", count_pairs_equals_reference}};
}

}  // namespace heed::test
