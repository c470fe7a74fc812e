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

Target as_target(const at::Tensor& tensor, int64_t first_row, bool add) {
  Target target{row_zero(tensor.mutable_data_ptr(), tensor, 3, first_row), {}, add};
  std::copy_n(tensor.strides().begin(), tensor.dim(), target.strides);
  return target;
}

// As if it had channels.
at::Tensor with_channels(const at::Tensor& lse, int64_t dim) {
  return lse.unsqueeze(2).expand({-1, -1, dim, -1, -1});
}

const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

struct Axes {
  Axis rows, cols;
};

// Tensors may hold some rows of a map: the whole one's height, and the first rows that query and
// key have.
struct Strip {
  int64_t height, query, key;
};

Axes check_inputs(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const Strip& strip, int64_t kernel_size, int64_t stride, int64_t dilation) {
  TORCH_CHECK(kernel_size > 0 && kernel_size % 2 == 1 && kernel_size <= kMaxKernel,
              "kernel_size must be odd, positive and at most ", kMaxKernel, ", got ", kernel_size);
  TORCH_CHECK(stride > 0 && dilation > 0, "stride and dilation must be positive, got ", stride,
              " and ", dilation);
  TORCH_CHECK(key.dim() == 5, "key must have 5 dimensions, got shape ", key.sizes());
  for (int64_t dim = 1; dim < 5; ++dim) {
    TORCH_CHECK(key.size(dim) > 0, "key must have N, d, H, W >= 1, got shape ", key.sizes());
  }
  check_same(key, "key", key.sizes(), query.scalar_type());
  TORCH_CHECK(strip.key >= 0 && strip.height <= kMaxElements &&
                  strip.key <= strip.height - key.size(3),
              "key must have rows of a map of ", strip.height, ", got ", key.size(3),
              " from row ", strip.key, " on");
  const Axes axes{Axis(strip.height, kernel_size, stride, dilation),
                  Axis(key.size(4), kernel_size, stride, dilation)};
  check_same(value, "value", key.sizes(), query.scalar_type());
  TORCH_CHECK(query.dim() == 5, "query must have 5 dimensions, got shape ", query.sizes());
  TORCH_CHECK(strip.query >= 0 && strip.query <= axes.rows.queries - query.size(3),
              "query must have rows of ", axes.rows.queries, ", got ", query.size(3),
              " from row ", strip.query, " on");
  check_same(query, "query",
             {key.size(0), key.size(1), key.size(2), query.size(3), axes.cols.queries},
             query.scalar_type());
  return axes;
}

// What one call computes: neighbourhood attention of keys less slopes . (x, y), times factor.
struct Attention {
  at::Tensor query, key, value;
  at::Tensor query_bias;  // (N, d), contiguous and of the compute type, or undefined
  at::Tensor slopes;      // (d, 2), likewise
  Strip strip;
  Axes axes;
  double scale;

  Attention(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_,
            const std::optional<at::Tensor>& query_bias_,
            const std::optional<at::Tensor>& slopes_, const Strip& strip_, int64_t kernel_size,
            int64_t stride, int64_t dilation, double scale_)
      : query(query_),
        key(key_),
        value(value_),
        strip(strip_),
        axes(check_inputs(query_, key_, value_, strip_, kernel_size, stride, dilation)),
        scale(scale_) {
    if (query_bias_.has_value()) {
      check_same(*query_bias_, "query_bias", {key.size(1), key.size(2)},
                 query_bias_->scalar_type());
      query_bias = query_bias_->to(compute_type(query.scalar_type())).contiguous();
    }
    if (slopes_.has_value()) {
      check_same(*slopes_, "slopes", {key.size(2), 2}, slopes_->scalar_type());
      slopes = slopes_->to(compute_type(query.scalar_type())).contiguous();
    }
  }

  // Of whole maps.
  Attention(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_,
            int64_t kernel_size, int64_t stride, int64_t dilation, double scale_)
      : Attention(query_, key_, value_, std::nullopt, std::nullopt,
                  {key_.dim() == 5 ? key_.size(3) : 0, 0, 0},
                  kernel_size, stride, dilation, scale_) {
    TORCH_CHECK(query.size(3) == axes.rows.queries, "query must have ", axes.rows.queries,
                " rows, got ", query.size(3));
  }

