#include "lab/trace.h"

#include "lab/score.h"

namespace heed {

Arrays trace(std::shared_ptr<const Model> model, const SessionOptions& options, std::span<const int32_t> tokens,
             int64_t prefill, const std::function<void(double)>& progress) {
  int64_t total = int64_t(tokens.size());
  require(total >= 1, "trace", "there are no tokens");
  require(prefill >= 1 && prefill <= total, "--prefill",
          std::to_string(prefill) + " of " + std::to_string(total) + " tokens", "give 1…" + std::to_string(total));
  const ModelInfo& m = model->info();
  Session session(model, options);
  session.check_reach(total);

  Buffer losses(Dtype::F32, {total - 1});
  const auto score = [&](int64_t at, std::span<const float> logits) {
    if (at + 1 < total) losses->at<float>(at) = float(nll(logits, tokens[size_t(at + 1)]));
  };
  session.progress([&](int64_t done, int64_t layers) {
    if (progress) progress(double(done) / double(layers) * double(prefill) / double(total));
  });
  session.prefill({tokens.subspan(0, size_t(prefill))}, Session::Logits::None, [&](int64_t first, Tensor logits) {
    for (int64_t row = 0; row < logits.size[0]; ++row) score(first + row, logits.select(0, row).span<const float>());
  });

  Buffer bytes(Dtype::I64, {m.layers}), offsets(Dtype::I64, {int64_t(m.layers) * m.g + 1});
  std::vector<int32_t> kept;
  offsets->at<int64_t>(0) = 0;
  for (int l = 0; l < m.layers; ++l) {
    bytes->at<int64_t>(l) = session.kv_bytes(l);
    for (int64_t head = 0; head < m.g; ++head) {
      const std::vector<int32_t> positions = session.origins(l, head);
      kept.insert(kept.end(), positions.begin(), positions.end());
      offsets->at<int64_t>(l * m.g + head + 1) = int64_t(kept.size());
    }
  }
  const auto density = session.density();

  for (int64_t at = prefill; at < total; ++at) {
    if (interrupted()) {
      total = at + 1;  // the last token has a loss, and was not fed
      break;
    }
    score(at, session.decode(tokens[size_t(at)]).select(0, 0).span<const float>());
    if (progress) progress(double(at + 1) / double(total));
  }

  const auto matrix = [&](const std::vector<std::vector<double>>& values) {
    Buffer out(Dtype::F32, {m.layers, m.h});
    for (int l = 0; l < m.layers; ++l)
      for (int head = 0; head < m.h; ++head) out->at<float>(l, head) = float(values[size_t(l)][size_t(head)]);
    return out;
  };
  Arrays out;
  out.emplace_back("tokens", Buffer::of<int32_t>({total}, tokens.subspan(0, size_t(total))));
  out.emplace_back("nll", Buffer::of<float>({total - 1}, losses->span<const float>().subspan(0, size_t(total - 1))));
  out.emplace_back("kept_offsets", std::move(offsets));
  out.emplace_back("kept_index", Buffer::of<int32_t>({int64_t(kept.size())}, kept));
  out.emplace_back("kv_bytes", std::move(bytes));
  out.emplace_back("density", matrix(density));
  out.emplace_back("read_tokens", matrix(session.read_tokens()));
  return out;
}

}  // namespace heed
