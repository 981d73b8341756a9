// Mechanisms that change how entries lie in the store, not which of them count.
#include "attention/clusters.h"
#include "attention/numbers.h"
#include "attention/rotation.h"
#include "keep_case.h"
#include "mechanisms/registry.h"
#include "session_case.h"

namespace heed::test {
namespace {

std::shared_ptr<const Model> windowed(int h, int g, std::vector<int64_t> windows) {
  ModelInfo shape;
  shape.layers = int(windows.size()), shape.h = h, shape.g = g, shape.d = shape.d_v = 16, shape.hidden = 48;
  shape.vocabulary = 61, shape.windows = std::move(windows);
  return Model::random(shape, 64, Dtype::F32, 5);
}

class Stores : public Mechanisms {};

std::vector<float> row(const Tensor& logits) { return {logits.as<float>(), logits.as<float>() + logits.numel()}; }

// Prompts in parts, tokens, a fork and tokens taken back give what a full cache gives, and a layer never holds more than
// its window, what may be taken back, and what came since the last cut.
TEST(SwaCache, IsAFullCacheInTheMemoryOfAWindow) {
  struct Course {
    std::string spec;
    int64_t chunk, spare, every;
  };
  for (const auto& [h, g, windows] :
       {std::tuple{6, 2, std::vector<int64_t>{0, 24, 7, 1}}, {3, 3, {24, 0, 24, 24}}, {8, 1, {2, 100, 0, 1000}}}) {
    const auto model = windowed(h, g, windows);
    for (const Course& c :
         {Course{"swa-cache", 0, 0, 64}, Course{"swa-cache(when=every(1))", 25, 0, 1},
          Course{"swa-cache(when=every(5),spare=6)", 9, 6, 5}, Course{"swa-cache(when=every(1),spare=6)", 1, 6, 1}}) {
      SCOPED_TRACE(c.spec + " h=" + std::to_string(h));
      Session small(model, in_f32(c.spec, c.chunk)), full(model, in_f32("dense", c.chunk));
      int64_t part = 0;
      small.tap([&](LayerView& at) { part = std::max(part, at.rows[0]); });
      const auto check = [&](Session& a, Session& b) {
        for (int l = 0; l < model->info().layers; ++l) {
          const int64_t window = model->info().window(l), all = int64_t(b.tokens().size());
          const auto held = a.store().layer(l).positions(0);
          if (window == 0) EXPECT_EQ(held, all_of(all));
          else EXPECT_LE(int64_t(held.size()), window - 1 + c.spare + c.every - 1) << "layer " << l;
          const int64_t reach = std::min(all, window - 1);
          for (int64_t i = 1; i <= reach; ++i) EXPECT_EQ(held[held.size() - size_t(i)], all - i) << "layer " << l;
        }
      };
      EXPECT_LT(distance(row(small.prefill(text(83, 1))), row(full.prefill(text(83, 1)))), 1e-4);
      EXPECT_LE(part, c.chunk > 0 ? c.chunk : 83);
      check(small, full);
      for (int32_t i = 0; i < 20; ++i) {
        EXPECT_LT(distance(row(small.decode(i * 13 % 61)), row(full.decode(i * 13 % 61))), 1e-4) << i;
        check(small, full);
      }
      const auto small_fork = small.fork(), full_fork = full.fork();
      const int64_t back = 103 - c.spare;
      small_fork->truncate(0, back), full_fork->truncate(0, back);
      for (int32_t i = 0; i < 9; ++i)
        EXPECT_LT(distance(row(small_fork->decode(i * 7 % 61)), row(full_fork->decode(i * 7 % 61))), 1e-4) << i;
      EXPECT_LT(distance(row(small.prefill(text(40, 2))), row(full.prefill(text(40, 2)))), 1e-4);
      check(small, full);
      for (int32_t i = 0; i < 3; ++i)
        EXPECT_LT(distance(row(small.decode(i * 11 % 61)), row(full.decode(i * 11 % 61))), 1e-4) << i;
      if (c.spare == 0 && windows[1] == 24) {  // further back the window is short of what it lost
        small.truncate(0, 120), full.truncate(0, 120);
        EXPECT_GT(distance(row(small.decode(5)), row(full.decode(5))), 1e-4);
      }
    }
  }
}

TEST(SwaCache, LeavesAModelWithoutWindowsAlone) {
  const auto model = windowed(6, 2, {0, 0});
  Session small(model, in_f32("swa-cache(when=every(1))", 25)), full(model, in_f32("dense", 25));
  EXPECT_EQ(distance(row(small.prefill(text(83, 1))), row(full.prefill(text(83, 1)))), 0);
  for (int32_t i = 0; i < 5; ++i) EXPECT_EQ(distance(row(small.decode(i)), row(full.decode(i))), 0);
  EXPECT_EQ(small.store().bytes(), full.store().bytes());
}

/// Keys and values of one layer in a store of f32, `settle`d by a policy, and read back.
struct Settled {
  std::vector<Rows> k, v;  // [KV head][entry][channel], as they are kept
  double bits_k = 0;       // the bytes of a quantised page's keys and values for each number, positions left out

