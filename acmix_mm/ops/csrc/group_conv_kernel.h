// Kernels of the grouped convolution for one instruction set. No include guard: the file is
// included once per instruction set, by for_each_isa.h.

#include "simd.h"

namespace acmix_mm {
namespace KERNEL_ISA {
namespace {

// Vectors of a register tile, by its channels: accumulators, one row of operands and one other
// operand fill the registers.
constexpr int kTileWidth[kTileChannels + 1] = {
    0, kBytes == 64 ? 8 : 6, kBytes == 64 ? 8 : 4, kBytes == 64 ? 7 : 3,
    kBytes == 64 ? 6 : kBytes == 32 ? 3 : 2};
constexpr int kMaxTileWidth = 8;
// Vectors whose products with others are summed up before the sum goes to memory.
constexpr int kChunk = 32;
// Such sums that are added up before the total goes to double precision.
constexpr int kChunks = 32;

template <typename S, typename T>
INLINE void copy(T* __restrict to, int64_t to_step, const S* __restrict from, int64_t from_step,
                 int64_t count, T add = 0) {
  if (to_step == 1 && from_step == 1) {
    if constexpr (std::is_same_v<S, T>) {
      copy_row<false>(to, from, count, add);
    } else {
      for (int64_t x = 0; x < count; ++x) {
        to[x] = static_cast<T>(from[x]) + add;
      }
    }
  } else if (to_step == 1 && from_step == 2) {
    for (int64_t x = 0; x < count; ++x) {
      to[x] = static_cast<T>(from[2 * x]) + add;
    }
  } else {
    for (int64_t x = 0; x < count; ++x) {
      to[x * to_step] = static_cast<T>(from[x * from_step]) + add;
    }
  }
}

// Numbers 0, 2, ... of a row to one place and 1, 3, ... to another, all of them plus `add`.
template <typename S, typename T>
INLINE void split(T* __restrict even, T* __restrict odd, const S* __restrict from, int64_t count,
                  T add) {
  for (int64_t x = 0; x < count / 2; ++x) {
    even[x] = static_cast<T>(from[2 * x]) + add;
    odd[x] = static_cast<T>(from[2 * x + 1]) + add;
  }
  if (count % 2) {
    even[count / 2] = static_cast<T>(from[count - 1]) + add;
  }
}

// The reverse.
template <typename S, typename T>
INLINE void join(S* __restrict to, const T* __restrict even, const T* __restrict odd,
                 int64_t count) {
  for (int64_t x = 0; x < count / 2; ++x) {
    to[2 * x] = static_cast<S>(even[x]);
    to[2 * x + 1] = static_cast<S>(odd[x]);
  }
  if (count % 2) {
    to[count - 1] = static_cast<S>(even[count / 2]);
  }
}

// Targets [begin, begin + count) of the rows' axis of the map at `from`, to a slot of rows and one
// of columns or, with `both`, to those of even and of odd columns. `to` is the slot's first row.
template <bool both, typename S, typename T>
INLINE void pack_slot(const Layout& layout, const S* from, int64_t row_stride, int64_t col_stride,
                      int64_t row_residue, int64_t col_slot, int64_t begin, int64_t count, T add,
                      T* to) {
  const Gather& rows = layout.rows;
  const Gather& cols = layout.cols;
  const int64_t residue = cols.residues.data()[col_slot];
  const int64_t elements = cols.elements(col_slot);
  for (int64_t r = begin - rows.before; r < begin + count + rows.after; ++r, to += layout.pitch) {
    const int64_t y = r * rows.step + row_residue;
    if (y < 0 || y >= rows.source) {
      copy_row<true, T>(to, to, cols.positions);
      if (both) {
        copy_row<true, T>(to + layout.slot_pitch, to, cols.positions);
      }
    } else if (both) {
      split(to + residue * layout.slot_pitch, to + (1 - residue) * layout.slot_pitch,
            from + y * row_stride, cols.source, add);
    } else {
      copy(to, 1, from + y * row_stride + residue * col_stride, cols.step * col_stride, elements,
           add);
    }
  }
  copy_row<true, T>(to, to, layout.tail);
  if (both) {
    copy_row<true, T>(to + layout.slot_pitch, to, layout.tail);
  }
}

// The same of channels of one sample, to all slots; `bias` may be null.
template <typename S, typename T>
void pack(const Layout& layout, const Map& map, const Map& bias, int64_t sample, int64_t channel,
          int64_t channels, int64_t begin, int64_t count, T* to) {
  const Gather& rows = layout.rows;
  const Gather& cols = layout.cols;
  const bool both = cols.step == 2 && cols.slots() == 2 && map.strides[3] == 1;
  const S* from =
      static_cast<const S*>(map.data) + sample * map.strides[0] + channel * map.strides[1];
  for (int64_t c = 0; c < channels; ++c, from += map.strides[1], to += layout.channel_pitch) {
    T* slot = to + layout.head;
    T add = 0;
    if (bias.data != nullptr) {
      add = static_cast<T>(static_cast<const S*>(bias.data)[(channel + c) * bias.strides[0]]);
    }
    for (int64_t u = 0; u < rows.slots(); ++u) {
      const int64_t residue = rows.residues.data()[u];
      if (both) {
        pack_slot<true>(layout, from, map.strides[2], 1, residue, 0, begin, count, add, slot);
        slot += 2 * layout.slot_pitch;
      } else {
        for (int64_t v = 0; v < cols.slots(); ++v, slot += layout.slot_pitch) {
          pack_slot<false>(layout, from, map.strides[2], map.strides[3], residue, v, begin, count,
                           add, slot);
        }
      }
    }
  }
}

// Fetches what is packed next into the second-level cache, a share at a time between computations,
// which otherwise would wait for memory in turn with the packing.
struct Ahead {
  const char* channel = nullptr;
  const char* line = nullptr;
  int64_t channels = 0, channel_bytes = 0, lines = 0, left = 0, share = 0;

