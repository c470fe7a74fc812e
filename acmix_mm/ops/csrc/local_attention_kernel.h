// Kernels of neighbourhood attention for one instruction set. No include guard: the file is
// included once per instruction set, by for_each_isa.h.

#include "simd.h"

namespace acmix_mm {
namespace KERNEL_ISA {
namespace {

// Register tiles: with 32 registers, all offsets of a 7 x 7 row for three queries fit at once.
constexpr int kMaxRows = max_group_rows(kBytes);
constexpr int kMaxTaps = kBytes == 64 ? 7 : 4;
constexpr int kMaxChannels = kBytes == 64 ? 8 : 4;
constexpr int kScatterRows = 4;
constexpr int kScatterChannels = kBytes == 64 ? 4 : 2;

typedef int32_t IntVec __attribute__((vector_size(KERNEL_BYTES)));

// exp(x) as 2^n * 2^r with |r| <= 1/2, of x <= 0 (or little more) within about 1 ulp; below the
// normal numbers it is 0.
INLINE Vec<float> vector_exp(const Vec<float>& x) {
  const float log2_e = 1.44269504088896341f;
  // 1.5 * 2^23 rounds to an integer, and the last bits are n + 127, a float's exponent.
  const float magic = 12583039.f;
  const Vec<float> shifted = x * log2_e + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = x * log2_e - n;
  Vec<float> p = r * 1.54531629e-4f + 1.33908634e-3f;
  p = p * r + 9.61808256e-3f;
  p = p * r + 5.55035711e-2f;
  p = p * r + 2.40226508e-1f;
  p = p * r + 6.93147188e-1f;
  p = p * r + 1.f;
  const Vec<float> power = (Vec<float>)((IntVec)shifted << 23);
  return x < -87.f ? Vec<float>{} : p * power;
}

// log after Cephes, of normal numbers.
INLINE Vec<float> vector_log(const Vec<float>& x) {
  IntVec exponent = ((IntVec)x >> 23) - 127;
  Vec<float> m = (Vec<float>)(((IntVec)x & 0x007FFFFF) | 0x3F800000);
  const IntVec large = m > 1.41421356f;
  m = large ? m * 0.5f : m;
  exponent -= large;  // a true comparison is -1
  const Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
  const Vec<float> f = m - 1.f;
  Vec<float> p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * f * f + e * -2.12194440e-4f - f * f * 0.5f;
  return f + p + e * 0.693359375f + x * 0;  // the last term keeps NaN
}

INLINE Vec<double> vector_exp(const Vec<double>& x) {
  Vec<double> result;
  for (int i = 0; i < Simd<double>::lanes; ++i) {
    result[i] = __builtin_exp(x[i]);
  }
  return result;
}

INLINE Vec<double> vector_log(const Vec<double>& x) {
  Vec<double> result;
  for (int i = 0; i < Simd<double>::lanes; ++i) {
    result[i] = __builtin_log(x[i]);
  }
  return result;
}

// Scratch of one thread.
template <typename T>
struct Scratch {
  T *keys, *values;            // rings of packed key rows
  T *grad_keys, *grad_values;  // rings of the gradients of those rows
  T *query, *grad;             // packed query rows of a group
  T* lse;                      // by query of a group
  T* columns;                  // column coordinate of every packed key
  T *weights, *grad_logits;    // by offset and query of a group
  T** key_rows;                // rows of the group at hand, in the rings
  T** value_rows;
  T** grad_key_rows;
  T** grad_value_rows;
  const T** taps;  // every key of query 0 of the group at hand, row by row
  int64_t* reached;

