#include "kernels/reference/page.h"

namespace heed::reference {

void attend_store(Queue& queue, const Ragged& q, const Pages& pages, const Read& read, const Mods& mods, Tensor out,
                  Tensor lse) {
  require(read.plan.form != Plan::Form::Interval, "attend_store", "a read is dense, of blocks or of tokens");
  const Unpacked panel("attend_store", pages, &read);
  Mods own = mods;
  own.key_bias = panel.bias;
  own.k_pos = panel.positions;
  own.until = own.key_factor = own.row_factor = {};
  attend(queue, q, panel.k, panel.v, read.plan, own, out, lse);
}

}  // namespace heed::reference