  // Targets [begin, begin + count) of the rows' axis, to be fetched in so many steps.
  template <typename S>
  static Ahead of(const Layout& layout, const Map& map, int64_t sample, int64_t channel,
                  int64_t channels, int64_t begin, int64_t count, int64_t steps) {
    Ahead ahead;
    const Gather& rows = layout.rows;
    const int64_t width = layout.cols.source;
    if (map.strides[3] != 1 || map.strides[2] < width || map.strides[2] > 2 * width) {
      return ahead;
    }
    const int64_t first = std::max<int64_t>(0, (begin - rows.before) * rows.step);
    const int64_t last = std::min((begin + count + rows.after) * rows.step, rows.source);
    ahead.channel = static_cast<const char*>(map.data) +
                    sizeof(S) * (sample * map.strides[0] + channel * map.strides[1] +
                                 first * map.strides[2]);
    ahead.line = ahead.channel;
    ahead.channels = channels;
    ahead.channel_bytes = map.strides[1] * sizeof(S);
    ahead.lines = (last - first) * map.strides[2] * sizeof(S) / 64 + 1;
    ahead.left = ahead.lines;
    ahead.share = (channels * ahead.lines + steps - 1) / steps;
    return ahead;
  }

  INLINE void step() {
    for (int64_t i = 0; i < share && channels > 0; ++i, line += 64) {
      __builtin_prefetch(line, 0, 2);
      if (--left == 0) {
        --channels;
        left = lines;
        channel += channel_bytes;
        line = channel - 64;
      }
    }
  }
};

// Scratch of one thread of a convolution.
template <typename T>
struct ConvScratch {
  T* source;
  T* weight;  // by piece of target channels, tap, source channel, target channel
  T* bias;
  T* tile;

