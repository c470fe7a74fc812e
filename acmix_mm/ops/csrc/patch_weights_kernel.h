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

// Adds the products of one input with the weights of some output channels.
template <int outputs, typename T>
INLINE void add_input(Vec<T> (&sums)[outputs], Vec<T> value, T mean, T factor, T shift,
                      const T* weight) {
  value = (value - mean) * factor + shift;
  value = value < T(0) ? Vec<T>{} : value;  // NaN stays, as in PyTorch
  UNROLL
  for (int o = 0; o < outputs; ++o) {
    sums[o] += value * weight[o];
  }
}

// Some output channels of a vector of pixels: the query and the whole patch, channel by channel.
template <int outputs, bool full, typename T>
void sum_patch(const PatchPlan& plan, const PatchInputs<T>& inputs, const T* query,
               const T* corner, int64_t count, int64_t output, T* to) {
  Vec<T> sums[outputs] = {};
  const T *mean = inputs.mean, *factor = inputs.factor, *shift = inputs.shift;
  const T* weight = inputs.weight + output;
  const auto add = [&](const T* from, int64_t stride) __attribute__((always_inline)) {
    add_input<outputs, T>(sums, load_steps<full>(from, stride, count), *mean++, *factor++,
                          *shift++, weight);
    weight += plan.outputs;
  };
  for (int64_t channel = 0; channel < plan.channels; ++channel) {
    add(query + channel * plan.pixels, 1);
  }
  for (int64_t channel = 0; channel < plan.channels; ++channel) {
    for (int64_t i = 0; i < plan.kernel; ++i) {
      const T* row = corner + channel * plan.plane + i * plan.dilation * plan.width;
      for (int64_t j = 0; j < plan.kernel; ++j) {
        add(row + j * plan.dilation, plan.stride);
      }
    }
  }
  for (int o = 0; o < outputs; ++o) {
    write<T, T>(to + o * plan.pixels, sums[o], count);
  }
}

template <bool full, typename T>
void sum_outputs(const PatchPlan& plan, const PatchInputs<T>& inputs, const T* query,
                 const T* corner, int64_t count, T* to) {
  int64_t output = 0;
  const auto next = [&](auto outputs) {
    constexpr int number = decltype(outputs)::value;
    for (; plan.outputs - output >= number; output += number) {
      sum_patch<number, full>(plan, inputs, query, corner, count, output,
                              to + output * plan.pixels);
    }
  };
  next(std::integral_constant<int, kOutputs>{});
  next(std::integral_constant<int, 8>{});
  next(std::integral_constant<int, 4>{});
  next(std::integral_constant<int, 1>{});
}

// Rows [begin, end) of all images' outputs.
template <typename T>
void sum_rows(const PatchPlan& plan, const PatchInputs<T>& inputs, T* out, int64_t begin,
              int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / plan.rows, y = task % plan.rows;
    const T* query = inputs.query + image * plan.channels * plan.pixels + y * plan.cols;
    const T* from =
        inputs.padded + image * plan.channels * plan.plane + y * plan.stride * plan.width;
    T* to = out + image * plan.outputs * plan.pixels + y * plan.cols;
    int64_t x = 0;
    for (; x + lanes <= plan.cols; x += lanes) {
      sum_outputs<true>(plan, inputs, query + x, from + x * plan.stride, lanes, to + x);
    }
    if (x < plan.cols) {
      sum_outputs<false>(plan, inputs, query + x, from + x * plan.stride, plan.cols - x, to + x);
    }
  }
}

// The backward pass takes the inputs in strips: the channels of the query some at a time, and of
// each channel of the key the rows of the patch. Chunks of pixels of a strip are copied out side by
// side, so that all is products of small matrices. A strip's gradients are nobody else's: nothing
// is shared among threads, and sums have one order.
constexpr int kTileTaps = kBytes == 64 ? 7 : 3;
constexpr int kTileVectors = kBytes == 64 ? 2 : 3;
constexpr int kTileOutputs = kBytes == 64 ? 4 : 3;
constexpr int64_t kChunk = 256;        // pixels
constexpr int64_t kChunkPitch = 272;   // an odd number of cache lines, of floats
constexpr int64_t kChunks = 32;        // whose sums are added up before they go to double precision
constexpr int64_t kQueryTaps = 7;

// Scratch of one thread; T values are by tap of a strip and pixel of a chunk.
template <typename T>
struct PatchScratch {
  T *values;    // less their mean
  T *rectified;
  T *grads;     // of the values
  T *grad;      // by output and pixel of a chunk
  T *weight_sums, *factor_sums, *shift_sums;  // vectors, by tap of a task (and output)
  double* totals;                             // by tap of a task: outputs, factor, shift

