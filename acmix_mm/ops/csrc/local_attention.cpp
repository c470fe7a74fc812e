// Neighbourhood attention on the CPU: checks, dispatch over types and instruction sets, threads.
//
// Rows of keys and values are packed, with their reflected borders, into rings in per-thread
// scratch; a vector register holds adjacent queries of a row, and two or three query rows share the
// key rows that they see. Nothing of the size of the map exists beyond inputs and results.

#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

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
  void (*backward)(const Plan&, const BackwardArgs&, int64_t, int64_t, int64_t, int64_t, Arena);
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

Target as_target(const at::Tensor& tensor, bool add) {
  Target target{tensor.mutable_data_ptr(), {}, add};
  std::copy_n(tensor.strides().begin(), tensor.dim(), target.strides);
  return target;
}

const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

struct Axes {
  Axis rows, cols;
};

Axes check_inputs(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  int64_t kernel_size, int64_t stride, int64_t dilation) {
  TORCH_CHECK(kernel_size > 0 && kernel_size % 2 == 1 && kernel_size <= kMaxKernel,
              "kernel_size must be odd, positive and at most ", kMaxKernel, ", got ", kernel_size);
  TORCH_CHECK(stride > 0 && dilation > 0, "stride and dilation must be positive, got ", stride,
              " and ", dilation);
  TORCH_CHECK(key.dim() == 5, "key must have 5 dimensions, got shape ", key.sizes());
  for (int64_t dim = 1; dim < 5; ++dim) {
    TORCH_CHECK(key.size(dim) > 0, "key must have N, d, H, W >= 1, got shape ", key.sizes());
  }
  check_same(key, "key", key.sizes(), query.scalar_type());
  const Axes axes{Axis(key.size(3), kernel_size, stride, dilation),
                  Axis(key.size(4), kernel_size, stride, dilation)};
  check_same(value, "value", key.sizes(), query.scalar_type());
  check_same(query, "query",
             {key.size(0), key.size(1), key.size(2), axes.rows.queries, axes.cols.queries},
             query.scalar_type());
  return axes;
}

// What one call computes: neighbourhood attention of keys less slopes . (x, y), times factor.
struct Attention {
  at::Tensor query, key, value;
  at::Tensor slopes;  // (d, 2), contiguous and of the compute type, or undefined
  Axes axes;
  double scale;

  Attention(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_,
            const std::optional<at::Tensor>& slopes_, int64_t kernel_size, int64_t stride,
            int64_t dilation, double scale_)
      : query(query_),
        key(key_),
        value(value_),
        axes(check_inputs(query_, key_, value_, kernel_size, stride, dilation)),
        scale(scale_) {
    if (slopes_.has_value()) {
      check_same(*slopes_, "slopes", {key.size(2), 2}, slopes_->scalar_type());
      slopes = slopes_->to(compute_type(query.scalar_type())).contiguous();
    }
  }

  at::ScalarType dtype() const { return query.scalar_type(); }

  at::ScalarType sum_dtype() const { return compute_type(dtype()); }

  std::vector<int64_t> lse_shape() const {
    return {query.size(0), query.size(1), query.size(3), query.size(4)};
  }

  template <typename T>
  Plan plan(int64_t lanes) const {
    return Plan(query.size(0) * query.size(1), query.size(1), query.size(2), scale, axes.rows,
                axes.cols, lanes, 64 / sizeof(T));
  }
};

template <typename S, typename T>
void run_forward(const Attention& attention, const at::Tensor& factor, const Target& output,
                 const at::Tensor& lse) {
  const auto kernel = kernels<S, T>();
  const Plan plan = attention.plan<T>(kernel.lanes);
  const ForwardArgs args{as_map(attention.query),
                         as_map(attention.key),
                         as_map(attention.value),
                         data_or_null(attention.slopes),
                         data_or_null(factor),
                         output,
                         lse.mutable_data_ptr()};
  const int64_t bytes = kernel.scratch_bytes(plan, false);
  const int64_t groups = static_cast<int64_t>(plan.groups.size());
  at::parallel_for(0, plan.planes * groups, 1, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(bytes);
    kernel.forward(plan, args, begin, end, scratch.arena());
  });
}