  static ConvScratch lay_out(Arena& arena, const ConvPlan& plan) {
    ConvScratch scratch;
    const int64_t taps = plan.kernel * plan.kernel;
    scratch.source = arena.take<T>(plan.sources * plan.layout.channel_pitch);
    scratch.weight = arena.take<T>(taps * plan.sources * plan.targets);
    scratch.bias = arena.take<T>(plan.targets);
    scratch.tile = arena.take<T>(2 * kTileChannels * kMaxTileWidth * Simd<T>::lanes);
    return scratch;
  }
};

template <typename T>
int64_t conv_scratch_bytes(const ConvPlan& plan) {
  Arena arena;
  ConvScratch<T>::lay_out(arena, plan);
  return arena.used;
}

template <typename S, typename T>
void pack_weight(const ConvPlan& plan, const ConvArgs& args, int64_t group,
                 const ConvScratch<T>& scratch) {
  const S* weight = static_cast<const S*>(args.weight.data) + group * args.by_group;
  const int64_t kernel = plan.kernel;
  T* to = scratch.weight;
  for (int64_t i = 0; i < num_pieces(plan.targets); ++i) {
    const Piece piece = piece_of(plan.targets, i);
    for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
      const S* from = weight + tap / kernel * args.weight.strides[2] +
                      tap % kernel * args.weight.strides[3];
      for (int64_t c = 0; c < plan.sources; ++c) {
        for (int64_t t = piece.begin; t < piece.end; ++t) {
          *to++ = static_cast<T>(from[t * args.by_target + c * args.by_source]);
        }
      }
    }
  }
  if (args.bias.data != nullptr) {
    const S* bias = static_cast<const S*>(args.bias.data);
    for (int64_t t = 0; t < plan.targets; ++t) {
      scratch.bias[t] = static_cast<T>(bias[(group * plan.targets + t) * args.bias.strides[0]]);
    }
  }
}

// X adjacent vectors of C target channels; `to` has C rows of X vectors.
template <typename T, int C, int X>
void conv_tile(const T* source, int64_t pitch, int64_t sources, const T* weight, const T* bias,
               const int64_t* offsets, const int64_t* indices, int64_t taps, T* to, Ahead* ahead) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> sum[C][X];
  UNROLL
  for (int c = 0; c < C; ++c) {
    UNROLL
    for (int x = 0; x < X; ++x) {
      sum[c][x] = bias[c] - Vec<T>{};
    }
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    ahead->step();
    const T* from = source + offsets[tap];
    const T* w = weight + indices[tap] * sources * C;
    for (int64_t i = 0; i < sources; ++i, from += pitch, w += C) {
      Vec<T> s[X];
      UNROLL
      for (int x = 0; x < X; ++x) {
        s[x] = load(from + x * lanes);
        KEEP(s[x]);
      }
      UNROLL
      for (int c = 0; c < C; ++c) {
        Vec<T> factor = w[c] - Vec<T>{};
        KEEP(factor);
        UNROLL
        for (int x = 0; x < X; ++x) {
          sum[c][x] += factor * s[x];
        }
      }
    }
  }
  UNROLL
  for (int c = 0; c < C; ++c) {
    UNROLL
    for (int x = 0; x < X; ++x) {
      store<T>(to + (c * X + x) * lanes, sum[c][x]);
    }
  }
}

template <typename T, int C, int X = kTileWidth[C], typename... Args>
INLINE void conv_tile_of(int64_t width, Args... args) {
  if constexpr (X > 1) {
    if (width < X) {
      return conv_tile_of<T, C, X - 1>(width, args...);
    }
  }
  conv_tile<T, C, X>(args...);
}

// One phase of the targets of a block, or both phases of its columns at stride 2, for one piece of
// target channels. `to` is the map of the first of these channels.
template <typename S, typename T, int C, int phases>
void conv_block(const ConvPlan& plan, const ConvPlan::Phase* phase, int64_t begin, int64_t count,
                const T* weight, const T* bias, S* to, const int64_t* strides,
                const ConvScratch<T>& scratch, Ahead* ahead) {
  constexpr int lanes = Simd<T>::lanes;
  const Gather& rows = plan.layout.rows;
  const Gather& cols = plan.layout.cols;
  const int64_t pitch = plan.layout.pitch;
  const int64_t valid = cols.targets(phase->col);
  const int64_t vectors = ((count - 1) * pitch + valid + lanes - 1) / lanes;
  const int64_t tiles = (vectors + kTileWidth[C] - 1) / kTileWidth[C];
  int64_t row = 0, col = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = i * vectors / tiles;
    const int64_t width = (i + 1) * vectors / tiles - first;
    const int64_t tile = C * width * lanes;
    for (int p = 0; p < phases; ++p) {
      conv_tile_of<T, C>(width, scratch.source + first * lanes, plan.layout.channel_pitch,
                         plan.sources, weight, bias, phase[p].offsets.data(),
                         phase[p].indices.data(), static_cast<int64_t>(phase[p].offsets.size()),
                         scratch.tile + p * tile, ahead);
    }
    for (int64_t done = 0; done < width * lanes && row < count;) {
      const int64_t piece = std::min(width * lanes - done, pitch - col);
      if (col < valid) {
        S* target = to + ((begin + row) * rows.phases + phase->row) * strides[2] +
                    col * cols.phases + phase->col;
        const T* from = scratch.tile + done;
        for (int c = 0; c < C; ++c, target += strides[1], from += width * lanes) {
          if constexpr (phases == 2) {
            join(target, from, from + tile, std::min(2 * piece, cols.target - 2 * col));
          } else {
            copy(target, cols.phases, from, 1, std::min(piece, valid - col));
          }
        }
      }
      done += piece;
      col += piece;
      if (col == pitch) {
        col = 0;
        ++row;
      }
    }
  }
}