  Settled(const Case& c, const std::string& spec, const std::string& backend) {
    const int64_t g = c.shape.g, m = c.shape.m, d = c.shape.d, d_v = c.shape.d_v;
    Queue queue = queue_on(heed::backend(backend));
    ModelInfo model;
    model.h = int(c.shape.h), model.g = int(g), model.d = int(d), model.d_v = int(d_v);
    const auto mechanism = value_or_throw(make_mechanism(value_or_throw(parse_spec(spec))[0], registry()));
    StoreOptions options;
    options.k.kind = options.v.kind = PageType::Kind::F32;
    const StoreShape layer{int(g), int(d), int(d_v)};
    Store store(queue, std::span(&layer, 1), options);
    const Needs needs = mechanism->needs(model);
    EXPECT_EQ(store.add_layout(needs.quantised_k, needs.quantised_v), 1);
    const Tensor offsets = compute(queue, Dtype::I64, {g + 1}, index() * m);
    const Tensor positions = compute(queue, Dtype::I32, {g * m}, mod(index(), m));
    const auto ragged = [&](const Tensor& x) { return Ragged{x, offsets, {}, g, g * m}; };
    const Tensor keys = queue.upload(c.k->reshape({g * m, d})), values = queue.upload(c.v->reshape({g * m, d_v}));
    store.layer(0).append(queue, ragged(keys), ragged(values), positions, std::span(&m, 1));
    LayerView at(model, queue, 0, Phase::Prompt);
    at.store = &store.layer(0), at.stores = &store;
    EXPECT_TRUE(static_cast<const KeepPolicy&>(*mechanism).settle(at));
    const Tensor read_k = queue.scratch.take(Dtype::F32, {g * m, d}), read_v = queue.scratch.take(Dtype::F32, {g * m, d_v});
    queue.run->page_read(queue, store.layer(0).pages(), nullptr, ragged(read_k), ragged(read_v), {});
    const auto rows = [&](const Tensor& x) {
      const Buffer host = queue.read_back(x);
      std::vector<Rows> out{size_t(g)};
      for (int64_t r = 0; r < g * m; ++r) {
        auto& row = out[size_t(r / m)].emplace_back();
        for (int64_t y = 0; y < x.size[1]; ++y) row.push_back(double(host->at<float>(r, y)));
      }
      return out;
    };
    k = rows(read_k), v = rows(read_v);
    bits_k = double(store.bytes() / (g * (m / 64)) - 64 * 4) * 8 / double(64 * (d + d_v));
  }
};

// Every number of a full page is a whole number of steps of its block of 32, the nearest one that the codes reach; what
// does not fill a page, and the residual, stay as they were.
TEST_P(Stores, BlockCodesAreThoseOfLlamaCpp) {
  const Case c(shape(1, 128 + 64, 64, 96), 3);
  for (const auto& [spec, half, first_exact] :
       {std::tuple{"kv-q8", 128, 192}, {"kv-q4", 8, 192}, {"kv-q4(residual=1)", 8, 128}, {"kv-q8(residual=65)", 128, 64}}) {
    const Settled kept(c, spec, backend());
    const auto check = [&, half = half, first_exact = first_exact](const Rows& got, const Buffer& from, int64_t kv,
                                                                   int64_t width) {
      for (int64_t j = 0; j < c.shape.m; ++j)
        for (int64_t block = 0; block < width; block += 32) {
          double largest = 0;
          for (int64_t x = block; x < block + 32; ++x)
            if (const double y = double(from->at<float>(kv, j, x)); std::abs(y) > std::abs(largest)) largest = y;
          const double step = half == 128 ? std::abs(largest) / 127 : -largest / half;
          for (int64_t x = block; x < block + 32; ++x) {
            const double value = double(from->at<float>(kv, j, x)), there = got[size_t(j)][size_t(x)];
            if (j >= first_exact) {
              ASSERT_EQ(there, value);
              continue;
            }
            const double code = there / step, room = std::abs(code) * 0x1p-10 + 1e-6;  // the scale is rounded to f16
            ASSERT_NEAR(code, std::round(code), room);
            ASSERT_LE(std::abs(code), half + room);
            // llama.cpp's lines: min(15, ⌊x / s + 8.5⌋) − 8, and round(x / s).
            const double wanted = std::min(half - 1.0, std::floor(value / step + 0.5));
            ASSERT_NEAR(std::round(code), wanted, std::abs(value / step - std::floor(value / step) - 0.5) < 0.1 ? 1 : 0.01);
          }
        }
    };
    for (int64_t kv = 0; kv < c.shape.g; ++kv)
      check(kept.k[size_t(kv)], c.k, kv, 64), check(kept.v[size_t(kv)], c.v, kv, 96);
    if (first_exact == 192) { EXPECT_EQ(kept.bits_k, half == 128 ? 8.5 : 4.5) << "codes, and 16 bits for 32 of them"; }
  }
}

// In other coordinates nothing changes until something is rounded, and then less where one channel towers over others.
TEST_P(Stores, ARotationChangesNothingButTheRounding) {
  for (const auto& [d, d_v] : {std::pair{64, 128}, {192, 64}, {128, 192}, {48, 80}}) {
    Case c(shape(20, 128, d, d_v), 4);
    for (const std::string spec : {"kv-hadamard(residual=1000)", "turboquant(residual=1000)"}) {
      const ApplyOutput out = c.run(spec, backend());
      EXPECT_LT(c.dense_error(out), 2 * kExact) << spec;
      EXPECT_LT(kept_error(c, out), 2 * kExact) << spec;
    }
    for (int64_t r = 0; r < c.shape.g * c.shape.m; ++r)  // an outlier in every block of 32
      for (int64_t x = 5; x < d; x += 32) c.k->as<float>()[r * d + x] *= 30;
    for (int64_t r = 0; r < c.shape.h * c.shape.n; ++r)
      for (int64_t x = 5; x < d; x += 32) c.q->as<float>()[r * d + x] /= 30;
    const double plain = kept_error(c, c.run("kv-q4", backend())), turned = kept_error(c, c.run("kv-hadamard", backend())),
                 random = kept_error(c, c.run("turboquant", backend()));
    if (d % 64 == 0) EXPECT_LT(turned, plain) << d;
    else EXPECT_NEAR(turned, plain, 1e-5) << "64 does not divide the width";
    EXPECT_GT(std::min(turned, random), 1e-4) << "nothing was rounded";
  }
}

/// ‖M M^T − 1‖, the largest entry of it.
double from_orthogonal(const Buffer& m) {
  const int64_t d = m->size[0];
  double worst = 0;
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) {
      double dot = 0;
      for (int64_t c = 0; c < d; ++c) dot += double(m->at<float>(i, c)) * double(m->at<float>(j, c));
      worst = std::max(worst, std::abs(dot - (i == j)));
    }
  return worst;
}

TEST(Rotations, AreOrthogonal) {
  for (int64_t d : {1, 16, 48, 128}) EXPECT_LT(from_orthogonal(random_orthogonal(d, 7)), 1e-6) << d;
  for (const auto& [d, order] : {std::pair{1, 1}, {64, 64}, {192, 64}, {256, 256}, {24, 8}}) {
    const Buffer m = hadamard(d, order);
    EXPECT_LT(from_orthogonal(m), 1e-6) << d;
    for (int64_t i = 0; i < d; ++i)
      for (int64_t c = 0; c < d; ++c) {
        EXPECT_EQ(m->at<float>(i, c), m->at<float>(c, i));
        if (i / order == c / order) EXPECT_EQ(std::abs(m->at<float>(i, c)), 1 / std::sqrt(float(order)));
        else EXPECT_EQ(m->at<float>(i, c), 0);
      }
  }
  EXPECT_THROW(hadamard(24, 16), Error);
  EXPECT_THROW(hadamard(24, 3), Error);
}

// Lloyd and Max's tables for a normal density, and the paper's first points on the sphere.
TEST(LloydMax, GivesTheTablesOfANormalDensity) {
  const auto normal = [](double t) { return std::exp(-t * t / 2); };
  const std::vector<double> two{-1.5104, -0.4528, 0.4528, 1.5104},
      four{-2.7326, -2.0690, -1.6180, -1.2562, -0.9423, -0.6568, -0.3881, -0.1284};
  const auto got = lloyd_max(4, -8, 8, normal), many = lloyd_max(16, -8, 8, normal);
  for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(got[i], two[i], 2e-3);
  for (size_t i = 0; i < 8; ++i) {
    EXPECT_NEAR(many[i], four[i], 4e-3);
    EXPECT_NEAR(many[15 - i], -four[i], 4e-3);
  }
  EXPECT_NEAR(lloyd_max(2, -1, 1, [](double t) { return std::pow(1 - t * t, 61.5); })[1], 0.798 / std::sqrt(126.0), 2e-3);
  EXPECT_NEAR(lloyd_max(1, 0, 1, [](double) { return 1; })[0], 0.5, 1e-9);
}

// The distortion that the paper gives for unit vectors, in codes and one scale for a row.
TEST_P(Stores, TurboQuantsDistortionIsThePapers) {
  for (const auto& [spec, distortion, bits] : {std::tuple{"turboquant", 0.009, 4}, {"turboquant(bits=2)", 0.117, 2}})
    for (const int64_t d : {64, 128}) {
      const Case c(shape(1, 128, d, d), 6);  // normal rows point everywhere: a rotation of them is such rows again
      const Settled kept(c, spec, backend());
      double error = 0;
      for (int64_t kv = 0; kv < c.shape.g; ++kv)
        for (int64_t j = 0; j < c.shape.m; ++j) {
          double away = 0, size = 0;
          for (int64_t x = 0; x < d; ++x) {
            away += std::pow(kept.k[size_t(kv)][size_t(j)][size_t(x)] - double(c.k->at<float>(kv, j, x)), 2);
            size += std::pow(double(c.k->at<float>(kv, j, x)), 2);
          }
          error += away / size / double(c.shape.g * c.shape.m);
        }
      EXPECT_NEAR(error, distortion, 0.06 * distortion) << spec << " d=" << d;
      EXPECT_NEAR(kept.bits_k, bits + 16.0 / double(d), 1e-9);
    }
}

// A session in other coordinates, in parts, in batches and forked, before anything is quantised: EveryIdentity has it for
// random rotations; here for Hadamard's, which take widths of 64.
TEST(Rotations, ASessionDoesNotSeeThem) {
  ModelInfo shape;
  shape.layers = 2, shape.h = 4, shape.g = 2, shape.d = 64, shape.d_v = 64, shape.hidden = 48, shape.vocabulary = 61;
  shape.windows = {0, 24};
  const auto model = Model::random(shape, 64, Dtype::F32, 5);
  for (const int64_t chunk : {0, 25})
    for (const char* spec : {"kv-hadamard(residual=1000)", "kv-hadamard(residual=1000,layers=1)",
                             "kv-hadamard(residual=1000)+quest(budget=1000,page=8,dense=0)",
                             "turboquant(residual=1000)+loki(budget=1000,keys=plain)"}) {
      Session turned(model, in_f32(spec, chunk)), plain(model, in_f32("dense", chunk));
      EXPECT_LT(distance(row(turned.prefill(text(83, 1))), row(plain.prefill(text(83, 1)))), 1e-4) << spec;
      for (int32_t i = 0; i < 4; ++i) EXPECT_LT(distance(row(turned.decode(i)), row(plain.decode(i))), 1e-4) << spec;
      const auto fork = turned.fork();
      std::vector<float> keys[2];  // before their rotary embedding, as they came
      const auto look = [&](int which) {
        return [&, which](LayerView& at) {
          Ragged plain_rows = plain_keys(at);
          if (at.basis) change_basis(at.queue, plain_rows, at.basis->k_back, plain_rows);
          keys[which].insert(keys[which].end(), plain_rows.values.as<float>(),
                             plain_rows.values.as<float>() + plain_rows.values.numel());
        };
      };
      fork->tap(look(0)), plain.tap(look(1));
      EXPECT_LT(distance(row(fork->decode(9)), row(plain.decode(9))), 1e-4) << spec;
      EXPECT_LT(distance(keys[0], keys[1]), 1e-4) << spec;
    }
  const auto refused = Composition::parse("kv-hadamard+self-extend", model->info(), registry());
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().code, Code::Conflict);
}

