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

// Checks sizes and geometry; the tensors themselves are checked against the shape by check_map and
// check_weight.
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
  TORCH_CHECK(height <= kMaxElements, "height must be at most ", kMaxElements, ", got ", height);
  return {batch,  groups,    channels / groups, weight[0] / groups, height,
          width,  weight[3], stride,            dilation,           0,
          (height - 1) / stride + 1};
}

ConvShape conv_shape(const at::Tensor& input, at::IntArrayRef weight, int64_t stride,
                     int64_t dilation, int64_t groups, int64_t height) {
  TORCH_CHECK(input.dim() == 4, "input must have 4 dimensions, got shape ", input.sizes());
  return conv_shape(input.size(0), input.size(1), height, input.size(3), weight, stride, dilation,
                    groups);
}

// A tensor with rows of a map of `height` rows, from `first` on.
void check_map(const at::Tensor& map, const char* name, int64_t batch, int64_t channels,
               int64_t height, int64_t width, int64_t first, at::ScalarType dtype) {
  TORCH_CHECK(map.dim() == 4, name, " must have 4 dimensions, got shape ", map.sizes());
  check_same(map, name, {batch, channels, map.size(2), width}, dtype);
  TORCH_CHECK(first >= 0 && first <= height - map.size(2), name, " must have rows of ", height,
              ", got ", map.size(2), " from row ", first, " on");
}

void check_input(const at::Tensor& input, const char* name, const ConvShape& shape, int64_t first,
                 at::ScalarType dtype) {
  check_map(input, name, shape.batch, shape.groups * shape.inputs, shape.height, shape.width, first,
            dtype);
}

void check_output(const at::Tensor& output, const char* name, const ConvShape& shape,
                  int64_t first, at::ScalarType dtype) {
  check_map(output, name, shape.batch, shape.groups * shape.outputs,
            (shape.height - 1) / shape.stride + 1, (shape.width - 1) / shape.stride + 1, first,
            dtype);
}

// Raises unless `name`, with `rows` rows from `first` on, has those of [begin, end) that are in the
// map.
void check_rows(const char* name, int64_t first, int64_t rows, int64_t begin, int64_t end,
                int64_t height) {
  begin = std::max<int64_t>(begin, 0);
  end = std::min(end, height);
  TORCH_CHECK(begin >= end || (first <= begin && end <= first + rows), name, " must have rows ",
              begin, " to ", end - 1, ", got ", rows, " from row ", first, " on");
}

// Those of the input that output rows [begin, end) see.
void check_seen(const at::Tensor& input, const ConvShape& shape, int64_t first) {
  const int64_t reach = shape.kernel / 2 * std::min(shape.dilation, shape.height);
  check_rows("input", first, input.size(2), shape.begin * shape.stride - reach,
             (shape.end - 1) * shape.stride + reach + 1, shape.height);
}

void check_weight(const at::Tensor& weight, const ConvShape& shape, at::ScalarType dtype) {
  check_same(weight, "weight",
             {shape.groups * shape.outputs, shape.inputs, shape.kernel, shape.kernel}, dtype);
}

std::vector<int64_t> output_sizes(const ConvShape& shape) {
  return {shape.batch, shape.groups * shape.outputs, (shape.height - 1) / shape.stride + 1,
          (shape.width - 1) / shape.stride + 1};
}