template <typename S, typename T, int C = kTileChannels, typename... Args>
INLINE void conv_block_of(int64_t channels, bool pairs, Args&&... args) {
  if constexpr (C > 1) {
    if (channels < C) {
      return conv_block_of<S, T, C - 1>(channels, pairs, args...);
    }
  }
  if (pairs) {
    conv_block<S, T, C, 2>(args...);
  } else {
    conv_block<S, T, C, 1>(args...);
  }
}

// Tasks [begin, end): blocks of rows of the samples of the groups.
template <typename S, typename T>
void convolve(const ConvPlan& plan, const ConvArgs& args, int64_t begin, int64_t end,
              Arena arena) {
  const ConvScratch<T> scratch = ConvScratch<T>::lay_out(arena, plan);
  const Gather& rows = plan.layout.rows;
  const bool pairs = plan.layout.cols.phases == 2;
  const int64_t taps = plan.kernel * plan.kernel;
  int64_t packed_group = -1;
  const auto group_of = [&](int64_t task) { return task / (plan.blocks * plan.batch); };
  const auto sample_of = [&](int64_t task) { return task / plan.blocks % plan.batch; };
  const auto row_of = [&](int64_t task) {
    return plan.begin + task % plan.blocks * plan.block_rows;
  };
  // Register tiles times taps of a block, about.
  const int64_t steps = std::max<int64_t>(
      1, plan.block_rows * plan.layout.pitch * taps * num_pieces(plan.targets) /
             (kTileWidth[kTileChannels] * Simd<T>::lanes));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = group_of(task);
    const int64_t sample = sample_of(task);
    const int64_t first = row_of(task);
    const int64_t last = std::min(first + plan.block_rows, plan.end);
    if (group != packed_group) {
      pack_weight<S, T>(plan, args, group, scratch);
      packed_group = group;
    }
    pack<S, T>(plan.layout, args.source, args.source_bias, sample, group * plan.sources,
               plan.sources, first, last - first, scratch.source);
    Ahead ahead;
    if (task + 1 < end) {
      ahead = Ahead::of<S>(plan.layout, args.source, sample_of(task + 1),
                           group_of(task + 1) * plan.sources, plan.sources, row_of(task + 1),
                           plan.block_rows, steps);
    }
    for (size_t i = 0; i < plan.phases.size(); i += pairs ? 2 : 1) {
      const ConvPlan::Phase* phase = plan.phases.data() + i;
      const int64_t count = std::min(last, rows.targets(phase->row)) - first;
      if (count <= 0) {
        continue;
      }
      for (int64_t p = 0; p < num_pieces(plan.targets); ++p) {
        const Piece piece = piece_of(plan.targets, p);
        S* to = static_cast<S*>(args.target) + sample * args.target_strides[0] +
                (group * plan.targets + piece.begin) * args.target_strides[1];
        conv_block_of<S, T>(piece.end - piece.begin, pairs, plan, phase, first, count,
                            scratch.weight + piece.begin * taps * plan.sources,
                            scratch.bias + piece.begin, to, args.target_strides, scratch,
                            &ahead);
      }
    }
  }
}