  static Scratch lay_out(Arena& arena, const Plan& plan, bool backward) {
    Scratch scratch;
    const int64_t ring = plan.ring_rows * plan.dim * plan.key_pitch;
    const int64_t rows = plan.group_rows * plan.query_pitch;
    const int64_t offsets = plan.rows.kernel * plan.cols.kernel;
    scratch.keys = arena.take<T>(ring);
    scratch.values = arena.take<T>(ring);
    scratch.query = arena.take<T>(rows * plan.dim);
    scratch.key_rows = arena.take<T*>(plan.ring_rows);
    scratch.value_rows = arena.take<T*>(plan.ring_rows);
    scratch.taps = arena.take<const T*>(plan.ring_rows * plan.cols.kernel);
    scratch.columns = arena.take<T>(plan.slots * plan.slot_pitch);
    if (!backward) {
      scratch.weights = arena.take<T>(plan.group_rows * offsets * Simd<T>::lanes);
      return scratch;
    }
    scratch.grad_keys = arena.take<T>(ring);
    scratch.grad_values = arena.take<T>(ring);
    scratch.grad = arena.take<T>(rows * plan.dim);
    scratch.lse = arena.take<T>(rows);
    scratch.weights = arena.take<T>(rows * offsets);
    scratch.grad_logits = arena.take<T>(rows * offsets);
    scratch.grad_key_rows = arena.take<T*>(plan.ring_rows);
    scratch.grad_value_rows = arena.take<T*>(plan.ring_rows);
    scratch.reached = arena.take<int64_t>(plan.cols.kernel);
    return scratch;
  }
};

template <typename T>
int64_t scratch_bytes(const Plan& plan, bool backward) {
  Arena arena;
  Scratch<T>::lay_out(arena, plan, backward);
  return arena.used;
}

template <typename S>
INLINE const S* plane_of(const Map& map, const Plan& plan, int64_t plane) {
  return static_cast<const S*>(map.data) + plane / plan.heads * map.strides[0] +
         plane % plan.heads * map.strides[1];
}

template <typename S>
INLINE S* plane_of(const Target& target, const Plan& plan, int64_t plane) {
  return static_cast<S*>(target.data) + plane / plan.heads * target.strides[0] +
         plane % plan.heads * target.strides[1];
}

template <typename S, typename T>
INLINE Vec<T> read(const S* from, int64_t count) {
  Vec<T> value = {};
  if constexpr (std::is_same_v<S, T>) {
    if (count >= Simd<T>::lanes) {
      return load(from);
    }
  }
  if (count >= Simd<T>::lanes) {
    for (int i = 0; i < Simd<T>::lanes; ++i) {
      value[i] = static_cast<T>(from[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      value[i] = static_cast<T>(from[i]);
    }
  }
  return value;
}

// One query row of every channel, plus bias (N, d) where it is not null -> packed row, times factor.
template <typename S, typename T>
void pack_query(const Plan& plan, const Map& map, const void* bias, int64_t plane, int64_t row,
                T factor, T* to) {
  const S* from = plane_of<S>(map, plan, plane) + row * map.strides[3];
  const int64_t step = map.strides[4];
  for (int64_t c = 0; c < plan.dim; ++c, from += map.strides[2], to += plan.query_pitch) {
    T* target = to + plan.margin;
    T add = 0;
    if (bias != nullptr) {
      add = static_cast<const T*>(bias)[plane % plan.heads * plan.dim + c] * factor;
    }
    if (step == 1) {
      for (int64_t x = 0; x < plan.cols.queries; ++x) {
        target[x] = static_cast<T>(from[x]) * factor + add;
      }
    } else {
      for (int64_t x = 0; x < plan.cols.queries; ++x) {
        target[x] = static_cast<T>(from[x * step]) * factor + add;
      }
    }
  }
}

template <typename T>
void fill_columns(const Plan& plan, T* columns) {
  for (int64_t slot = 0; slot < plan.slots; ++slot) {
    for (int64_t z = 0; z < plan.slot_length; ++z) {
      columns[slot * plan.slot_pitch + z] = static_cast<T>(
          coordinate(plan.source.data()[slot * plan.slot_length + z], plan.cols.size));
    }
  }
}

// to[i] = from[i * step] for i < count, which is 0 or at least a vector.
template <typename S, typename T>
INLINE void copy(const S* __restrict from, int64_t step, int64_t count, T* __restrict to) {
  constexpr int64_t lanes = Simd<T>::lanes;
  if (step == 1 && count > 0) {
    // Vectors may overlap: all but the first and the last are aligned, since stores across cache
    // lines are slow.
    store<T>(to, read<S, T>(from, lanes));
    const int64_t misaligned = reinterpret_cast<uintptr_t>(to) / sizeof(T) % lanes;
    for (int64_t i = lanes - misaligned; i < count - lanes; i += lanes) {
      store<T>(to + i, read<S, T>(from + i, lanes));
    }
    store<T>(to + count - lanes, read<S, T>(from + count - lanes, lanes));
  } else if (step == 2) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<T>(from[2 * i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<T>(from[i * step]);
    }
  }
}

// One key row of every channel, less slopes . (x, y) unless they are null -> packed row with
// reflected borders.
template <typename S, typename T>
void pack_key(const Plan& plan, const Map& map, const void* slopes, int64_t plane, int64_t row,
              const T* columns, T* to) {
  const S* from = plane_of<S>(map, plan, plane) + row * map.strides[3];
  const int64_t step = map.strides[4];
  const T y = static_cast<T>(coordinate(row, plan.rows.size));
  for (int64_t c = 0; c < plan.dim; ++c, from += map.strides[2], to += plan.key_pitch) {
    for (int64_t slot = 0; slot < plan.slots; ++slot) {
      const int64_t* source = plan.source.data() + slot * plan.slot_length;
      const Span inside = plan.inside.data()[slot];
      T* keys = to + slot * plan.slot_pitch;
      for (int64_t z = 0; z < inside.begin; ++z) {
        keys[z] = static_cast<T>(from[source[z] * step]);
      }
      copy(from + source[inside.begin] * step, plan.cols.stride * step, inside.end - inside.begin,
           keys + inside.begin);
      for (int64_t z = inside.end; z < plan.slot_length; ++z) {
        keys[z] = static_cast<T>(from[source[z] * step]);
      }
    }
    if (slopes != nullptr) {
      const Vec<T> slope = static_cast<const T*>(slopes)[2 * c] - Vec<T>{};
      const Vec<T> at_row = static_cast<const T*>(slopes)[2 * c + 1] * y - Vec<T>{};
      for (int64_t z = 0; z < plan.slots * plan.slot_pitch; z += Simd<T>::lanes) {
        store<T>(to + z, load(to + z) - (slope * load(columns + z) + at_row));
      }
    }
  }
}

// Adjoint of the positions that pack_key subtracts: adds to the sums (d, 2).
template <typename T>
void sum_positions(const Plan& plan, const T* from, int64_t row, const T* columns, double* sums) {
  constexpr int lanes = Simd<T>::lanes;
  const double y = coordinate(row, plan.rows.size);
  for (int64_t c = 0; c < plan.dim; ++c, from += plan.key_pitch) {
    Vec<T> x_sum = {}, sum = {};
    for (int64_t slot = 0; slot < plan.slots; ++slot) {
      const T* keys = from + slot * plan.slot_pitch;
      const T* positions = columns + slot * plan.slot_pitch;
      int64_t z = 0;
      for (; z + lanes <= plan.slot_length; z += lanes) {
        const Vec<T> key = load(keys + z);
        x_sum += key * load(positions + z);
        sum += key;
      }
      for (; z < plan.slot_length; ++z) {
        x_sum[0] += keys[z] * positions[z];
        sum[0] += keys[z];
      }
    }
    for (int i = 0; i < lanes; ++i) {
      sums[2 * c] -= x_sum[i];
      sums[2 * c + 1] -= sum[i] * y;
    }
  }
}

// Adjoint of pack_key: adds a packed row, times factor, to row `row` of a map.
template <typename T>
void unpack_key(const Plan& plan, const T* from, int64_t plane, int64_t row, T factor,
                const Target& target) {
  const int64_t stride = plan.cols.stride;
  const int64_t* source = plan.source.data();
  const Span* inside = plan.inside.data();
  const int64_t length = plan.slot_length;
  // With stride 2, columns 2 i and 2 i + 1 lie in two slots; together they are adjacent.
  int64_t pairs = 0, even = 0, odd = 0;
  if (stride == 2 && plan.slots == 2) {
    const int64_t first[2] = {source[inside[0].begin], source[length + inside[1].begin]};
    even = first[0] < first[1] ? 0 : 1;
    odd = 1 - even;
    if (first[even] == 0 && first[odd] == 1) {
      pairs = std::min(inside[0].end - inside[0].begin, inside[1].end - inside[1].begin);
    }
    even = even * plan.slot_pitch + inside[even].begin;
    odd = odd * plan.slot_pitch + inside[odd].begin;
  }
  T* __restrict to = plane_of<T>(target, plan, plane) + row * target.strides[3];
  for (int64_t c = 0; c < plan.dim; ++c, from += plan.key_pitch, to += target.strides[2]) {
    for (int64_t i = 0; i < pairs; ++i) {
      to[2 * i] += factor * from[even + i];
      to[2 * i + 1] += factor * from[odd + i];
    }
    for (int64_t slot = 0; slot < plan.slots; ++slot) {
      const int64_t* column = source + slot * length;
      const T* keys = from + slot * plan.slot_pitch;
      const Span span = inside[slot];
      int64_t z = 0;
      for (; z < span.begin; ++z) {
        to[column[z]] += factor * keys[z];
      }
      z += pairs;
      if (stride == 1) {
        T* __restrict first = to + column[span.begin] - span.begin;
        for (; z < span.end; ++z) {
          first[z] += factor * keys[z];
        }
      }
      for (; z < length; ++z) {
        to[column[z]] += factor * keys[z];
      }
    }
  }
}

// The lattice rows [begin, end) of one plane and phase that a ring holds.
struct Window {
  int64_t plane = -1, phase = -1, begin = 0, end = 0;

  INLINE bool holds(int64_t other_plane, int64_t other_phase, int64_t row) const {
    return plane == other_plane && phase == other_phase && begin <= row && row < end;
  }
};

// Packs the key rows of a group that the rings do not hold yet, and lists all of the group's.
template <typename S, typename T>
void fill_rings(const Plan& plan, const Map& key, const Map& value, const void* slopes,
                int64_t plane, const Group& group, Window& window, const Scratch<T>& scratch) {
  const int64_t begin = group.first * plan.rows.step;
  const int64_t end = begin + plan.ring_rows;
  const int64_t needed = begin + plan.rows.kernel + (group.count - 1) * plan.rows.step;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t place = row % plan.ring_rows * plan.dim * plan.key_pitch;
    scratch.key_rows[row - begin] = scratch.keys + place;
    scratch.value_rows[row - begin] = scratch.values + place;
    if (row < needed && !window.holds(plane, group.phase, row)) {
      const int64_t y = plan.rows.key(group.phase, row);
      pack_key<S, T>(plan, key, slopes, plane, y, scratch.columns, scratch.keys + place);
      pack_key<S, T>(plan, value, nullptr, plane, y, scratch.columns, scratch.values + place);
    }
  }
  window.plane = plane;
  window.phase = group.phase;
  window.begin = begin;
  window.end = needed;
}

// Lists the keys of a group's first query, row by row.
template <typename T>
void list_taps(const Plan& plan, T* const* rows, const T** taps) {
  for (int64_t u = 0; u < plan.ring_rows; ++u) {
    for (int64_t j = 0; j < plan.cols.kernel; ++j) {
      *taps++ = rows[u] + plan.offset.data()[j];
    }
  }
}

// Products of R query rows with J offsets of a key row, for one vector of queries.
template <typename T, int R, int J, bool unit>
void dot_taps(const T* query, int64_t query_pitch, int64_t query_row, const T* key,
              int64_t key_pitch, const int64_t* offset, int64_t dim, T* out, int64_t out_row,
              int64_t out_pitch) {
  Vec<T> sum[R][J] = {};
  for (int64_t c = 0; c < dim; ++c, query += query_pitch, key += key_pitch) {
    Vec<T> q[R];
    UNROLL
    for (int r = 0; r < R; ++r) {
      q[r] = load(query + r * query_row);
    }
    UNROLL
    for (int j = 0; j < J; ++j) {
      Vec<T> k = load(key + (unit ? j : offset[j]));
      KEEP(k);
      UNROLL
      for (int r = 0; r < R; ++r) {
        sum[r][j] += q[r] * k;
      }
    }
  }
  UNROLL
  for (int r = 0; r < R; ++r) {
    UNROLL
    for (int j = 0; j < J; ++j) {
      store<T>(out + r * out_row + j * out_pitch, sum[r][j]);
    }
  }
}

// The same for any number of offsets, in pieces of at most J.
template <typename T, int R, bool unit, int J = kMaxTaps>
void dot_row(const T* query, int64_t query_pitch, int64_t query_row, const T* key,
             int64_t key_pitch, const int64_t* offset, int64_t dim, T* out, int64_t out_row,
             int64_t out_pitch, int64_t taps) {
  for (; taps >= J; taps -= J) {
    dot_taps<T, R, J, unit>(query, query_pitch, query_row, key, key_pitch, offset, dim, out,
                            out_row, out_pitch);
    key += unit ? J : 0;
    offset += J;
    out += J * out_pitch;
  }
  if constexpr (J > 1) {
    if (taps > 0) {
      dot_row<T, R, unit, J - 1>(query, query_pitch, query_row, key, key_pitch, offset, dim, out,
                                 out_row, out_pitch, taps);
    }
  }
}

// Products of the query rows of a group with their neighbourhoods, for the vector at column x.
// Row r's offset o goes to out + r * out_row + o * out_pitch.
template <typename T, bool unit>
void dot_block(const Plan& plan, int64_t count, const T* query, T* const* rows, int64_t x, T* out,
               int64_t out_row, int64_t out_pitch) {
  const int64_t kernel = plan.rows.kernel;
  const int64_t step = plan.rows.step;
  const int64_t taps = plan.cols.kernel;
  const int64_t query_row = plan.dim * plan.query_pitch;
  // From a key row's products with one query row to those with the next.
  const int64_t next_row = out_row - step * taps * out_pitch;
  int64_t first = 0, last = 0;  // query rows that see key row u
  for (int64_t u = 0; u < kernel + (count - 1) * step; ++u, out += taps * out_pitch) {
    first += u == kernel + first * step;
    last += last < count && u == last * step;
    const auto dot = last - first == 1   ? dot_row<T, 1, unit>
                     : last - first == 2 ? dot_row<T, 2, unit>
                                         : dot_row<T, kMaxRows, unit>;
    dot(query + first * query_row + plan.margin + x, plan.query_pitch, query_row, rows[u] + x,
        plan.key_pitch, plan.offset.data(), plan.dim, out + first * next_row, next_row, out_pitch,
        taps);
  }
}

// Adds weighted keys to the sums of C channels: first the keys, from the n-th of the group's on,
// that query rows R0 to R1 - 1 of the group see, then, as rows come and go, the others.
template <typename T, int C, int R0 = 0, int R1 = 1>
INLINE void add_weighted(const Plan& plan, int64_t count, Vec<T> (&sum)[kMaxRows][C],
                         const T* const* keys, int64_t at, const T* weights, int64_t weight_row,
                         int64_t pitch, int64_t n = 0) {
  const int64_t step = plan.rows.step;
  const bool grows = R0 == 0 && R1 < count;
  const int64_t until = (grows ? R1 * step : plan.rows.kernel + R0 * step) * plan.cols.kernel;
  for (; n < until; ++n) {
    const T* key = keys[n] + at;
    Vec<T> w[R1];
    UNROLL
    for (int r = R0; r < R1; ++r) {
      w[r] = load(weights + n * pitch + r * weight_row);
    }
    UNROLL
    for (int c = 0; c < C; ++c) {
      Vec<T> k = load(key + c * plan.key_pitch);
      KEEP(k);
      UNROLL
      for (int r = R0; r < R1; ++r) {
        sum[r][c] += w[r] * k;
      }
    }
  }
  if constexpr (R0 == 0 && R1 < kMaxRows) {
    if (grows) {
      add_weighted<T, C, 0, R1 + 1>(plan, count, sum, keys, at, weights, weight_row, pitch, n);
      return;
    }
  }
  if constexpr (R0 + 1 < R1) {
    add_weighted<T, C, R0 + 1, R1>(plan, count, sum, keys, at, weights, weight_row, pitch, n);
  }
}

// Weighted sums over the neighbourhoods of the query rows of a group, for the vector at column x,
// of channels [begin, end), C at a time: to sums (rows, kMaxChannels, lanes). The adjoint of
// dot_block with respect to the query.
template <typename T, int C = kMaxChannels>
void sum_block(const Plan& plan, int64_t count, const T* const* keys, int64_t x, const T* weights,
               int64_t weight_row, int64_t pitch, int64_t begin, int64_t end, T* sums) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t next_row = weight_row - plan.rows.step * plan.cols.kernel * pitch;  // dot_block's
  for (; begin + C <= end; begin += C, sums += C * lanes) {
    Vec<T> sum[kMaxRows][C] = {};
    const int64_t at = begin * plan.key_pitch + x;
    add_weighted<T, C>(plan, count, sum, keys, at, weights, next_row, pitch);
    UNROLL
    for (int r = 0; r < kMaxRows; ++r) {
      UNROLL
      for (int c = 0; c < C; ++c) {
        store<T>(sums + (r * kMaxChannels + c) * lanes, sum[r][c]);
      }
    }
  }
  if constexpr (C > 1) {
    if (begin < end) {
      sum_block<T, C / 2>(plan, count, keys, x, weights, weight_row, pitch, begin, end, sums);
    }
  }
}

// Rows of a target that a group of queries writes or, where `add`, adds to; null rows are left out.
template <typename S, typename T>
struct TargetRows {
  S* row[kMaxRows];
  int64_t channel_pitch;
  bool add;
  const T* factors;  // by channel, or null
};

// The sums of sum_block over all channels, times factor[row], to a target.
template <typename S, typename T>
void write_sums(const Plan& plan, int64_t count, const T* const* keys, int64_t x, const T* weights,
                int64_t weight_row, int64_t pitch, const Vec<T>* factor,
                const TargetRows<S, T>& out) {
  constexpr int lanes = Simd<T>::lanes;
  T sums[kMaxRows * kMaxChannels * lanes] __attribute__((aligned(64)));
  for (int64_t begin = 0; begin < plan.dim; begin += kMaxChannels) {
    const int64_t end = std::min<int64_t>(begin + kMaxChannels, plan.dim);
    const auto place = [&](int64_t row, int64_t channel) {
      return out.row[row] + channel * out.channel_pitch + x;
    };
    if (out.add) {
      // There is time until the sums are there.
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = begin; c < end && out.row[r] != nullptr; ++c) {
          __builtin_prefetch(place(r, c) + lanes - 1, 1);
        }
      }
    }
    sum_block<T>(plan, count, keys, x, weights, weight_row, pitch, begin, end, sums);
    for (int64_t r = 0; r < count; ++r) {
      const T* from = sums + r * kMaxChannels * lanes;
      for (int64_t c = begin; c < end && out.row[r] != nullptr; ++c, from += lanes) {
        Vec<T> result = load(from) * factor[r];
        if (out.factors != nullptr) {
          result *= out.factors[c];
        }
        if (out.add) {
          result += read<S, T>(place(r, c), plan.cols.queries - x);
        }
        write<S, T>(place(r, c), result, plan.cols.queries - x);
      }
    }
  }
}

// Logits -> exp(logit - maximum), in place; returns their sum.
template <typename T>
INLINE Vec<T> exponentials(T* logits, int64_t count, Vec<T>& maximum) {
  constexpr int lanes = Simd<T>::lanes;
  // Several maxima, lest each wait for the one before.
  Vec<T> maxima[4];
  std::fill_n(maxima, 4, load(logits));
  int64_t o = 1;
  for (; o + 4 <= count; o += 4) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const Vec<T> logit = load(logits + (o + i) * lanes);
      maxima[i] = logit > maxima[i] ? logit : maxima[i];
    }
  }
  for (; o < count; ++o) {
    const Vec<T> logit = load(logits + o * lanes);
    maxima[0] = logit > maxima[0] ? logit : maxima[0];
  }
  maxima[0] = maxima[1] > maxima[0] ? maxima[1] : maxima[0];
  maxima[2] = maxima[3] > maxima[2] ? maxima[3] : maxima[2];
  maximum = maxima[2] > maxima[0] ? maxima[2] : maxima[0];
  Vec<T> total = {};
  for (int64_t o = 0; o < count; ++o) {
    const Vec<T> weight = vector_exp(load(logits + o * lanes) - maximum);
    store<T>(logits + o * lanes, weight);
    total += weight;
  }
  return total;
}

