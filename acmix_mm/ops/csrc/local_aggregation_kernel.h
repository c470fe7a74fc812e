// Kernels of the aggregation for one instruction set. No include guard: the file is included once
// per instruction set, by for_each_isa.h.
//
// They are parts of neighbourhood attention: the sum of values by weights, and its two adjoints.

#include "local_attention_kernel.h"

namespace acmix_mm {
namespace KERNEL_ISA {
namespace {

// Scratch of one thread.
template <typename T>
struct AggregationScratch {
  T* ring;     // packed rows of values, or of their gradients
  T** rows;    // rows of the group at hand, in the ring
  T* grad;     // packed rows of a group's output gradients
  T* weights;  // by offset and output of a group; zeros past the ends of rows
  const T** taps;    // every value of output 0 of the group at hand, row by row
  int64_t* reached;

  static AggregationScratch lay_out(Arena& arena, const Plan& plan) {
    AggregationScratch scratch;
    const int64_t rows = plan.group_rows * plan.query_pitch;
    scratch.ring = arena.take<T>(plan.ring_rows * plan.dim * plan.key_pitch);
    scratch.rows = arena.take<T*>(plan.ring_rows);
    scratch.grad = arena.take<T>(rows * plan.dim);
    scratch.weights = arena.take<T>(rows * plan.rows.kernel * plan.cols.kernel);
    scratch.taps = arena.take<const T*>(plan.ring_rows * plan.cols.kernel);
    scratch.reached = arena.take<int64_t>(plan.cols.kernel);
    return scratch;
  }
};

template <typename T>
int64_t aggregation_scratch_bytes(const Plan& plan) {
  Arena arena;
  AggregationScratch<T>::lay_out(arena, plan);
  return arena.used;
}

template <typename T>
INLINE void clear_blanks(const Plan& plan, T* row) {
  for (int64_t c = 0; c < plan.dim; ++c, row += plan.key_pitch) {
    for (const int64_t blank : plan.blanks) {
      row[blank] = T(0);
    }
  }
}

template <typename T>
INLINE T* ring_row(const Plan& plan, int64_t row, const AggregationScratch<T>& scratch) {
  return scratch.ring + row % plan.ring_rows * plan.dim * plan.key_pitch;
}

// Packs the value rows of a group that the ring does not hold yet, and lists all of the group's.
template <typename S, typename T>
void fill_ring(const Plan& plan, const Map& value, int64_t plane, const Group& group,
               Window& window, const AggregationScratch<T>& scratch) {
  const int64_t begin = group.first * plan.rows.step;
  const int64_t end = begin + plan.rows.kernel + (group.count - 1) * plan.rows.step;
  for (int64_t row = begin; row < begin + plan.ring_rows; ++row) {
    T* to = ring_row(plan, row, scratch);
    scratch.rows[row - begin] = to;
    if (row >= end || window.holds(plane, group.phase, row)) {
      continue;
    }
    const int64_t y = plan.rows.key(group.phase, row);
    if (y < 0) {
      clear(to, plan.dim * plan.key_pitch);
    } else {
      pack_key<S, T>(plan, value, nullptr, plane, y, nullptr, to);
      clear_blanks(plan, to);
    }
  }
  window = {plane, group.phase, begin, end};
}

// Calls visit(row of the map, packed row) for each offset and row of a group's weights, in the
// order of memory.
template <typename S, typename T, typename Maps, typename Visit>
INLINE void for_each_weight_row(const Plan& plan, const Maps& map, int64_t plane,
                                const Group& group, T* weights, Visit visit) {
  const int64_t offsets = plan.rows.kernel * plan.cols.kernel;
  auto* from = plane_of<S>(map, plan, plane) + plan.query_row(group, 0) * map.strides[3];
  for (int64_t o = 0; o < offsets; ++o, from += map.strides[2]) {
    for (int64_t r = 0; r < group.count; ++r) {
      visit(from + r * plan.rows.phases * map.strides[3],
            weights + (r * offsets + o) * plan.query_pitch + plan.margin);
    }
  }
}

template <typename S, typename T>
void pack_weights(const Plan& plan, const Map& map, int64_t plane, const Group& group,
                  T* weights) {
  const int64_t step = map.strides[4], count = plan.cols.queries;
  for_each_weight_row<S>(plan, map, plane, group, weights, [&](const S* from, T* to) {
    if (step == 1) {
      for (int64_t x = 0; x < count; ++x) {
        to[x] = static_cast<T>(from[x]);
      }
    } else {
      for (int64_t x = 0; x < count; ++x) {
        to[x] = static_cast<T>(from[x * step]);
      }
    }
  });
}

template <typename S, typename T>
void unpack_weights(const Plan& plan, const Target& target, int64_t plane, const Group& group,
                    T* weights) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t count = plan.cols.queries;
  for_each_weight_row<S>(plan, target, plane, group, weights, [&](S* to, const T* from) {
    for (int64_t x = 0; x < count; x += lanes) {
      write<S, T>(to + x, load(from + x), count - x);
    }
  });
}

template <typename S, typename T>
void pack_grad(const Plan& plan, const Map& grad, int64_t plane, const Group& group, T* to) {
  for (int64_t r = 0; r < group.count; ++r, to += plan.dim * plan.query_pitch) {
    pack_query<S, T>(plan, grad, nullptr, plane, plan.query_row(group, r), T(1), to);
  }
}

template <typename S, typename T>
void aggregate_group(const Plan& plan, const AggregationArgs& args, int64_t plane,
                     const Group& group, const AggregationScratch<T>& scratch) {
  const int64_t weight_row = plan.rows.kernel * plan.cols.kernel * plan.query_pitch;
  TargetRows<S, T> out{{}, args.out.strides[2], false, nullptr};
  for (int64_t r = 0; r < group.count; ++r) {
    out.row[r] =
        plane_of<S>(args.out, plan, plane) + plan.query_row(group, r) * args.out.strides[3];
  }
  Vec<T> factor[kMaxRows];
  std::fill_n(factor, kMaxRows, T(1) - Vec<T>{});
  list_taps(plan, scratch.rows, scratch.taps);
  for (int64_t x = 0; x < plan.cols.queries; x += Simd<T>::lanes) {
    write_sums<S, T>(plan, group.count, scratch.taps, x, scratch.weights + plan.margin + x,
                     weight_row, plan.query_pitch, factor, out);
  }
}

// Groups [begin, end) of all planes' groups.
template <typename S, typename T>
void aggregate(const Plan& plan, const AggregationArgs& args, int64_t begin, int64_t end,
               Arena arena) {
  const auto scratch = AggregationScratch<T>::lay_out(arena, plan);
  const int64_t groups = static_cast<int64_t>(plan.groups.size());
  Window window;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t plane = i / groups;
    const Group& group = plan.groups.data()[i % groups];
    fill_ring<S>(plan, args.value, plane, group, window, scratch);
    pack_weights<S>(plan, args.weight, plane, group, scratch.weights);
    aggregate_group<S, T>(plan, args, plane, group, scratch);
  }
}

// Likewise, products of output gradients with neighbourhoods.
template <typename S, typename T>
void differentiate_weights(const Plan& plan, const GradWeightArgs& args, int64_t begin,
                           int64_t end, Arena arena) {
  const auto scratch = AggregationScratch<T>::lay_out(arena, plan);
  const auto dot = plan.unit ? dot_block<T, true> : dot_block<T, false>;
  const int64_t groups = static_cast<int64_t>(plan.groups.size());
  const int64_t weight_row = plan.rows.kernel * plan.cols.kernel * plan.query_pitch;
  Window window;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t plane = i / groups;
    const Group& group = plan.groups.data()[i % groups];
    fill_ring<S>(plan, args.value, plane, group, window, scratch);
    pack_grad<S>(plan, args.grad, plane, group, scratch.grad);
    for (int64_t x = 0; x < plan.cols.queries; x += Simd<T>::lanes) {
      dot(plan, group.count, scratch.grad, scratch.rows, x, scratch.weights + plan.margin + x,
          weight_row, plan.query_pitch);
    }
    unpack_weights<S>(plan, args.grad_weight, plane, group, scratch.weights);
  }
}

