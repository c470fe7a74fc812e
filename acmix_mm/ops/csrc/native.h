// What the native operators share outside their kernels: macros, choice of the instruction set,
// scratch memory, checks.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// Keeps a loaded vector in a register: GCC would rather fold the load into each of its uses, and
// loads across cache lines are what bounds the kernels.
#if defined(__x86_64__)
#define NATIVE_X86
#define KEEP(vector) __asm__("" : "+v"(vector))
#else
#define KEEP(vector)
#endif

namespace acmix_mm {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set that the processor has and that ATEN_CPU_CAPABILITY, PyTorch's own
// switch, leaves on.
inline Isa best_isa() {
#ifdef NATIVE_X86
  const std::string limit = at::get_cpu_capability();
  const bool allows_avx2 = limit != "DEFAULT" && limit != "NO AVX";
  const bool allows_avx512 = allows_avx2 && limit != "AVX2";
  if (allows_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (allows_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

// Hands out pieces of one allocation; without one, it only counts.
struct Arena {
  uintptr_t base = 0;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

// Zeros: lanes past the end of a row must hold finite numbers, and sums start at 0.
class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t bytes) : data_(c10::GetCPUAllocator()->allocate(bytes)) {
    std::memset(data_.get(), 0, bytes);
  }

  Arena arena() const { return Arena{reinterpret_cast<uintptr_t>(data_.get()), 0}; }

 private:
  at::DataPtr data_;
};

// A tensor of at most 5 dimensions; for attention (B, N, d, rows, columns).
struct Map {
  const void* data;
  int64_t strides[5];
};

inline Map as_map(const at::Tensor& tensor) {
  Map map{tensor.const_data_ptr(), {}};
  std::copy_n(tensor.strides().begin(), tensor.dim(), map.strides);
  return map;
}

// Where row 0 would be of a tensor whose rows, dimension `dim`, are a larger one's from `first` on.
inline void* row_zero(const void* data, const at::Tensor& tensor, int64_t dim, int64_t first) {
  const int64_t bytes = first * tensor.stride(dim) * tensor.element_size();
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(data) - bytes);
}

inline Map as_map(const at::Tensor& tensor, int64_t dim, int64_t first) {
  Map map = as_map(tensor);
  map.data = row_zero(map.data, tensor, dim, first);
  return map;
}

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// n elements in an odd number of cache lines, lest channels fall into the same cache sets.
inline int64_t spread(int64_t n, int64_t line) {
  n = round_up(n, line);
  return n / line % 2 ? n : n + line;
}

inline at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? type : at::kFloat;
}

// Larger arguments are refused, before any of them is multiplied by another: sums and products of
// sizes, strides, dilations and taps stay far from overflow then. Elements count as often as an
// expanded tensor shows them.
constexpr int64_t kMaxElements = int64_t{1} << 40;
constexpr int64_t kMaxKernel = (1 << 15) - 1;
constexpr double kMaxScratch = int64_t{1} << 31;  // numbers a thread

inline void check_same(const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                       at::ScalarType dtype) {
  bool fits = tensor.numel() <= kMaxElements;
  for (const int64_t size : tensor.sizes()) {  // of an empty tensor, too
    fits = fits && size <= kMaxElements;
  }
  TORCH_CHECK(fits, name, " must have at most ", kMaxElements, " elements, got shape ",
              tensor.sizes());
  TORCH_CHECK(tensor.device().is_cpu(), name, " must be on the CPU");
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be of dtype ", dtype, ", got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == shape, name, " must have shape ", shape, ", got ",
              tensor.sizes());
}

}  // namespace acmix_mm
