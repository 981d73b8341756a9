// attend_store for the few query rows of a decode step: each KV head's entries are read once, where they lie, for all
// rows that share them, and unpacked in registers, or (decode_codes.h) multiplied as the codes they are. Bound by memory in
// 16 bits.
#pragma once
#include "kernels/kernels.h"

namespace heed::HEED_ISA {

/// Does what attend_store does (its arguments are checked) and returns true; or returns false and does nothing where the
/// form is not one of these: softmax; keys kept as they are read; heads in groups; at most eight rows a KV head; plain
/// pages, or quantised ones whose groups are whole vectors; widths of whole pairs of vectors; no masks and no parts.
bool decode(Queue& queue, const Ragged& q, const Pages& pages, const Plan& plan, const Mods& mods, Tensor out, Tensor lse);

}  // namespace heed::HEED_ISA