// Scratch of one thread of the gradient of the weight.
template <typename T>
struct WeightScratch {
  T* input;
  T* grad;
  T* sums;  // by input channel and tap, and output channel: a vector

  static WeightScratch lay_out(Arena& arena, const WeightPlan& plan) {
    WeightScratch scratch;
    scratch.input = arena.take<T>(plan.inputs * plan.input.channel_pitch);
    scratch.grad = arena.take<T>(kTileChannels * plan.grad.channel_pitch);
    scratch.sums = arena.take<T>(plan.offsets.size() * kTileChannels * Simd<T>::lanes);
    return scratch;
  }
};

template <typename T>
int64_t weight_scratch_bytes(const WeightPlan& plan) {
  Arena arena;
  WeightScratch<T>::lay_out(arena, plan);
  return arena.used;
}

// Adds the products of C output gradients with X shifted inputs to X x C vectors of sums.
template <typename T, int C, int X>
void dot_tile(const T* grad, int64_t pitch, const T* input, const int64_t* offsets, int64_t count,
              T* sums) {
  constexpr int lanes = Simd<T>::lanes;
  const T* from[X];
  UNROLL
  for (int x = 0; x < X; ++x) {
    from[x] = input + offsets[x];
  }
  Vec<T> sum[X][C] = {};
  for (int64_t z = 0; z < count; z += lanes) {
    Vec<T> s[X];
    UNROLL
    for (int x = 0; x < X; ++x) {
      s[x] = load(from[x] + z);
      KEEP(s[x]);
    }
    UNROLL
    for (int c = 0; c < C; ++c) {
      Vec<T> g = load(grad + c * pitch + z);
      KEEP(g);
      UNROLL
      for (int x = 0; x < X; ++x) {
        sum[x][c] += g * s[x];
      }
    }
  }
  UNROLL
  for (int x = 0; x < X; ++x) {
    UNROLL
    for (int c = 0; c < C; ++c) {
      T* total = sums + (x * C + c) * lanes;
      store<T>(total, load(total) + sum[x][c]);
    }
  }
}

template <typename T, int C, int X = kTileWidth[C], typename... Args>
INLINE void dot_tile_of(int64_t width, Args... args) {
  if constexpr (X > 1) {
    if (width < X) {
      return dot_tile_of<T, C, X - 1>(width, args...);
    }
  }
  dot_tile<T, C, X>(args...);
}

// All sums of a chunk of `count` pixels.
template <typename T, int C>
void dot_chunk(const WeightPlan& plan, const T* grad, const T* input, int64_t count, T* sums,
               Ahead* ahead) {
  const int64_t terms = static_cast<int64_t>(plan.offsets.size());
  const int64_t tiles = (terms + kTileWidth[C] - 1) / kTileWidth[C];
  for (int64_t i = 0; i < tiles; ++i) {
    ahead->step();
    const int64_t first = i * terms / tiles;
    dot_tile_of<T, C>((i + 1) * terms / tiles - first, grad, plan.grad.channel_pitch, input,
                      plan.offsets.data() + first, count, sums + first * C * Simd<T>::lanes);
  }
}

template <typename T, int C = kTileChannels, typename... Args>
INLINE void dot_chunk_of(int64_t channels, Args&&... args) {
  if constexpr (C > 1) {
    if (channels < C) {
      return dot_chunk_of<T, C - 1>(channels, args...);
    }
  }
  dot_chunk<T, C>(args...);
}