template <typename S, typename T, bool unit>
void forward_group(const Plan& plan, const ForwardArgs& args, int64_t plane, const Group& group,
                   const Scratch<T>& scratch) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t offsets = plan.rows.kernel * plan.cols.kernel;
  const T* factors = static_cast<const T*>(args.factor);
  TargetRows<S, T> out{{},
                       args.output.strides[2],
                       args.output.add,
                       factors ? factors + plane % plan.heads * plan.dim : nullptr};
  T* lse[kMaxRows];
  for (int64_t r = 0; r < group.count; ++r) {
    const int64_t y = plan.query_row(group, r);
    pack_query<S, T>(plan, args.query, args.query_bias, plane, y, static_cast<T>(plan.scale),
                     scratch.query + r * plan.dim * plan.query_pitch);
    out.row[r] = plane_of<S>(args.output, plan, plane) + y * args.output.strides[3];
    lse[r] = plane_of<T>(args.lse, plan, plane) + y * args.lse.strides[3];
  }
  list_taps(plan, scratch.value_rows, scratch.taps);
  for (int64_t x = 0; x < plan.cols.queries; x += lanes) {
    dot_block<T, unit>(plan, group.count, scratch.query, scratch.key_rows, x, scratch.weights,
                       offsets * lanes, lanes);
    Vec<T> factor[kMaxRows];
    for (int64_t r = 0; r < group.count; ++r) {
      Vec<T> maximum;
      const Vec<T> total = exponentials(scratch.weights + r * offsets * lanes, offsets, maximum);
      factor[r] = T(1) / total;
      write<T, T>(lse[r] + x, maximum + vector_log(total), plan.cols.queries - x);
    }
    write_sums<S, T>(plan, group.count, scratch.taps, x, scratch.weights, offsets * lanes, lanes,
                     factor, out);
  }
}