// Returns one log-sum-exp a query and head; the result goes to output, times factor.
at::Tensor run_forward(const Attention& attention, const at::Tensor& factor,
                       const at::Tensor& output, bool add) {
  at::Tensor lse = at::empty(attention.lse_shape(),
                             attention.query.options().dtype(attention.sum_dtype()));
  if (output.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, attention.dtype(), "local_attention", [&] {
          using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
          run_forward<scalar_t, compute_t>(attention, factor, as_target(output, add), lse);
        });
  }
  return lse;
}

// Into how many row blocks the backward pass cuts a plane: as few as keep all threads busy, since
// queries near a cut are computed twice.
int64_t row_blocks(const Plan& plan) {
  const int64_t threads = at::get_num_threads();
  const int64_t even = threads / std::gcd(plan.planes, threads);
  const int64_t enough = 2 * ((threads + plan.planes - 1) / plan.planes);
  return plan.planes >= 4 * threads ? 1 : std::min({even, enough, plan.rows.size});
}

// What the backward pass adds to or writes.
struct Gradients {
  at::Tensor query, key, value;
  bool add_to_query;
  at::Tensor slopes;  // (d, 2) float64
  at::Tensor factor;  // (1,) float64
};

template <typename S, typename T>
void run_backward(const Attention& attention, const at::Tensor& grad, const at::Tensor& lse,
                  double factor, const Gradients& gradients) {
  const auto kernel = kernels<S, T>();
  const Plan plan = attention.plan<T>(kernel.lanes);
  const int64_t blocks = row_blocks(plan);
  const int64_t tasks = plan.planes * blocks;
  const bool with_slopes = attention.slopes.defined();
  // Sums of each task, added up in one order whichever thread had it.
  std::vector<double> slope_sums(with_slopes ? tasks * plan.dim * 2 : 0);
  std::vector<double> factor_sums(tasks);
  const BackwardArgs args{as_map(grad),
                          as_map(attention.query),
                          as_map(attention.key),
                          as_map(attention.value),
                          lse_as_map(lse),
                          data_or_null(attention.slopes),
                          factor,
                          as_target(gradients.query, gradients.add_to_query),
                          as_target(gradients.key, true),
                          as_target(gradients.value, true),
                          with_slopes ? slope_sums.data() : nullptr,
                          factor_sums.data()};
  const int64_t bytes = kernel.scratch_bytes(plan, true);
  const int64_t height = plan.rows.size;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks;
      kernel.backward(plan, args, task / blocks, task, block * height / blocks,
                      (block + 1) * height / blocks, scratch.arena());
    }
  });
  double* slopes = gradients.slopes.mutable_data_ptr<double>();
  for (size_t i = 0; i < slope_sums.size(); ++i) {
    slopes[i % (plan.dim * 2)] += slope_sums[i];
  }
  *gradients.factor.mutable_data_ptr<double>() =
      std::accumulate(factor_sums.begin(), factor_sums.end(), 0.);
}

void run_backward(const Attention& attention, const at::Tensor& grad, const at::Tensor& lse,
                  double factor, const Gradients& gradients) {
  check_same(grad, "grad", attention.query.sizes(), attention.dtype());
  check_same(lse, "lse", attention.lse_shape(), attention.sum_dtype());
  if (attention.query.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, attention.dtype(), "local_attention", [&] {
          using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
          run_backward<scalar_t, compute_t>(attention, grad, lse, factor, gradients);
        });
  }
}

