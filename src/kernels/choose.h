// page_choose for tables of host memory, made of their page_score and select.
#pragma once
#include "kernels/kernels.h"

namespace heed {

void choose_pages(Queue&, decltype(Kernels::page_score) score, decltype(Kernels::select) select, const Ragged& q,
                  const Pages&, const PageChoice&, int64_t capacity, Tensor index, Tensor count, Tensor rowptr);

}  // namespace heed
