#include "base/threads.h"
#include "kernels/bounds.h"
#include "kernels/checks.h"
#include "kernels/harness.h"
#include "kernels/quant.h"

namespace heed::test {
namespace {

constexpr Dtype all_types[] = {Dtype::F32,  Dtype::F16,  Dtype::BF16, Dtype::Q4_0,  Dtype::Q4_1,
                               Dtype::Q5_0, Dtype::Q5_1, Dtype::Q8_0, Dtype::Q2_K,  Dtype::Q3_K,
                               Dtype::Q4_K, Dtype::Q5_K, Dtype::Q6_K, Dtype::IQ4_NL};

/// Where a block's scales lie, so that random bytes around them make random, finite weights.
template <class Block>
void scale_block(Random& random, void* at, double typical) {
  Block* block = static_cast<Block*>(at);
  block->d = f16(typical * (0.5 + random.uniform()) * (chance(random, 0.2) ? -1 : 1));
  if constexpr (requires { block->m; }) block->m = f16(typical * random.normal());
  if constexpr (requires { block->dmin; }) block->dmin = f16(typical * random.uniform());
}

void scale_block(Random& random, Dtype type, void* at) {
  switch (type) {
    case Dtype::Q4_0: return scale_block<BlockQ4_0>(random, at, 0.1);
    case Dtype::Q4_1: return scale_block<BlockQ4_1>(random, at, 0.1);
    case Dtype::Q5_0: return scale_block<BlockQ5_0>(random, at, 0.05);
    case Dtype::Q5_1: return scale_block<BlockQ5_1>(random, at, 0.05);
    case Dtype::Q8_0: return scale_block<BlockQ8_0>(random, at, 0.01);
    case Dtype::IQ4_NL: return scale_block<BlockIQ4_NL>(random, at, 0.01);
    case Dtype::Q2_K: return scale_block<BlockQ2_K>(random, at, 0.03);
    case Dtype::Q3_K: return scale_block<BlockQ3_K>(random, at, 0.01);
    case Dtype::Q4_K: return scale_block<BlockQ4_K>(random, at, 0.003);
    case Dtype::Q5_K: return scale_block<BlockQ5_K>(random, at, 0.002);
    case Dtype::Q6_K: return scale_block<BlockQ6_K>(random, at, 0.0005);
    default: break;
  }
}

struct Weights {
  Buffer memory, other;
  Tensor view;
  Weights(Random& random, Dtype type, int64_t rows, int64_t width) {
    const DtypeInfo kind = info(type);
    memory = Buffer(Dtype::U8, {rows * width / kind.block * kind.bytes});
    view = Tensor(memory->data, type, {rows, width});
    if (!is_block(type)) {
      each(view, [&](auto index) { set(view, index, random.normal()); });
      return;
    }
    for (int64_t i = 0; i < memory->numel(); ++i) memory->as<uint8_t>()[i] = uint8_t(random.next());
    for (int64_t b = 0; b < rows * width / kind.block; ++b)
      scale_block(random, type, memory->as<char>() + b * kind.bytes);
  }
  /// As `run` may be given them: half of the time in its own order, where it has one.
  Tensor as_given(const Kernels& run, Random& random) {
    if (!run.interleave || !is_block(view.type) || chance(random, 0.5)) return view;
    other = Buffer(Dtype::U8, {memory->numel()});
    Tensor to(other->data, view.type, {view.size[0], view.size[1]});
    to.interleaved = true;
    Queue queue;
    run.interleave(queue, view, to);
    return to;
  }
  /// The largest row norm, of the exact values.
  double norm() const {
    double out = 0;
    std::vector<float> row(static_cast<size_t>(view.size[1]));
    for (int64_t r = 0; r < view.size[0]; ++r) {
      double squares = 0;
      if (is_block(view.type)) dequantise_row(view.type, view.slice(0, r, r + 1).data, view.size[1], row.data());
      for (int64_t c = 0; c < view.size[1]; ++c) {
        const int64_t index[] = {r, c};
        const double x = is_block(view.type) ? double(row[size_t(c)]) : number(view, index);
        squares += x * x;
      }
      out = std::max(out, squares);
    }
    return std::sqrt(out);
  }
};

Dtype any_type(Random& random) { return all_types[random.below(int64_t(std::size(all_types)))]; }

int64_t some_width(Random& random, Dtype type) {
  const int64_t block = info(type).block;
  if (block == 256) return pick<int64_t>(random, {256, 512, 768});
  if (block == 32) return pick<int64_t>(random, {32, 64, 96, 576, 640});
  return pick<int64_t>(random, {1, 7, 64, 65, 200, 576});
}

void matmul_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(4); ++i)
    for (Dtype type : all_types) {
      const int64_t inputs = some_width(random, type), outputs = pick<int64_t>(random, {1, 3, 16, 17, 64, 100}),
                    tokens = pick<int64_t>(random, {0, 1, 2, 8, 13, 17, 70});
      Weights w(random, type, outputs, inputs);
      const Poisoned x = filled(
          chance(random, 0.7) ? Dtype::F32 : Dtype::BF16, {tokens, inputs}, [&] { return random.normal(); },
          random.below(2), random.below(2) * 3);
      const Poisoned bias = filled(Dtype::F32, {outputs}, [&] { return random.normal(); }, random.below(2));
      const bool biased = chance(random, 0.5), accumulate = chance(random, 0.5);
      Poisoned want(Dtype::F32, {tokens, outputs}, random.below(2), random.below(2) * 3), got = want.twin();
      if (accumulate)
        each(want, [&](auto index) {
          const double held = random.normal();
          set(want, index, held);
          set(got, index, held);
        });
      SCOPED_TRACE(std::string(info(type).name) + " " + w.view.shape() + ", " + std::to_string(tokens) + " tokens" +
                   (biased ? ", bias" : "") + (accumulate ? ", accumulate" : ""));
      Queue queue;
      oracle().matmul(queue, w.view, x, biased ? bias.view() : Tensor(), accumulate, want);
      run.matmul(queue, w.as_given(run, random), x, biased ? bias.view() : Tensor(), accumulate, got);
      const double rms = tokens ? longest_row(x) / std::sqrt(double(inputs)) : 0;
      expect_close("y", want, got, product(type, rms, largest(x), w.norm(), double(inputs)));
    }
}

