#include "kernels/cuda/page.cuh"

namespace heed::cuda {

void attend_store(Queue& queue, const Ragged& q, const Pages& pages, const Read& read, const Mods& mods, Tensor out, Tensor lse) {
  constexpr const char* where = "attend_store";
  require(read.plan.form != Plan::Form::Interval, where, "a read is dense, of blocks or of tokens");
  Scratch scratch(queue.scratch);
  const Unpacked panel = unpack(queue, where, pages, &read, true);
  Mods own = mods;
  own.key_bias = panel.bias;
  own.k_pos = panel.positions;
  own.until = own.key_factor = own.row_factor = {};
  attend(queue, q, panel.k, panel.v, read.plan, own, out, lse);
}

}  // namespace heed::cuda
