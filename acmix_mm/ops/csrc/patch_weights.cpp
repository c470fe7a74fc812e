// Scale, shift, ReLU and 1x1 convolution of the k x k patch of a map, without the patch, on the CPU:
// checks, dispatch over types and instruction sets, threads.

#include <torch/library.h>

#include <type_traits>

#include "native.h"
#include "patch_weights_plan.h"

#define KERNEL_HEADER "patch_weights_kernel.h"
#include "for_each_isa.h"

namespace acmix_mm {
namespace {

template <typename T>
auto kernel() {
  switch (best_isa()) {
#ifdef NATIVE_X86
    case Isa::avx512:
      return avx512::sum_rows<T>;
    case Isa::avx2:
      return avx2::sum_rows<T>;
#endif
    default:
      return baseline::sum_rows<T>;
  }
}

at::Tensor forward(const at::Tensor& padded, const at::Tensor& scale, const at::Tensor& shift,
                   const at::Tensor& weight, int64_t kernel_size, int64_t stride,
                   int64_t dilation) {
  TORCH_CHECK(kernel_size > 0 && stride > 0 && dilation > 0,
              "kernel_size, stride and dilation must be positive, got ", kernel_size, ", ", stride,
              " and ", dilation);
  TORCH_CHECK(padded.dim() == 4 && weight.dim() == 2,
              "padded and weight must have 4 and 2 dimensions, got shapes ", padded.sizes(),
              " and ", weight.sizes());
  const auto dtype = padded.scalar_type();
  check_same(padded, "padded", padded.sizes(), dtype);
  const int64_t last = std::min(padded.size(2), padded.size(3)) - 1;
  TORCH_CHECK(padded.size(1) > 0 && last >= 0, "padded must have R, H, W >= 1, got shape ",
              padded.sizes());
  TORCH_CHECK(kernel_size - 1 <= last / dilation, "padded must have more rows and columns than ",
              "kernel_size - 1, ", kernel_size - 1, ", times dilation, ", dilation,
              ", got shape ", padded.sizes());
  const int64_t reach = (kernel_size - 1) * dilation;
  const int64_t height = padded.size(2) - reach, width = padded.size(3) - reach;
  TORCH_CHECK(padded.size(1) <= kMaxElements / kernel_size / kernel_size,
              "kernel_size must be smaller for padded of shape ", padded.sizes(), ", got ",
              kernel_size);
  const int64_t inputs = padded.size(1) * kernel_size * kernel_size, outputs = weight.size(1);
  check_same(scale, "scale", {inputs}, dtype);
  check_same(shift, "shift", {inputs}, dtype);
  check_same(weight, "weight", {inputs, outputs}, dtype);
  const int64_t rows = (height - 1) / stride + 1, columns = (width - 1) / stride + 1;
  at::Tensor out = at::empty({padded.size(0), outputs, rows, columns}, padded.options());
  const auto from = padded.contiguous(), a = scale.contiguous(), b = shift.contiguous(),
             w = weight.contiguous();
  const PatchPlan plan{padded.size(1),  kernel_size,
                       stride,          dilation,
                       padded.size(3),  padded.size(2) * padded.size(3),
                       outputs,         rows,
                       columns,         rows * columns};
  AT_DISPATCH_FLOATING_TYPES(dtype, "patch_weights", [&] {
    const PatchArgs<scalar_t> args{
        from.const_data_ptr<scalar_t>(), a.const_data_ptr<scalar_t>(),
        b.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(),
        out.mutable_data_ptr<scalar_t>()};
    const auto run = kernel<scalar_t>();
    at::parallel_for(0, padded.size(0) * rows, 1,
                     [&](int64_t begin, int64_t end) { run(plan, args, begin, end); });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(acmix_mm, m) {
  m.def(
      "patch_weights_native(Tensor padded, Tensor scale, Tensor shift, Tensor weight, "
      "int kernel_size, int stride, int dilation) -> Tensor");
}

TORCH_LIBRARY_IMPL(acmix_mm, CPU, m) { m.impl("patch_weights_native", &forward); }

}  // namespace acmix_mm