  static PatchScratch lay_out(Arena& arena, const PatchPlan& plan) {
    PatchScratch scratch;
    constexpr int lanes = Simd<T>::lanes;
    const int64_t strip = std::max(plan.kernel, kQueryTaps) * kChunkPitch;
    const int64_t taps = std::max(plan.patch(), kQueryTaps);
    scratch.values = arena.take<T>(strip);
    scratch.rectified = arena.take<T>(strip);
    scratch.grads = arena.take<T>(strip);
    scratch.grad = arena.take<T>(plan.outputs * kChunkPitch);
    scratch.weight_sums = arena.take<T>(taps * plan.outputs * lanes);
    scratch.factor_sums = arena.take<T>(taps * lanes);
    scratch.shift_sums = arena.take<T>(taps * lanes);
    scratch.totals = arena.take<double>(taps * (plan.outputs + 2));
    return scratch;
  }
};

template <typename T>
int64_t patch_scratch_bytes(const PatchPlan& plan) {
  Arena arena;
  PatchScratch<T>::lay_out(arena, plan);
  return arena.used;
}

// Taps of a strip: where the first is of pixel 0 of the first image, and steps from there.
struct Strip {
  int64_t taps, first, from, by_tap, by_row, by_col, by_image;
  int64_t input;  // of the first tap
};

// Calls visit(offset of the first pixel in the map, in the chunk, number of pixels) for the parts
// of rows that pixels [begin, begin + count) are.
template <typename Visit>
INLINE void for_each_piece(const PatchPlan& plan, const Strip& strip, int64_t begin,
                           int64_t count, Visit visit) {
  int64_t y = begin / plan.cols, x = begin % plan.cols;
  for (int64_t n = 0; n < count; ++y, x = 0) {
    const int64_t piece = std::min(plan.cols - x, count - n);
    visit(y * strip.by_row + x * strip.by_col, n, piece);
    n += piece;
  }
}

template <typename T>
INLINE void add_row(T* to, const T* from, int64_t count) {
  typedef T Quad __attribute__((vector_size(16)));
  constexpr int lanes = Simd<T>::lanes, quad = 16 / sizeof(T);
  int64_t x = 0;
  for (; x + lanes <= count; x += lanes) {
    store<T>(to + x, load(to + x) + load(from + x));
  }
  for (; x + quad <= count; x += quad) {
    Quad sum, add;
    __builtin_memcpy(&sum, to + x, sizeof(sum));
    __builtin_memcpy(&add, from + x, sizeof(add));
    sum += add;
    __builtin_memcpy(to + x, &sum, sizeof(sum));
  }
  for (; x < count; ++x) {
    to[x] += from[x];
  }
}

// Copies a chunk of a strip out of the map `from`, and normalises it; zeros up to whole vectors.
template <typename T>
void gather_strip(const PatchPlan& plan, const PatchInputs<T>& inputs, const Strip& strip,
                  const T* from, int64_t begin, int64_t count, const PatchScratch<T>& scratch) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t j = 0; j < strip.taps; ++j, from += strip.by_tap) {
    T* values = scratch.values + j * kChunkPitch;
    T* rectified = scratch.rectified + j * kChunkPitch;
    for_each_piece(plan, strip, begin, count, [&](int64_t at, int64_t n, int64_t piece) {
      if (strip.by_col == 1) {
        copy_row<false>(values + n, from + at, piece);
        return;
      }
      for (int64_t i = 0; i < piece; ++i) {
        values[n + i] = from[at + i * strip.by_col];
      }
    });
    const int64_t input = strip.input + j;
    const T mean = inputs.mean[input], factor = inputs.factor[input], shift = inputs.shift[input];
    for (int64_t n = 0; n < count; n += lanes) {
      const Vec<T> value = load(values + n) - mean;
      const Vec<T> result = value * factor + shift;
      store<T>(values + n, value);
      store<T>(rectified + n, result < T(0) ? Vec<T>{} : result);
    }
    for (int64_t n = count; n % lanes != 0; ++n) {
      values[n] = T(0);
      rectified[n] = T(0);
    }
  }
}

