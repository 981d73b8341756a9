#include "kernels/cpu/weights.h"

#include "kernels/cpu/quants.h"

namespace heed::HEED_ISA {

Weights::Weights(const Tensor& w, const char* where) : data(w.as<const char>()), type(w.type) {
  const DtypeInfo i = info(type);
  require(w.rank == 2 && w.size[1] % i.block == 0 && w.stride[0] % i.block == 0 && (w.stride[1] == 1 || w.size[1] <= 1),
          where, "weights are [rows, width] with contiguous rows of whole blocks, got " + w.shape() + " of " + i.name);
  rows = w.size[0];
  width = w.size[1];
  row_bytes = w.stride[0] / i.block * i.bytes;
}

namespace {

template <Dtype D, class Out>
void unpack_quant(const char* from, int64_t count, Out* out) {
  using Q = Quant<D>;
  using Block = typename Q::Block;
  constexpr int per_block = info(D).block, per_group = Q::group / kLanes;
  const Block* blocks = reinterpret_cast<const Block*>(from);
  for (int64_t n = count / per_block; n > 0; --n, ++blocks, out += per_block) {
    float scale[per_block / Q::group], low[per_block / Q::group];
    Q::scales(*blocks, scale, low);
    const auto unit = [&]<int i>() {
      F f[32 / kLanes];
      widen<Q::is_signed>(Q::template codes<i>(*blocks), f);
      for (int v = 0; v < 32 / kLanes; ++v) {
        const int g = i * (32 / Q::group) + v / per_group;
        const float shift = Q::has_low ? low[g] : -float(Q::offset) * scale[g];
        store(out + 32 * i + v * kLanes, fma(f[v], set(scale[g]), set(shift)));
      }
    };
    [&]<int... i>(std::integer_sequence<int, i...>) {
      (unit.template operator()<i>(), ...);
    }(std::make_integer_sequence<int, per_block / 32>());
  }
}

template <class In, class Out>
void unpack_plain(const In* from, int64_t count, Out* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
  if (i < count) store_part(out + i, load_part(from + i, int(count - i)), int(count - i));
}

template <class Out>
void unpack_any(const Weights& w, int64_t row, int64_t begin, int64_t count, Out* out) {
  const char* from = w.at(row, begin);
  if (with_quant(w.type, [&]<Dtype D>() { unpack_quant<D>(from, count, out); })) return;
  if (w.type == Dtype::F32) return unpack_plain(reinterpret_cast<const float*>(from), count, out);
  if (w.type == Dtype::F16) return unpack_plain(reinterpret_cast<const f16*>(from), count, out);
  unpack_plain(reinterpret_cast<const bf16*>(from), count, out);
}

}  // namespace

void unpack(const Weights& w, int64_t row, int64_t begin, int64_t count, float* out) {
  unpack_any(w, row, begin, count, out);
}
void unpack(const Weights& w, int64_t row, int64_t begin, int64_t count, bf16* out) {
  unpack_any(w, row, begin, count, out);
}

}  // namespace heed::HEED_ISA
