#include "kernels/cpu/cpu.h"
#include "kernels/cpu/simd.h"

#define HEED_QUOTE(x) #x
#define HEED_NAME(x) HEED_QUOTE(x)

namespace heed::HEED_ISA {

namespace {

template <Products P>
const Kernels& made() {
  static const Kernels table = [] {
    Kernels t = reference_kernels();
    t.name = HEED_NAME(HEED_ISA);
    for (char& c : t.name)
      if (c == '_') c = '-';
#if defined(HEED_PAIR_DOT) && !defined(HEED_BF16_DOT)
    if (P == Products::Rounded) t.name += "-int16";
#endif
    fill_attention(t);
    fill_planning(t);
    fill_recurrence(t);
    fill_model(t);
    fill_products(t, P);
    return t;
  }();
  return table;
}

}  // namespace

const Kernels& table(Products kind) {
  return kind == Products::Exact ? made<Products::Exact>() : made<Products::Rounded>();
}

}  // namespace heed::HEED_ISA