// What goes is the older half behind the sinks, and a longer prompt loses as many halves as tokens would have.
TEST_P(Stores, ContextShiftDropsHalves) {
  const Case c(shape(4, 90), 8);
  for (const auto& [budget, sinks] : {std::pair{40, 4}, {41, 0}, {91, 3}, {90, 3}, {9, 7}}) {
    std::vector<int32_t> expected;
    for (int32_t j = 0; j < 90; ++j) {
      expected.push_back(j);
      if (int(expected.size()) == budget)
        expected.erase(expected.begin() + sinks, expected.begin() + sinks + (budget - sinks) / 2);
    }
    const std::string spec = "context-shift(budget=" + std::to_string(budget) + ",sinks=" + std::to_string(sinks) + ")";
    for (const auto& list : kept(c, spec, backend())) EXPECT_EQ(list, expected) << spec;
  }
}

HEED_ON_ALL_SETTINGS(Stores);

// The same bits as from pages that lie anywhere, in memory that grows and shrinks by whole page groups, at addresses that
// stay; forks take the slots that others left.
TEST(VAttention, IsTheSameAttentionInOnePieceOfMemory) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}})
    for (const std::string own : {"", "+h2o(budget=70)", "+adakv(snapkv(budget=40,window=4,when=every(9)))"})
      for (const int64_t chunk : {0, 25}) {
        const auto model = windowed(h, g, {0, 24, 0});
        SessionOptions o = in_f32("dense" + own, chunk);
        Session plain(model, o);
        o.attention = "vattention(page=8,context=300,ahead=0,layers=0-1)" + own;
        Session slots(model, o);
        const auto check = [&] {
          for (int l = 0; l < 2; ++l) {
            LayerStore& layer = slots.store().layer(l);
            const int64_t stride = kPageHeader + layer.pages().layouts[0].bytes;
            int64_t groups = 0;
            for (int64_t s = 0; s < layer.segments(); ++s) {
              const int64_t pages = (layer.length(s) + 63) / 64;
              groups += (pages * stride + 8191) / 8192;
              for (int64_t p = 1; p < pages; ++p)
                EXPECT_EQ(layer.pages().page(s, p), layer.pages().page(s, 0) + p * stride);
            }
            EXPECT_EQ(layer.bytes(), groups * 8192);
          }
          EXPECT_EQ(slots.store().layer(2).bytes(), plain.store().layer(2).bytes());
        };
        EXPECT_EQ(row(slots.prefill(text(83, 1))), row(plain.prefill(text(83, 1))));
        check();
        const char* first = slots.store().layer(0).pages().page(0, 0);
        for (int32_t i = 0; i < 50; ++i) {
          EXPECT_EQ(row(slots.decode(i)), row(plain.decode(i))) << i;
          check();
        }
        EXPECT_EQ(slots.store().layer(0).pages().page(0, 0), first);
        for (int round = 0; round < 2; ++round) {
          const auto fork = slots.fork(), other = plain.fork();
          EXPECT_EQ(row(fork->decode(round)), row(other->decode(round)));
          fork->truncate(0, 90), other->truncate(0, 90);
          EXPECT_EQ(row(fork->decode(9)), row(other->decode(9)));
        }
        EXPECT_EQ(row(slots.prefill(text(40, 2))), row(plain.prefill(text(40, 2))));
        check();
        EXPECT_EQ(row(slots.decode(3)), row(plain.decode(3)));
      }
}