void check_columns(const at::Tensor& target, const char* name) {
  TORCH_CHECK(target.stride(3) == 1 || target.size(3) == 1, name, " must have adjacent columns");
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
void run_differentiate_weight(const ConvShape& shape, const Map& grad, const Map& input,
                              const Map& input_bias, const at::Tensor& grad_weight) {
  const auto kernel = kernels<S, T>();
  const WeightPlan plan(shape, kernel.lanes, 64 / sizeof(T));
  const int64_t numbers = grad_weight.numel();
  const ScratchMemory partials(plan.parts * numbers * sizeof(double));
  const WeightArgs args{grad, input, input_bias, partials.arena().take<double>(0)};
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

// Of a tensor (channels,) or none.
Map bias_map(const std::optional<at::Tensor>& bias, const char* name, int64_t channels,
             at::ScalarType dtype) {
  if (!bias.has_value()) {
    return {};
  }
  check_same(*bias, name, {channels}, dtype);
  return as_map(*bias);
}

void forward_rows_(const at::Tensor& output, const at::Tensor& input,
                   const std::optional<at::Tensor>& input_bias, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, int64_t stride, int64_t dilation,
                   int64_t groups, int64_t height, int64_t first_output, int64_t first_input) {
  ConvShape shape = conv_shape(input, weight.sizes(), stride, dilation, groups, height);
  const auto dtype = input.scalar_type();
  check_input(input, "input", shape, first_input, dtype);
  check_weight(weight, shape, dtype);
  check_output(output, "output", shape, first_output, dtype);
  check_columns(output, "output");
  shape.begin = first_output;
  shape.end = first_output + output.size(2);
  check_seen(input, shape, first_input);
  const Map added = bias_map(input_bias, "input_bias", input.size(1), dtype);
  const Map output_bias = bias_map(bias, "bias", weight.size(0), dtype);
  if (output.numel() == 0) {
    return;
  }
  const ConvArgs args{as_map(input, 2, first_input),
                      added,
                      as_map(weight),
                      output_bias,
                      row_zero(output.mutable_data_ptr(), output, 2, first_output),
                      {output.stride(0), output.stride(1), output.stride(2)},
                      shape.outputs * weight.stride(0),
                      weight.stride(0),
                      weight.stride(1)};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "group_conv", [&] {
    using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    run_convolve<scalar_t, compute_t>(shape, false, args);
  });
}

at::Tensor forward(const at::Tensor& input, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, int64_t stride, int64_t dilation,
                   int64_t groups) {
  TORCH_CHECK(input.dim() == 4, "input must have 4 dimensions, got shape ", input.sizes());
  const ConvShape shape =
      conv_shape(input, weight.sizes(), stride, dilation, groups, input.size(2));
  check_input(input, "input", shape, 0, input.scalar_type());
  at::Tensor output = at::empty(output_sizes(shape), input.options());
  forward_rows_(output, input, std::nullopt, weight, bias, stride, dilation, groups, input.size(2), 0, 0);
  return output;
}

// As conv_shape, of what the gradient of the input takes.
ConvShape grad_shape(const at::Tensor& grad, const at::Tensor& weight, int64_t height,
                     int64_t width, int64_t stride, int64_t dilation, int64_t groups) {
  TORCH_CHECK(grad.dim() == 4 && weight.dim() == 4,
              "grad and weight must have 4 dimensions, got shapes ", grad.sizes(), " and ",
              weight.sizes());
  check_same(weight, "weight", weight.sizes(), grad.scalar_type());
  TORCH_CHECK(weight.numel() > 0, "weight must not be empty, got shape ", weight.sizes());
  TORCH_CHECK(0 < groups && groups <= weight.size(0),
              "groups must be at least 1 and at most the output channels, ", weight.size(0),
              ", got ", groups);
  const ConvShape shape = conv_shape(grad.size(0), groups * weight.size(1), height, width,
                                     weight.sizes(), stride, dilation, groups);
  check_weight(weight, shape, grad.scalar_type());
  check_same(grad, "grad", output_sizes(shape), grad.scalar_type());
  return shape;
}

void grad_input_rows_(const at::Tensor& grad_input, const at::Tensor& grad,
                      const at::Tensor& weight, int64_t stride, int64_t dilation, int64_t groups,
                      int64_t height, int64_t first_input) {
  TORCH_CHECK(grad_input.dim() == 4, "grad_input must have 4 dimensions, got shape ",
              grad_input.sizes());
  ConvShape shape =
      grad_shape(grad, weight, height, grad_input.size(3), stride, dilation, groups);
  const auto dtype = grad.scalar_type();
  check_input(grad_input, "grad_input", shape, first_input, dtype);
  check_columns(grad_input, "grad_input");
  const int64_t step = std::min(stride, height);
  const int64_t end = first_input + grad_input.size(2);
  TORCH_CHECK(first_input % step == 0 && (end % step == 0 || end == height),
              "grad_input must begin and end at multiples of stride, got rows ", first_input,
              " to ", end);
  shape.begin = first_input / step;
  shape.end = (end + step - 1) / step;
  if (grad_input.numel() == 0) {
    return;
  }
  const ConvArgs args{as_map(grad),
                      {},
                      as_map(weight),
                      {},
                      row_zero(grad_input.mutable_data_ptr(), grad_input, 2, first_input),
                      {grad_input.stride(0), grad_input.stride(1), grad_input.stride(2)},
                      shape.outputs * weight.stride(0),
                      weight.stride(1),
                      weight.stride(0)};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "group_conv", [&] {
    using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    run_convolve<scalar_t, compute_t>(shape, true, args);
  });
}

