// Vectors of one instruction set. No include guard: see for_each_isa.h.

namespace acmix_mm {
namespace KERNEL_ISA {
namespace {

constexpr int kBytes = KERNEL_BYTES;

template <typename T>
struct Simd {
  static constexpr int lanes = kBytes / sizeof(T);
  typedef T vec __attribute__((vector_size(KERNEL_BYTES)));
};
template <typename T>
using Vec = typename Simd<T>::vec;

template <typename T>
INLINE Vec<T> load(const T* from) {
  Vec<T> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
INLINE void store(T* to, const Vec<T>& value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <typename T>
INLINE void clear(T* to, int64_t count) {
  __builtin_memset(to, 0, count * sizeof(T));
}

// The first `count` numbers of a vector.
template <typename S, typename T>
INLINE void write(S* to, const Vec<T>& value, int64_t count) {
  if constexpr (std::is_same_v<S, T>) {
    if (count >= Simd<T>::lanes) {
      store<T>(to, value);
      return;
    }
  }
  if (count >= Simd<T>::lanes) {
    for (int i = 0; i < Simd<T>::lanes; ++i) {
      to[i] = static_cast<S>(value[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<S>(value[i]);
    }
  }
}

template <typename P, bool zero, typename T>
INLINE void copy_piece(T* to, const T* from, T add) {
  P piece = {};
  if constexpr (!zero) {
    __builtin_memcpy(&piece, from, sizeof(P));
    piece += add;
  }
  KEEP(piece);  // or GCC makes the loop such a call
  __builtin_memcpy(to, &piece, sizeof(P));
}

// Copies `count` numbers, plus `add`, or writes zeros; rows are often too short for calls of memcpy
// and memset.
template <bool zero, typename T>
INLINE void copy_row(T* to, const T* from, int64_t count, T add = 0) {
  typedef T Quad __attribute__((vector_size(16)));
  constexpr int lanes = Simd<T>::lanes, quad = 16 / sizeof(T);
  if (count >= lanes) {
    for (int64_t x = 0; x + lanes <= count; x += lanes) {
      copy_piece<Vec<T>, zero>(to + x, from + x, add);
    }
    copy_piece<Vec<T>, zero>(to + count - lanes, from + count - lanes, add);
  } else if (count >= quad) {
    for (int64_t x = 0; x + quad <= count; x += quad) {
      copy_piece<Quad, zero>(to + x, from + x, add);
    }
    copy_piece<Quad, zero>(to + count - quad, from + count - quad, add);
  } else {
    for (int64_t x = 0; x < count; ++x) {
      copy_piece<T, zero>(to + x, from + x, add);
    }
  }
}

}  // namespace
}  // namespace KERNEL_ISA
}  // namespace acmix_mm
