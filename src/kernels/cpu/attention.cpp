#include "kernels/cpu/cpu.h"

namespace heed::HEED_ISA {

void fill_attention(Kernels& t) {
  t.attend = attend;
  t.attend_store = attend_store;
  t.merge = merge;
  t.observe = observe;
  t.observe_rows = observe_rows;
  t.page_write = page_write;
  t.page_read = page_read;
  t.page_move = page_move;
  t.column_read = column_read;
  t.column_write = column_write;
  t.page_score = page_score;
  t.page_choose = page_choose;
}

}  // namespace heed::HEED_ISA
