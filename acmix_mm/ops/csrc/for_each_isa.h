// Includes KERNEL_HEADER once per instruction set, compiled for it, with KERNEL_ISA the namespace
// to define and KERNEL_BYTES the size of a vector register. Everything in such a header is local to
// the translation unit, so that the linker cannot merge functions compiled for different
// instruction sets.
#include "native.h"

#define KERNEL_ISA baseline
#define KERNEL_BYTES 16
#include KERNEL_HEADER
#undef KERNEL_ISA
#undef KERNEL_BYTES

#ifdef NATIVE_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define KERNEL_ISA avx2
#define KERNEL_BYTES 32
#include KERNEL_HEADER
#undef KERNEL_ISA
#undef KERNEL_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,"      \
                                                   "avx512vl"))),                            \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define KERNEL_ISA avx512
#define KERNEL_BYTES 64
#include KERNEL_HEADER
#undef KERNEL_ISA
#undef KERNEL_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
