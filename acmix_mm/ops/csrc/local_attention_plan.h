// How one call of neighbourhood attention is laid out; shared by all instruction sets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "native.h"

namespace acmix_mm {

// Position outside [0, size) -> position inside, by repeated reflection at the border pixels.
inline int64_t reflect(int64_t position, int64_t size) {
  if (size == 1) {
    return 0;
  }
  const int64_t period = 2 * (size - 1);
  position = ((position % period) + period) % period;
  return std::min(position, period - position);
}

// One spatial axis. Queries phase, phase + phases, ... see keys of one lattice: the neighbourhood
// of the t-th of them is keys t * step + 0 .. kernel - 1 of the keys `key(phase, .)`.
struct Axis {
  int64_t size, queries, kernel, stride, dilation, before, phases, step;
  bool zeros;  // beyond the border, in place of the map reflected

  Axis(int64_t size_, int64_t kernel_, int64_t stride_, int64_t dilation_, bool zeros_ = false)
      : size(size_), kernel(kernel_), stride(std::min(stride_, size_)), zeros(zeros_) {
    queries = (size + stride - 1) / stride;
    // Reflection is periodic, and zeros are zeros: a larger dilation only wastes scratch.
    const int64_t period = std::max<int64_t>(1, 2 * (size - 1));
    dilation = zeros ? std::min(dilation_, size) : (dilation_ - 1) % period + 1;
    before = kernel / 2 * dilation;
    phases = dilation / std::gcd(dilation, stride);
    step = stride / std::gcd(dilation, stride);
  }

  // Where a position of the padded axis comes from; -1 is a zero.
  int64_t source(int64_t position) const {
    if (zeros) {
      return 0 <= position && position < size ? position : -1;
    }
    return reflect(position, size);
  }

  int64_t key(int64_t phase, int64_t index) const {
    return source(phase * stride + index * dilation - before);
  }
};

// With 32 registers, three query rows share what is loaded of a key row; with 16, two.
constexpr int64_t max_group_rows(int64_t vector_bytes) { return vector_bytes == 64 ? 3 : 2; }

// Query rows that share key rows and are worked off together.
struct Group {
  int64_t phase, first, count;
};

// From begin on, before end.
struct Span {
  int64_t begin, end;
};

struct Plan {
  int64_t planes, heads, dim;
  double scale;
  Axis rows, cols;
  int64_t group_rows;  // rows of a full group
  int64_t ring_rows;   // key rows that such a group sees
  std::vector<Group> groups;

  // A packed key row holds, for each residue modulo the stride that some offset needs (a slot),
  // the keys of that residue: every offset then reads adjacent keys for adjacent queries.
  int64_t slots = 0;
  int64_t slot_length;               // keys of a slot
  int64_t slot_pitch;                // elements from slot to slot
  int64_t key_pitch, query_pitch;    // elements from channel to channel
  int64_t padded_cols;               // queries of a row, rounded up to whole vectors
  int64_t margin;                    // zeros left and right of a packed query row
  bool unit;                         // offsets of adjacent keys are adjacent
  std::vector<int64_t> slot, shift;  // by offset: its slot, and where query 0 sees its key there
  std::vector<int64_t> offset;       // both in one: slot * slot_pitch + shift
  std::vector<int64_t> source;       // by slot and key: column of the map
  std::vector<Span> inside;          // by slot: its keys that lie within the map, if many
  std::vector<int64_t> blanks;       // packed keys that are zeros, with some column as source

