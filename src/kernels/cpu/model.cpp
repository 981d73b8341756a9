#include "kernels/cpu/cpu.h"

namespace heed::HEED_ISA {

void fill_model(Kernels& t) {
  t.embed = embed;
  t.dequantise = dequantise;
  t.interleave = interleave;
  t.rms_norm = rms_norm;
  t.split_heads = split_heads;
  t.merge_heads = merge_heads;
  t.glu = glu;
  t.add = add;
  t.tile_rows = 1024;  // weights are unpacked for each tile (docs/performance.md)
}

}  // namespace heed::HEED_ISA
