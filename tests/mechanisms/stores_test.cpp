// Mechanisms that change how entries lie in the store, not which of them count.
#include <array>
#include <numeric>

#include "attention/clusters.h"
#include "attention/numbers.h"
#include "attention/rotation.h"
#include "keep_case.h"
#include "mechanisms/registry.h"
#include "session_case.h"
#include "stores_case.h"

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

// The paper's code of a pair, from its angle and length alone, and its error against exact keys.
TEST_P(Stores, PolarKeysAreTheMiddlesOfTheirRanges) {
  const Case c(shape(4, 192, 32, 32), 3);
  for (const auto& [bits, group] : {std::pair{4, 64}, {2, 16}, {8, 32}}) {
    const std::string spec = "polar-rope(residual=64,bits=" + std::to_string(bits) + ",group=" + std::to_string(group) +
                             ")";
    const Settled kept(c, spec, backend());
    const double levels = 1 << bits;
    for (int64_t kv = 0; kv < c.shape.g; ++kv)
      for (int64_t j = 0; j < 192; ++j)
        for (int64_t x = 0; x < 16; ++x) {
          const auto polar = [&](int64_t i) {
            const double a = double(c.k->at<float>(kv, i, x)), b = double(c.k->at<float>(kv, i, x + 16));
            return std::array{std::fmod(std::atan2(b, a) + 2 * M_PI, 2 * M_PI), std::hypot(a, b)};
          };
          const auto& row = kept.k[size_t(kv)][size_t(j)];
          if (j >= 128) {
            ASSERT_EQ(row[size_t(x)], double(c.k->at<float>(kv, j, x)));
            continue;
          }
          double low[2] = {1e9, 1e9}, high[2] = {-1e9, -1e9};
          for (int64_t i = j / group * group; i < (j / group + 1) * group; ++i)
            for (size_t w = 0; w < 2; ++w)
              low[w] = std::min(low[w], polar(i)[w]), high[w] = std::max(high[w], polar(i)[w]);
          const double a = row[size_t(x)], b = row[size_t(x + 16)],
                       there[2] = {std::fmod(std::atan2(b, a) + 2 * M_PI, 2 * M_PI), std::hypot(a, b)};
          for (size_t w = 0; w < 2; ++w) {
            const double step = (high[w] - low[w]) / levels, code = (there[w] - low[w]) / step - 0.5,
                         wanted = std::min(levels - 1, std::floor((polar(j)[w] - low[w]) / step));
            const double room = 0x1p-9 * (levels + std::abs(low[w]) / step);  // range and step are rounded to f16
            ASSERT_NEAR(code, std::round(code), room + 1e-3) << spec;
            const double edge = (polar(j)[w] - low[w]) / step;
            ASSERT_NEAR(std::round(code), wanted, std::abs(edge - std::round(edge)) < room + 1e-3 ? 1 : 0.01) << spec;
          }
        }
    for (int64_t kv = 0; kv < c.shape.g; ++kv)
      for (int64_t j = 0; j < 192; ++j)
        for (int64_t x = 0; x < 32; ++x)
          ASSERT_EQ(kept.v[size_t(kv)][size_t(j)][size_t(x)], double(c.v->at<float>(kv, j, x)));
  }
}

/// All keys (or values) of a layer, row by row.
std::vector<std::vector<double>> rows_of(Session& session, int layer, bool keys) {
  LayerStore& store = session.store().layer(layer);
  Queue queue(&reference_kernels(), cpu_memory());
  const int64_t all = store.entries(), width = keys ? store.shape().d : store.shape().d_v;
  const Ragged out{queue.scratch.take(Dtype::F32, {all, width}), store.offsets(queue), {}, session.model().info().g, all};
  queue.run->page_read(queue, store.pages(), nullptr, keys ? out : Ragged(), keys ? Ragged() : out, {});
  std::vector<std::vector<double>> rows;
  for (int64_t r = 0; r < all; ++r)
    rows.emplace_back(out.values.select(0, r).as<float>(), out.values.select(0, r).as<float>() + width);
  return rows;
}

