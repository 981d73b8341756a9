#include "attention/on_host.h"

namespace heed {

Tensor OnHost::operator()(const Tensor& t) {
  if (!t || queue_.memory->device == Device::Cpu) return t;
  return copies_.emplace_back(queue_.read_back(t));
}

Ragged OnHost::segments(const Ragged& r) {
  Ragged out = r;
  out.offsets = (*this)(r.offsets), out.ends = (*this)(r.ends);
  return out;
}

Plan OnHost::operator()(const Plan& plan) {
  Plan out = plan;
  for (Tensor* t : {&out.rowptr, &out.count, &out.index, &out.mask, &out.bits, &out.part}) *t = (*this)(*t);
  return out;
}

Mods OnHost::positions(const Mods& mods) {
  Mods out = mods;
  for (Tensor* t : {&out.q_pos, &out.k_pos, &out.until}) *t = (*this)(*t);
  return out;
}

}  // namespace heed