// Groups [begin, end) of all planes' groups.
template <typename S, typename T>
void forward(const Plan& plan, const ForwardArgs& args, int64_t begin, int64_t end, Arena arena) {
  const Scratch<T> scratch = Scratch<T>::lay_out(arena, plan, false);
  fill_columns(plan, scratch.columns);
  const int64_t groups = static_cast<int64_t>(plan.groups.size());
  Window window;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t plane = i / groups;
    const Group& group = plan.groups.data()[i % groups];
    fill_rings<S, T>(plan, args.key, args.value, args.slopes, plane, group, window, scratch);
    if (plan.unit) {
      forward_group<S, T, true>(plan, args, plane, group, scratch);
    } else {
      forward_group<S, T, false>(plan, args, plane, group, scratch);
    }
  }
}

// Adds, for one vector of packed keys, the products of I weight rows with C query channels to the
// gradients of I key rows: a gather, so that no two lanes meet.
template <typename T, int I, int C>
void scatter_tile(T* const* rows, int64_t at, int64_t key_pitch, const T* query,
                  int64_t query_pitch, const T* weights, int64_t weight_pitch,
                  int64_t weight_row, const int64_t* taps, int64_t num_taps, const int64_t* shift) {
  Vec<T> sum[I][C];
  UNROLL
  for (int i = 0; i < I; ++i) {
    UNROLL
    for (int c = 0; c < C; ++c) {
      sum[i][c] = load(rows[i] + at + c * key_pitch);
    }
  }
  for (int64_t n = 0; n < num_taps; ++n) {
    const int64_t j = taps[n];
    const T* w = weights + j * weight_pitch - shift[j];
    const T* from = query - shift[j];
    Vec<T> q[C];
    UNROLL
    for (int c = 0; c < C; ++c) {
      q[c] = load(from + c * query_pitch);
    }
    UNROLL
    for (int i = 0; i < I; ++i) {
      Vec<T> weight = load(w + i * weight_row);
      KEEP(weight);
      UNROLL
      for (int c = 0; c < C; ++c) {
        sum[i][c] += weight * q[c];
      }
    }
  }
  UNROLL
  for (int i = 0; i < I; ++i) {
    UNROLL
    for (int c = 0; c < C; ++c) {
      store<T>(rows[i] + at + c * key_pitch, sum[i][c]);
    }
  }
}

