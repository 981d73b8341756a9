// Gradients through whole models, against differences: what moves the rows behind the last layer when a layer's attention is
// moved. Small models of every architecture (tests/data/make/tiny_models.py), window layers and norms of all kinds included.
#include "model/gradients.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/random.h"
#include "model/session.h"
#include "model/transformer.h"

namespace heed {
namespace {

constexpr int64_t kHeld = 21, kNew = 9;  // tokens before, and those that gradients go through

std::vector<int32_t> text(int64_t count, int vocabulary) {
  std::vector<int32_t> out;
  for (int64_t i = 0; i < count; ++i) out.push_back(int32_t((i * 37 + 11) % vocabulary));
  return out;
}

SessionOptions exact(const std::string& backend, int sequences) {
  SessionOptions o;
  o.backend = backend, o.sequences = sequences;
  o.k.kind = o.v.kind = PageType::Kind::F32;
  return o;
}

struct Seen {
  double objective = 0;
  std::vector<Buffer> outputs, keys, values;  // of each layer, gradients
};

/// Φ = Σ c · x² with random c, of the rows behind the last layer; with `moved`, attention of layer `at` is changed by
/// ε · moved first.
Seen look(Session& session, const std::vector<std::span<const int32_t>>& fed, int at = -1,
          const Buffer* moved = nullptr, double epsilon = 0) {
  const ModelInfo& m = session.model().info();
  Seen out;
  out.outputs.resize(size_t(m.layers)), out.keys.resize(size_t(m.layers)), out.values.resize(size_t(m.layers));
  session.tap([&](LayerView& view) {
    for (int64_t i = 0; view.layer == at && i < view.out.numel(); ++i)
      view.out.as<float>()[i] += float(epsilon * double((*moved)->as<float>()[i]));
  });
  session.gradients(
      fed,
      [&](Queue&, Tensor x, Tensor d_x) {
        Random random(4);
        for (int64_t i = 0; i < x.numel(); ++i) {
          const double c = random.normal(), y = double(x.as<float>()[i]);
          out.objective += c * y * y, d_x.as<float>()[i] = float(2 * c * y);
        }
      },
      [&](LayerView& view) {
        const size_t l = size_t(view.layer);
        out.outputs[l] = view.queue.read_back(view.gradients->output);
        out.keys[l] = view.queue.read_back(view.gradients->k), out.values[l] = view.queue.read_back(view.gradients->v);
      });
  session.tap({});
  return out;
}

class GradientsTest : public testing::TestWithParam<const char*> {
 protected:
  std::shared_ptr<const Model> model = *Model::load(std::string(HEED_TEST_DATA) + "/tiny/" + GetParam() + ".gguf");
  const ModelInfo& m = model->info();
  // Two sequences, the second with fewer tokens on both sides.
  std::vector<int32_t> one = text(kHeld + kNew, m.vocabulary), two = text(14, m.vocabulary);
  std::vector<std::span<const int32_t>> held{std::span(one).first(kHeld), std::span(two).first(10)},
      fed{std::span(one).subspan(kHeld), std::span(two).subspan(10)};
};

TEST_P(GradientsTest, AreWhatMovesTheEnd) {
  Session session(model, exact("reference", 2));
  session.prefill(held, Session::Logits::None);
  const int64_t entries = session.store().entries();
  const Seen base = look(session, fed);
  EXPECT_EQ(session.store().entries(), entries) << "nothing of it is kept";
  const int64_t rows = (int64_t(fed[0].size()) + int64_t(fed[1].size())) * m.h;
  for (int l = 0; l < m.layers; ++l) {
    Random random{uint64_t(30 + l)};
    Buffer moved(Dtype::F32, {rows, m.d_v});
    for (float& x : moved->span<float>()) x = float(random.normal());
    // What the output matrix makes of the move, token by token: head-major rows of each sequence.
    Buffer weights(Dtype::F32, {m.hidden, m.h * m.d_v});
    Queue queue = queue_on(reference_kernels());
    queue.run->dequantise(queue, model->layers()[size_t(l)].o, weights);
    double expected = 0, squares = 0;  // of the slope, and of its terms: how large a sum of random signs is
    int64_t token = 0;
    for (size_t s = 0; s < fed.size(); ++s) {
      const int64_t n = int64_t(fed[s].size()), first = token;
      for (; token < first + n; ++token)
        for (int64_t head = 0; head < m.h; ++head)
          for (int64_t c = 0; c < m.d_v; ++c) {
            double own = 0;
            for (int64_t o = 0; o < m.hidden; ++o)
              own += double(base.outputs[size_t(l)]->at<float>(token, o)) * double(weights->at<float>(o, head * m.d_v + c));
            own *= double(moved->at<float>(first * m.h + head * n + token - first, c));
            expected += own, squares += own * own;
          }
    }
    const double epsilon = 1e-3;
    const double up = look(session, fed, l, &moved, epsilon).objective,
                 down = look(session, fed, l, &moved, -epsilon).objective;
    const double slope = (up - down) / (2 * epsilon);
    EXPECT_NEAR(slope, expected, 0.02 * std::sqrt(squares)) << "layer " << l;
  }
}

// Old keys and values have a gradient each, keys and values of the feed too; tables agree on all.
TEST_P(GradientsTest, TablesAgree) {
  Session reference(model, exact("reference", 2));
  reference.prefill(held, Session::Logits::None);
  const Seen expected = look(reference, fed);
  for (const Kernels* table : cpu_kernels()) {
    Session session(model, exact(table->name, 2));
    session.prefill(held, Session::Logits::None);
    const Seen got = look(session, fed);
    for (int l = 0; l < m.layers; ++l)
      for (const auto& [a, b] :
           {std::pair{&expected.outputs, &got.outputs}, {&expected.keys, &got.keys}, {&expected.values, &got.values}}) {
        const Tensor x = (*a)[size_t(l)], y = (*b)[size_t(l)];
        ASSERT_EQ(x.numel(), y.numel());
        double square = 0, error = 0;
        for (int64_t i = 0; i < x.numel(); ++i)
          square += std::pow(double(x.as<float>()[i]), 2),
              error += std::pow(double(x.as<float>()[i]) - double(y.as<float>()[i]), 2);
        EXPECT_GT(square, 0);
        EXPECT_LT(std::sqrt(error / square), table->rounds ? 0.1 : 1e-3) << table->name << " layer " << l;
      }
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, GradientsTest, testing::Values("llama", "qwen2", "qwen3", "gemma3"),
                         [](const auto& info) { return std::string(info.param); });

// The gradient of the loss: what moves −Σ log p of the next tokens when rows behind the last layer are moved.
TEST_P(GradientsTest, OfPredictionIsWhatMovesTheLoss) {
  Session session(model, exact("reference", 1));
  const std::vector<int32_t> tokens = text(12, m.vocabulary);
  const Objective loss = session.prediction_loss(tokens);
  double worst = 0;
  session.gradients({std::span(tokens)},
                    [&](Queue& queue, Tensor x, Tensor d_x) {
                      loss(queue, x, d_x);
                      const auto weights = model->place(queue);
                      const auto value = [&] {
                        Buffer y(Dtype::F32, {x.size[0], m.vocabulary});
                        logits(queue, *weights, model->architecture(), x, y);
                        double sum = 0;
                        for (int64_t t = 0; t + 1 < x.size[0]; ++t) {
                          double all = 0;
                          for (int64_t v = 0; v < m.vocabulary; ++v) all += std::exp(double(y->at<float>(t, v)));
                          sum += std::log(all) - double(y->at<float>(t, tokens[size_t(t) + 1]));
                        }
                        return sum;
                      };
                      Random random(6);
                      for (int trial = 0; trial < 4; ++trial) {
                        Buffer before(Dtype::F32, {x.size[0], x.size[1]}), move(Dtype::F32, {x.size[0], x.size[1]});
                        copy(x, before);
                        double expected = 0, squares = 0;
                        for (int64_t i = 0; i < x.numel(); ++i) {
                          const double by = random.normal();
                          move->as<float>()[i] = float(by);
                          expected += by * double(d_x.as<float>()[i]),
                              squares += std::pow(by * double(d_x.as<float>()[i]), 2);
                        }
                        const auto moved = [&](double by) {
                          for (int64_t i = 0; i < x.numel(); ++i)
                            x.as<float>()[i] = before->as<float>()[i] + float(by) * move->as<float>()[i];
                          return value();
                        };
                        const double slope = (moved(0.01) - moved(-0.01)) / 0.02;
                        copy(before, x);
                        worst = std::max(worst, std::abs(slope - expected) / std::sqrt(squares));
                      }
                      for (int64_t c = 0; c < x.size[1]; ++c)
                        EXPECT_EQ(d_x.at<float>(x.size[0] - 1, c), 0) << "nothing follows the last";
                    },
                    {});
  EXPECT_LT(worst, 0.03);
}

// Other coordinates change nothing, nor do keys that are kept plain or a part of the text at a time.
TEST(Gradients, AreTheSameHoweverAStoreKeepsItsKeys) {
  const auto model = *Model::load(std::string(HEED_TEST_DATA) + "/tiny/llama.gguf");
  const std::vector<int32_t> tokens = text(kHeld + kNew, model->info().vocabulary);
  std::vector<Buffer> dense;
  for (const char* spec : {"dense", "kv-hadamard(residual=64)", "self-extend(group=2,window=200)"}) {
    SessionOptions o = exact("reference", 1);
    o.attention = spec;
    Session session(model, o);
    session.prefill(std::span(tokens).first(kHeld), Session::Logits::None);
    const Seen seen = look(session, {std::span(tokens).subspan(kHeld)});
    if (dense.empty()) {
      for (const Buffer& b : seen.outputs) {
        dense.emplace_back(Dtype::F32, std::initializer_list<int64_t>{b->size[0], b->size[1]});
        copy(b, dense.back());
      }
      continue;
    }
    for (size_t l = 0; l < dense.size(); ++l)
      for (int64_t i = 0; i < dense[l]->numel(); ++i)
        ASSERT_NEAR(dense[l]->as<float>()[i], seen.outputs[l]->as<float>()[i], 2e-3) << spec << " layer " << l;
  }
}

TEST(Gradients, OfANormAndOfProducts) {
  for (const Kernels* table : cpu_kernels())
    for (const int64_t width : {1, 7, 64, 129}) {
      Queue queue = queue_on(*table);
      Random random{uint64_t(width)};
      const int64_t rows = 3, outs = 18;
      const auto draw = [&](int64_t a, int64_t b) {
        Buffer out(Dtype::F32, {a, b});
        for (float& x : out->span<float>()) x = float(random.normal());
        return out;
      };
      const Buffer x = draw(rows, width), w = draw(1, width), d_y = draw(rows, width), d_x = draw(rows, width);
      const Buffer matrix = draw(outs, width), d_z = draw(rows, outs), d_in = draw(rows, width);
      Buffer before(Dtype::F32, {rows, width});
      copy(d_x, before);
      const float eps = 1e-2f;
      rms_norm_backward(queue, x, w->reshape({width}), eps, d_y, true, d_x);
      matmul_backward(queue, matrix, d_z, false, d_in);
      for (int64_t t = 0; t < rows; ++t) {
        double mean = eps, along = 0;
        for (int64_t c = 0; c < width; ++c)
          mean += std::pow(double(x->at<float>(t, c)), 2) / double(width),
              along += double(x->at<float>(t, c)) * double(w->at<float>(0, c)) * double(d_y->at<float>(t, c)) / double(width);
        for (int64_t c = 0; c < width; ++c) {
          const double r = 1 / std::sqrt(mean), own = double(w->at<float>(0, c)) * double(d_y->at<float>(t, c));
          ASSERT_NEAR(d_x->at<float>(t, c),
                      double(before->at<float>(t, c)) + r * own - r * r * r * double(x->at<float>(t, c)) * along, 1e-4);
          double sum = 0;
          for (int64_t o = 0; o < outs; ++o) sum += double(d_z->at<float>(t, o)) * double(matrix->at<float>(o, c));
          ASSERT_NEAR(d_in->at<float>(t, c), sum, 1e-4);
        }
      }
    }
}

}  // namespace
}  // namespace heed