  // Of query rows [begin, end).
  Plan(int64_t planes_, int64_t heads_, int64_t dim_, double scale_, const Axis& rows_,
       const Axis& cols_, int64_t begin, int64_t end, int64_t lanes, int64_t line)
      : planes(planes_), heads(heads_), dim(dim_), scale(scale_), rows(rows_), cols(cols_) {
    // So few that some key row is seen by all of them.
    group_rows = std::min(max_group_rows(64 * lanes / line), (rows.kernel - 1) / rows.step + 1);
    ring_rows = rows.kernel + (group_rows - 1) * rows.step;
    for (int64_t phase = 0; phase < std::min(rows.phases, rows.queries); ++phase) {
      const int64_t last = (end - phase + rows.phases - 1) / rows.phases;
      int64_t first = (begin - phase + rows.phases - 1) / rows.phases;
      for (; first < last; first += group_rows) {
        groups.push_back({phase, first, std::min(group_rows, last - first)});
      }
    }

    std::vector<int64_t> residues;
    for (int64_t j = 0; j < cols.kernel; ++j) {
      const int64_t residue = j * cols.dilation % cols.stride;
      const auto found = std::find(residues.begin(), residues.end(), residue);
      slot.push_back(found - residues.begin());
      shift.push_back(j * cols.dilation / cols.stride);
      if (found == residues.end()) {
        residues.push_back(residue);
      }
    }
    slots = static_cast<int64_t>(residues.size());
    padded_cols = round_up(cols.queries, lanes);
    margin = line;
    slot_length = cols.queries + shift.back();
    slot_pitch = round_up(padded_cols + shift.back(), line);
    key_pitch = spread(slots * slot_pitch, line);
    query_pitch = spread(margin + round_up(cols.queries, line) + margin, line);
    unit = cols.stride == 1 && cols.dilation == 1;
    // What the backward pass holds of rings and queries, more or less.
    const double numbers =
        4. * ring_rows * dim * key_pitch +
        2. * group_rows * query_pitch * (dim + static_cast<double>(rows.kernel) * cols.kernel);
    TORCH_CHECK(numbers <= kMaxScratch, "kernel_size, stride, dilation and columns of key must ",
                "be smaller, got ", rows.kernel, ", ", cols.stride, ", ", cols.dilation, " and ",
                cols.size, ": packed rows of keys and weights would have ", numbers, " numbers");
    for (int64_t j = 0; j < cols.kernel; ++j) {
      offset.push_back(slot[j] * slot_pitch + shift[j]);
    }
    for (int64_t u = 0; u < slots; ++u) {
      for (int64_t z = 0; z < slot_length; ++z) {
        const int64_t column = cols.source(z * cols.stride + residues[u] - cols.before);
        source.push_back(std::max<int64_t>(column, 0));
        if (column < 0) {
          blanks.push_back(u * slot_pitch + z);
        }
      }
      // Keys z with 0 <= z * stride - before < size, where before is:
      const int64_t before = cols.before - residues[u];
      const int64_t begin = std::max<int64_t>(before + cols.stride - 1, 0) / cols.stride;
      const int64_t end = std::min((before + cols.size - 1) / cols.stride + 1, slot_length);
      // Of short rows all keys may be gathered as well.
      inside.push_back(end - begin >= lanes ? Span{begin, end} : Span{0, 0});
    }
  }

  int64_t query_row(const Group& group, int64_t row) const {
    return group.phase + (group.first + row) * rows.phases;
  }
};

// Into how many row blocks a backward pass cuts the rows of a plane: as few as keep all threads
// busy, since queries near a cut are computed twice.
inline int64_t row_blocks(const Plan& plan, int64_t rows) {
  const int64_t threads = at::get_num_threads();
  const int64_t even = threads / std::gcd(plan.planes, threads);
  const int64_t enough = 2 * ((threads + plan.planes - 1) / plan.planes);
  return plan.planes >= 4 * threads ? 1 : std::min({even, enough, rows});
}

// A (B, N, d, rows, columns) tensor with adjacent columns, to write or to add to.
struct Target {
  void* data;
  int64_t strides[5];
  bool add;
};

struct ForwardArgs {
  Map query, key, value;
  const void* query_bias;  // (N, d) of the compute type or null: added to queries
  const void* slopes;      // (d, 2) of the compute type or null: keys lose slopes . (x, y)
  const void* factor;      // (N, d) of the compute type or null: on the output
  Target output, lse;  // lse has no channels
};

struct BackwardArgs {
  Map grad, query, key, value, lse;
  const void* query_bias;
  const void* slopes;
  double factor;  // on the output, of all channels
  Target grad_query;
  Target grad_key, grad_value;  // to add to, of the compute type
  double* slope_sums;           // (d, 2) of each task, to add to; null without slopes
  double* factor_sums;          // of each task, to add to
};

// Position of a row or column on the axis: linspace(-1, 1, size)[index].
inline double coordinate(int64_t index, int64_t size) {
  return size == 1 ? -1. : -1. + 2. * static_cast<double>(index) / static_cast<double>(size - 1);
}

}  // namespace acmix_mm