template <typename T, int C, int I = kScatterRows>
void scatter_rows(const Plan& plan, T* const* rows, int64_t at, const T* query, const T* weights,
                  int64_t num_taps, const int64_t* taps, int64_t begin = 0) {
  const int64_t weight_row = plan.cols.kernel * plan.query_pitch;
  for (; begin + I <= plan.rows.kernel; begin += I) {
    scatter_tile<T, I, C>(rows + begin, at, plan.key_pitch, query, plan.query_pitch,
                          weights + begin * weight_row, plan.query_pitch, weight_row, taps,
                          num_taps, plan.shift.data());
  }
  if constexpr (I > 1) {
    if (begin < plan.rows.kernel) {
      scatter_rows<T, C, I - 1>(plan, rows, at, query, weights, num_taps, taps, begin);
    }
  }
}

template <typename T, int C = kScatterChannels>
void scatter_channels(const Plan& plan, T* const* rows, int64_t at, const T* query,
                      const T* weights, int64_t num_taps, const int64_t* taps,
                      int64_t channel = 0) {
  for (; channel + C <= plan.dim; channel += C) {
    scatter_rows<T, C>(plan, rows, channel * plan.key_pitch + at,
                       query + channel * plan.query_pitch, weights, num_taps, taps);
  }
  if constexpr (C > 1) {
    if (channel < plan.dim) {
      scatter_channels<T, C / 2>(plan, rows, at, query, weights, num_taps, taps, channel);
    }
  }
}

