#include "lab/code_books.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/npy.h"
#include "base/random.h"
#include "lab/files.h"
#include "mechanisms/registry.h"

namespace heed {
namespace {

std::shared_ptr<const Model> book_model() {
  ModelInfo shape;
  shape.layers = 2, shape.h = 4, shape.g = 2, shape.d = 16, shape.d_v = 32, shape.hidden = 48, shape.vocabulary = 61;
  return Model::random(shape, 64, Dtype::F32, 5);
}
std::vector<int32_t> book_tokens(int64_t length) {
  Random random(9);
  std::vector<int32_t> out;
  for (int64_t i = 0; i < length; ++i) out.push_back(int32_t(random.below(61)));
  return out;
}
Needs book_needs(const ModelInfo& m, const std::string& spec) {
  return value_or_throw(make_mechanism(value_or_throw(parse_spec(spec))[0], registry()))->needs(m);
}
SessionOptions book_session(const std::string& attention) {
  SessionOptions o;
  o.attention = attention, o.backend = "reference", o.k.kind = o.v.kind = PageType::Kind::F32;
  return o;
}

/// Where the numbers of a group lie between its ends, its farthest from the mean left out.
void add_shares(std::vector<double> x, size_t apart, std::vector<double>& to) {
  double mean = 0;
  for (double a : x) mean += a / double(x.size());
  std::stable_sort(x.begin(), x.end(), [&](double a, double b) { return std::abs(a - mean) < std::abs(b - mean); });
  x.resize(x.size() - apart);
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  for (double a : x) to.push_back((a - (*low + *high) / 2) / ((*high - *low) / 2));
}

double distortion(const std::vector<double>& x, const std::array<float, 16>& points, int bits) {
  double sum = 0;
  for (double a : x) {
    double nearest = INFINITY;
    for (int i = 0; i < 1 << bits; ++i) nearest = std::min(nearest, std::pow(a - double(points[size_t(i)]), 2));
    sum += nearest / double(x.size());
  }
  return sum;
}

// Points are means of the numbers nearest to them, which keys before rotation and values of a session of plain keys give.
TEST(CodeBooks, AreLloydsOfWhatPagesHold) {
  const auto model = book_model();
  const ModelInfo& m = model->info();
  const auto ids = book_tokens(500);
  const std::string spec = "kvquant(bits=3,outliers=2)";
  const Needs needs = book_needs(m, spec);
  CodeBookOptions options;
  options.session = book_session("dense"), options.length = 200;
  const CodeBooks books = learn_code_books(model, ids, needs.quantised_k, needs.quantised_v, options);
  EXPECT_EQ(books.texts, 2) << "what is left has one page, which does not count";
  EXPECT_EQ(books.pages, 4);
  ASSERT_EQ(books.points.size(), 2u);

  std::vector<std::vector<double>> keys(2), values(2);
  for (size_t begin = 0; begin < 400; begin += 200) {
    Session session(model, book_session("kvquant(residual=1000)"));  // keeps keys before rotation
    session.tap([&](LayerView& at) {
      const int64_t all = at.store->entries();
      const Ragged k{at.queue.scratch.take(Dtype::F32, {all, m.d}), at.store->offsets(at.queue), {}, m.g, all},
          v{at.queue.scratch.take(Dtype::F32, {all, m.d_v}), k.offsets, {}, m.g, all};
      at.queue.run->page_read(at.queue, at.store->pages(), nullptr, k, v, {});
      for (int64_t head = 0; head < m.g; ++head)
        for (int64_t first = 64; first < 192; first += 64) {
          for (int64_t c = 0; c < m.d; ++c) {
            std::vector<double> x;
            for (int64_t e = first; e < first + 64; ++e) x.push_back(double(k.values.at<float>(k.begin(head) + e, c)));
            add_shares(x, 2, keys[size_t(at.layer)]);
          }
          for (int64_t e = first; e < first + 64; ++e) {
            std::vector<double> x;
            for (int64_t c = 0; c < m.d_v; ++c) x.push_back(double(v.values.at<float>(v.begin(head) + e, c)));
            add_shares(x, 1, values[size_t(at.layer)]);
          }
        }
    });
    session.prefill(std::span(ids).subspan(begin, 192), Session::Logits::None);
  }
  for (size_t l = 0; l < 2; ++l)
    for (const auto& [x, points, of] : {std::tuple{&keys[l], books.points[l].k, needs.quantised_k.points},
                                        {&values[l], books.points[l].v, needs.quantised_v.points}}) {
      for (int i = 0; i < 8; ++i) {
        double sum = 0, count = 0;
        for (double a : *x) {
          const auto away = [&](int p) { return std::abs(a - double(points[size_t(p)])); };
          bool nearest = true;
          for (int p = 0; p < 8; ++p) nearest = nearest && away(i) <= away(p);
          if (nearest) sum += a, ++count;
        }
        EXPECT_NEAR(double(points[size_t(i)]), sum / count, 5e-3) << "layer " << l << ", point " << i;
      }
      EXPECT_LE(distortion(*x, points, 3), distortion(*x, of, 3) * 1.001) << "than books of normal numbers";
    }
  EXPECT_THROW(learn_code_books(model, std::span(ids).first(127), needs.quantised_k, needs.quantised_v, options), Error);
}

// With gradients a point is the mean of the numbers nearest to it, each as often as its squared gradient says.
TEST(CodeBooks, GradientsWeighNumbers) {
  const auto model = book_model();
  const ModelInfo& m = model->info();
  const auto ids = book_tokens(192);
  const Needs needs = book_needs(m, "kvquant(bits=2,outliers=0)");
  CodeBookOptions options;
  options.session = book_session("dense"), options.length = 192, options.gradients = true;
  const CodeBooks books = learn_code_books(model, ids, needs.quantised_k, needs.quantised_v, options);
  options.gradients = false;
  const CodeBooks plain = learn_code_books(model, ids, needs.quantised_k, needs.quantised_v, options);
  Session session(model, book_session("dense"));
  int layers = 0;
  session.gradients({std::span<const int32_t>(ids)}, session.prediction_loss(ids), [&](LayerView& at) {
    ++layers;
    std::vector<double> x, w;
    for (int64_t head = 0; head < m.g; ++head)
      for (int64_t e = 64; e < 192; ++e) {
        const int64_t row = at.v.begin(head) + e;
        double low = INFINITY, high = -INFINITY;
        for (int64_t c = 0; c < m.d_v; ++c)
          low = std::min(low, double(at.v.values.at<float>(row, c))),
          high = std::max(high, double(at.v.values.at<float>(row, c)));
        for (int64_t c = 0; c < m.d_v; ++c) {
          x.push_back((double(at.v.values.at<float>(row, c)) - (low + high) / 2) / ((high - low) / 2));
          w.push_back(std::pow(double(at.gradients->v.at<float>(row, c)), 2));
        }
      }
    const auto lost = [&](const std::array<float, 16>& points) {
      double sum = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        double nearest = INFINITY;
        for (int p = 0; p < 4; ++p) nearest = std::min(nearest, std::pow(x[i] - double(points[size_t(p)]), 2));
        sum += w[i] * nearest;
      }
      return sum;
    };
    const auto& own = books.points[size_t(at.layer)].v;
    for (int i = 0; i < 4; ++i) {
      double sum = 0, count = 0;
      for (size_t j = 0; j < x.size(); ++j) {
        bool nearest = true;
        for (int p = 0; p < 4; ++p)
          nearest = nearest && std::abs(x[j] - double(own[size_t(i)])) <= std::abs(x[j] - double(own[size_t(p)]));
        if (nearest) sum += w[j] * x[j], count += w[j];
      }
      EXPECT_NEAR(double(own[size_t(i)]), sum / count, 5e-3) << "layer " << at.layer << ", point " << i;
    }
    EXPECT_LT(lost(own), lost(plain.points[size_t(at.layer)].v) * 1.001);
  });
  EXPECT_EQ(layers, 2);
}

TEST(CodeBooks, AProfileGivesEachLayerItsOwn) {
  const auto model = book_model();
  const ModelInfo& m = model->info();
  const Needs needs = book_needs(m, "kvquant(bits=2)");
  CodeBookOptions options;
  options.session = book_session("dense"), options.length = 128;
  const CodeBooks books = learn_code_books(model, book_tokens(128), needs.quantised_k, needs.quantised_v, options);
  const std::string folder = testing::TempDir() + "/heed_code_books";
  std::filesystem::create_directories(folder);
  const Spec spec = value_or_throw(parse_spec("kvquant(bits=2)"))[0];
  const auto profile = code_books_profile(spec, m, books, folder + "/own.npz", "own.npz");
  EXPECT_EQ(profile["attention"], "kvquant(bits=2,book=@own.npz)");
  EXPECT_THROW(code_books_profile(value_or_throw(parse_spec("kvquant(book=@x.npz)"))[0], m, books, "x", "x"), Error);
  value_or_throw(write_file(folder + "/own.json", profile.dump()));

  Session session(model, book_session("@" + folder + "/own.json"));
  session.prefill(book_tokens(200));
  auto fork = session.fork();
  for (Session* s : {&session, fork.get()})
    for (int l = 0; l < 2; ++l) {
      const Pages& pages = s->store().layer(l).pages();
      EXPECT_EQ(pages.layouts[1].k.points, books.points[size_t(l)].k);
      EXPECT_EQ(pages.layouts[1].v.points, books.points[size_t(l)].v);
      EXPECT_EQ(pages.layout.at<uint8_t>(0, 0), 0) << "the first page";
      EXPECT_EQ(pages.layout.at<uint8_t>(0, 1), 1);
    }
  const Tensor a = session.decode(3), b = fork->decode(3);
  EXPECT_TRUE(std::equal(a.as<float>(), a.as<float>() + a.numel(), b.as<float>()));

  const auto refused = [&](const std::string& attention, const std::string& part) {
    try {
      Session one(model, book_session(attention));
      ADD_FAILURE() << attention << " was taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.failure().exit_status(), 2) << error.what();
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  refused("kvquant(bits=3,book=@" + folder + "/own.npz)", "[2, 8]");
  refused("kvquant(book=own.npz)", "names no file");
}

}  // namespace
}  // namespace heed
