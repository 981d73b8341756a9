#include "attention/rotation.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/quantised_past.h"

namespace heed::mechanisms {

namespace {

// llama.cpp's block-quantised caches: 32 channels of an entry share a scale, without a zero (q8_0, q4_0). Its rotation
// spreads an outlier channel over its neighbours first: q and k, behind their rotary embedding, are multiplied by Hadamard
// matrices of the largest order 64 · 2^t that divides d, v by those of order 64, and the output again; widths that 64 does
// not divide stay as they are. Scales are rounded to f16 before codes are made (llama.cpp: behind), and a page is turned
// once it is full, so up to 63 entries stay exact.
template <int Bits, bool Rotated>
struct KvQuant final : QuantisedPast {
  KvQuant() { bits = Bits; }

  static std::vector<ParamInfo> params() {
    std::vector<ParamInfo> all = {residual_param(0)};
    if (Rotated) all.insert(all.begin(), param(&KvQuant::bits, "bits", Bits, 4, 8, "4 or 8 bits a number"));
    return all;
  }
  std::string check() const override { return only({4, 8}); }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.quantised = true, n.basis = Rotated;
    n.quantised_k.kind = kind(bits), n.quantised_k.codes = PageType::Codes::Signed;
    n.quantised_v = n.quantised_k;
    return n;
  }

  Basis basis(const ModelInfo& m) const override {
    Basis out;
    if (m.d % 64 == 0) out.k = hadamard(m.d, m.d & -m.d);
    if (m.d_v % 64 == 0) out.v = hadamard(m.d_v, 64);
    return out;
  }
};

template <int Bits, bool Rotated>
Entry made(std::string name, std::string title) {
  Entry e = entry<KvQuant<Bits, Rotated>>(name, std::move(title), "ggml-org, llama.cpp", Rotated ? 2026 : 2023,
                                          uint8_t(Role::Keep));
  e.equation = Bits == 8 ? "blocks of 32 channels: s = max|x| / 127, code = round(x / s)"
                         : "blocks of 32 channels: s = x_m / −8, |x_m| the largest; code = min(15, ⌊x / s + 8.5⌋), "
                           "value (code − 8) s";
  if (Rotated) e.equation = "(H q)·(H k) = q·k, Σ p v = H Σ p (H v), H = H^T = H^-1; " + e.equation;
  e.needs = "a second layout of pages";
  e.identity = name + "(residual=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace

Entry kv_q8() { return made<8, false>("kv-q8", "8-bit KV cache (q8_0)"); }
Entry kv_q4() { return made<4, false>("kv-q4", "4-bit KV cache (q4_0)"); }
Entry kv_hadamard() { return made<4, true>("kv-hadamard", "Rotated KV cache quantisation"); }

}  // namespace heed::mechanisms