/// A norm of x before the products, or none, and x as they then read it.
struct Normed {
  Poisoned weight, rows;
  Norm norm;
  bool wanted;
  Normed(Random& random, const Tensor& x)
      : weight(filled(
            Dtype::F32, {x.size[1]}, [&] { return random.normal(); }, random.below(2))),
        rows(Dtype::F32, {x.size[0], x.size[1]}), norm{weight, 1e-5f}, wanted(chance(random, 0.5)) {
    Queue queue;
    if (wanted) oracle().rms_norm(queue, x, norm.weight, norm.eps, rows);
    else copy(x, rows.view());
  }
  const Norm* given() const { return wanted ? &norm : nullptr; }
};

/// Weights spread around zero, as trained ones are, in formats that say nothing of it.
void centre(Dtype type, void* at) {
  const auto low = [](auto* block, double middle) { return f16(-middle * double(float(block->d))); };
  const auto same = [](uint8_t* scales) {  // six bits of scale equal six bits of minimum
    for (int i = 0; i < 4; ++i) scales[4 + i] = scales[i], scales[8 + i] = uint8_t(scales[8 + i] % 16 * 17);
  };
  if (type == Dtype::Q4_1) {
    auto* b = static_cast<BlockQ4_1*>(at);
    b->m = low(b, 7.5);
  } else if (type == Dtype::Q5_1) {
    auto* b = static_cast<BlockQ5_1*>(at);
    b->m = low(b, 15.5);
  } else if (type == Dtype::Q2_K) {
    auto* b = static_cast<BlockQ2_K*>(at);
    for (uint8_t& both : b->scales) both = uint8_t(both % 16 * 17);
    b->dmin = low(b, -1.5);
  } else if (type == Dtype::Q4_K) {
    auto* b = static_cast<BlockQ4_K*>(at);
    same(b->scales);
    b->dmin = low(b, -7.5);
  } else if (type == Dtype::Q5_K) {
    auto* b = static_cast<BlockQ5_K*>(at);
    same(b->scales);
    b->dmin = low(b, -15.5);
  }
}

