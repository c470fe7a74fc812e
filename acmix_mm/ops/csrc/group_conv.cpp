// Grouped 2-D convolution on the CPU for few channels a group: checks, dispatch over types and
// instruction sets, threads.
//
// Of every group, blocks of rows are packed into per-thread scratch; a register tile holds several
// output channels of some vectors of pixels. Nothing of the size of the map exists beyond inputs
// and results.

#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "group_conv_plan.h"
#include "native.h"

#define KERNEL_HEADER "group_conv_kernel.h"
#include "for_each_isa.h"

namespace acmix_mm {
namespace {

// The kernels of one instruction set for storage type S and compute type T.
template <typename S, typename T>
struct Kernels {
  int64_t lanes;
  int64_t (*conv_scratch_bytes)(const ConvPlan&);
  void (*convolve)(const ConvPlan&, const ConvArgs&, int64_t, int64_t, Arena);
  int64_t (*weight_scratch_bytes)(const WeightPlan&);
  void (*differentiate_weight)(const WeightPlan&, const WeightArgs&, int64_t, int64_t, Arena);
};

template <typename S, typename T>
Kernels<S, T> kernels() {
  switch (best_isa()) {
#ifdef NATIVE_X86
    case Isa::avx512:
      return {avx512::Simd<T>::lanes, avx512::conv_scratch_bytes<T>, avx512::convolve<S, T>,
              avx512::weight_scratch_bytes<T>, avx512::differentiate_weight<S, T>};
    case Isa::avx2:
      return {avx2::Simd<T>::lanes, avx2::conv_scratch_bytes<T>, avx2::convolve<S, T>,
              avx2::weight_scratch_bytes<T>, avx2::differentiate_weight<S, T>};
#endif
    default:
      return {baseline::Simd<T>::lanes, baseline::conv_scratch_bytes<T>, baseline::convolve<S, T>,
              baseline::weight_scratch_bytes<T>, baseline::differentiate_weight<S, T>};
  }
}

// Checks sizes and geometry; the tensors themselves are checked against the shape by check_tensor.
ConvShape conv_shape(int64_t batch, int64_t channels, int64_t height, int64_t width,
                     at::IntArrayRef weight, int64_t stride, int64_t dilation, int64_t groups) {
  TORCH_CHECK(stride > 0 && dilation > 0 && groups > 0,
              "stride, dilation and groups must be positive, got ", stride, ", ", dilation,
              " and ", groups);
  TORCH_CHECK(channels > 0 && height > 0 && width > 0,
              "input must have C, H, W >= 1, got shape ",
              at::IntArrayRef({batch, channels, height, width}));
  TORCH_CHECK(channels % groups == 0, "input must have a multiple of ", groups,
              " channels, got ", channels);
  TORCH_CHECK(weight.size() == 4 && weight[3] > 0 && weight[3] % 2 == 1 &&
                  weight[3] <= kMaxKernel && weight[0] > 0 && weight[0] % groups == 0,
              "weight must have an odd kernel of side ", kMaxKernel,
              " at most and some multiple of ", groups, " output channels, got shape ", weight);
  return {batch,  groups, channels / groups, weight[0] / groups, height,
          width,  weight[3], stride,         dilation};
}

ConvShape conv_shape(const at::Tensor& input, at::IntArrayRef weight, int64_t stride,
                     int64_t dilation, int64_t groups) {
  TORCH_CHECK(input.dim() == 4, "input must have 4 dimensions, got shape ", input.sizes());
  return conv_shape(input.size(0), input.size(1), input.size(2), input.size(3), weight, stride,
                    dilation, groups);
}

void check_input(const at::Tensor& input, const ConvShape& shape, at::ScalarType dtype) {
  check_same(input, "input",
             {shape.batch, shape.groups * shape.inputs, shape.height, shape.width}, dtype);
}

void check_weight(const at::Tensor& weight, const ConvShape& shape, at::ScalarType dtype) {
  check_same(weight, "weight",
             {shape.groups * shape.outputs, shape.inputs, shape.kernel, shape.kernel}, dtype);
}

std::vector<int64_t> output_sizes(const ConvShape& shape) {
  return {shape.batch, shape.groups * shape.outputs, (shape.height - 1) / shape.stride + 1,
          (shape.width - 1) / shape.stride + 1};
}

template <typename S, typename T>
void run_convolve(const ConvShape& shape, bool transposed, const ConvArgs& args) {
  const auto kernel = kernels<S, T>();
  const ConvPlan plan(shape, transposed, kernel.lanes, 64 / sizeof(T));
  const int64_t bytes = kernel.conv_scratch_bytes(plan);
  at::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(bytes);
    kernel.convolve(plan, args, begin, end, scratch.arena());
  });
}