// Gradients of J taps of a chunk from n on, V vectors; sums are those of the taps.
template <typename T, int J, int V>
INLINE void differentiate_tile(const T* grad, int64_t outputs, const T* weight, const T* factor,
                               const T* values, const T* rectified, T* grads, T* factor_sums,
                               T* shift_sums) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> sum[J][V] = {};
  for (int64_t o = 0; o < outputs; ++o, grad += kChunkPitch) {
    Vec<T> g[V];
    UNROLL
    for (int v = 0; v < V; ++v) {
      g[v] = load(grad + v * lanes);
      KEEP(g[v]);
    }
    UNROLL
    for (int j = 0; j < J; ++j) {
      UNROLL
      for (int v = 0; v < V; ++v) {
        sum[j][v] += g[v] * weight[j * outputs + o];
      }
    }
  }
  UNROLL
  for (int j = 0; j < J; ++j) {
    Vec<T> of_factor = load(factor_sums + j * lanes), of_shift = load(shift_sums + j * lanes);
    UNROLL
    for (int v = 0; v < V; ++v) {
      const int64_t at = j * kChunkPitch + v * lanes;
      const Vec<T> g = load(rectified + at) <= T(0) ? Vec<T>{} : sum[j][v];
      of_factor += g * load(values + at);
      of_shift += g;
      store<T>(grads + at, g * factor[j]);
    }
    store<T>(factor_sums + j * lanes, of_factor);
    store<T>(shift_sums + j * lanes, of_shift);
  }
}

// Adds the products of J taps with C outputs, summed over a chunk, to J x outputs vectors.
template <typename T, int J, int C>
INLINE void multiply_tile(const T* rectified, const T* grad, int64_t count, int64_t outputs,
                          T* sums) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> sum[J][C] = {};
  for (int64_t n = 0; n < count; n += lanes) {
    Vec<T> g[C];
    UNROLL
    for (int c = 0; c < C; ++c) {
      g[c] = load(grad + c * kChunkPitch + n);
      KEEP(g[c]);
    }
    UNROLL
    for (int j = 0; j < J; ++j) {
      Vec<T> r = load(rectified + j * kChunkPitch + n);
      KEEP(r);
      UNROLL
      for (int c = 0; c < C; ++c) {
        sum[j][c] += r * g[c];
      }
    }
  }
  UNROLL
  for (int j = 0; j < J; ++j) {
    UNROLL
    for (int c = 0; c < C; ++c) {
      T* to = sums + (j * outputs + c) * lanes;
      store<T>(to, load(to) + sum[j][c]);
    }
  }
}

// Both of a chunk, for J taps at a time from tap j of a strip on.
template <typename T, int J = kTileTaps>
void differentiate_taps(const PatchPlan& plan, const PatchInputs<T>& inputs, const Strip& strip,
                        int64_t count, const PatchScratch<T>& scratch, int64_t j = 0) {
  constexpr int lanes = Simd<T>::lanes;
  for (; j + J <= strip.taps; j += J) {
    const T* weight = inputs.weight + (strip.input + j) * plan.outputs;
    const T* factor = inputs.factor + strip.input + j;
    const int64_t row = j * kChunkPitch;
    T* factor_sums = scratch.factor_sums + (strip.first + j) * lanes;
    T* shift_sums = scratch.shift_sums + (strip.first + j) * lanes;
    int64_t n = 0;
    for (; n + (kTileVectors - 1) * lanes < count; n += kTileVectors * lanes) {
      differentiate_tile<T, J, kTileVectors>(
          scratch.grad + n, plan.outputs, weight, factor, scratch.values + row + n,
          scratch.rectified + row + n, scratch.grads + row + n, factor_sums, shift_sums);
    }
    for (; n < count; n += lanes) {
      differentiate_tile<T, J, 1>(scratch.grad + n, plan.outputs, weight, factor,
                                  scratch.values + row + n, scratch.rectified + row + n,
                                  scratch.grads + row + n, factor_sums, shift_sums);
    }
    T* sums = scratch.weight_sums + (strip.first + j) * plan.outputs * lanes;
    int64_t o = 0;
    for (; o + kTileOutputs <= plan.outputs; o += kTileOutputs) {
      multiply_tile<T, J, kTileOutputs>(scratch.rectified + row, scratch.grad + o * kChunkPitch,
                                        count, plan.outputs, sums + o * lanes);
    }
    for (; o < plan.outputs; ++o) {
      multiply_tile<T, J, 1>(scratch.rectified + row, scratch.grad + o * kChunkPitch, count,
                             plan.outputs, sums + o * lanes);
    }
  }
  if constexpr (J > 1) {
    if (j < strip.taps) {
      differentiate_taps<T, J - 1>(plan, inputs, strip, count, scratch, j);
    }
  }
}