/// Rounding activations x to steps of s moves a product by √(Σ w² s² / 12) and no more: what a format adds to all weights of
/// a run must meet the same rounded activations as their codes do.
void matmul_rounds_activations_once(const Kernels& run, Random random) {
  for (Dtype type : all_types) {
    if (!is_block(type)) continue;
    const int64_t inputs = 768, outputs = 64, tokens = pick<int64_t>(random, {1, 2, 4});
    Weights w(random, type, outputs, inputs);
    const DtypeInfo kind = info(type);
    for (int64_t b = 0; b < outputs * inputs / kind.block; ++b) centre(type, w.memory->as<char>() + b * kind.bytes);
    const Poisoned x = filled(Dtype::F32, {tokens, inputs}, [&] { return random.normal(); });
    Poisoned want(Dtype::F32, {tokens, outputs}), got = want.twin();
    Queue queue;
    oracle().matmul(queue, w.view, x, {}, false, want);
    run.matmul(queue, w.as_given(run, random), x, {}, false, got);
    double expected = 0, error = 0;
    std::vector<float> row(static_cast<size_t>(inputs));
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t o = 0; o < outputs; ++o) {
        dequantise_row(type, w.view.slice(0, o, o + 1).data, inputs, row.data());
        for (int64_t first = 0; first < inputs; first += 32) {
          double top = 0, squares = 0;
          for (int64_t c = first; c < first + 32; ++c) {
            top = std::max(top, std::abs(double(x->at<float>(t, c))));
            squares += double(row[size_t(c)]) * double(row[size_t(c)]);
          }
          expected += squares * top * top / (127.0 * 127 * 12);
        }
        error += std::pow(double(got->at<float>(t, o)) - double(want->at<float>(t, o)), 2);
      }
    EXPECT_LT(std::sqrt(error), 1.35 * std::sqrt(expected)) << info(type).name << ", " << tokens << " tokens";
  }
}

/// Prompts: more tokens than are packed at once, rows that go in pieces, panels that go in rounds. A token's numbers do not depend
/// on how many tokens or threads there are, but on a GPU, whose library chooses by shape.
void matmul_of_prompts(const Kernels& run, Random random) {
  struct Size {
    int64_t tokens, inputs, outputs;
  };
  for (const Size& size : {Size{8, 768, 100}, {31, 512, 65}, {60, 4352, 33}, {9, 8448, 17}, {12, 256, 4500}, {2060, 256, 20}})
    for (int i = 0; i < cases(2); ++i) {
      const Dtype type = any_type(random);
      const auto [tokens, inputs, outputs] = size;
      Weights w(random, type, outputs, inputs);
      const Poisoned x = filled(
          Dtype::F32, {tokens, inputs}, [&] { return random.normal(); }, random.below(2), random.below(2) * 3);
      Poisoned want(Dtype::F32, {tokens, outputs}, random.below(2), random.below(2) * 3), got = want.twin();
      SCOPED_TRACE(std::string(info(type).name) + " " + w.view.shape() + ", " + std::to_string(tokens) + " tokens");
      Queue queue;
      const Tensor given = w.as_given(run, random);
      oracle().matmul(queue, w.view, x, {}, false, want);
      run.matmul(queue, given, x, {}, false, got);
      const double rms = longest_row(x) / std::sqrt(double(inputs));
      expect_close("y", want, got, product(type, rms, largest(x), w.norm(), double(inputs)));
      if (run.name == "cuda") continue;
      const int64_t some = std::min<int64_t>(tokens, 8 + random.below(20)), first = random.below(tokens - some + 1);
      Poisoned again(Dtype::F32, {some, outputs}, random.below(2));
      const int before = threads();
      set_threads(1 + int(random.below(5)));
      run.matmul(queue, given, x.view().slice(0, first, first + some), {}, false, again);
      set_threads(before);
      each(again, [&](auto index) {
        const int64_t from[] = {first + index[0], index[1]};
        ASSERT_EQ(number(again, index), number(got, from)) << "token " << from[0] << ", row " << index[1];
      });
    }
}