// Two layers' entries behind a prompt against the paper's lines on what a dense session holds, and the memory of it.
TEST(MiniCache, TwoLayersShareDirections) {
  struct Course {
    int h, g, from;
    double t, retention;
    int64_t chunk;
  };
  for (const Course& c : {Course{6, 2, 0, 0.6, 0.05, 0}, Course{3, 3, -1, 0.6, 0.05, 0}, Course{3, 3, 1, 0.3, 0, 0},
                          Course{6, 2, 0, 0.5, 0.02, 100}, Course{4, 1, 0, 1, 0, 70}, Course{3, 3, 0, 0.5, 1, 0}}) {
    const auto model = tiny_model(c.h, c.g);
    const std::string spec = "minicache(from=" + std::to_string(c.from) + ",t=" + std::to_string(c.t) +
                             ",retention=" + std::to_string(c.retention) + ")";
    SCOPED_TRACE(spec + " chunk " + std::to_string(c.chunk));
    Session merged(model, in_f32(spec, c.chunk)), dense(model, in_f32("dense", c.chunk));
    const int64_t all = 200;
    // What later parts of a prompt come to depends on what earlier ones became: those are compared by direction alone.
    merged.prefill(text(all, 1)), dense.prefill(text(all, 1));
    const int from = c.from < 0 ? 2 : c.from;
    int64_t shared = 0, plain_bytes = dense.store().layer(0).pages().layouts[0].bytes;
    for (int low = from; low + 1 < 4; low += 2) {
      const Pages &one = merged.store().layer(low).pages(), &two = merged.store().layer(low + 1).pages();
      for (int kv = 0; kv < c.g; ++kv)
        for (int64_t p = 0; p < 4; ++p) {
          EXPECT_EQ(one.page(kv, p) == two.page(kv, p), one.layout.at<uint8_t>(kv, p) == 1);
          EXPECT_EQ(two.layout.at<uint8_t>(kv, p), 2 * one.layout.at<uint8_t>(kv, p));
          shared += one.page(kv, p) == two.page(kv, p);
        }
      for (const bool keys : {true, false}) {
        const auto x = rows_of(dense, low, keys), y = rows_of(dense, low + 1, keys), a = rows_of(merged, low, keys),
                   b = rows_of(merged, low + 1, keys);
        for (int kv = 0; kv < c.g; ++kv) {
          std::vector<double> alike;
          const auto dot = [](const std::vector<double>& p, const std::vector<double>& q) {
            return std::inner_product(p.begin(), p.end(), q.begin(), 0.0);
          };
          for (int64_t j = 0; j < all; ++j) {
            const auto &p = x[size_t(kv * all + j)], &q = y[size_t(kv * all + j)];
            alike.push_back(dot(p, q) / std::sqrt(dot(p, p) * dot(q, q)));
          }
          const double low_one = *std::min_element(alike.begin(), alike.end()),
                       high = *std::max_element(alike.begin(), alike.end());
          for (int64_t j = 0; c.chunk == 0 && j < all; ++j) {
            const size_t r = size_t(kv * all + j);
            const bool whole = one.page(kv, j / 64) != two.page(kv, j / 64) ||
                               alike[size_t(j)] < low_one + c.retention * (high - low_one);
            if (std::abs(alike[size_t(j)] - low_one - c.retention * (high - low_one)) < 1e-4)
              continue;  // either may be
            const double angle = std::acos(alike[size_t(j)]), m = std::sqrt(dot(x[r], x[r])),
                         n = std::sqrt(dot(y[r], y[r]));
            for (size_t i = 0; i < x[r].size(); ++i) {
              const double e = (std::sin((1 - c.t) * angle) * x[r][i] / m + std::sin(c.t * angle) * y[r][i] / n) /
                               std::sin(angle);
              ASSERT_NEAR(a[r][i], whole ? x[r][i] : m * e, 1e-4) << "entry " << j << " channel " << i;
              ASSERT_NEAR(b[r][i], whole ? y[r][i] : n * e, 1e-4) << "entry " << j << " channel " << i;
            }
          }
          for (int64_t j = 0; j < all; ++j)  // where they share a page and are merged, one direction
            if (c.t == 0.5 && c.retention == 0 && one.page(kv, j / 64) == two.page(kv, j / 64)) {
              const auto &p = a[size_t(kv * all + j)], &q = b[size_t(kv * all + j)];
              ASSERT_NEAR(dot(p, q) / std::sqrt(dot(p, p) * dot(q, q)), 1, 1e-5);
            }
        }
      }
    }
    if (c.retention == 0) { EXPECT_EQ(shared, 3 * c.g * (from == 1 ? 1 : 2)) << "every full page"; }
    if (c.retention == 1) { EXPECT_EQ(shared, 0); }
    EXPECT_GE(shared, c.retention < 0.1 ? 1 : 0);
    int64_t held = 0;
    for (int l = 0; l < 4; ++l) held += merged.store().layer(l).bytes();
    const int64_t one_page = shared ? merged.store().layer(0).pages().layouts[1].bytes : 0;
    EXPECT_EQ(held, 4 * 4 * c.g * plain_bytes - shared * (2 * plain_bytes - one_page))
        << "a page that two layers hold counts once";
    // Forked, decoded and taken back, into a page that was shared too.
    auto fork = merged.fork();
    EXPECT_EQ(row(fork->decode(7)), row(merged.decode(7)));
    fork->truncate(0, 150), fork->decode(3);
    fork->truncate(0, 20), fork->decode(9);
    EXPECT_EQ(fork->store().layer(3).positions(0).size(), 21u);
    fork.reset();
    EXPECT_TRUE(std::isfinite(row(merged.decode(5))[0]));
    Session twin(model, in_f32(spec, c.chunk));
    twin.prefill(text(all, 1)), twin.decode(7), twin.decode(5);
    EXPECT_EQ(row(twin.decode(9)), row(merged.decode(9))) << "as if there had been no fork";
  }
}