Gradients make_gradients(const Attention& attention, const at::Tensor& query,
                         const at::Tensor& key, const at::Tensor& value, bool add_to_query) {
  const auto sums = attention.query.options().dtype(at::kDouble);
  return {query, key, value, add_to_query, at::zeros({attention.query.size(2), 2}, sums),
          at::zeros({1}, sums)};
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& key,
                                           const at::Tensor& value, int64_t kernel_size,
                                           int64_t stride, int64_t dilation, double scale) {
  const Attention attention(query, key, value, std::nullopt, kernel_size, stride, dilation, scale);
  at::Tensor output = at::empty(query.sizes(), query.options());
  at::Tensor lse = run_forward(attention, at::Tensor(), output, false);
  return {output, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& lse, int64_t kernel_size, int64_t stride,
    int64_t dilation, double scale) {
  const Attention attention(query, key, value, std::nullopt, kernel_size, stride, dilation, scale);
  // Sums over many queries: half precision would lose most of them.
  const auto sums = key.options().dtype(attention.sum_dtype());
  const Gradients gradients =
      make_gradients(attention, at::empty(query.sizes(), query.options()),
                     at::zeros(key.sizes(), sums), at::zeros(key.sizes(), sums), false);
  run_backward(attention, grad, lse, 1., gradients);
  const auto dtype = query.scalar_type();
  return {gradients.query, gradients.key.to(dtype), gradients.value.to(dtype)};
}

void check_target(const at::Tensor& target, const char* name, const at::Tensor& like,
                  at::ScalarType dtype) {
  check_same(target, name, like.sizes(), dtype);
  TORCH_CHECK(target.stride(4) == 1 || target.size(4) == 1, name, " must have adjacent columns");
}

at::Tensor forward_add_(const at::Tensor& output, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const at::Tensor& slopes,
                        const at::Tensor& factor, int64_t kernel_size, int64_t stride,
                        int64_t dilation, double scale) {
  const Attention attention(query, key, value, slopes, kernel_size, stride, dilation, scale);
  check_target(output, "output", query, query.scalar_type());
  check_same(factor, "factor", {query.size(1), query.size(2)}, factor.scalar_type());
  return run_forward(attention, factor.to(attention.sum_dtype()).contiguous(), output, true);
}

std::tuple<at::Tensor, at::Tensor> backward_add_(
    const at::Tensor& grad_query, const at::Tensor& grad_key, const at::Tensor& grad_value,
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& slopes, double factor, const at::Tensor& lse,
    int64_t kernel_size, int64_t stride, int64_t dilation, double scale) {
  const Attention attention(query, key, value, slopes, kernel_size, stride, dilation, scale);
  check_target(grad_query, "grad_query", query, query.scalar_type());
  check_target(grad_key, "grad_key", key, attention.sum_dtype());
  check_target(grad_value, "grad_value", key, attention.sum_dtype());
  const Gradients gradients = make_gradients(attention, grad_query, grad_key, grad_value, true);
  run_backward(attention, grad, lse, factor, gradients);
  return {gradients.slopes, gradients.factor};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(acmix_mm, m) {
  m.def(
      "local_attention_native_forward(Tensor query, Tensor key, Tensor value, int kernel_size, "
      "int stride, int dilation, float scale) -> (Tensor, Tensor)");
  m.def(
      "local_attention_native_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
      "Tensor lse, int kernel_size, int stride, int dilation, float scale) "
      "-> (Tensor, Tensor, Tensor)");
  // As parts of a larger operator: keys less slopes . (x, y) of their position, results times
  // factor (by head and channel, or one for all) and added to what is there. Backward also returns
  // the gradients of slopes and factor, in float64.
  m.def(
      "local_attention_native_forward_add_(Tensor(a!) output, Tensor query, Tensor key, "
      "Tensor value, Tensor slopes, Tensor factor, int kernel_size, int stride, int dilation, "
      "float scale) -> Tensor");
  m.def(
      "local_attention_native_backward_add_(Tensor(a!) grad_query, Tensor(b!) grad_key, "
      "Tensor(c!) grad_value, Tensor grad, Tensor query, Tensor key, Tensor value, Tensor slopes, "
      "float factor, Tensor lse, int kernel_size, int stride, int dilation, float scale) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(acmix_mm, CPU, m) {
  m.impl("local_attention_native_forward", &forward);
  m.impl("local_attention_native_backward", &backward);
  m.impl("local_attention_native_forward_add_", &forward_add_);
  m.impl("local_attention_native_backward_add_", &backward_add_);
}

}  // namespace acmix_mm