/// Few tokens and many rows of quantised weights: on a GPU every multiprocessor then has more of them than it adds up at a time.
void matmul_of_many_rows(const Kernels& run, Random random) {
  struct Size {
    int64_t tokens, inputs, rows;
  };
  const int64_t multiprocessors = run.name == "cuda" ? 132 : 2;
  for (const Size& size : {Size{1, 8192, 137}, {1, 768, 70}, {3, 2304, 90}, {8, 4096, 100}, {9, 1024, 60}, {16, 4096, 55}}) {
    Dtype type = any_type(random);
    while (!is_block(type)) type = any_type(random);
    const int64_t inputs = size.inputs, outputs = size.rows * multiprocessors + 1;
    const Weights w(random, type, outputs, inputs);
    const Poisoned x = filled(Dtype::F32, {size.tokens, inputs}, [&] { return random.normal(); });
    Poisoned want(Dtype::F32, {size.tokens, outputs}, random.below(2), random.below(2) * 3), got = want.twin();
    SCOPED_TRACE(std::string(info(type).name) + " " + w.view.shape() + ", " + std::to_string(size.tokens) + " tokens");
    Queue queue;
    oracle().matmul(queue, w.view, x, {}, false, want);
    run.matmul(queue, w.view, x, {}, false, got);
    const double rms = longest_row(x) / std::sqrt(double(inputs));
    expect_close("y", want, got, product(type, rms, largest(x), w.norm(), double(inputs)));
  }
}

/// Massive activations, which meet weights of 0 here, take nothing from the numbers beside them.
void matmul_beside_massive(const Kernels& run, Random random) {
  for (int i = 0; i < cases(20); ++i) {
    const Dtype type = pick<Dtype>(random, {Dtype::F32, Dtype::F16, Dtype::BF16});
    const int64_t inputs = pick<int64_t>(random, {40, 128, 200, 576}), tokens = pick<int64_t>(random, {8, 23}), outputs = 70;
    const Weights w(random, type, outputs, inputs);
    const Poisoned x = filled(
        Dtype::F32, {tokens, inputs}, [&] { return random.normal(); }, random.below(2), random.below(2) * 3);
    const double rms = longest_row(x) / std::sqrt(double(inputs)), most = largest(x);
    for (int massive = int(random.below(4)); massive >= 0; --massive) {
      const int64_t column = random.below(inputs), token = random.below(tokens);
      for (int64_t o = 0; o < outputs; ++o) set(w.view, std::array{o, column}, 0);
      set(x, std::array{token, column}, (random.below(2) ? 1 : -1) * std::pow(10, 2 + 3 * random.uniform()));
    }
    Poisoned want(Dtype::F32, {tokens, outputs}), got = want.twin();
    Queue queue;
    oracle().matmul(queue, w.view, x, {}, false, want);
    run.matmul(queue, w.view, x, {}, false, got);
    SCOPED_TRACE(std::string(info(type).name) + " " + w.view.shape());
    expect_close("y", want, got, product(type, rms, most, w.norm(), double(inputs)));
  }
}

void matmul_each_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(60); ++i) {
    // Matrices of one input may be of different types, as q, k and v are.
    const int64_t inputs = pick<int64_t>(random, {256, 512, 768}),
                  tokens = pick<int64_t>(random, {0, 1, 2, 5, 16, 17, 70}), count = random.below(4);
    std::vector<Weights> w;
    std::vector<Poisoned> bias, want, got;
    std::vector<Linear> oracles, runs;
    for (int64_t m = 0; m < count; ++m) {
      const int64_t outputs = pick<int64_t>(random, {1, 3, 16, 17, 64, 100});
      w.emplace_back(random, any_type(random), outputs, inputs);
      bias.push_back(filled(Dtype::F32, {outputs}, [&] { return random.normal(); }, random.below(2)));
      want.emplace_back(Dtype::F32, std::initializer_list<int64_t>{tokens, outputs}, random.below(2), random.below(2) * 3);
      got.push_back(want.back().twin());
      const Tensor held = chance(random, 0.5) ? bias.back().view() : Tensor();
      const bool add = chance(random, 0.3);
      if (add)
        each(want.back(), [&](auto index) {
          const double before = random.normal();
          set(want.back(), index, before);
          set(got.back(), index, before);
        });
      oracles.push_back({w.back().view, held, want.back(), add});
      runs.push_back({w.back().as_given(run, random), held, got.back(), add});
    }
    const Poisoned x = filled(
        Dtype::F32, {tokens, inputs}, [&] { return random.normal(); }, random.below(2), random.below(2) * 3);
    SCOPED_TRACE(std::to_string(count) + " matrices, " + std::to_string(inputs) + " inputs, " + std::to_string(tokens) +
                 " tokens");
    Queue queue;
    const Normed normed(random, x);
    oracle().matmul_each(queue, oracles, x, normed.given());
    run.matmul_each(queue, runs, x, normed.given());
    const double rms = tokens ? longest_row(normed.rows) / std::sqrt(double(inputs)) : 0;
    for (size_t m = 0; m < size_t(count); ++m)
      expect_close("y", want[m], got[m], product(w[m].view.type, rms, largest(normed.rows), w[m].norm(), double(inputs)));
  }
}

