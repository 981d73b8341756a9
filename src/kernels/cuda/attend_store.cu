// attend over pages: which form takes a call.
#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/attend_sm90.h"

namespace heed::cuda {

void attend_store(Queue& queue, const Ragged& q, const Pages& pages, const Read& read, const Mods& mods, Tensor out,
                  Tensor lse) {
  constexpr const char* where = "attend_store";
  require(read.plan.form != Plan::Form::Interval, where, "a read is dense, of blocks or of tokens");
  check_read(where, pages, &read);
  const PagesView view = pages_view(where, pages);
  check_plan(read.plan, where);
  if (read.plan.parts == 1 && !pages.layouts.empty() && q.values.rank == 2) {
    check_tensor(where, "out", out, {q.values.size[0], pages.layouts[0].d_v});
    check_tensor(where, "lse", lse, {q.values.size[0]}, true);
    if (attend_store_sm90(queue, q, pages, read, mods, out, lse)) return;
  }
  Scratch scratch(queue.scratch);
  // Positions and biases as a panel has them; keys and values are read where they lie.
  const Unpacked panel = unpack(queue, where, pages, &read, false, false);
  Mods own = mods;
  own.key_bias = panel.bias;
  own.k_pos = panel.positions;
  own.until = own.key_factor = own.row_factor = {};
  const AttentionView a = attention_view(where, q, panel.k, panel.v, &read.plan, own);
  const AttendOut to = attend_out(where, read.plan, a.q_rows, a.d_v, out, lse);
  attend_pages(queue, a, view, rope_view(pages.plain_keys ? read.rope : nullptr), read_places(read),
               std::max<int64_t>(1, pages.length_bound), to);
}

}  // namespace heed::cuda
