#include "lab/code_books.h"

#include <algorithm>
#include <optional>

#include "attention/maps.h"
#include "attention/rotation.h"
#include "lab/calibrate.h"
#include "mechanisms/keep/kvquant.h"

namespace heed {
namespace {

/// Rows of one KV head after another, on the host: at(head, row, channel).
struct HostRows {
  Buffer values, offsets;
  HostRows(Queue& queue, const Ragged& x) : values(queue.read_back(x.values)), offsets(queue.read_back(x.offsets)) {}
  float at(int64_t head, int64_t row, int64_t channel) const {
    return values->at<float>(offsets->at<int64_t>(head) + row, channel);
  }
};

}  // namespace

CodeBooks learn_code_books(std::shared_ptr<const Model> model, std::span<const int32_t> text, const PageType& k,
                           const PageType& v, const CodeBookOptions& options, const std::function<void(double)>& progress) {
  const ModelInfo& m = model->info();
  std::vector<mechanisms::RangeHistogram> keys(static_cast<size_t>(m.layers)), values = keys;
  CodeBooks out;
  out.bits = k.bits(), out.gradients = options.gradients;
  const int64_t wanted = std::min(int64_t(text.size()), options.length * options.texts);
  for (int64_t begin = 0; begin < wanted; begin += options.length) {
    const int64_t length = std::min(options.length, wanted - begin) / kPage * kPage;
    if (length <= kPage) break;
    if (interrupted()) throw Error(Code::Interrupted, "calibrate", "stopped");
    SessionOptions how = options.session;
    how.attention = "dense", how.chunk = 0;
    Session session(model, how);
    const auto look = [&](LayerView& at) {
      const Scratch scope(at.queue.scratch);
      // A rotation turns a gradient as it turns a key.
      const auto before_rotation = [&](const Ragged& x) {
        const Rope* rope = m.rope(at.layer);
        return rope ? turned(at.queue, x, backwards(at.queue, *rope), at.k_pos) : x;
      };
      const auto beside = [&](Ragged like, const Tensor& numbers) {
        like.values = numbers;
        return like;
      };
      const HostRows key(at.queue, before_rotation(in_f32(at.queue, at.k))), value(at.queue, in_f32(at.queue, at.v));
      const Gradients* slope = at.gradients;
      std::optional<HostRows> key_slope, value_slope;
      if (slope) {
        key_slope.emplace(at.queue, before_rotation(beside(at.k, slope->k)));
        value_slope.emplace(at.queue, beside(at.v, slope->v));
      }
      std::vector<float> group, weights;
      const auto take = [&](const HostRows& from, const std::optional<HostRows>& slopes, int64_t head, int64_t e, int64_t c) {
        group.push_back(from.at(head, e, c));
        if (slopes) weights.push_back(slopes->at(head, e, c) * slopes->at(head, e, c));
      };
      for (int64_t head = 0; head < m.g; ++head)
        for (int64_t first = kPage; first < length; first += kPage) {
          for (int64_t begin = first; begin < first + kPage; begin += k.group)
            for (int64_t c = 0; c < m.d; ++c) {
              group.clear(), weights.clear();
              for (int64_t e = begin; e < begin + k.group; ++e) take(key, key_slope, head, e, c);
              keys[size_t(at.layer)].add(group, k.outliers, weights);
            }
          for (int64_t e = first; e < first + kPage; ++e)
            for (int64_t begin = 0; begin < m.d_v; begin += v.group) {
              group.clear(), weights.clear();
              for (int64_t c = begin; c < std::min<int64_t>(begin + v.group, m.d_v); ++c)
                take(value, value_slope, head, e, c);
              values[size_t(at.layer)].add(group, v.outliers, weights);
            }
        }
    };
    const auto part = text.subspan(size_t(begin), size_t(length));
    if (options.gradients) {
      session.gradients({part}, session.prediction_loss(part), look);
    } else {
      session.tap(look);
      session.prefill(part, Session::Logits::None);
    }
    out.pages += length / kPage - 1, ++out.texts;
    if (progress) progress(double(begin + length) / double(wanted));
  }
  require(out.texts > 0, "calibrate",
          "no part of the text has more than one page of 64 tokens, of which the first does not count",
          "give a longer text, or a larger -c");
  for (size_t l = 0; l < keys.size(); ++l) out.points.push_back({keys[l].points(out.bits), values[l].points(out.bits)});
  return out;
}

nlohmann::ordered_json code_books_profile(const Spec& spec, const ModelInfo& m, const CodeBooks& learnt,
                                          const std::string& arrays, const std::string& named) {
  const int64_t count = int64_t(1) << learnt.bits;
  Buffer keys(Dtype::F32, {m.layers, count}), values(Dtype::F32, {m.layers, count});
  for (int64_t l = 0; l < m.layers; ++l) {
    std::copy_n(learnt.points[size_t(l)].k.begin(), count, keys->as<float>() + l * count);
    std::copy_n(learnt.points[size_t(l)].v.begin(), count, values->as<float>() + l * count);
  }
  return array_profile(spec, m, "book", arrays, named, {{"keys", keys}, {"values", values}},
                       {{"what", std::string("points of keys and values, ") +
                                     (learnt.gradients ? "weighed by squared gradients of the loss" : "unweighted")},
                        {"texts", learnt.texts},
                        {"pages", learnt.pages}});
}

}  // namespace heed