void matmul_glu_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(60); ++i) {
    const int64_t inputs = pick<int64_t>(random, {256, 512, i % 20 ? 512 : 4352}),
                  tokens = pick<int64_t>(random, {0, 1, 2, 5, 17, 40}),
                  outputs = pick<int64_t>(random, {1, 3, 16, 17, 64, 100});
    Weights gate(random, any_type(random), outputs, inputs), up(random, any_type(random), outputs, inputs);
    const Poisoned x = filled(
        Dtype::F32, {tokens, inputs}, [&] { return random.normal(); }, random.below(2), random.below(2) * 3);
    const bool narrow = chance(random, 0.4);
    Poisoned want(narrow ? Dtype::BF16 : Dtype::F32, {tokens, outputs}, random.below(2), random.below(2) * 3),
        got = want.twin();
    const Activation activation = chance(random, 0.5) ? Activation::Silu : Activation::GeluTanh;
    const Normed normed(random, x);
    SCOPED_TRACE(std::string(info(gate.view.type).name) + " and " + info(up.view.type).name + " " + gate.view.shape() +
                 ", " + std::to_string(tokens) + " tokens" + (narrow ? " to bf16" : ""));
    Queue queue;
    oracle().matmul_glu(queue, gate.view, up.view, x, normed.given(), activation, want);
    run.matmul_glu(queue, gate.as_given(run, random), up.as_given(run, random), x, normed.given(), activation, got);
    // act is at most as large as its argument and grows by at most 1.13 of it.
    Poisoned g(Dtype::F32, {tokens, outputs}), u = g.twin();
    oracle().matmul(queue, gate.view, normed.rows, {}, false, g);
    oracle().matmul(queue, up.view, normed.rows, {}, false, u);
    const double rms = tokens ? longest_row(normed.rows) / std::sqrt(double(inputs)) : 0, unit = narrow ? 0x1p-8 : 0x1p-20;
    const auto error = [&](const Weights& w, double most) {
      return product(w.view.type, rms, largest(normed.rows), w.norm(), double(inputs)) + unit * most;
    };
    const double gates = error(gate, largest(g)), ups = error(up, largest(u));
    expect_close("y", want, got, 1.13 * gates * (largest(u) + ups) + largest(g) * (ups + (0x1p-18 + 2 * unit) * largest(u)));
  }
}

void embed_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(2); ++i)
    for (Dtype type : all_types) {
      const int64_t width = some_width(random, type), vocabulary = 1 + random.below(30), tokens = random.below(20);
      Weights w(random, type, vocabulary, width);
      const Poisoned ids = filled(Dtype::I32, {tokens}, [&] { return double(random.below(vocabulary)); });
      Poisoned want(Dtype::F32, {tokens, width}, 1, 3), got = want.twin();
      SCOPED_TRACE(std::string(info(type).name) + " " + w.view.shape());
      Queue queue;
      oracle().embed(queue, w.view, ids, 1.5f, want);
      run.embed(queue, w.as_given(run, random), ids, 1.5f, got);
      expect_close("y", want, got, plain(4, largest(want)));
    }
}

void dequantise_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(2); ++i)
    for (Dtype type : all_types) {
      Weights w(random, type, 1 + random.below(40), some_width(random, type));
      Poisoned want(Dtype::F32, {w.view.size[0], w.view.size[1]}, random.below(2), 3), got = want.twin();
      SCOPED_TRACE(std::string(info(type).name) + " " + w.view.shape());
      Queue queue;
      oracle().dequantise(queue, w.view, want);
      run.dequantise(queue, w.as_given(run, random), got);
      expect_close("y", want, got, plain(4, largest(want)));
    }
}