// Adds the vectors of sums to the weight, of which `to` is the first output channel, and clears
// them.
template <typename T>
void flush(const WeightPlan& plan, int64_t channels, double* to, T* sums) {
  constexpr int quads = kBytes / 16, numbers = 16 / sizeof(T);
  typedef T Quad __attribute__((vector_size(16)));
  const int64_t terms = static_cast<int64_t>(plan.offsets.size());
  const int64_t channel_size = plan.inputs * plan.kernel * plan.kernel;
  T* from = sums;
  for (int64_t n = 0; n < terms; ++n) {
    double* target = to + plan.indices.data()[n];
    for (int64_t c = 0; c < channels; ++c, from += Simd<T>::lanes, target += channel_size) {
      Quad part[quads];
      __builtin_memcpy(part, from, kBytes);
      UNROLL
      for (int half = quads / 2; half > 0; half /= 2) {
        UNROLL
        for (int i = 0; i < half; ++i) {
          part[i] += part[i + half];
        }
      }
      double total = 0;
      UNROLL
      for (int i = 0; i < numbers; ++i) {
        total += part[0][i];
      }
      *target += total;
    }
  }
  clear(sums, terms * channels * Simd<T>::lanes);
}

// Tasks [begin, end): parts of the pixels of pieces of the output channels of the groups.
template <typename S, typename T>
void differentiate_weight(const WeightPlan& plan, const WeightArgs& args, int64_t begin,
                          int64_t end, Arena arena) {
  constexpr int lanes = Simd<T>::lanes;
  const WeightScratch<T> scratch = WeightScratch<T>::lay_out(arena, plan);
  const int64_t pieces = num_pieces(plan.outputs);
  const int64_t units = plan.batch * plan.blocks;
  const int64_t channel_size = plan.inputs * plan.kernel * plan.kernel;
  const T* grad = scratch.grad + plan.grad.head;
  // Register tiles times chunks of a block, about.
  const int64_t steps = std::max<int64_t>(
      1, plan.block_rows * plan.input.pitch * static_cast<int64_t>(plan.offsets.size()) /
             (kTileWidth[kTileChannels] * kChunk * lanes));
  const auto first_unit = [&](int64_t part) { return part * units / plan.parts; };
  const auto part_of = [&](int64_t task) { return task / (pieces * plan.groups); };
  const auto group_of = [&](int64_t task) { return task / pieces % plan.groups; };
  const auto sample_of = [&](int64_t unit) { return unit / plan.blocks; };
  const auto row_of = [&](int64_t unit) {
    return plan.begin + unit % plan.blocks * plan.block_rows;
  };
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = part_of(task);
    const int64_t group = group_of(task);
    const Piece piece = piece_of(plan.outputs, task % pieces);
    const int64_t channel = group * plan.outputs + piece.begin;
    double* to =
        args.partials + (part * plan.groups * plan.outputs + channel) * channel_size;
    int64_t chunks = 0;
    for (int64_t unit = first_unit(part); unit < first_unit(part + 1); ++unit) {
      const int64_t first = row_of(unit);
      const int64_t count = std::min(plan.block_rows, plan.end - first);
      pack<S, T>(plan.input, args.input, args.input_bias, sample_of(unit), group * plan.inputs,
                 plan.inputs, first, count, scratch.input);
      pack<S, T>(plan.grad, args.grad, Map{}, sample_of(unit), channel, piece.end - piece.begin,
                 first, count, scratch.grad);
      const bool last = unit + 1 == first_unit(part + 1);
      const int64_t next_task = task + last;
      Ahead ahead;
      if (next_task < end) {
        const int64_t next = last ? first_unit(part_of(next_task)) : unit + 1;
        ahead = Ahead::of<S>(plan.input, args.input, sample_of(next),
                             group_of(next_task) * plan.inputs, plan.inputs, row_of(next),
                             plan.block_rows, steps);
      }
      const int64_t length = round_up(count * plan.input.pitch, lanes);
      for (int64_t z = 0; z < length; z += kChunk * lanes) {
        dot_chunk_of<T>(piece.end - piece.begin, plan, grad + z, scratch.input + z,
                        std::min<int64_t>(kChunk * lanes, length - z), scratch.sums, &ahead);
        if (++chunks == kChunks) {
          flush(plan, piece.end - piece.begin, to, scratch.sums);
          chunks = 0;
        }
      }
    }
    flush(plan, piece.end - piece.begin, to, scratch.sums);
  }
}

}  // namespace
}  // namespace KERNEL_ISA
}  // namespace acmix_mm