// Layers that are the same but for a factor: nothing is lost at any t.
TEST(MiniCache, EqualDirectionsStayWhatTheyAre) {
  Queue queue(&reference_kernels(), cpu_memory());
  const StoreShape shape{2, 16, 8};
  StoreOptions options;
  options.k.kind = options.v.kind = PageType::Kind::F32;
  options.columns = {{.name = "own"}, {.name = "high", .keeps = Column::Keeps::KeyMax, .block = 16}};
  for (const float t : {0.0f, 0.4f, 1.0f}) {
    Store store(queue, std::vector{shape, shape}, options);
    for (uint8_t of : {uint8_t(1), uint8_t(2)}) {
      PageType pair = options.k;
      pair.pair = of;
      ASSERT_EQ(store.add_layout(pair, pair), of);
    }
    Random random(3);
    const std::vector<int64_t> offsets{0, 130, 260};
    Buffer k(Dtype::F32, {260, 16}), v(Dtype::F32, {260, 8}), positions(Dtype::I32, {260});
    for (int64_t i = 0; i < 260 * 16; ++i) k->as<float>()[i] = float(random.normal());
    for (int64_t i = 0; i < 260 * 8; ++i)
      v->as<float>()[i] = i < 8 ? 0 : float(random.normal());  // one of no direction
    for (int32_t i = 0; i < 260; ++i) positions->as<int32_t>()[i] = i % 130;
    const auto appended = [&](int layer) {
      const Ragged keys{k, queue.upload(offsets), {}, 2, 260}, values{v, keys.offsets, {}, 2, 260};
      store.layer(layer).append(queue, keys, values, positions);
      Ragged own = keys;
      own.values = compute(queue, Dtype::F32, {260}, index() + layer * 1000);
      store.layer(layer).write_column(queue, 0, own);
    };
    appended(0);
    for (int64_t i = 0; i < 260 * 16; ++i)
      k->as<float>()[i] *= -0.25f * (i / 16 == 70 ? 1 : -1);  // and one the other way round
    for (int64_t i = 0; i < 260 * 8; ++i) v->as<float>()[i] *= 3;
    appended(1);
    const auto read = [&](int layer) {
      std::vector<float> out(260 * 24 + 260 + 2 * 9 * 16);
      const Ragged keys{Tensor(out.data(), Dtype::F32, {260, 16}), store.layer(layer).offsets(queue), {}, 2, 260};
      Ragged values = keys, own = keys;
      values.values = Tensor(out.data() + 260 * 16, Dtype::F32, {260, 8}),
      own.values = Tensor(out.data() + 260 * 24, Dtype::F32, {260});
      queue.run->page_read(queue, store.layer(layer).pages(), nullptr, keys, values, {});
      queue.run->column_read(queue, store.layer(layer).pages(), 0, own);
      for (int64_t s = 0; s < 2; ++s)
        for (int64_t b = 0; b < 9; ++b) {
          const Pages& pages = store.layer(layer).pages();
          const auto* at = reinterpret_cast<const float*>(pages.page(s, b / 4) + pages.layout_of(s, b / 4).column_at[1]) +
                           b % 4 * 16;
          std::copy_n(at, 16, out.data() + 260 * 25 + (s * 9 + b) * 16);
        }
      return out;
    };
    const auto low = read(0), high = read(1);
    const Tensor first = queue.upload(std::vector<int32_t>{0, 1}), last = queue.upload(std::vector<int32_t>{9, 2});
    Ragged none{queue.scratch.take(Dtype::F32, {260}), store.layer(0).offsets(queue), {}, 2, 260};
    queue.fill(none.values, 0);
    Ragged some = none;
    some.values = compute(queue, Dtype::F32, {260}, index() == 70);  // stays whole
    store.layer(1).pair(queue, store.layer(0), first, last, 1, some, none, t, 3);
    EXPECT_LT(distance(read(0), low), 1e-5);
    EXPECT_LT(distance(read(1), high), 1e-5);
    EXPECT_EQ(store.layer(0).pages().layout.at<uint8_t>(0, 1), 1);
    EXPECT_EQ(store.layer(1).pages().layout.at<uint8_t>(1, 1), 2);
    EXPECT_EQ(store.layer(1).pages().layout.at<uint8_t>(1, 0), 0) << "not asked for";
    EXPECT_EQ(store.layer(1).pages().layout.at<uint8_t>(0, 2), 0) << "not full";
    EXPECT_EQ(store.layer(0).pages().page(0, 1), store.layer(1).pages().page(0, 1));
  }
}

