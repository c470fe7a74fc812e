// How one grouped convolution is laid out; shared by all instruction sets.
//
// A block of rows is packed flat: a channel's rows lie one after the other, with zeros between that
// are right border of one row and left border of the next. Then a tap of the kernel is one offset,
// the same for all pixels of the block, and vectors run over the ends of rows: maps narrower than a
// vector keep all lanes busy. Only results at the zeros between the rows are thrown away.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "native.h"

namespace acmix_mm {

// Channels of a register tile.
constexpr int64_t kTileChannels = 4;
// Into how many tasks a convolution is divided at least, where it is large enough.
constexpr int64_t kTasks = 64;

// Channels [begin, end) of the i-th of the fewest even pieces of at most kTileChannels.
struct Piece {
  int64_t begin, end;
};

inline int64_t num_pieces(int64_t channels) {
  return (channels + kTileChannels - 1) / kTileChannels;
}

inline Piece piece_of(int64_t channels, int64_t i) {
  const int64_t pieces = num_pieces(channels);
  return {i * channels / pieces, (i + 1) * channels / pieces};
}

// Tap `index` of the kernel, for target t of its phase, sees element t + shift of slot `slot`.
struct Tap {
  int64_t index, slot, shift;
};

// What the targets of a convolution see along one spatial axis. Target t of a phase is position
// t * phases + phase. Element e of a slot is source position e * step + residue.
struct Gather {
  int64_t source, target, step, phases;
  int64_t positions;                   // targets of the largest phase; no slot has more elements
  int64_t before = 0, after = 0;       // how far taps reach beyond the positions
  std::vector<int64_t> residues;       // by slot
  std::vector<std::vector<Tap>> taps;  // by phase

  // Output pixels from the input, or the gradient of input pixels from that of the output.
  Gather(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, bool transposed) {
    // Larger strides and dilations see the same: one output, and the middle tap only.
    stride = std::min(stride, size);
    dilation = std::min(dilation, size);
    positions = (size + stride - 1) / stride;
    source = transposed ? positions : size;
    target = transposed ? size : positions;
    step = transposed ? 1 : stride;
    phases = transposed ? stride : 1;
    taps.resize(phases);
    for (int64_t index = 0; index < kernel; ++index) {
      const int64_t reach = (index - kernel / 2) * dilation;  // input position - stride * output's
      if (!transposed) {
        const int64_t residue = (reach % stride + stride) % stride;
        add(0, index, residue, (reach - residue) / stride);
      } else {
        const int64_t phase = (reach % stride + stride) % stride;
        add(phase, index, 0, (phase - reach) / stride);
      }
    }
  }

  int64_t targets(int64_t phase) const { return (target - phase + phases - 1) / phases; }
  int64_t elements(int64_t slot) const { return (source - residues[slot] + step - 1) / step; }
  int64_t slots() const { return static_cast<int64_t>(residues.size()); }
  int64_t reach() const { return std::max(before, after); }

 private:
  // Taps that see only zeros are left out.
  void add(int64_t phase, int64_t index, int64_t residue, int64_t shift) {
    const int64_t count = (source - residue + step - 1) / step;
    if (shift + targets(phase) <= 0 || shift >= count) {
      return;
    }
    const auto found = std::find(residues.begin(), residues.end(), residue);
    taps[phase].push_back({index, found - residues.begin(), shift});
    if (found == residues.end()) {
      residues.push_back(residue);
    }
    before = std::max(before, -shift);
    after = std::max(after, shift);
  }
};

// A block of rows of several channels, packed.
struct Layout {
  Gather rows, cols;
  int64_t pitch;      // elements from row to row
  int64_t head;       // from the start of a slot to its first row
  int64_t tail;       // after its last row: a vector that starts in the block may end here
  int64_t slot_pitch;
  int64_t channel_pitch;

  Layout(const Gather& rows_, const Gather& cols_, int64_t pitch_, int64_t block_rows,
         int64_t lanes, int64_t line)
      : rows(rows_), cols(cols_), pitch(pitch_) {
    head = round_up(cols.before, line);
    tail = lanes + cols.after;
    slot_pitch = round_up(
        head + (rows.before + block_rows + rows.after) * pitch + tail, line);
    channel_pitch = spread(rows.slots() * cols.slots() * slot_pitch, line);
  }