// Calls visit(at, z, taps) for every vector of packed keys that some query of a row sees: at
// element `at` of a packed row, keys z and on of their slot, and how many taps reach it, which are
// listed in `taps`.
template <typename T, typename Visit>
INLINE void for_each_seen(const Plan& plan, int64_t* taps, Visit visit) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t* shift = plan.shift.data();
  for (int64_t slot = 0; slot < plan.slots; ++slot) {
    for (int64_t z = 0; z < plan.slot_length; z += lanes) {
      int64_t num_taps = 0;
      for (int64_t j = 0; j < plan.cols.kernel; ++j) {
        const bool reached = z + lanes > shift[j] && z - shift[j] < plan.cols.queries;
        if (plan.slot.data()[j] == slot && reached) {
          taps[num_taps++] = j;
        }
      }
      if (num_taps > 0) {
        visit(slot * plan.slot_pitch + z, z, num_taps);
      }
    }
  }
}

// One query row's contribution to the gradients of its key rows and value rows.
template <typename T>
void scatter(const Plan& plan, int64_t row, const Scratch<T>& scratch) {
  const int64_t query_row = row * plan.dim * plan.query_pitch + plan.margin;
  const int64_t weight_row =
      row * plan.rows.kernel * plan.cols.kernel * plan.query_pitch + plan.margin;
  T* const* key_rows = scratch.grad_key_rows + row * plan.rows.step;
  T* const* value_rows = scratch.grad_value_rows + row * plan.rows.step;
  for_each_seen<T>(plan, scratch.reached, [&](int64_t at, int64_t z, int64_t num_taps) {
    scatter_channels<T>(plan, key_rows, at, scratch.query + query_row + z,
                        scratch.grad_logits + weight_row + z, num_taps, scratch.reached);
    scatter_channels<T>(plan, value_rows, at, scratch.grad + query_row + z,
                        scratch.weights + weight_row + z, num_taps, scratch.reached);
  });
}

