// Sizes and arguments of the patch weights' kernels.
#pragma once

#include <cstdint>

#include "native.h"

namespace acmix_mm {

// Inputs of the convolution are the R channels of the query, then the R k k of the patch.
struct PatchPlan {
  int64_t batch, channels, outputs, kernel, stride, dilation;
  int64_t rows, cols, pixels;  // of queries and results
  int64_t width, plane;        // of the padded map

  int64_t patch() const { return kernel * kernel; }
};

// Maps (B, R, rows, columns) and (B, R, padded rows and columns); mean, factor and shift (inputs),
// weight (inputs, O).
template <typename T>
struct PatchInputs {
  const T *query, *padded, *mean, *factor, *shift, *weight;
};

// Of all inputs but the mean; grad_query and grad_padded are zeros, to add to.
template <typename T>
struct PatchGradients {
  const T* grad;  // (B, O, rows, columns)
  T *query, *padded, *factor, *shift, *weight;
};

}  // namespace acmix_mm