TEST(MiniCache, NeedsTheSameEntriesInBothLayers) {
  const auto model = tiny_model(4, 2);
  for (const char* spec :
       {"minicache+snapkv", "minicache+kv-q8", "minicache(layers=2-)+kivi(layers=0)", "minicache+vattention"}) {
    const auto parsed = Composition::parse(spec, model->info(), registry());
    ASSERT_FALSE(parsed.has_value()) << spec;
    EXPECT_EQ(parsed.error().code, Code::Conflict);
  }
  EXPECT_FALSE(Composition::parse("minicache(t=1.5)", model->info(), registry()).has_value());
  EXPECT_FALSE(Composition::parse("minicache(retention=-1)", model->info(), registry()).has_value());
}

/// ∫ f over [a, b], by Simpson's rule.
template <class F>
double integral(double a, double b, F&& f) {
  const int n = 2000;
  double sum = f(a) + f(b);
  for (int i = 1; i < n; ++i) sum += f(a + (b - a) * i / n) * (i % 2 ? 4 : 2);
  return sum * (b - a) / n / 3;
}

// Blocks of 16 against the tree of angles written out, with points that are the means of what is nearest to them.
TEST_P(Stores, PolarQuantIsATreeOfAngles) {
  const Case c(shape(1, 128 + 9, 32, 64), 5);
  const Settled kept(c, "polarquant", backend());
  EXPECT_EQ(Settled(Case(shape(1, 128, 32, 64), 5), "polarquant", backend()).bits_k, 4)
      << "62 bits for 16 numbers, in 64";
  ModelInfo model;
  model.d = 32, model.d_v = 64;
  const auto mechanism = value_or_throw(make_mechanism(value_or_throw(parse_spec("polarquant"))[0], registry()));
  const PageType type = mechanism->needs(model).quantised_k;
  const double variance[] = {0.1169, 0.0613, 0.0311};
  std::vector<std::vector<double>> points;
  for (int level = 2; level <= 4; ++level) {
    const auto density = [&](double x) { return std::pow(std::sin(2 * x), std::pow(2.0, level - 1) - 1); };
    const auto moment = [&](double a, double b, int of) {
      return integral(a, b, [&](double x) { return density(x) * std::pow(x, of); });
    };
    const double all = moment(0, M_PI / 2, 0), mean = moment(0, M_PI / 2, 1) / all;
    EXPECT_NEAR(moment(0, M_PI / 2, 2) / all - mean * mean, variance[level - 2], 2e-4);
    auto& own = points.emplace_back();
    for (int i = 0; i < 4; ++i) own.push_back(double(type.points[size_t(4 * (level - 2) + i)]));
    for (size_t i = 0; i < 4; ++i) {
      const double a = i ? (own[i - 1] + own[i]) / 2 : 0, b = i < 3 ? (own[i] + own[i + 1]) / 2 : M_PI / 2;
      EXPECT_NEAR(own[i], moment(a, b, 1) / moment(a, b, 0), 2e-3) << "level " << level;
    }
  }
  double away = 0, size = 0;
  const auto check = [&](const Rows& got, const Buffer& from, int64_t kv, int64_t width) {
    for (int64_t j = 0; j < 137; ++j)
      for (int64_t first = 0; first < width; first += 16) {
        std::vector<double> x, wanted(16, 1.0);
        for (int64_t i = 0; i < 16; ++i) x.push_back(double(from->at<float>(kv, j, first + i)));
        const std::vector<double> given = x;
        bool close = false;  // to where either code may be taken
        for (int level = 1; level <= 4; ++level) {
          std::vector<double> up;
          for (size_t i = 0; i + 1 < x.size(); i += 2) {
            const double angle = std::fmod(std::atan2(x[i + 1], x[i]) + 2 * M_PI, 2 * M_PI), part = M_PI / 8;
            double code = (std::floor(angle / part) + 0.5) * part;
            close |= level == 1 && std::abs(angle / part - std::round(angle / part)) < 1e-5;
            if (level > 1) {
              const auto& own = points[size_t(level - 2)];
              code = *std::min_element(own.begin(), own.end(),
                                       [&](double a, double b) { return std::abs(angle - a) < std::abs(angle - b); });
              for (size_t p = 1; p < 4; ++p) close |= std::abs(angle - (own[p - 1] + own[p]) / 2) < 1e-5;
            }
            for (size_t n = 0; n < size_t(1) << level; ++n)
              wanted[(i << (level - 1)) + n] *= n >> (level - 1) ? std::sin(code) : std::cos(code);
            up.push_back(std::hypot(x[i], x[i + 1]));
          }
          x = up;
        }
        for (size_t i = 0; i < 16; ++i) {
          const double there = got[size_t(j)][size_t(first) + i];
          if (j >= 128) { ASSERT_EQ(there, given[i]) << "not a full page"; }
          if (j < 128 && !close) { ASSERT_NEAR(there, x[0] * wanted[i], 1e-3 * x[0]); }
          if (j < 128) away += std::pow(there - given[i], 2), size += given[i] * given[i];
        }
      }
  };
  for (int64_t kv = 0; kv < c.shape.g; ++kv)
    check(kept.k[size_t(kv)], c.k, kv, 32), check(kept.v[size_t(kv)], c.v, kv, 64);
  EXPECT_LT(away / size, 0.05);
  EXPECT_GT(away / size, 0.005);
  EXPECT_THROW(mechanism->needs([] {
    ModelInfo m;
    m.d = m.d_v = 24;
    return m;
  }()),
               Error);
}