  at::ScalarType dtype() const { return query.scalar_type(); }

  at::ScalarType sum_dtype() const { return compute_type(dtype()); }

  std::vector<int64_t> lse_shape() const {
    return {query.size(0), query.size(1), query.size(3), query.size(4)};
  }

  template <typename T>
  Plan plan(int64_t lanes) const {
    const Plan plan(query.size(0) * query.size(1), query.size(1), query.size(2), scale, axes.rows,
                    axes.cols, strip.query, strip.query + query.size(3), lanes, 64 / sizeof(T));
    if (key.size(3) < strip.height) {
      for (const Group& group : plan.groups) {
        const int64_t first = group.first * plan.rows.step;
        const int64_t rows = plan.rows.kernel + (group.count - 1) * plan.rows.step;
        for (int64_t row = first; row < first + rows; ++row) {
          const int64_t y = plan.rows.key(group.phase, row);
          TORCH_CHECK(strip.key <= y && y < strip.key + key.size(3), "key must have row ", y,
                      ", got ", key.size(3), " rows from row ", strip.key, " on");
        }
      }
    }
    return plan;
  }
};

template <typename S, typename T>
void run_forward(const Attention& attention, const at::Tensor& factor, const Target& output,
                 const at::Tensor& lse) {
  const auto kernel = kernels<S, T>();
  const Plan plan = attention.plan<T>(kernel.lanes);
  const Strip& strip = attention.strip;
  const ForwardArgs args{as_map(attention.query, 3, strip.query),
                         as_map(attention.key, 3, strip.key),
                         as_map(attention.value, 3, strip.key),
                         data_or_null(attention.query_bias),
                         data_or_null(attention.slopes),
                         data_or_null(factor),
                         output,
                         as_target(with_channels(lse, attention.query.size(2)), strip.query,
                                   false)};
  const int64_t bytes = kernel.scratch_bytes(plan, false);
  const int64_t groups = static_cast<int64_t>(plan.groups.size());
  at::parallel_for(0, plan.planes * groups, 1, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(bytes);
    kernel.forward(plan, args, begin, end, scratch.arena());
  });
}

