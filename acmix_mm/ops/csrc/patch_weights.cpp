// Normalisation, ReLU and 1x1 convolution of a query beside the k x k patch of a key, without the
// patch, and its gradients, on the CPU: checks, dispatch over types and instruction sets, threads.

#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "native.h"
#include "patch_weights_plan.h"

#define KERNEL_HEADER "patch_weights_kernel.h"
#include "for_each_isa.h"

namespace acmix_mm {
namespace {

template <typename T>
struct Kernels {
  void (*sum_rows)(const PatchPlan&, const PatchInputs<T>&, T*, int64_t, int64_t);
  int64_t (*scratch_bytes)(const PatchPlan&);
  int64_t (*tasks)(const PatchPlan&);
  void (*differentiate)(const PatchPlan&, const PatchInputs<T>&, const PatchGradients<T>&, int64_t,
                        int64_t, Arena);
};

template <typename T>
Kernels<T> kernels() {
  switch (best_isa()) {
#ifdef NATIVE_X86
    case Isa::avx512:
      return {avx512::sum_rows<T>, avx512::patch_scratch_bytes<T>, avx512::patch_tasks,
              avx512::differentiate_patch<T>};
    case Isa::avx2:
      return {avx2::sum_rows<T>, avx2::patch_scratch_bytes<T>, avx2::patch_tasks,
              avx2::differentiate_patch<T>};
#endif
    default:
      return {baseline::sum_rows<T>, baseline::patch_scratch_bytes<T>, baseline::patch_tasks,
              baseline::differentiate_patch<T>};
  }
}

// What one call computes: tensors of the compute type, contiguous, and their sizes.
struct Patch {
  at::Tensor query, padded, mean, factor, shift, weight;
  PatchPlan plan;

  Patch(const at::Tensor& query_, const at::Tensor& padded_, const at::Tensor& mean_,
        const at::Tensor& factor_, const at::Tensor& shift_, const at::Tensor& weight_,
        int64_t kernel_size, int64_t stride, int64_t dilation)
      : plan(check(query_, padded_, mean_, factor_, shift_, weight_, kernel_size, stride,
                   dilation)) {
    const auto type = compute_type(query_.scalar_type());
    query = query_.to(type).contiguous();
    padded = padded_.to(type).contiguous();
    mean = mean_.contiguous();
    factor = factor_.contiguous();
    shift = shift_.contiguous();
    weight = weight_.contiguous();
  }

  int64_t inputs() const { return plan.channels * (1 + plan.patch()); }

  template <typename T>
  PatchInputs<T> arguments() const {
    return {query.const_data_ptr<T>(),  padded.const_data_ptr<T>(), mean.const_data_ptr<T>(),
            factor.const_data_ptr<T>(), shift.const_data_ptr<T>(),  weight.const_data_ptr<T>()};
  }

