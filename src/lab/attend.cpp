#include "lab/attend.h"

#include "model/session.h"

namespace heed {
namespace {

Ragged heads(const Tensor& x, const Tensor& offsets) {
  return {.values = x.reshape({x.size[0] * x.size[1], x.size[2]}),
          .offsets = offsets,
          .ends = {},
          .heads = x.size[0],
          .bound = x.size[0] * x.size[1]};
}

Buffer equal_segments(const Tensor& x) {
  Buffer offsets(Dtype::I64, {x.size[0] + 1});
  for (int64_t s = 0; s <= x.size[0]; ++s) offsets->at<int64_t>(s) = s * x.size[1];
  return offsets;
}

}  // namespace

Attended attend(const Tensor& q, const Tensor& k, const Tensor& v, const Plan& plan, const AttendOptions& options) {
  for (const auto& [x, name] : {std::pair{q, "q"}, {k, "k"}, {v, "v"}})
    require(x.data && x.rank == 3 && x.contiguous(), "attend",
            std::string(name) + " " + x.shape() + " is not a contiguous [heads, rows, width]");
  require(q.type == k.type && k.type == v.type, "attend", "q, k and v are of different types");
  require(k.size[0] == v.size[0] && k.size[1] == v.size[1], "attend",
          "k " + k.shape() + " and v " + v.shape() + " differ in heads or rows");
  require(q.size[2] == k.size[2], "attend", "q " + q.shape() + " and k " + k.shape() + " differ in width");
  require(k.size[0] > 0 && q.size[0] % k.size[0] == 0, "attend",
          std::to_string(k.size[0]) + " KV heads do not divide " + std::to_string(q.size[0]) + " heads");
  require(!options.causal || q.size[1] <= k.size[1] || plan.form != Plan::Form::Dense, "attend",
          "more queries than keys", "say causal = false");

  Queue queue = queue_on(backend(options.backend, options.device));
  Plan used = plan;
  if (used.form == Plan::Form::Dense) used.causal = options.causal;
  check_plan(used, "attend");
  Mods mods;
  mods.scale = options.scale, mods.softcap = options.softcap, mods.window = options.window;
  const Tensor q_offsets = queue.upload(equal_segments(q)), k_offsets = queue.upload(equal_segments(k));
  for (Tensor* t : {&used.rowptr, &used.count, &used.index, &used.mask, &used.bits, &used.part})
    if (*t) *t = queue.upload(*t);
  const int64_t h = q.size[0], n = q.size[1], d_v = v.size[2];
  const bool parts = used.parts > 1;
  Attended result{parts ? Buffer(Dtype::F32, {used.parts, h, n, d_v}) : Buffer(Dtype::F32, {h, n, d_v}),
                  parts ? Buffer(Dtype::F32, {used.parts, h, n}) : Buffer(Dtype::F32, {h, n})};
  const bool host = queue.memory->device == Device::Cpu;
  auto made = [&](const Buffer& b) { return host ? b.view() : queue.scratch.take(Dtype::F32, {b->numel()}); };
  const Tensor flat_out = made(result.out), flat_lse = made(result.lse);
  auto placed = [&](const Tensor& t) { return host ? t : queue.upload(t); };
  const Tensor out = parts ? flat_out.reshape({used.parts, h * n, d_v}) : flat_out.reshape({h * n, d_v});
  const Tensor lse = parts ? flat_lse.reshape({used.parts, h * n}) : flat_lse.reshape({h * n});
  queue.run->attend(queue, heads(placed(q), q_offsets), heads(placed(k), k_offsets), heads(placed(v), k_offsets), used,
                    mods, out, lse);
  if (!host) queue.read_back(out, result.out->data), queue.read_back(lse, result.lse->data);
  return result;
}

}  // namespace heed
