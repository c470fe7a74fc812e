// Sum of neighbourhoods by given weights, and its adjoints, on the CPU: checks, dispatch over types
// and instruction sets, threads.
//
// Rows of values are packed, with their borders, into rings in per-thread scratch, as in
// local_attention.cpp. Nothing of the size of unfolded values exists beyond weights and results.

#include <torch/library.h>

#include <type_traits>

#include "local_aggregation_plan.h"
#include "native.h"

#define KERNEL_HEADER "local_aggregation_kernel.h"
#include "for_each_isa.h"

namespace acmix_mm {
namespace {

// The kernels of one instruction set for storage type S and compute type T.
template <typename S, typename T>
struct Kernels {
  int64_t lanes;
  int64_t (*scratch_bytes)(const Plan&);
  void (*aggregate)(const Plan&, const AggregationArgs&, int64_t, int64_t, Arena);
  void (*differentiate_weights)(const Plan&, const GradWeightArgs&, int64_t, int64_t, Arena);
  void (*differentiate_values)(const Plan&, const GradValueArgs&, int64_t, int64_t, int64_t,
                               Arena);
};

template <typename S, typename T>
Kernels<S, T> kernels() {
  switch (best_isa()) {
#ifdef NATIVE_X86
    case Isa::avx512:
      return {avx512::Simd<T>::lanes, avx512::aggregation_scratch_bytes<T>,
              avx512::aggregate<S, T>, avx512::differentiate_weights<S, T>,
              avx512::differentiate_values<S, T>};
    case Isa::avx2:
      return {avx2::Simd<T>::lanes, avx2::aggregation_scratch_bytes<T>, avx2::aggregate<S, T>,
              avx2::differentiate_weights<S, T>, avx2::differentiate_values<S, T>};
#endif
    default:
      return {baseline::Simd<T>::lanes, baseline::aggregation_scratch_bytes<T>,
              baseline::aggregate<S, T>, baseline::differentiate_weights<S, T>,
              baseline::differentiate_values<S, T>};
  }
}

// Sizes of one call: values (B, C, H, W), weights (B, G, k k, output rows, output columns).
struct Sizes {
  int64_t batch, channels, groups;
  Axis rows, cols;

  Sizes(at::IntArrayRef value, int64_t groups_, int64_t kernel_size, int64_t stride,
        int64_t dilation, bool zeros)
      : batch(value[0]),
        channels(value[1]),
        groups(groups_),
        rows(check(value, groups_, kernel_size, stride, dilation), kernel_size, stride, dilation,
             zeros),
        cols(value[3], kernel_size, stride, dilation, zeros) {}

  std::vector<int64_t> value() const { return {batch, channels, rows.size, cols.size}; }

  std::vector<int64_t> out() const { return {batch, channels, rows.queries, cols.queries}; }

  std::vector<int64_t> weight() const {
    return {batch, groups, rows.kernel * rows.kernel, rows.queries, cols.queries};
  }

  Plan plan(int64_t lanes, int64_t line) const {
    return Plan(batch * groups, groups, channels / groups, 1., rows, cols, 0, rows.queries, lanes,
                line);
  }

 private:
  // Returns the height.
  static int64_t check(at::IntArrayRef value, int64_t groups, int64_t kernel_size, int64_t stride,
                       int64_t dilation) {
    TORCH_CHECK(kernel_size > 0 && kernel_size % 2 == 1 && kernel_size <= kMaxKernel,
                "kernel_size must be odd, positive and at most ", kMaxKernel, ", got ",
                kernel_size);
    TORCH_CHECK(stride > 0 && dilation > 0, "stride and dilation must be positive, got ", stride,
                " and ", dilation);
    for (int64_t dim = 1; dim < 4; ++dim) {
      TORCH_CHECK(value[dim] > 0 && value[dim] <= kMaxElements, "value must have C, H, W of 1 to ",
                  kMaxElements, ", got shape ", value);
    }
    TORCH_CHECK(groups > 0 && value[1] % groups == 0,
                "weight must have a number of groups that divides ", value[1], ", got ", groups);
    return value[2];
  }
};

void check_dims(const at::Tensor& tensor, const char* name, int64_t dims) {
  TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, got shape ",
              tensor.sizes());
}

// (B, C, rows, columns) as (B, G, C / G, rows, columns): channel c is of group c mod G.
at::Tensor by_group(const at::Tensor& maps, int64_t groups) {
  const auto sizes = maps.sizes(), strides = maps.strides();
  return maps.as_strided(
      {sizes[0], groups, sizes[1] / groups, sizes[2], sizes[3]},
      {strides[0], strides[1], strides[1] * groups, strides[2], strides[3]});
}

Target as_target(const at::Tensor& tensor) {
  Target target{tensor.mutable_data_ptr(), {}, false};
  std::copy_n(tensor.strides().begin(), tensor.dim(), target.strides);
  return target;
}

// Runs a kernel on the groups of all planes, in any order.
template <typename S, typename T, typename Kernel, typename Args>
void run_groups(const Sizes& sizes, Kernel Kernels<S, T>::* run, const Args& args) {
  const auto kernel = kernels<S, T>();
  const Plan plan = sizes.plan(kernel.lanes, 64 / sizeof(T));
  const int64_t bytes = kernel.scratch_bytes(plan);
  const int64_t tasks = plan.planes * static_cast<int64_t>(plan.groups.size());
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(bytes);
    (kernel.*run)(plan, args, begin, end, scratch.arena());
  });
}