/// The projection on the `rank` main eigenvectors of Σ x x^T of rows x, by Jacobi rotations.
Rows projected(const Rows& x, size_t rank) {
  const size_t n = x[0].size();
  Rows a(n, std::vector<double>(n, 0.0)), v = a;
  for (const auto& row : x)
    for (size_t i = 0; i < n; ++i)
      for (size_t j = 0; j < n; ++j) a[i][j] += row[i] * row[j];
  for (size_t i = 0; i < n; ++i) v[i][i] = 1;
  for (int sweep = 0; sweep < 30; ++sweep)
    for (size_t p = 0; p < n; ++p)
      for (size_t q = p + 1; q < n; ++q) {
        if (std::abs(a[p][q]) < 1e-14 * std::sqrt(a[p][p] * a[q][q])) continue;
        const double half = (a[q][q] - a[p][p]) / (2 * a[p][q]),
                     t = (half < 0 ? -1 : 1) / (std::abs(half) + std::hypot(half, 1)), cos = 1 / std::hypot(t, 1),
                     sin = t * cos;
        for (size_t i = 0; i < n; ++i) {
          const double x1 = a[i][p], y1 = a[i][q];
          a[i][p] = cos * x1 - sin * y1, a[i][q] = sin * x1 + cos * y1;
        }
        for (size_t i = 0; i < n; ++i) {
          const double x1 = a[p][i], y1 = a[q][i], x2 = v[p][i], y2 = v[q][i];
          a[p][i] = cos * x1 - sin * y1, a[q][i] = sin * x1 + cos * y1;
          v[p][i] = cos * x2 - sin * y2, v[q][i] = sin * x2 + cos * y2;
        }
      }
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t(0));
  std::sort(order.begin(), order.end(), [&](size_t i, size_t j) { return a[i][i] > a[j][j]; });
  Rows out;
  for (const auto& row : x) {
    auto& to = out.emplace_back(n, 0.0);
    for (size_t r = 0; r < rank; ++r) {
      const auto& e = v[order[r]];
      const double dot = std::inner_product(e.begin(), e.end(), row.begin(), 0.0);
      for (size_t i = 0; i < n; ++i) to[i] += dot * e[i];
    }
  }
  return out;
}