  // From the start of a channel to what the tap sees for the block's first target.
  int64_t offset(const Tap& row, const Tap& col) const {
    return (row.slot * cols.slots() + col.slot) * slot_pitch + head +
           (rows.before + row.shift) * pitch + col.shift;
  }
};

// Rows of a block: as many as a second-level cache holds comfortably, but enough blocks for many
// threads. The division does not depend on the number of threads, lest sums do.
inline int64_t choose_block_rows(int64_t positions, const Gather& rows, const Gather& cols,
                                 int64_t planes, int64_t channels, int64_t size) {
  constexpr int64_t kCache = 128 << 10;
  const int64_t slots = rows.slots() * cols.slots();
  const int64_t row_bytes = channels * slots * (cols.positions + cols.reach()) * size;
  const int64_t halo = rows.before + rows.after;
  const int64_t least = std::max<int64_t>(4, 2 * halo);
  const int64_t pieces = (kTasks + planes - 1) / planes;
  int64_t count = std::max(least, (positions + pieces - 1) / pieces);
  count = std::min(count, std::max(halo + 1, kCache / row_bytes - halo));
  const int64_t blocks = (positions + count - 1) / count;
  return (positions + blocks - 1) / blocks;
}

struct ConvShape {
  int64_t batch, groups, inputs, outputs;  // channels of one group
  int64_t height, width, kernel, stride, dilation;
  int64_t begin, end;  // what of the rows' positions is computed, see Gather
};

// Convolution of `sources` channels to `targets` channels in every group: the convolution itself,
// or its gradient with respect to the input.
struct ConvPlan {
  // One lattice of targets, and the taps that it sees.
  struct Phase {
    int64_t row, col;
    std::vector<int64_t> offsets, indices;
  };

  int64_t batch, groups, sources, targets, kernel, begin, end, block_rows, blocks, tasks;
  Layout layout;
  std::vector<Phase> phases;

  ConvPlan(const ConvShape& shape, bool transposed, int64_t lanes, int64_t line)
      : ConvPlan(shape, transposed, lanes, line,
                 {shape.height, shape.kernel, shape.stride, shape.dilation, transposed},
                 {shape.width, shape.kernel, shape.stride, shape.dilation, transposed}) {}

 private:
  ConvPlan(const ConvShape& shape, bool transposed, int64_t lanes, int64_t line,
           const Gather& rows, const Gather& cols)
      : batch(shape.batch),
        groups(shape.groups),
        sources(transposed ? shape.outputs : shape.inputs),
        targets(transposed ? shape.inputs : shape.outputs),
        kernel(shape.kernel),
        begin(shape.begin),
        end(shape.end),
        block_rows(choose_block_rows(end - begin, rows, cols, batch * groups,
                                     std::max(sources, targets), 64 / line)),
        blocks((end - begin + block_rows - 1) / block_rows),
        tasks(batch * groups * blocks),
        layout(rows, cols, cols.positions + cols.reach(), block_rows, lanes, line) {
    for (int64_t row = 0; row < rows.phases; ++row) {
      for (int64_t col = 0; col < cols.phases; ++col) {
        Phase phase{row, col, {}, {}};
        for (const Tap& p : rows.taps[row]) {
          for (const Tap& q : cols.taps[col]) {
            phase.offsets.push_back(layout.offset(p, q));
            phase.indices.push_back(p.index * kernel + q.index);
          }
        }
        phases.push_back(std::move(phase));
      }
    }
  }
};

// Gradient of the weight: products of output gradients with inputs, summed over the pixels.
struct WeightPlan {
  int64_t batch, groups, inputs, outputs, kernel, begin, end, block_rows, blocks;
  int64_t parts;  // the pixels of a group are divided among so many tasks
  Layout input, grad;
  std::vector<int64_t> offsets, indices;  // by input channel and tap: in `input`, in the weight

  WeightPlan(const ConvShape& shape, int64_t lanes, int64_t line)
      : WeightPlan(shape, lanes, line,
                   {shape.height, shape.kernel, shape.stride, shape.dilation, false},
                   {shape.width, shape.kernel, shape.stride, shape.dilation, false}) {}

 private:
  WeightPlan(const ConvShape& shape, int64_t lanes, int64_t line, const Gather& rows,
             const Gather& cols)
      : batch(shape.batch),
        groups(shape.groups),
        inputs(shape.inputs),
        outputs(shape.outputs),
        kernel(shape.kernel),
        begin(shape.begin),
        end(shape.end),
        block_rows(choose_block_rows(end - begin, rows, cols, batch * groups, inputs, 64 / line)),
        blocks((end - begin + block_rows - 1) / block_rows),
        input(rows, cols, cols.positions + cols.reach(), block_rows, lanes, line),
        grad(Gather(rows.positions, 1, 1, 1, false), Gather(cols.positions, 1, 1, 1, false),
             input.pitch, block_rows, lanes, line) {
    constexpr int64_t kPartials = 4 << 20;
    const int64_t numbers = groups * outputs * inputs * kernel * kernel;
    parts = std::min((kTasks + groups - 1) / groups, std::max<int64_t>(1, kPartials / numbers));
    parts = std::min(parts, batch * blocks);
    for (const Tap& p : rows.taps[0]) {
      for (int64_t channel = 0; channel < inputs; ++channel) {
        for (const Tap& q : cols.taps[0]) {
          offsets.push_back(channel * input.channel_pitch + input.offset(p, q));
          indices.push_back((channel * kernel + p.index) * kernel + q.index);
        }
      }
    }
  }
};

struct ConvArgs {
  Map source, source_bias, weight, bias;  // the data of biases may be null
  void* target;              // has adjacent columns
  int64_t target_strides[3];
  // Strides of the weight by group, target channel and source channel.
  int64_t by_group, by_target, by_source;
};

struct WeightArgs {
  Map grad, input, input_bias;  // the bias's data may be null
  double* partials;  // zeros: parts, then a weight
};

}  // namespace acmix_mm