// Adds the gradient rows before `until` to the rows [begin, end) of the map, and clears them.
template <typename T>
void flush(const Plan& plan, const BackwardArgs& args, int64_t task, int64_t until, int64_t begin,
           int64_t end, Window& window, const Scratch<T>& scratch) {
  for (; window.begin < window.end && window.begin < until; ++window.begin) {
    const int64_t row_size = plan.dim * plan.key_pitch;
    const int64_t place = window.begin % plan.ring_rows * row_size;
    const int64_t y = plan.rows.key(window.phase, window.begin);
    if (begin <= y && y < end) {
      unpack_key(plan, scratch.grad_keys + place, window.plane, y, T(1), args.grad_key);
      unpack_key(plan, scratch.grad_values + place, window.plane, y, static_cast<T>(args.factor),
                 args.grad_value);
      if (args.slope_sums != nullptr) {
        sum_positions(plan, scratch.grad_keys + place, y, scratch.columns,
                      args.slope_sums + task * plan.dim * 2);
      }
    }
    clear(scratch.grad_keys + place, row_size);
    clear(scratch.grad_values + place, row_size);
  }
}

// Packs what the gradient of one query row needs besides keys and values.
template <typename S, typename T>
void pack_row_gradient(const Plan& plan, const BackwardArgs& args, int64_t plane, int64_t y,
                       int64_t row, const Scratch<T>& scratch) {
  T* query = scratch.query + row * plan.dim * plan.query_pitch;
  T* grad = scratch.grad + row * plan.dim * plan.query_pitch;
  pack_query<S, T>(plan, args.query, args.query_bias, plane, y, static_cast<T>(plan.scale), query);
  pack_query<S, T>(plan, args.grad, nullptr, plane, y, T(1), grad);
  T* lse = scratch.lse + row * plan.query_pitch;
  const T* from = plane_of<T>(args.lse, plan, plane) + y * args.lse.strides[3];
  for (int64_t x = 0; x < plan.cols.queries; ++x) {
    lse[x] = from[x * args.lse.strides[4]];
  }
}

// Weights and gradients of logits of the vector at column x, from logits in `weights` and the
// products of grad and value in `grad_logits`. Returns the products of grad and attention.
template <typename T>
INLINE Vec<T> differentiate(const Plan& plan, int64_t x, int64_t row, T factor,
                            const Scratch<T>& scratch) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t pitch = plan.query_pitch;
  const int64_t offsets = plan.rows.kernel * plan.cols.kernel;
  const int64_t valid = plan.cols.queries - x;
  T* weights = scratch.weights + row * offsets * pitch + plan.margin + x;
  T* grad_logits = scratch.grad_logits + row * offsets * pitch + plan.margin + x;
  const Vec<T> lse = load(scratch.lse + row * pitch + x);
  Vec<T> total = {};
  for (int64_t o = 0; o < offsets; ++o) {
    const Vec<T> weight = vector_exp(load(weights + o * pitch) - lse);
    store<T>(weights + o * pitch, weight);
    total += weight * load(grad_logits + o * pitch);
  }
  for (int64_t o = 0; o < offsets; ++o) {
    T* grad_logit = grad_logits + o * pitch;
    store<T>(grad_logit, load(weights + o * pitch) * (load(grad_logit) - total) * factor);
    if (valid < lanes) {
      // Lanes past the row's end would reach keys of real queries.
      clear(weights + o * pitch + valid, lanes - valid);
      clear(grad_logit + valid, lanes - valid);
    }
  }
  return total;
}