// Cuts planes into blocks of rows whose gradients are summed by one thread each.
template <typename S, typename T>
void run_row_blocks(const Sizes& sizes, const GradValueArgs& args) {
  const auto kernel = kernels<S, T>();
  const Plan plan = sizes.plan(kernel.lanes, 64 / sizeof(T));
  const int64_t bytes = kernel.scratch_bytes(plan);
  const int64_t rows = sizes.rows.size, blocks = row_blocks(plan, rows);
  at::parallel_for(0, plan.planes * blocks, 1, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks;
      kernel.differentiate_values(plan, args, task / blocks, block * rows / blocks,
                                  (block + 1) * rows / blocks, scratch.arena());
    }
  });
}

template <typename F>
void dispatch(at::ScalarType dtype, F run) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "local_aggregation", [&] {
    using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    run(scalar_t{}, compute_t{});
  });
}

at::Tensor forward(const at::Tensor& value, const at::Tensor& weight, int64_t kernel_size,
                   int64_t stride, int64_t dilation, bool zeros) {
  check_dims(value, "value", 4);
  check_dims(weight, "weight", 5);
  const auto dtype = value.scalar_type();
  check_same(value, "value", value.sizes(), dtype);
  const Sizes sizes(value.sizes(), weight.size(1), kernel_size, stride, dilation, zeros);
  check_same(weight, "weight", sizes.weight(), dtype);
  at::Tensor out = at::empty(sizes.out(), value.options());
  if (out.numel() == 0) {
    return out;
  }
  const AggregationArgs args{as_map(by_group(value, sizes.groups)), as_map(weight),
                             as_target(by_group(out, sizes.groups))};
  dispatch(dtype, [&](auto s, auto t) {
    using K = Kernels<decltype(s), decltype(t)>;
    run_groups(sizes, &K::aggregate, args);
  });
  return out;
}

at::Tensor grad_value(const at::Tensor& grad, const at::Tensor& weight, int64_t height,
                      int64_t width, int64_t kernel_size, int64_t stride, int64_t dilation,
                      bool zeros) {
  check_dims(grad, "grad", 4);
  check_dims(weight, "weight", 5);
  const auto dtype = grad.scalar_type();
  check_same(grad, "grad", grad.sizes(), dtype);
  const Sizes sizes({grad.size(0), grad.size(1), height, width}, weight.size(1), kernel_size,
                    stride, dilation, zeros);
  check_same(grad, "grad", sizes.out(), dtype);
  check_same(weight, "weight", sizes.weight(), dtype);
  // Sums over many outputs: half precision would lose most of them.
  at::Tensor out = at::zeros(sizes.value(), grad.options().dtype(compute_type(dtype)));
  if (out.numel() > 0) {
    const GradValueArgs args{as_map(by_group(grad, sizes.groups)), as_map(weight),
                             as_target(by_group(out, sizes.groups))};
    dispatch(dtype, [&](auto s, auto t) { run_row_blocks<decltype(s), decltype(t)>(sizes, args); });
  }
  return out.to(dtype);
}

at::Tensor grad_weight(const at::Tensor& grad, const at::Tensor& value, int64_t groups,
                       int64_t kernel_size, int64_t stride, int64_t dilation, bool zeros) {
  check_dims(grad, "grad", 4);
  check_dims(value, "value", 4);
  const auto dtype = value.scalar_type();
  check_same(value, "value", value.sizes(), dtype);
  const Sizes sizes(value.sizes(), groups, kernel_size, stride, dilation, zeros);
  check_same(grad, "grad", sizes.out(), dtype);
  at::Tensor out = at::empty(sizes.weight(), value.options());
  if (out.numel() > 0) {
    const GradWeightArgs args{as_map(by_group(grad, groups)), as_map(by_group(value, groups)),
                              as_target(out)};
    dispatch(dtype, [&](auto s, auto t) {
      using K = Kernels<decltype(s), decltype(t)>;
      run_groups(sizes, &K::differentiate_weights, args);
    });
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(acmix_mm, m) {
  m.def(
      "local_aggregation_native(Tensor value, Tensor weight, int kernel_size, int stride, "
      "int dilation, bool zeros) -> Tensor");
  m.def(
      "local_aggregation_native_grad_value(Tensor grad, Tensor weight, int height, int width, "
      "int kernel_size, int stride, int dilation, bool zeros) -> Tensor");
  m.def(
      "local_aggregation_native_grad_weight(Tensor grad, Tensor value, int groups, "
      "int kernel_size, int stride, int dilation, bool zeros) -> Tensor");
}

TORCH_LIBRARY_IMPL(acmix_mm, CPU, m) {
  m.impl("local_aggregation_native", &forward);
  m.impl("local_aggregation_native_grad_value", &grad_value);
  m.impl("local_aggregation_native_grad_weight", &grad_weight);
}

}  // namespace acmix_mm
