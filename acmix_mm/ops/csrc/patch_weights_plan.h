// Sizes and arguments of the patch weights' kernel.
#pragma once

#include <cstdint>

namespace acmix_mm {

struct PatchPlan {
  int64_t channels, kernel, stride, dilation;
  int64_t width, plane;  // of the padded map
  int64_t outputs, out_height, out_width, out_plane;
};

// Maps (B, R, padded rows and columns) and (B, O, rows, columns); scale and shift (R k k), weight
// (R k k, O).
template <typename T>
struct PatchArgs {
  const T *padded, *scale, *shift, *weight;
  T* out;
};

}  // namespace acmix_mm