// Adds the gradient rows before `until` to the rows [begin, end) of the map, and clears them.
template <typename T>
void flush_ring(const Plan& plan, const Target& target, int64_t until, int64_t begin, int64_t end,
                Window& window, const AggregationScratch<T>& scratch) {
  for (; window.begin < window.end && window.begin < until; ++window.begin) {
    T* row = ring_row(plan, window.begin, scratch);
    const int64_t y = plan.rows.key(window.phase, window.begin);
    if (begin <= y && y < end) {
      clear_blanks(plan, row);
      unpack_key(plan, row, window.plane, y, T(1), target);
    }
    clear(row, plan.dim * plan.key_pitch);
  }
}

// Gradients of value rows [begin, end) of a plane, see attention's backward().
template <typename S, typename T>
void differentiate_values(const Plan& plan, const GradValueArgs& args, int64_t plane,
                          int64_t begin, int64_t end, Arena arena) {
  const auto scratch = AggregationScratch<T>::lay_out(arena, plan);
  const int64_t weight_row = plan.rows.kernel * plan.cols.kernel * plan.query_pitch;
  Window window;
  for (const Group& group : plan.groups) {
    if (!reaches(plan, group, begin, end)) {
      continue;
    }
    const int64_t first = group.first * plan.rows.step;
    const bool continued = window.plane == plane && window.phase == group.phase;
    flush_ring(plan, args.grad_value, continued ? first : INT64_MAX, begin, end, window, scratch);
    window = {plane, group.phase, first,
              first + plan.rows.kernel + (group.count - 1) * plan.rows.step};
    pack_grad<S>(plan, args.grad, plane, group, scratch.grad);
    pack_weights<S>(plan, args.weight, plane, group, scratch.weights);
    for (int64_t u = 0; u < plan.ring_rows; ++u) {
      scratch.rows[u] = ring_row(plan, first + u, scratch);
    }
    for (int64_t r = 0; r < group.count; ++r) {
      const T* grad = scratch.grad + r * plan.dim * plan.query_pitch + plan.margin;
      const T* weights = scratch.weights + r * weight_row + plan.margin;
      for_each_seen<T>(plan, scratch.reached, [&](int64_t at, int64_t z, int64_t num_taps) {
        scatter_channels<T>(plan, scratch.rows + r * plan.rows.step, at, grad + z, weights + z,
                            num_taps, scratch.reached);
      });
    }
  }
  flush_ring(plan, args.grad_value, INT64_MAX, begin, end, window, scratch);
}

}  // namespace
}  // namespace KERNEL_ISA
}  // namespace acmix_mm
