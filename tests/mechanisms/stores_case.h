// What a page makes of keys and values.
#pragma once
#include "attention/numbers.h"
#include "keep_case.h"
#include "mechanisms/registry.h"

namespace heed::test {

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
    EXPECT_EQ(store.add_layout(needs.quantised_k, needs.quantised_v.quantised() ? needs.quantised_v : options.v), 1);
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

}  // namespace heed::test
