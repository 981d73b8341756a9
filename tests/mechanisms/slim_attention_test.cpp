// Values made of keys against values that were kept.
#include <array>
#include <cmath>

#include "base/random.h"
#include "harness.h"
#include "mechanisms/registry.h"
#include "session_case.h"

namespace heed::test {
namespace {

std::vector<float> row_of(const Tensor& logits) { return {logits.as<float>(), logits.as<float>() + logits.numel()}; }

std::string refused(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) { return error.what(); }
  return "taken";
}

// In all phases: prompts in parts, decoded tokens that stay and that leave, a fork, tokens taken back, windows.
TEST(SlimAttention, IsDenseWithoutValues) {
  const auto model = tiny_model(3, 3);
  for (const int64_t chunk : {0, 25})
    for (const char* spec : {"slim-attention(every=8)", "slim-attention", "slim-attention(every=1,layers=1-2)"}) {
      SCOPED_TRACE(std::string(spec) + " chunk " + std::to_string(chunk));
      Session slim(model, in_f32(spec, chunk)), dense(model, in_f32("dense", chunk));
      EXPECT_LT(distance(row_of(slim.prefill(text(83, 1))), row_of(dense.prefill(text(83, 1)))), 1e-3);
      EXPECT_EQ(slim.store().layer(1).entries(), 0);
      for (int32_t i = 0; i < 20; ++i)
        EXPECT_LT(distance(row_of(slim.decode(i * 13 % 61)), row_of(dense.decode(i * 13 % 61))), 1e-3) << i;
      const auto slim_fork = slim.fork(), dense_fork = dense.fork();
      slim_fork->truncate(0, 60), dense_fork->truncate(0, 60);
      for (int32_t i = 0; i < 9; ++i)
        EXPECT_LT(distance(row_of(slim_fork->decode(i * 7 % 61)), row_of(dense_fork->decode(i * 7 % 61))), 1e-3) << i;
      EXPECT_LT(distance(row_of(slim.prefill(text(40, 2))), row_of(dense.prefill(text(40, 2)))), 1e-3);
      EXPECT_LT(distance(row_of(slim.decode(5)), row_of(dense.decode(5))), 1e-3);
    }
}

TEST(SlimAttention, ABatchIsItsSequences) {
  const auto model = tiny_model(3, 3);
  SessionOptions two = in_f32("slim-attention(every=3)");
  two.sequences = 2;
  SessionOptions plain = two;
  plain.attention = "dense";
  Session slim(model, two), dense(model, plain);
  const std::vector<int32_t> a = text(50, 1), b = text(31, 2);
  const std::vector<std::span<const int32_t>> both{a, b};
  EXPECT_LT(distance(row_of(slim.prefill(both)), row_of(dense.prefill(both))), 1e-3);
  for (int32_t i = 0; i < 8; ++i) {
    const std::vector<int32_t> ids{i, 60 - i};
    EXPECT_LT(distance(row_of(slim.decode(ids)), row_of(dense.decode(ids))), 1e-3) << i;
  }
}

TEST(SlimAttention, HoldsHalf) {
  const auto model = tiny_model(3, 3);
  Session slim(model, in_f32("slim-attention")), dense(model, in_f32("dense"));
  slim.prefill(text(640, 1)), dense.prefill(text(640, 1));
  const int64_t beside = 4 * 640 * (1 + 3) + 8 * (2 + 4);  // positions of tokens, and of each head's entries
  EXPECT_EQ(slim.kv_bytes(2), 640 * 48 * 4 + beside);
  EXPECT_LT(double(slim.kv_bytes()), 0.56 * double(dense.kv_bytes()));
}

TEST(SlimAttention, RefusesWhatItCannotInvert) {
  const auto grouped = tiny_model(6, 2);
  EXPECT_NE(refused([&] { Session(grouped, in_f32("slim-attention")); }).find("6 heads share 2"), std::string::npos);
  ModelInfo wide;
  wide.layers = 1, wide.h = wide.g = 3, wide.d = wide.d_v = 16, wide.hidden = 64, wide.vocabulary = 61;
  const auto model = Model::random(wide, 64, Dtype::F32, 5);
  EXPECT_NE(refused([&] { Session(model, in_f32("slim-attention")); }).find("not square"), std::string::npos);
  EXPECT_FALSE(Composition::parse("slim-attention(heads=0)", tiny_model(3, 3)->info(), registry()).has_value());
  EXPECT_FALSE(Composition::parse("slim-attention+snapkv", tiny_model(3, 3)->info(), registry()).has_value());
}

/// Attention over values that were never kept, with biases and values of another width, in f64; several queries at once and,
/// where they are one a head, the order of decoding.
void check_projections(const std::string& backend, bool biases, int64_t queries, bool singular) {
  const int64_t h = 3, d = 8, d_v = 12, hidden = h * d, m = 70;
  Random random(4);
  const auto filled = [&](std::initializer_list<int64_t> sizes) {
    Buffer out(Dtype::F32, sizes);
    for (int64_t i = 0; i < out->numel(); ++i) out->as<float>()[i] = float(random.normal());
    return out;
  };
  const Buffer x = filled({m, hidden}), w_k = filled({hidden, hidden}), w_v = filled({h * d_v, hidden}),
               b_k = filled({hidden}), b_v = filled({h * d_v}), q = filled({h * queries, d});
  if (singular)
    for (int64_t c = 0; c < hidden; ++c) w_k->at<float>(5, c) = 2 * w_k->at<float>(9, c);
  const auto product = [&](const Buffer& w, const Buffer& b, int64_t token, int64_t out) {
    double sum = biases ? double(b->at<float>(out)) : 0;
    for (int64_t c = 0; c < hidden; ++c) sum += double(w->at<float>(out, c)) * double(x->at<float>(token, c));
    return sum;
  };
  Buffer k(Dtype::F32, {h * m, d}), v(Dtype::F32, {h * m, d_v});
  for (int64_t head = 0; head < h; ++head)
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t c = 0; c < d; ++c) k->at<float>(head * m + j, c) = float(product(w_k, b_k, j, head * d + c));
      for (int64_t c = 0; c < d_v; ++c) v->at<float>(head * m + j, c) = float(product(w_v, b_v, j, head * d_v + c));
    }
  ModelInfo model;
  model.h = model.g = int(h), model.d = int(d), model.d_v = int(d_v), model.hidden = int(hidden);
  Queue queue = queue_on(heed::backend(backend));
  const auto mechanism = value_or_throw(make_mechanism(value_or_throw(parse_spec("slim-attention(every=1)"))[0], registry()));
  const auto state = mechanism->open(model);
  StoreOptions options;
  options.k.kind = options.v.kind = PageType::Kind::F32, options.plain_keys = true;
  const StoreShape layer{int(h), int(d), int(d_v)};
  Store store(queue, std::span(&layer, 1), options);
  const Tensor offsets = compute(queue, Dtype::I64, {h + 1}, index() * m),
               positions = compute(queue, Dtype::I32, {h * m}, mod(index(), m));
  const Tensor keys = queue.upload(k), values = queue.upload(v);
  store.layer(0).append(queue, {keys, offsets, {}, h, h * m}, {values, offsets, {}, h, h * m}, positions, std::span(&m, 1));
  LayerView at(model, queue, 0, queries == 1 ? Phase::Decode : Phase::Chunk);
  at.store = &store.layer(0), at.stores = &store, at.rows = {queries};
  at.enter(state.get());
  at.projections = {queue.upload(w_k), queue.upload(w_v), {}, {}};
  if (biases) at.projections.k_bias = queue.upload(b_k), at.projections.v_bias = queue.upload(b_v);
  at.q = {queue.upload(q), compute(queue, Dtype::I64, {h + 1}, index() * queries), {}, h, h * queries};
  at.q_pos = at.mods.q_pos = compute(queue, Dtype::I32, {h * queries}, double(m));
  ASSERT_TRUE(static_cast<const KeepPolicy&>(*mechanism).settle(at));
  EXPECT_EQ(store.layer(0).entries(), 0);
  at.out = compute(queue, Dtype::F32, {h * queries, d_v}, 0), at.lse = compute(queue, Dtype::F32, {h * queries}, -INFINITY);
  if (singular) {
    EXPECT_NE(refused([&] { mechanism->edit(at); }).find("no inverse"), std::string::npos);
    return;
  }
  const Buffer out = queue.read_back(mechanism->edit(at));
  for (int64_t head = 0; head < h; ++head)
    for (int64_t i = 0; i < queries; ++i) {
      std::vector<double> weights, wanted(size_t(d_v), 0.0);
      double sum = 0;
      for (int64_t j = 0; j < m; ++j) {
        double dot = 0;
        for (int64_t c = 0; c < d; ++c)
          dot += double(q->at<float>(head * queries + i, c)) * double(k->at<float>(head * m + j, c));
        weights.push_back(std::exp(dot / std::sqrt(double(d))));
        sum += weights.back();
      }
      for (int64_t j = 0; j < m; ++j)
        for (int64_t c = 0; c < d_v; ++c)
          wanted[size_t(c)] += weights[size_t(j)] / sum * double(v->at<float>(head * m + j, c));
      for (int64_t c = 0; c < d_v; ++c)
        ASSERT_NEAR(double(out->at<float>(head * queries + i, c)), wanted[size_t(c)], 2e-3) << "head " << head;
    }
}

TEST(SlimAttention, MakesValuesOfKeys) {
  for (const std::string backend : {"reference", "auto", "guarded"})
    for (const bool biases : {false, true})
      for (const int64_t queries : {1, 5}) check_projections(backend, biases, queries, false);
  check_projections("reference", false, 1, true);
}

}  // namespace
}  // namespace heed::test