template <typename S, typename T, bool unit>
void backward_group(const Plan& plan, const BackwardArgs& args, int64_t plane, int64_t task,
                    const Group& group, const TargetRows<S, T>& grad_query,
                    const Scratch<T>& scratch) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t weight_row = plan.rows.kernel * plan.cols.kernel * plan.query_pitch;
  for (int64_t r = 0; r < group.count; ++r) {
    pack_row_gradient<S, T>(plan, args, plane, plan.query_row(group, r), r, scratch);
  }
  Vec<T> factor[kMaxRows];
  std::fill_n(factor, kMaxRows, static_cast<T>(plan.scale) - Vec<T>{});
  list_taps(plan, scratch.key_rows, scratch.taps);
  for (int64_t x = 0; x < plan.cols.queries; x += lanes) {
    T* weights = scratch.weights + plan.margin + x;
    T* grad_logits = scratch.grad_logits + plan.margin + x;
    dot_block<T, unit>(plan, group.count, scratch.query, scratch.key_rows, x, weights, weight_row,
                       plan.query_pitch);
    dot_block<T, unit>(plan, group.count, scratch.grad, scratch.value_rows, x, grad_logits,
                       weight_row, plan.query_pitch);
    // GCC does not know that there are no more than kMaxRows, and would warn.
    for (int64_t r = 0; r < std::min<int64_t>(group.count, kMaxRows); ++r) {
      const Vec<T> total = differentiate(plan, x, r, static_cast<T>(args.factor), scratch);
      if (grad_query.row[r] != nullptr) {
        const int64_t valid = std::min<int64_t>(lanes, plan.cols.queries - x);
        for (int64_t i = 0; i < valid; ++i) {
          args.factor_sums[task] += total[i];
        }
      }
    }
    write_sums<S, T>(plan, group.count, scratch.taps, x, grad_logits, weight_row, plan.query_pitch,
                     factor, grad_query);
  }
  for (int64_t r = 0; r < group.count; ++r) {
    scatter(plan, r, scratch);
  }
}

// Does some query of the group see key rows [begin, end)?
INLINE bool reaches(const Plan& plan, const Group& group, int64_t begin, int64_t end) {
  const int64_t first = group.first * plan.rows.step;
  const int64_t last = first + (group.count - 1) * plan.rows.step + plan.rows.kernel;
  for (int64_t row = first; row < last; ++row) {
    const int64_t y = plan.rows.key(group.phase, row);
    if (begin <= y && y < end) {
      return true;
    }
  }
  return false;
}

// Gradients of key rows [begin, end) of a plane, and of the queries centred on them. A query that
// sees rows of several such blocks is computed for each: nothing is shared, and every sum has the
// same order however the rows are divided.
template <typename S, typename T>
void backward(const Plan& plan, const BackwardArgs& args, int64_t plane, int64_t task,
              int64_t begin, int64_t end, Arena arena) {
  const Scratch<T> scratch = Scratch<T>::lay_out(arena, plan, true);
  fill_columns(plan, scratch.columns);
  const int64_t groups = static_cast<int64_t>(plan.groups.size());
  Window keys, grads;
  for (int64_t i = 0; i < groups; ++i) {
    const Group& group = plan.groups.data()[i];
    if (!reaches(plan, group, begin, end)) {
      continue;
    }
    const int64_t first = group.first * plan.rows.step;
    const bool continued = grads.plane == plane && grads.phase == group.phase;
    flush(plan, args, task, continued ? first : INT64_MAX, begin, end, grads, scratch);
    fill_rings<S, T>(plan, args.key, args.value, args.slopes, plane, group, keys, scratch);
    for (int64_t u = 0; u < plan.ring_rows; ++u) {
      const int64_t place = (first + u) % plan.ring_rows * plan.dim * plan.key_pitch;
      scratch.grad_key_rows[u] = scratch.grad_keys + place;
      scratch.grad_value_rows[u] = scratch.grad_values + place;
    }
    grads = keys;
    TargetRows<S, T> out{{}, args.grad_query.strides[2], args.grad_query.add, nullptr};
    for (int64_t r = 0; r < group.count; ++r) {
      const int64_t y = plan.query_row(group, r);
      if (begin <= y * plan.rows.stride && y * plan.rows.stride < end) {
        out.row[r] = plane_of<S>(args.grad_query, plan, plane) + y * args.grad_query.strides[3];
      }
    }
    if (plan.unit) {
      backward_group<S, T, true>(plan, args, plane, task, group, out, scratch);
    } else {
      backward_group<S, T, false>(plan, args, plane, task, group, out, scratch);
    }
  }
  flush(plan, args, task, INT64_MAX, begin, end, grads, scratch);
}

}  // namespace
}  // namespace KERNEL_ISA
}  // namespace acmix_mm