void rms_norm_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(40); ++i) {
    const int64_t rows = random.below(20), width = pick<int64_t>(random, {1, 7, 64, 80, 576, 1000});
    const double size = pick(random, {1e-6, 1.0, 1e5});
    const Poisoned x = filled(
        Dtype::F32, {rows, width}, [&] { return size * random.normal(); }, random.below(2), random.below(2) * 3);
    const Poisoned weight = filled(Dtype::F32, {width}, [&] { return random.normal(); }, random.below(2));
    const Tensor by = chance(random, 0.7) ? weight.view() : Tensor();
    Poisoned want = x.twin(), got = x.twin(), same = x.twin();
    copy(x.view(), same.view());
    SCOPED_TRACE("case " + std::to_string(i) + ": " + x->shape() + " of size " + std::to_string(size));
    Queue queue;
    oracle().rms_norm(queue, x, by, 1e-6f, want);
    run.rms_norm(queue, x, by, 1e-6f, got);
    run.rms_norm(queue, same, by, 1e-6f, same);
    expect_close("y", want, got, plain(double(width), std::max(1.0, largest(want))));
    expect_close("y in place", got, same, 0);
  }
}

/// Sequences of random lengths: the tokens of each, and its head-major segments.
struct Tokens {
  std::vector<int64_t> first{0}, segments;
  Buffer offsets;
  Tokens(Random& random, int64_t heads) {
    for (int64_t s = 1 + random.below(3); s > 0; --s) {
      const int64_t n = chance(random, 0.2) ? 0 : 1 + random.below(chance(random, 0.3) ? 100 : 20);
      first.push_back(first.back() + n);
      segments.insert(segments.end(), size_t(heads), n);
    }
    offsets = Buffer::of<int64_t>({int64_t(first.size())}, first);
  }
};

void split_heads_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(50); ++i) {
    const int64_t heads = pick<int64_t>(random, {1, 3, 8}), d = pick<int64_t>(random, {64, 80, 96, 128, 256});
    const Tokens tokens(random, heads);
    const int64_t count = tokens.first.back(), others = random.below(2) * 2;  // a slice of the heads of a wider product
    const Poisoned wide = filled(Dtype::F32, {count, heads + others, d}, [&] { return random.normal(); }, random.below(2));
    const Tensor x = wide->slice(1, others / 2, others / 2 + heads);
    const Poisoned norm = filled(Dtype::F32, {d}, [&] { return random.normal(); });
    Rope rope;
    rope.dims = int(chance(random, 0.7) ? d : d / 4 * 2);
    rope.neox = chance(random, 0.5);
    double power = 0;
    const Poisoned inv_freq = filled(Dtype::F32, {rope.dims / 2}, [&] { return std::pow(1e4, -2 * power++ / rope.dims); });
    rope.inv_freq = inv_freq;
    const double furthest = pick(random, {1.0, 100.0, 30000.0});
    const bool by_head = chance(random, 0.3);
    const Poisoned positions = filled(Dtype::I32, by_head ? std::vector<int64_t>{count, heads} : std::vector<int64_t>{count},
                                      [&] { return std::floor(furthest * random.uniform()); });
    const bool turned = chance(random, 0.7), normed = chance(random, 0.5);
    const RaggedData want = ragged(random, pick(random, {Dtype::F32, Dtype::BF16, Dtype::F16}), tokens.segments, heads,
                                   d, Layout::any(random));
    const Poisoned got = want.values.twin();
    Ragged to = want.view;
    to.values = got;
    SCOPED_TRACE("case " + std::to_string(i) + ": " + x.shape() + " to " + info(want.values->type).name +
                 (turned ? ", rope" : "") + (normed ? ", norm" : "") + (rope.neox ? ", neox" : ""));
    Queue queue;
    // Beside others, which have other heads, types and rotations: all of them, or the first few.
    const RaggedData plain = ragged(random, Dtype::F32, tokens.segments, heads, d, Layout::any(random));
    const Poisoned plain_got = plain.values.twin();
    Ragged plain_to = plain.view;
    plain_to.values = plain_got;
    std::vector<Heads> wanted, ran;
    for (int64_t others_before = random.below(4); others_before > 0; --others_before) {
      wanted.push_back({.x = x, .out = plain});
      ran.push_back({.x = x, .out = plain_to});
    }
    wanted.push_back({x, normed ? norm.view() : Tensor(), turned ? &rope : nullptr, positions, want});
    ran.push_back({x, normed ? norm.view() : Tensor(), turned ? &rope : nullptr, positions, to});
    oracle().split_heads(queue, tokens.offsets, 1e-6f, wanted);
    run.split_heads(queue, tokens.offsets, 1e-6f, ran);
    const double type_unit = low_precision(want.values->type, want.values->type);
    expect_close("out", want.values, got, largest(want.values) * (type_unit + 0x1p-19 + (turned ? 0x1p-23 * furthest : 0)));
    expect_close("plain", plain.values, plain_got, 0);
  }
}

