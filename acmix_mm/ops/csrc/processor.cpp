// What is to be known of the processor beyond its instruction sets.

#include <torch/library.h>

#include "native.h"

#ifdef NATIVE_X86
#include <cpuid.h>
#include <x86intrin.h>
#endif

namespace acmix_mm {
namespace {

#ifdef NATIVE_X86
#define CHAIN(op, n) op " %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n"
#define CHAINS(op)                                                                           \
  CHAIN(op, 0) CHAIN(op, 1) CHAIN(op, 2) CHAIN(op, 3) CHAIN(op, 4) CHAIN(op, 5) CHAIN(op, 6) \
  CHAIN(op, 7) CHAIN(op, 8) CHAIN(op, 9) CHAIN(op, 10) CHAIN(op, 11)
#define REGISTERS                                                                            \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",   \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
// Cycles, at best, of many products `op` of vectors, in chains that are independent.
#define CYCLES(op)                                                                           \
  [] {                                                                                       \
    uint64_t best = UINT64_MAX;                                                              \
    for (int round = 0; round < 32; ++round) {                                               \
      const uint64_t start = __rdtsc();                                                      \
      __asm__ volatile("vzeroall" ::: REGISTERS);                                            \
      for (int i = 0; i < 256; ++i) {                                                        \
        __asm__ volatile(CHAINS(op)::: REGISTERS);                                           \
      }                                                                                      \
      __asm__ volatile("vzeroupper" ::: REGISTERS);                                          \
      best = std::min<uint64_t>(best, __rdtsc() - start);                                    \
    }                                                                                        \
    return best;                                                                             \
  }()

bool has_amx_bfloat16() {
  unsigned int a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}
#endif

// Does PyTorch multiply matrices of bfloat16 faster than those of float32? AMX does. AVX512_BF16
// multiplies twice as many numbers at once, but Emerald Rapids takes four times as long for it, so
// that it has to be measured where it pays.
bool bfloat16_products_pay() {
#ifdef NATIVE_X86
  static const bool pay = [] {
    if (best_isa() != Isa::avx512) {
      return false;
    }
    return has_amx_bfloat16() || (__builtin_cpu_supports("avx512bf16") &&
                                  2 * CYCLES("vdpbf16ps") < 3 * CYCLES("vfmadd231ps"));
  }();
  return pay;
#else
  return false;
#endif
}

// Does oneDNN multiply matrices of float32 faster than torch.mm does? That is MKL, which on other
// processors than Intel's leaves half of an AVX-512 unit unused.
bool onednn_products_pay() {
#ifdef NATIVE_X86
  static const bool faster = best_isa() == Isa::avx512 && !__builtin_cpu_is("intel");
  return faster && at::hasMKL() && at::hasMKLDNN() && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(acmix_mm, m) {
  m.def("native_onednn_products_pay() -> bool", &onednn_products_pay);
  m.def("native_bfloat16_products_pay() -> bool", &bfloat16_products_pay);
}

}  // namespace acmix_mm