// Adds the gradients of a chunk of a strip to those of the map `to`.
template <typename T>
void scatter_strip(const PatchPlan& plan, const Strip& strip, T* to, int64_t begin, int64_t count,
                   const PatchScratch<T>& scratch) {
  for (int64_t j = 0; j < strip.taps; ++j, to += strip.by_tap) {
    const T* grads = scratch.grads + j * kChunkPitch;
    for_each_piece(plan, strip, begin, count, [&](int64_t at, int64_t n, int64_t piece) {
      if (strip.by_col == 1) {
        add_row(to + at, grads + n, piece);
        return;
      }
      for (int64_t i = 0; i < piece; ++i) {
        to[at + i * strip.by_col] += grads[n + i];
      }
    });
  }
}

template <typename T>
INLINE void add_lanes(double* totals, T* vectors, int64_t count) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (int n = 0; n < lanes; ++n) {
      total += vectors[i * lanes + n];
    }
    totals[i] += total;
  }
  clear(vectors, count * lanes);
}

template <typename T>
void flush_sums(const PatchPlan& plan, int64_t taps, const PatchScratch<T>& scratch) {
  double* totals = scratch.totals;
  add_lanes(totals, scratch.weight_sums, taps * plan.outputs);
  add_lanes(totals + taps * plan.outputs, scratch.factor_sums, taps);
  add_lanes(totals + taps * (plan.outputs + 1), scratch.shift_sums, taps);
}

INLINE int64_t query_tasks(const PatchPlan& plan) {
  return (plan.channels + kQueryTaps - 1) / kQueryTaps;
}

// Of the backward pass.
inline int64_t patch_tasks(const PatchPlan& plan) { return query_tasks(plan) + plan.channels; }

// Tasks [begin, end): some channels of the query, or one of the key.
template <typename T>
void differentiate_patch(const PatchPlan& plan, const PatchInputs<T>& inputs,
                         const PatchGradients<T>& gradients, int64_t begin, int64_t end,
                         Arena arena) {
  const auto scratch = PatchScratch<T>::lay_out(arena, plan);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t key = task - query_tasks(plan);
    const bool of_query = key < 0;
    const T* map = of_query ? inputs.query : inputs.padded;
    T* to = of_query ? gradients.query : gradients.padded;
    // The first strip of the task, of a key's channel the first row of the patch.
    Strip strip{plan.kernel, 0,           key * plan.plane, plan.dilation, plan.stride * plan.width,
                plan.stride, plan.channels * plan.plane, plan.channels + key * plan.patch()};
    if (of_query) {
      const int64_t channel = task * kQueryTaps;
      strip = {std::min(kQueryTaps, plan.channels - channel),
               0,
               channel * plan.pixels,
               plan.pixels,
               plan.cols,
               1,
               plan.channels * plan.pixels,
               channel};
    }
    const int64_t strips = of_query ? 1 : plan.kernel;
    const int64_t taps = strips * strip.taps;
    int64_t chunks = 0;
    for (int64_t image = 0; image < plan.batch; ++image) {
      for (int64_t pixel = 0; pixel < plan.pixels; pixel += kChunk) {
        const int64_t count = std::min(kChunk, plan.pixels - pixel);
        const T* grad = gradients.grad + image * plan.outputs * plan.pixels + pixel;
        for (int64_t o = 0; o < plan.outputs; ++o) {
          T* row = scratch.grad + o * kChunkPitch;
          copy_row<false>(row, grad + o * plan.pixels, count);
          clear(row + count, round_up(count, Simd<T>::lanes) - count);
        }
        Strip next = strip;
        for (int64_t i = 0; i < strips; ++i) {
          const int64_t at = next.from + image * next.by_image;
          gather_strip(plan, inputs, next, map + at, pixel, count, scratch);
          differentiate_taps<T>(plan, inputs, next, count, scratch);
          scatter_strip(plan, next, to + at, pixel, count, scratch);
          next.first += next.taps;
          next.input += next.taps;
          next.from += plan.dilation * plan.width;
        }
        if (++chunks % kChunks == 0) {
          flush_sums(plan, taps, scratch);
        }
      }
    }
    flush_sums(plan, taps, scratch);
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t input = strip.input + t;
      for (int64_t o = 0; o < plan.outputs; ++o) {
        gradients.weight[input * plan.outputs + o] =
            static_cast<T>(scratch.totals[t * plan.outputs + o]);
      }
      gradients.factor[input] = static_cast<T>(scratch.totals[taps * plan.outputs + t]);
      gradients.shift[input] = static_cast<T>(scratch.totals[taps * (plan.outputs + 1) + t]);
    }
    clear(scratch.totals, taps * (plan.outputs + 2));
  }
}

}  // namespace
}  // namespace KERNEL_ISA
}  // namespace acmix_mm