void merge_heads_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(30); ++i) {
    const int64_t heads = pick<int64_t>(random, {1, 3, 8}), d = pick<int64_t>(random, {5, 64, 80, 128});
    const Tokens tokens(random, heads);
    const RaggedData in = normal_ragged(random, Dtype::F32, tokens.segments, heads, d, Layout::any(random));
    const Poisoned want(chance(random, 0.5) ? Dtype::F32 : Dtype::BF16, {tokens.first.back(), heads * d},
                        random.below(2), random.below(2) * 3),
        got = want.twin();
    Queue queue;
    oracle().merge_heads(queue, in, tokens.offsets, want);
    run.merge_heads(queue, in, tokens.offsets, got);
    expect_close("y", want, got, 0);
  }
}

void glu_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(30); ++i) {
    const int64_t rows = random.below(10), width = pick<int64_t>(random, {1, 7, 64, 100, 1536});
    const double size = pick(random, {1.0, 50.0});
    const Poisoned gate = filled(
        Dtype::F32, {rows, width}, [&] { return size * random.normal(); }, random.below(2), random.below(2) * 3);
    const Poisoned up = filled(Dtype::F32, {rows, width}, [&] { return random.normal(); }, random.below(2));
    const Activation activation = pick(random, {Activation::Silu, Activation::GeluTanh});
    Poisoned want = gate.twin(), got = gate.twin(), same = gate.twin();
    copy(gate.view(), same.view());
    Queue queue;
    oracle().glu(queue, gate, up, activation, want);
    run.glu(queue, gate, up, activation, got);
    run.glu(queue, same, up, activation, same);
    expect_close("y", want, got, plain(1, std::max(1.0, largest(want))));
    expect_close("y in place", got, same, 0);
  }
}

void add_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(20); ++i) {
    const int64_t rows = random.below(10), width = pick<int64_t>(random, {1, 7, 64, 100, 1536});
    const Poisoned x = filled(
        Dtype::F32, {rows, width}, [&] { return random.normal(); }, random.below(2), random.below(2) * 3);
    const Poisoned want = filled(
                       Dtype::F32, {rows, width}, [&] { return random.normal(); }, random.below(2)),
                   got = want.twin();
    copy(want.view(), got.view());
    Queue queue;
    oracle().add(queue, x, want);
    run.add(queue, x, got);
    expect_close("y", want, got, 0);
  }
}