/// Rotates a row of 2 · |turn| numbers to a position (or back), halves together.
void rotate(std::vector<double>& row, const Rope& rope, double position) {
  for (size_t c = 0; c < size_t(rope.dims / 2); ++c) {
    const double a = position * double(rope.inv_freq.at<float>(int64_t(c))), x = row[c], y = row[c + size_t(rope.dims / 2)];
    row[c] = x * std::cos(a) - y * std::sin(a), row[c + size_t(rope.dims / 2)] = x * std::sin(a) + y * std::cos(a);
  }
}

// The first decoded token's attention in the first group of layers, from the singular vectors of what a dense session holds.
TEST(Xkv, LayersShareLatents) {
  for (const auto& [h, g, size, rank, value_rank] :
       {std::tuple{6, 2, 2, 24, 30}, {3, 3, 4, 60, 50}, {6, 2, 1, 20, 8}, {4, 1, 3, 90, 12}}) {
    const auto model = windowed(h, g, {0, 0, 0, 0});
    const ModelInfo& info = model->info();
    const std::string spec = "xkv(size=" + std::to_string(size) + ",rank=" + std::to_string(rank) +
                             ",value_rank=" + std::to_string(value_rank) + ",rounds=40)";
    SCOPED_TRACE(spec);
    Session compact(model, in_f32(spec)), dense(model, in_f32("dense"));
    const int64_t all = 150;
    EXPECT_EQ(row(compact.prefill(text(all, 1))), row(dense.prefill(text(all, 1)))) << "a prompt is read densely";
    Rows keys(static_cast<size_t>(all)), values = keys;  // a token's rows of all layers of the group
    for (int l = 0; l < size; ++l) {
      auto k = rows_of(dense, l, true), v = rows_of(dense, l, false);
      for (int kv = 0; kv < g; ++kv)
        for (int64_t j = 0; j < all; ++j) {
          auto &x = k[size_t(kv * all + j)], &y = v[size_t(kv * all + j)];
          rotate(x, *info.rope(l), -double(j));
          keys[size_t(j)].insert(keys[size_t(j)].end(), x.begin(), x.end());
          values[size_t(j)].insert(values[size_t(j)].end(), y.begin(), y.end());
        }
    }
    const Rows k = projected(keys, std::min(size_t(rank), keys[0].size())),
               v = projected(values, std::min(size_t(value_rank), values[0].size()));
    for (int l = 0; l < 4; ++l)
      EXPECT_EQ(compact.store().layer(l).entries(), 0) << "nothing of the prompt stays in the store";
    double worst = 0, changed = 0;
    compact.tap([&](LayerView& at) {
      if (at.layer > 0) return;
      const Ragged own_k = stored_keys(at), own_v = stored_values(at);
      for (int head = 0; head < h; ++head) {
        const size_t kv = size_t(head * g / h);
        std::vector<double> q, weights, out(16, 0.0);
        for (int64_t c = 0; c < 16; ++c) q.push_back(double(at.q.values.at<float>(head, c)));
        double total = 0;
        for (int64_t j = 0; j <= all; ++j) {
          std::vector<double> x, y;
          for (size_t c = 0; c < 16; ++c) {
            x.push_back(j < all ? k[size_t(j)][kv * 16 + c] : double(own_k.values.at<float>(int64_t(kv), int64_t(c))));
            y.push_back(j < all ? v[size_t(j)][kv * 16 + c] : double(own_v.values.at<float>(int64_t(kv), int64_t(c))));
          }
          if (j < all) rotate(x, *info.rope(0), double(j));
          const double w = std::exp(std::inner_product(q.begin(), q.end(), x.begin(), 0.0) / 4);
          total += w;
          for (size_t c = 0; c < 16; ++c) out[c] += w * y[c];
        }
        for (size_t c = 0; c < 16; ++c)
          worst = std::max(worst, std::abs(out[c] / total - double(at.out.at<float>(head, int64_t(c)))));
      }
    });
    const auto first = row(compact.decode(7));
    compact.tap({});
    changed = distance(first, row(dense.decode(7)));
    EXPECT_LT(worst, 1e-3);
    EXPECT_GT(changed, 1e-4);
    int64_t held = 0;  // latents of all tokens, and a matrix for each layer
    for (int l = 0; l < 4; l += size) {
      const int64_t count = std::min(size, 4 - l), wide = count * g * 16, r = std::min<int64_t>(rank, wide),
                    w = std::min<int64_t>(value_rank, wide);
      held += 4 * (r + w) * (all + wide) + 4 * all * (1 + g) + 8 * (2 + g + 1);
    }
    EXPECT_NEAR(double(compact.kv_bytes() - compact.store().bytes()), double(held), 16) << "shares may be rounded";
    // A fork, tokens taken back from the prompt, and a second part of it.
    auto fork = compact.fork();
    EXPECT_EQ(row(fork->decode(5)), row(compact.decode(5)));
    fork->truncate(0, 100);
    auto again = fork->fork();
    again->prefill(text(130, 4)), again->decode(1);
    EXPECT_TRUE(std::isfinite(row(fork->decode(9))[0]));
    Session shorter(model, in_f32("dense")),
        exact(model, in_f32("xkv(rank=1000000,value_rank=1000000,size=" + std::to_string(size) + ")"));
    exact.prefill(text(all, 1)), exact.decode(3), exact.truncate(0, 100);
    const auto prompt = text(all, 1);
    shorter.prefill(std::span(prompt).first(100));
    EXPECT_LT(distance(row(exact.decode(9)), row(shorter.decode(9))), 1e-4) << "what is taken back is not read";
    EXPECT_LT(distance(row(exact.prefill(text(40, 2))), row(shorter.prefill(text(40, 2)))), 1e-4);
    EXPECT_LT(distance(row(exact.decode(2)), row(shorter.decode(2))), 1e-4);
  }
  const auto model = tiny_model(4, 2);
  for (const char* spec : {"xkv(layers=2-)", "xkv(heads=0)", "xkv(size=0)", "xkv+snapkv", "xkv+tidal-decode"})
    EXPECT_FALSE(Composition::parse(spec, model->info(), registry()).has_value()) << spec;
}

}  // namespace
}  // namespace heed::test