at::Tensor grad_input(const at::Tensor& grad, const at::Tensor& weight, int64_t height,
                      int64_t width, int64_t stride, int64_t dilation, int64_t groups) {
  const ConvShape shape = grad_shape(grad, weight, height, width, stride, dilation, groups);
  at::Tensor out =
      at::empty({shape.batch, groups * shape.inputs, height, width}, grad.options());
  grad_input_rows_(out, grad, weight, stride, dilation, groups, height, 0);
  return out;
}

at::Tensor grad_weight_rows(const at::Tensor& grad, const at::Tensor& input,
                            const std::optional<at::Tensor>& input_bias, int64_t kernel_size,
                            int64_t stride, int64_t dilation, int64_t groups, int64_t height,
                            int64_t first_output, int64_t first_input) {
  TORCH_CHECK(grad.dim() == 4 && input.dim() == 4,
              "grad and input must have 4 dimensions, got shapes ", grad.sizes(), " and ",
              input.sizes());
  TORCH_CHECK(groups > 0, "groups must be positive, got ", groups);
  const std::vector<int64_t> sizes{grad.size(1), input.size(1) / groups, kernel_size, kernel_size};
  ConvShape shape = conv_shape(input, sizes, stride, dilation, groups, height);
  const auto dtype = input.scalar_type();
  check_input(input, "input", shape, first_input, dtype);
  check_output(grad, "grad", shape, first_output, dtype);
  shape.begin = first_output;
  shape.end = first_output + grad.size(2);
  check_seen(input, shape, first_input);
  const Map added = bias_map(input_bias, "input_bias", input.size(1), dtype);
  if (grad.numel() == 0) {
    return at::zeros(sizes, input.options());
  }
  at::Tensor out = at::empty(sizes, input.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "group_conv", [&] {
    using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    run_differentiate_weight<scalar_t, compute_t>(shape, as_map(grad, 2, first_output),
                                                  as_map(input, 2, first_input), added, out);
  });
  return out;
}

at::Tensor grad_weight(const at::Tensor& grad, const at::Tensor& input, int64_t kernel_size,
                       int64_t stride, int64_t dilation, int64_t groups) {
  TORCH_CHECK(grad.dim() == 4 && input.dim() == 4,
              "grad and input must have 4 dimensions, got shapes ", grad.sizes(), " and ",
              input.sizes());
  const int64_t height = input.size(2);
  TORCH_CHECK(stride > 0 && grad.size(2) == (height + stride - 1) / stride, "grad must have the ",
              "rows of the output of input with ", height, ", got ", grad.size(2));
  return grad_weight_rows(grad, input, std::nullopt, kernel_size, stride, dilation, groups, height, 0, 0);
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
  // As parts of a larger operator, of some rows of a map of `height` rows: tensors of the size of
  // the output have them from `first_output` on, those of the size of the input from `first_input`
  // on; grad has all where rows of the input are differentiated. The bias of the input is added to
  // its pixels before they are padded.
  m.def(
      "group_conv_native_rows_(Tensor(a!) output, Tensor input, Tensor? input_bias, "
      "Tensor weight, Tensor? bias, int stride, int dilation, int groups, int height, "
      "int first_output, int first_input) -> ()");
  m.def(
      "group_conv_native_grad_input_rows_(Tensor(a!) grad_input, Tensor grad, Tensor weight, "
      "int stride, int dilation, int groups, int height, int first_input) -> ()");
  m.def(
      "group_conv_native_grad_weight_rows(Tensor grad, Tensor input, Tensor? input_bias, "
      "int kernel_size, int stride, int dilation, int groups, int height, int first_output, "
      "int first_input) -> Tensor");
}

TORCH_LIBRARY_IMPL(acmix_mm, CPU, m) {
  m.impl("group_conv_native", &forward);
  m.impl("group_conv_native_grad_input", &grad_input);
  m.impl("group_conv_native_grad_weight", &grad_weight);
  m.impl("group_conv_native_rows_", &forward_rows_);
  m.impl("group_conv_native_grad_input_rows_", &grad_input_rows_);
  m.impl("group_conv_native_grad_weight_rows", &grad_weight_rows);
}

}  // namespace acmix_mm
