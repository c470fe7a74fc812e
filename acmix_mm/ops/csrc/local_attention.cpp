// Neighbourhood attention on the CPU: checks, dispatch over types and instruction sets, threads.
//
// Rows of keys and values are packed, with their reflected borders, into rings in per-thread
// scratch; a vector register holds adjacent queries of a row, and two query rows share the key rows
// that both see. Nothing of the size of the map exists beyond inputs and results.

#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>

#include "local_attention_plan.h"
#include "native.h"

#define KERNEL_HEADER "local_attention_kernel.h"
#include "for_each_isa.h"

namespace acmix_mm {
namespace {

// The kernels of one instruction set for storage type S and compute type T.
template <typename S, typename T>
struct Kernels {
  int64_t lanes;
  int64_t (*scratch_bytes)(const Plan&, bool);
  void (*forward)(const Plan&, const ForwardArgs&, int64_t, int64_t, Arena);
  void (*backward)(const Plan&, const BackwardArgs&, int64_t, int64_t, int64_t, Arena);
};

template <typename S, typename T>
Kernels<S, T> kernels() {
  switch (best_isa()) {
#ifdef NATIVE_X86
    case Isa::avx512:
      return {avx512::Simd<T>::lanes, avx512::scratch_bytes<T>, avx512::forward<S, T>,
              avx512::backward<S, T>};
    case Isa::avx2:
      return {avx2::Simd<T>::lanes, avx2::scratch_bytes<T>, avx2::forward<S, T>,
              avx2::backward<S, T>};
#endif
    default:
      return {baseline::Simd<T>::lanes, baseline::scratch_bytes<T>, baseline::forward<S, T>,
              baseline::backward<S, T>};
  }
}

// lse has no channels.
Map lse_as_map(const at::Tensor& lse) {
  return {lse.const_data_ptr(), {lse.stride(0), lse.stride(1), 0, lse.stride(2), lse.stride(3)}};
}

struct Axes {
  Axis rows, cols;
};

Axes check_inputs(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  int64_t kernel_size, int64_t stride, int64_t dilation) {
  TORCH_CHECK(kernel_size > 0 && kernel_size % 2 == 1 && stride > 0 && dilation > 0,
              "kernel_size must be odd, kernel_size, stride and dilation positive");
  TORCH_CHECK(key.dim() == 5, "key must have 5 dimensions, got shape ", key.sizes());
  for (int64_t dim = 1; dim < 5; ++dim) {
    TORCH_CHECK(key.size(dim) > 0, "key must have N, d, H, W >= 1, got shape ", key.sizes());
  }
  const Axes axes{Axis(key.size(3), kernel_size, stride, dilation),
                  Axis(key.size(4), kernel_size, stride, dilation)};
  check_same(key, "key", key.sizes(), query.scalar_type());
  check_same(value, "value", key.sizes(), query.scalar_type());
  check_same(query, "query",
             {key.size(0), key.size(1), key.size(2), axes.rows.queries, axes.cols.queries},
             query.scalar_type());
  return axes;
}

template <typename S, typename T>
void run_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                 const Axes& axes, double scale, const at::Tensor& output, const at::Tensor& lse) {
  const auto kernel = kernels<S, T>();
  const Plan plan(query.size(0) * query.size(1), query.size(1), query.size(2), scale, axes.rows,
                  axes.cols, kernel.lanes, 64 / sizeof(T));
  const ForwardArgs args{as_map(query), as_map(key), as_map(value), output.mutable_data_ptr(),
                         lse.mutable_data_ptr()};
  const int64_t bytes = kernel.scratch_bytes(plan, false);
  const int64_t groups = static_cast<int64_t>(plan.groups.size());
  at::parallel_for(0, plan.planes * groups, 1, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(bytes);
    kernel.forward(plan, args, begin, end, scratch.arena());
  });
}

