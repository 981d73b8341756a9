// Which tables this machine can run: the only place that asks the processor and the operating system.
#include <cstdlib>
#include <string_view>

#include "kernels/cpu/products.h"
#include "kernels/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace heed {

#if defined(__x86_64__)

namespace avx2 {
const Kernels& table(Products);
}
namespace avx512 {
const Kernels& table(Products);
}
namespace avx512_bf16 {
const Kernels& table(Products);
}
namespace amx {
const Kernels& table(Products);
}

namespace {

struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Cpuid(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

bool bit(unsigned word, int i) { return (word >> i) & 1; }

/// The register state that the operating system saves (XCR0); 0 without XSAVE.
uint64_t saved_state() {
  if (!bit(Cpuid(1, 0).c, 27)) return 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

/// Linux gives tile registers only to a process that asks; the answer then holds for all its threads.
bool tiles_permitted() {
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

struct Machine {
  bool avx2, avx512, avx512_bf16, amx;
  Machine() {
    const uint64_t state = saved_state();
    const Cpuid one(1, 0), seven(7, 0), seven_one(7, 1);
    avx2 = (state & 0x6) == 0x6 && bit(one.c, 12) && bit(one.c, 29) && bit(seven.b, 5) && bit(seven.b, 8);  // FMA F16C AVX2 BMI2
    avx512 = avx2 && (state & 0xe6) == 0xe6 && bit(seven.b, 16) && bit(seven.b, 30) && bit(seven.b, 17) &&
             bit(seven.b, 31) && bit(seven.b, 28);                                       // F BW DQ VL CD
    avx512_bf16 = avx512 && bit(seven.c, 11) && bit(seven_one.a, 5) && bit(seven.c, 1);  // VNNI BF16 VBMI
    amx = avx512_bf16 && (state & 0x60000) == 0x60000 && bit(seven.d, 24) && bit(seven.d, 22) && bit(seven.d, 25) &&
          tiles_permitted();  // TILE BF16 INT8
  }
};

}  // namespace

bool bf16_dots_pay() {
  static const bool pay = [] {
    const char* said = std::getenv("HEED_BF16_DOTS");  // "other": as on the other makers' machines, for tests
    return (Cpuid(0, 0).b != 0x756e6547) != (said && std::string_view(said) == "other");  // "Genu": Intel
  }();
  return pay;
}
#elif defined(__aarch64__)
namespace neon {
const Kernels& table(Products);
}
#endif

std::vector<const Kernels*> cpu_kernels() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> all;
#if defined(__x86_64__)
    const Machine has;
#ifdef HEED_HAS_amx
    if (has.amx) all.push_back(&amx::table(Products::Rounded));
#endif
#ifdef HEED_HAS_avx512_bf16
    if (has.avx512_bf16) all.push_back(&avx512_bf16::table(Products::Rounded));
#endif
#ifdef HEED_HAS_avx512
    if (has.avx512) all.push_back(&avx512::table(Products::Exact));
#endif
#ifdef HEED_HAS_avx2
    if (has.avx2)
      for (Products kind : {Products::Rounded, Products::Exact}) all.push_back(&avx2::table(kind));
#endif
#elif defined(__aarch64__)
    all.push_back(&neon::table(Products::Exact));
#endif
    // HEED_ISA=name limits the list to that table and the lesser ones; a name this machine lacks changes nothing.
    if (const char* limit = std::getenv("HEED_ISA")) {
      for (size_t i = 0; i < all.size(); ++i)
        if (std::string_view(all[i]->name) == limit) {
          all.erase(all.begin(), all.begin() + std::ptrdiff_t(i));
          break;
        }
      if (std::string_view(limit) == "reference") all.clear();
    }
    if (all.empty()) all.push_back(&reference_kernels());
    return all;
  }();
  return found;
}

}  // namespace heed