TEST(VAttention, SaysWhatItCannot) {
  const auto model = tiny_model(4, 2);
  for (const auto& [spec, says] : {std::pair{"vattention(page=6)", "page"},
                                   {"vattention(page=2)", "page"},
                                   {"vattention(heads=0)", "heads"},
                                   {"vattention(pool=1)", "pool"},
                                   {"vattention(ahead=10)", "ahead"},
                                   {"vattention+kv-q8", "kv-q8"},
                                   {"vattention+vattention(page=4)", "vattention"}}) {
    const auto parsed = Composition::parse(spec, model->info(), registry());
    ASSERT_FALSE(parsed.has_value()) << spec;
    EXPECT_NE(parsed.error().text().find(says), std::string::npos) << parsed.error().text();
  }
  Session narrow(model, in_f32("vattention(page=4,context=64)"));
  try {
    narrow.prefill(text(83, 1));
    FAIL() << "83 entries where 64 are reserved";
  } catch (const Error& e) { EXPECT_NE(std::string(e.what()).find("context"), std::string::npos) << e.what(); }
  EXPECT_NO_THROW(narrow.prefill(text(50, 1))) << "as it was before";
  Session small(model, in_f32("vattention(page=256,pool=1)"));  // 4 layers of 2 heads
  EXPECT_THROW(small.prefill(text(50, 1)), Error);
}

}  // namespace
}  // namespace heed::test