// Into how many row blocks the backward pass cuts a plane: as few as keep all threads busy, since
// queries near a cut are computed twice.
int64_t row_blocks(const Plan& plan) {
  const int64_t threads = at::get_num_threads();
  const int64_t even = threads / std::gcd(plan.planes, threads);
  const int64_t enough = 2 * ((threads + plan.planes - 1) / plan.planes);
  return plan.planes >= 4 * threads ? 1 : std::min({even, enough, plan.rows.size});
}

template <typename S, typename T>
void run_backward(const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
                  const at::Tensor& value, const at::Tensor& output, const at::Tensor& lse,
                  const Axes& axes, double scale, const at::Tensor& grad_query,
                  const at::Tensor& grad_key, const at::Tensor& grad_value) {
  const auto kernel = kernels<S, T>();
  const Plan plan(query.size(0) * query.size(1), query.size(1), query.size(2), scale, axes.rows,
                  axes.cols, kernel.lanes, 64 / sizeof(T));
  const BackwardArgs args{as_map(grad),
                          as_map(query),
                          as_map(key),
                          as_map(value),
                          as_map(output),
                          lse_as_map(lse),
                          grad_query.mutable_data_ptr(),
                          grad_key.mutable_data_ptr(),
                          grad_value.mutable_data_ptr()};
  const int64_t bytes = kernel.scratch_bytes(plan, true);
  const int64_t blocks = row_blocks(plan);
  const int64_t height = plan.rows.size;
  at::parallel_for(0, plan.planes * blocks, 1, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks;
      kernel.backward(plan, args, task / blocks, block * height / blocks,
                      (block + 1) * height / blocks, scratch.arena());
    }
  });
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& key,
                                           const at::Tensor& value, int64_t kernel_size,
                                           int64_t stride, int64_t dilation, double scale) {
  const Axes axes = check_inputs(query, key, value, kernel_size, stride, dilation);
  const auto dtype = query.scalar_type();
  at::Tensor output = at::empty(query.sizes(), query.options());
  at::Tensor lse = at::empty({query.size(0), query.size(1), query.size(3), query.size(4)},
                             query.options().dtype(compute_type(dtype)));
  if (output.numel() == 0) {
    return {output, lse};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "local_attention", [&] {
    using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    run_forward<scalar_t, compute_t>(query, key, value, axes, scale, output, lse);
  });
  return {output, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& output, const at::Tensor& lse, int64_t kernel_size,
    int64_t stride, int64_t dilation, double scale) {
  const Axes axes = check_inputs(query, key, value, kernel_size, stride, dilation);
  const auto dtype = query.scalar_type();
  check_same(grad, "grad", query.sizes(), dtype);
  check_same(output, "output", query.sizes(), dtype);
  check_same(lse, "lse", {query.size(0), query.size(1), query.size(3), query.size(4)},
             compute_type(dtype));
  at::Tensor grad_query = at::empty(query.sizes(), query.options());
  // Sums over many queries: half precision would lose most of them.
  const auto options = key.options().dtype(compute_type(dtype));
  at::Tensor grad_key = at::zeros(key.sizes(), options);
  at::Tensor grad_value = at::zeros(key.sizes(), options);
  if (query.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "local_attention", [&] {
      using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
      run_backward<scalar_t, compute_t>(grad, query, key, value, output, lse, axes, scale,
                                        grad_query, grad_key, grad_value);
    });
  }
  return {grad_query, grad_key.to(dtype), grad_value.to(dtype)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(acmix_mm, m) {
  m.def(
      "local_attention_native_forward(Tensor query, Tensor key, Tensor value, int kernel_size, "
      "int stride, int dilation, float scale) -> (Tensor, Tensor)");
  m.def(
      "local_attention_native_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
      "Tensor output, Tensor lse, int kernel_size, int stride, int dilation, float scale) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(acmix_mm, CPU, m) {
  m.impl("local_attention_native_forward", &forward);
  m.impl("local_attention_native_backward", &backward);
}

}  // namespace acmix_mm