// The result goes to output, times factor, and one log-sum-exp a query and head to lse.
void run_forward(const Attention& attention, const at::Tensor& factor, const at::Tensor& output,
                 bool add, const at::Tensor& lse) {
  if (output.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, attention.dtype(), "local_attention", [&] {
          using compute_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
          run_forward<scalar_t, compute_t>(
              attention, factor, as_target(output, attention.strip.query, add), lse);
        });
  }
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
  const int64_t blocks = row_blocks(plan, attention.key.size(3));
  const int64_t tasks = plan.planes * blocks;
  const bool with_slopes = attention.slopes.defined();
  // Sums of each task, added up in one order whichever thread had it.
  std::vector<double> slope_sums(with_slopes ? tasks * plan.dim * 2 : 0);
  std::vector<double> factor_sums(tasks);
  const Strip& strip = attention.strip;
  const BackwardArgs args{as_map(grad, 3, strip.query),
                          as_map(attention.query, 3, strip.query),
                          as_map(attention.key, 3, strip.key),
                          as_map(attention.value, 3, strip.key),
                          as_map(with_channels(lse, plan.dim), 3, strip.query),
                          data_or_null(attention.query_bias),
                          data_or_null(attention.slopes),
                          factor,
                          as_target(gradients.query, strip.query, gradients.add_to_query),
                          as_target(gradients.key, strip.key, true),
                          as_target(gradients.value, strip.key, true),
                          with_slopes ? slope_sums.data() : nullptr,
                          factor_sums.data()};
  const int64_t bytes = kernel.scratch_bytes(plan, true);
  const int64_t rows = attention.key.size(3);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const ScratchMemory scratch(bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks;
      kernel.backward(plan, args, task / blocks, task, strip.key + block * rows / blocks,
                      strip.key + (block + 1) * rows / blocks, scratch.arena());
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
  const Attention attention(query, key, value, kernel_size, stride, dilation, scale);
  at::Tensor output = at::empty(query.sizes(), query.options());
  at::Tensor lse =
      at::empty(attention.lse_shape(), query.options().dtype(attention.sum_dtype()));
  run_forward(attention, at::Tensor(), output, false, lse);
  return {output, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& lse, int64_t kernel_size, int64_t stride,
    int64_t dilation, double scale) {
  const Attention attention(query, key, value, kernel_size, stride, dilation, scale);
  // Sums over many queries: half precision would lose most of them.
  const auto sums = key.options().dtype(attention.sum_dtype());
  const Gradients gradients =
      make_gradients(attention, at::empty(query.sizes(), query.options()),
                     at::zeros(key.sizes(), sums), at::zeros(key.sizes(), sums), false);
  run_backward(attention, grad, lse, 1., gradients);
  const auto dtype = query.scalar_type();
  return {gradients.query, gradients.key.to(dtype), gradients.value.to(dtype)};
}

void check_target(const at::Tensor& target, const char* name, at::IntArrayRef shape,
                  at::ScalarType dtype) {
  check_same(target, name, shape, dtype);
  TORCH_CHECK(target.stride(-1) == 1 || target.size(-1) == 1, name, " must have adjacent columns");
}

void forward_add_(const at::Tensor& output, const at::Tensor& lse, const at::Tensor& query,
                  const std::optional<at::Tensor>& query_bias, const at::Tensor& key,
                  const at::Tensor& value, const at::Tensor& slopes, const at::Tensor& factor, int64_t kernel_size, int64_t stride, int64_t dilation,
                  double scale, int64_t height, int64_t first_query, int64_t first_key) {
  const Attention attention(query, key, value, query_bias, slopes, {height, first_query, first_key},
                            kernel_size, stride, dilation, scale);
  check_target(output, "output", query.sizes(), query.scalar_type());
  check_target(lse, "lse", attention.lse_shape(), attention.sum_dtype());
  check_same(factor, "factor", {query.size(1), query.size(2)}, factor.scalar_type());
  run_forward(attention, factor.to(attention.sum_dtype()).contiguous(), output, true, lse);
}

std::tuple<at::Tensor, at::Tensor> backward_add_(
    const at::Tensor& grad_query, const at::Tensor& grad_key, const at::Tensor& grad_value,
    const at::Tensor& grad, const at::Tensor& query, const std::optional<at::Tensor>& query_bias,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& slopes, double factor, const at::Tensor& lse,
    int64_t kernel_size, int64_t stride, int64_t dilation, double scale, int64_t height,
    int64_t first_query, int64_t first_key) {
  const Attention attention(query, key, value, query_bias, slopes, {height, first_query, first_key},
                            kernel_size, stride, dilation, scale);
  check_target(grad_query, "grad_query", query.sizes(), query.scalar_type());
  check_target(grad_key, "grad_key", key.sizes(), attention.sum_dtype());
  check_target(grad_value, "grad_value", key.sizes(), attention.sum_dtype());
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
  // As parts of a larger operator: queries plus a bias, keys less slopes . (x, y) of their position,
  // results times factor (by head and channel, or one for all) and added to what is there. Backward
  // also returns the gradients of slopes and factor, in float64. Tensors may be some rows of a map
  // of `height` rows: those of queries from `first_query` on, those of keys from `first_key` on.
  m.def(
      "local_attention_native_forward_add_(Tensor(a!) output, Tensor(b!) lse, Tensor query, "
      "Tensor? query_bias, Tensor key, Tensor value, Tensor slopes, Tensor factor, "
      "int kernel_size, int stride, int dilation, float scale, int height, int first_query, "
      "int first_key) -> ()");
  m.def(
      "local_attention_native_backward_add_(Tensor(a!) grad_query, Tensor(b!) grad_key, "
      "Tensor(c!) grad_value, Tensor grad, Tensor query, Tensor? query_bias, Tensor key, "
      "Tensor value, Tensor slopes, float factor, Tensor lse, int kernel_size, int stride, int dilation, float scale, "
      "int height, int first_query, int first_key) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(acmix_mm, CPU, m) {
  m.impl("local_attention_native_forward", &forward);
  m.impl("local_attention_native_backward", &backward);
  m.impl("local_attention_native_forward_add_", &forward_add_);
  m.impl("local_attention_native_backward_add_", &backward_add_);
}

}  // namespace acmix_mm
