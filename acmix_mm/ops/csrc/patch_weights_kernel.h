// Kernel of the patch weights for one instruction set. No include guard: the file is included once
// per instruction set, by for_each_isa.h.

#include "simd.h"

namespace acmix_mm {
namespace KERNEL_ISA {
namespace {

// Output channels whose sums stay in registers.
constexpr int kOutputs = kBytes == 64 ? 16 : 8;

// A vector of every `stride`-th number; zeros beyond `count`, which nothing may be read from.
template <bool full, typename T>
INLINE Vec<T> load_steps(const T* from, int64_t stride, int64_t count) {
  if (full && stride == 1) {
    return load(from);
  }
  Vec<T> value = {};
  const int64_t end = full ? Simd<T>::lanes : count;
  for (int64_t i = 0; i < end; ++i) {
    value[i] = from[i * stride];
  }
  return value;
}

// Some output channels of a vector of pixels: the whole patch, channel by channel.
template <int outputs, bool full, typename T>
void sum_patch(const PatchPlan& plan, const PatchArgs<T>& args, const T* corner, int64_t count,
               int64_t output, T* to) {
  Vec<T> sums[outputs] = {};
  const T *scale = args.scale, *shift = args.shift, *weight = args.weight + output;
  for (int64_t channel = 0; channel < plan.channels; ++channel) {
    for (int64_t i = 0; i < plan.kernel; ++i) {
      const T* row = corner + channel * plan.plane + i * plan.dilation * plan.width;
      for (int64_t j = 0; j < plan.kernel; ++j) {
        Vec<T> value = load_steps<full>(row + j * plan.dilation, plan.stride, count);
        value = value * *scale++ + *shift++;
        value = value < T(0) ? Vec<T>{} : value;  // NaN stays, as in PyTorch
        UNROLL
        for (int o = 0; o < outputs; ++o) {
          sums[o] += value * weight[o];
        }
        weight += plan.outputs;
      }
    }
  }
  for (int o = 0; o < outputs; ++o) {
    write<T, T>(to + o * plan.out_plane, sums[o], count);
  }
}

template <bool full, typename T>
void sum_outputs(const PatchPlan& plan, const PatchArgs<T>& args, const T* corner, int64_t count,
                 T* to) {
  int64_t output = 0;
  const auto next = [&](auto outputs) {
    constexpr int number = decltype(outputs)::value;
    for (; plan.outputs - output >= number; output += number) {
      sum_patch<number, full>(plan, args, corner, count, output, to + output * plan.out_plane);
    }
  };
  next(std::integral_constant<int, kOutputs>{});
  next(std::integral_constant<int, 8>{});
  next(std::integral_constant<int, 4>{});
  next(std::integral_constant<int, 1>{});
}

// Rows [begin, end) of all images' outputs.
template <typename T>
void sum_rows(const PatchPlan& plan, const PatchArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / plan.out_height, y = task % plan.out_height;
    const T* from = args.padded + image * plan.channels * plan.plane + y * plan.stride * plan.width;
    T* to = args.out + image * plan.outputs * plan.out_plane + y * plan.out_width;
    int64_t x = 0;
    for (; x + lanes <= plan.out_width; x += lanes) {
      sum_outputs<true>(plan, args, from + x * plan.stride, lanes, to + x);
    }
    if (x < plan.out_width) {
      sum_outputs<false>(plan, args, from + x * plan.stride, plan.out_width - x, to + x);
    }
  }
}

}  // namespace
}  // namespace KERNEL_ISA
}  // namespace acmix_mm