template <typename S, typename T>
void run_differentiate_weight(const ConvShape& shape, const at::Tensor& grad,
                              const at::Tensor& input, const at::Tensor& grad_weight) {
  const auto kernel = kernels<S, T>();
  const WeightPlan plan(shape, kernel.lanes, 64 / sizeof(T));
  const int64_t numbers = grad_weight.numel();
  const ScratchMemory partials(plan.parts * numbers * sizeof(double));
  const WeightArgs args{as_map(grad), as_map(input), partials.arena().take<double>(0)};
  const int64_t bytes = kernel.weight_scratch_bytes(plan);
  const int64_t tasks = plan.parts * plan.groups * num_pieces(plan.outputs);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(bytes);
    kernel.differentiate_weight(plan, args, begin, end, scratch.arena());
  });
  S* to = static_cast<S*>(grad_weight.mutable_data_ptr());
  for (int64_t i = 0; i < numbers; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < plan.parts; ++part) {
      sum += args.partials[part * numbers + i];
    }
    to[i] = static_cast<S>(static_cast<T>(sum));
  }
}

at::Tensor forward(const at::Tensor& input, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, int64_t stride, int64_t dilation,
                   int64_t groups) {
  const ConvShape shape = conv_shape(input, weight.sizes(), stride, dilation, groups);
  const auto dtype = input.scalar_type();
  check_input(input, shape, dtype);
  check_weight(weight, shape, dtype);
  Map bias_map{};
  if (bias.has_value()) {
    check_same(*bias, "bias", {weight.size(0)}, dtype);
    bias_map = as_map(*bias);
  }
  at::Tensor output = at::empty(output_sizes(shape), input.options());
  if (shape.batch == 0) {
    return output;
  }
  const ConvArgs args{as_map(input),
                      as_map(weight),
                      bias_map,
                      output.mutable_data_ptr(),
                      shape.outputs * weight.stride(0),
                      weight.stride(0),
                      weight.stride(1)};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "group_conv", [&] {
    using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    run_convolve<scalar_t, compute_t>(shape, false, args);
  });
  return output;
}

at::Tensor grad_input(const at::Tensor& grad, const at::Tensor& weight, int64_t height,
                      int64_t width, int64_t stride, int64_t dilation, int64_t groups) {
  TORCH_CHECK(grad.dim() == 4 && weight.dim() == 4,
              "grad and weight must have 4 dimensions, got shapes ", grad.sizes(), " and ",
              weight.sizes());
  const auto dtype = grad.scalar_type();
  check_same(weight, "weight", weight.sizes(), dtype);
  TORCH_CHECK(weight.numel() > 0, "weight must not be empty, got shape ", weight.sizes());
  TORCH_CHECK(groups <= weight.size(0), "groups must be at most the output channels, ",
              weight.size(0), ", got ", groups);
  const ConvShape shape = conv_shape(grad.size(0), groups * weight.size(1), height, width,
                                     weight.sizes(), stride, dilation, groups);
  check_weight(weight, shape, dtype);
  check_same(grad, "grad", output_sizes(shape), dtype);
  at::Tensor out =
      at::empty({shape.batch, groups * shape.inputs, height, width}, grad.options());
  if (shape.batch == 0) {
    return out;
  }
  const ConvArgs args{as_map(grad),
                      as_map(weight),
                      {},
                      out.mutable_data_ptr(),
                      shape.outputs * weight.stride(0),
                      weight.stride(1),
                      weight.stride(0)};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "group_conv", [&] {
    using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    run_convolve<scalar_t, compute_t>(shape, true, args);
  });
  return out;
}

at::Tensor grad_weight(const at::Tensor& grad, const at::Tensor& input, int64_t kernel_size,
                       int64_t stride, int64_t dilation, int64_t groups) {
  TORCH_CHECK(grad.dim() == 4 && input.dim() == 4,
              "grad and input must have 4 dimensions, got shapes ", grad.sizes(), " and ",
              input.sizes());
  TORCH_CHECK(groups > 0, "groups must be positive, got ", groups);
  const std::vector<int64_t> sizes{grad.size(1), input.size(1) / groups, kernel_size, kernel_size};
  const ConvShape shape = conv_shape(input, sizes, stride, dilation, groups);
  const auto dtype = input.scalar_type();
  check_input(input, shape, dtype);
  check_same(grad, "grad", output_sizes(shape), dtype);
  if (shape.batch == 0) {
    return at::zeros(sizes, input.options());
  }
  at::Tensor out = at::empty(sizes, input.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "group_conv", [&] {
    using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    run_differentiate_weight<scalar_t, compute_t>(shape, grad, input, out);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(acmix_mm, m) {
  m.def(
      "group_conv_native(Tensor input, Tensor weight, Tensor? bias, int stride, int dilation, "
      "int groups) -> Tensor");
  m.def(
      "group_conv_native_grad_input(Tensor grad, Tensor weight, SymInt height, SymInt width, "
      "int stride, int dilation, int groups) -> Tensor");
  m.def(
      "group_conv_native_grad_weight(Tensor grad, Tensor input, int kernel_size, int stride, "
      "int dilation, int groups) -> Tensor");
}

TORCH_LIBRARY_IMPL(acmix_mm, CPU, m) {
  m.impl("group_conv_native", &forward);
  m.impl("group_conv_native_grad_input", &grad_input);
  m.impl("group_conv_native_grad_weight", &grad_weight);
}

}  // namespace acmix_mm