 private:
  static PatchPlan check(const at::Tensor& query, const at::Tensor& padded, const at::Tensor& mean,
                         const at::Tensor& factor, const at::Tensor& shift,
                         const at::Tensor& weight, int64_t kernel_size, int64_t stride,
                         int64_t dilation) {
    TORCH_CHECK(kernel_size > 0 && stride > 0 && dilation > 0,
                "kernel_size, stride and dilation must be positive, got ", kernel_size, ", ",
                stride, " and ", dilation);
    TORCH_CHECK(padded.dim() == 4 && weight.dim() == 2,
                "padded and weight must have 4 and 2 dimensions, got shapes ", padded.sizes(),
                " and ", weight.sizes());
    const auto dtype = query.scalar_type(), sums = compute_type(dtype);
    TORCH_CHECK(at::isFloatingType(dtype), "query must be a floating-point tensor, got ", dtype);
    check_same(padded, "padded", padded.sizes(), dtype);
    const int64_t channels = padded.size(1);
    const int64_t last = std::min(padded.size(2), padded.size(3)) - 1;
    TORCH_CHECK(channels > 0 && last >= 0, "padded must have R, H, W >= 1, got shape ",
                padded.sizes());
    TORCH_CHECK(kernel_size - 1 <= last / dilation, "padded must have more rows and columns than ",
                "kernel_size - 1, ", kernel_size - 1, ", times dilation, ", dilation,
                ", got shape ", padded.sizes());
    const int64_t reach = (kernel_size - 1) * dilation;
    const int64_t rows = (padded.size(2) - reach - 1) / stride + 1;
    const int64_t cols = (padded.size(3) - reach - 1) / stride + 1;
    TORCH_CHECK(channels <= kMaxElements / kernel_size / kernel_size,
                "kernel_size must be smaller for padded of shape ", padded.sizes(), ", got ",
                kernel_size);
    const int64_t inputs = channels * (1 + kernel_size * kernel_size), outputs = weight.size(1);
    check_same(query, "query", {padded.size(0), channels, rows, cols}, dtype);
    check_same(mean, "mean", {inputs}, sums);
    check_same(factor, "factor", {inputs}, sums);
    check_same(shift, "shift", {inputs}, sums);
    check_same(weight, "weight", {inputs, outputs}, sums);
    return {padded.size(0), channels, outputs,        kernel_size,
            stride,         dilation, rows,           cols,
            rows * cols,    padded.size(3), padded.size(2) * padded.size(3)};
  }
};

at::Tensor forward(const at::Tensor& query, const at::Tensor& padded, const at::Tensor& mean,
                   const at::Tensor& factor, const at::Tensor& shift, const at::Tensor& weight,
                   int64_t kernel_size, int64_t stride, int64_t dilation) {
  const Patch patch(query, padded, mean, factor, shift, weight, kernel_size, stride, dilation);
  const PatchPlan& plan = patch.plan;
  at::Tensor out =
      at::empty({plan.batch, plan.outputs, plan.rows, plan.cols}, patch.query.options());
  AT_DISPATCH_FLOATING_TYPES(patch.query.scalar_type(), "patch_weights", [&] {
    const auto inputs = patch.arguments<scalar_t>();
    const auto kernel = kernels<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, plan.batch * plan.rows, 1, [&](int64_t begin, int64_t end) {
      kernel.sum_rows(plan, inputs, to, begin, end);
    });
  });
  return out.to(query.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& padded,
    const at::Tensor& mean, const at::Tensor& factor, const at::Tensor& shift,
    const at::Tensor& weight, int64_t kernel_size, int64_t stride, int64_t dilation) {
  const Patch patch(query, padded, mean, factor, shift, weight, kernel_size, stride, dilation);
  const PatchPlan& plan = patch.plan;
  const auto dtype = query.scalar_type();
  check_same(grad, "grad", {plan.batch, plan.outputs, plan.rows, plan.cols}, dtype);
  const auto options = patch.query.options();
  const at::Tensor out = grad.to(options).contiguous();
  at::Tensor grad_query = at::zeros(query.sizes(), options);
  at::Tensor grad_padded = at::zeros(padded.sizes(), options);
  at::Tensor grad_factor = at::empty({patch.inputs()}, options);
  at::Tensor grad_shift = at::empty({patch.inputs()}, options);
  at::Tensor grad_weight = at::empty({patch.inputs(), plan.outputs}, options);
  AT_DISPATCH_FLOATING_TYPES(patch.query.scalar_type(), "patch_weights", [&] {
    const auto inputs = patch.arguments<scalar_t>();
    const PatchGradients<scalar_t> gradients{out.const_data_ptr<scalar_t>(),
                                             grad_query.mutable_data_ptr<scalar_t>(),
                                             grad_padded.mutable_data_ptr<scalar_t>(),
                                             grad_factor.mutable_data_ptr<scalar_t>(),
                                             grad_shift.mutable_data_ptr<scalar_t>(),
                                             grad_weight.mutable_data_ptr<scalar_t>()};
    const auto kernel = kernels<scalar_t>();
    const int64_t bytes = kernel.scratch_bytes(plan);
    TORCH_CHECK(bytes <= kMaxScratch * sizeof(scalar_t), "kernel_size must be smaller for weight ",
                "of shape ", weight.sizes(), ", got ", kernel_size);
    at::parallel_for(0, kernel.tasks(plan), 1, [&](int64_t begin, int64_t end) {
      const ScratchMemory scratch(bytes);
      kernel.differentiate(plan, inputs, gradients, begin, end, scratch.arena());
    });
  });
  return {grad_query.to(dtype), grad_padded.to(dtype), grad_factor, grad_shift, grad_weight};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(acmix_mm, m) {
  m.def(
      "patch_weights_native(Tensor query, Tensor padded, Tensor mean, Tensor factor, "
      "Tensor shift, Tensor weight, int kernel_size, int stride, int dilation) -> Tensor");
  m.def(
      "patch_weights_native_backward(Tensor grad, Tensor query, Tensor padded, Tensor mean, "
      "Tensor factor, Tensor shift, Tensor weight, int kernel_size, int stride, int dilation) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(acmix_mm, CPU, m) {
  m.impl("patch_weights_native", &forward);
  m.impl("patch_weights_native_backward", &backward);
}

}  // namespace acmix_mm