TEST(Reference, ModelArithmeticOfSmallNumbers) {
  Queue queue;
  using V = std::vector<float>;
  const Buffer w = Buffer::of<float>({2, 3}, V{1, 2, 3, 4, 5, 6}), x = Buffer::of<float>({2, 3}, V{1, 0, -1, 2, 1, 0}),
               bias = Buffer::of<float>({2}, V{10, 20});
  Buffer y = Buffer::of<float>({2, 2}, V{1, 1, 1, 1});
  oracle().matmul(queue, w, x, bias, true, y);
  EXPECT_EQ(read(y), (V{9, 19, 15, 34}));
  oracle().matmul(queue, w, x, {}, false, y);
  EXPECT_EQ(read(y), (V{-2, -2, 4, 13}));
  const Buffer ids = Buffer::of<int32_t>({2}, std::vector<int32_t>{1, 0});
  Buffer rows(Dtype::F32, {2, 3});
  oracle().embed(queue, w, ids, 2, rows);
  EXPECT_EQ(read(rows), (V{8, 10, 12, 2, 4, 6}));
  const Buffer wrong = Buffer::of<int32_t>({2}, std::vector<int32_t>{2, 0});
  EXPECT_THROW(oracle().embed(queue, w, wrong, 2, rows), Error);
  const Buffer four = Buffer::of<float>({1, 2}, V{3, 4}), twice = Buffer::of<float>({2}, V{2, 1});
  Buffer norm(Dtype::F32, {1, 2});
  oracle().rms_norm(queue, four, twice, 0, norm);
  EXPECT_NEAR(norm->at<float>(0, 0), 6 / std::sqrt(12.5), 1e-6);
  EXPECT_NEAR(norm->at<float>(0, 1), 4 / std::sqrt(12.5), 1e-6);
  const Buffer gate = Buffer::of<float>({1, 2}, V{1, -2}), up = Buffer::of<float>({1, 2}, V{2, 3});
  Buffer act(Dtype::F32, {1, 2});
  oracle().glu(queue, gate, up, Activation::Silu, act);
  EXPECT_NEAR(act->at<float>(0, 0), 2 / (1 + std::exp(-1.0)), 1e-6);
  oracle().glu(queue, gate, up, Activation::GeluTanh, act);  // the tanh form is within 1e-3 of x Φ(x)
  EXPECT_NEAR(act->at<float>(0, 1), 3 * -2 * 0.5 * std::erfc(2 / std::sqrt(2.0)), 2e-3);
}

TEST(Reference, HeadsAreSplitTurnedAndMerged) {
  Queue queue;
  using V = std::vector<float>;
  // Two tokens of two heads of four channels; a quarter turn at position 1, none at position 0.
  const Buffer x = Buffer::of<float>({2, 2, 4}, V{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16});
  const Buffer first = Buffer::of<int64_t>({2}, std::vector<int64_t>{0, 2}),
               positions = Buffer::of<int32_t>({2}, std::vector<int32_t>{0, 1});
  const Buffer inv_freq = Buffer::of<float>({2}, V{1.5707964f, 0});
  Random random(0);
  RaggedData out = ragged(random, Dtype::F32, {2, 2}, 2, 4, {});
  Rope rope;
  rope.inv_freq = inv_freq;
  rope.dims = 4;
  const Heads turned[] = {{.x = x, .rope = &rope, .positions = positions, .out = out}};
  auto close = [&](const V& expected) {
    const V got = read(out.values);
    for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(got[i], expected[i], 1e-5) << i;
  };
  oracle().split_heads(queue, first, 0, std::span(turned));
  close({1, 2, 3, 4, -11, 10, 9, 12, 5, 6, 7, 8, -15, 14, 13, 16});  // pairs (0, 2) and (1, 3)
  rope.neox = false;
  oracle().split_heads(queue, first, 0, std::span(turned));
  close({1, 2, 3, 4, -10, 9, 11, 12, 5, 6, 7, 8, -14, 13, 15, 16});  // pairs (0, 1) and (2, 3)
  const Heads plain[] = {{.x = x, .out = out}};
  oracle().split_heads(queue, first, 0, std::span(plain));
  Buffer y(Dtype::F32, {2, 8});
  oracle().merge_heads(queue, out, first, y);
  EXPECT_EQ(read(y), read(x));
}

}  // namespace

std::vector<Check> model_checks() {
  using enum Check::Against;
  return {{Reference, "matmul", matmul_equals_reference},
          {Reference, "matmul_rounding", matmul_rounds_activations_once},
          {Reference, "matmul_prompts", matmul_of_prompts},
          {Reference, "matmul_many_rows", matmul_of_many_rows},
          {Reference, "matmul_beside_massive", matmul_beside_massive},
          {Reference, "matmul_each", matmul_each_equals_reference},
          {Reference, "matmul_glu", matmul_glu_equals_reference},
          {Reference, "embed", embed_equals_reference},
          {Reference, "dequantise", dequantise_equals_reference},
          {Reference, "rms_norm", rms_norm_equals_reference},
          {Reference, "split_heads", split_heads_equals_reference},
          {Reference, "merge_heads", merge_heads_equals_reference},
          {Reference, "glu", glu_equals_reference},
          {Reference, "add", add_equals_reference}};
}

}  // namespace heed::test
