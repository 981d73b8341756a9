#include "kernels/reference/reference.h"

namespace heed {

const Kernels& reference_kernels() {
  static const Kernels table = [] {
    Kernels t{};
    t.name = "reference";
    t.attend = reference::attend;
    t.attend_backward = reference::attend_backward;
    t.attend_store = reference::attend_store;
    t.merge = reference::merge;
    t.observe = reference::observe;
    t.observe_rows = reference::observe_rows;
    t.pool = reference::pool;
    t.smooth = reference::smooth;
    t.proxy = reference::proxy;
    t.reduce = reference::reduce;
    t.select = reference::select;
    t.compute = reference::compute;
    t.offsets = reference::offsets;
    t.tile_blocks = reference::tile_blocks;
    t.unite = reference::unite;
    t.count_pairs = reference::count_pairs;
    t.recur = reference::recur;
    t.recur_backward = reference::recur_backward;
    t.scan = reference::scan;
    t.combine = reference::combine;
    t.spread = reference::spread;
    t.page_write = reference::page_write;
    t.page_read = reference::page_read;
    t.page_move = reference::page_move;
    t.column_read = reference::column_read;
    t.column_write = reference::column_write;
    t.page_supply = reference::page_supply;
    t.page_grow = reference::page_grow;
    t.page_own = reference::page_own;
    t.page_pair = reference::page_pair;
    t.page_shrink = reference::page_shrink;
    t.page_hold = reference::page_hold;
    t.page_convert = reference::page_convert;
    t.page_score = reference::page_score;
    t.page_choose = reference::page_choose;
    t.matmul = reference::matmul;
    t.matmul_each = reference::matmul_each;
    t.matmul_glu = reference::matmul_glu;
    t.embed = reference::embed;
    t.rms_norm = reference::rms_norm;
    t.split_heads = reference::split_heads;
    t.merge_heads = reference::merge_heads;
    t.glu = reference::glu;
    t.add = reference::add;
    t.dequantise = reference::dequantise;
    return t;
  }();
  return table;
}

}  // namespace heed
