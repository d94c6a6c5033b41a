// 1x1: arranges the entries of a convolution in the order in which they are read (ElementRuns of conv.h). Compiled for the
// baseline. The chunks follow from shape and topology alone, not from the threads: they change how a sum is formed.
#pragma once
#include "conv_plan.h"

namespace {

constexpr int64_t MOST_CHUNKS = 64;

// The arrangement of lists: `rows` of them in each subgrid.
struct RunsPlan {
  int64_t subgrids, rows, used;
  int64_t most = 0;  // entries of the longest strip
  int shift = 3;     // of a channel to its chunk
  int64_t chunks = 1;

  // `first`: where the entries of each row begin, and the end. `lanes`: numbers of a channel that one tile of outputs reads.
  RunsPlan(int64_t subgrids, int64_t rows, const int32_t *first, int64_t channels, int64_t groups, int64_t lanes)
      : subgrids(subgrids), rows(rows), used(first[subgrids * rows]) {
    constexpr int64_t IN_L1 = 6656, RUN = 8;  // floats: 26 KiB
    const double density = double(used) / (double(rows) * subgrids * channels / groups);  // entries of a row, a channel
    while (shift < 16 && (lanes << (shift + 1)) <= IN_L1) shift++;
    while (shift < 16 && density * (int64_t(1) << shift) < RUN) shift++;
    while (blocks_of(channels, int64_t(1) << shift) > MOST_CHUNKS) shift++;
    chunks = blocks_of(channels, int64_t(1) << shift);
    for (int64_t q = 0; q < subgrids; q++)
      for (int64_t r = 0; r < rows; r += STRIP)
        most = std::max<int64_t>(most, first[q * rows + std::min(r + STRIP, rows)] - first[q * rows + r]);
  }

  int64_t strips() const { return blocks_of(rows, STRIP); }
  int64_t starts() const { return subgrids * strips() * chunks * STRIP; }
  int64_t lists(bool gradient) const { return round_up(starts() + 1, LINE) + (gradient ? 3 : 2) * round_up(used, LINE); }
  int64_t floats(bool gradient, int threads) const {
    return lists(gradient) + round_up(threads * most * int64_t(sizeof(NotedEntry) / sizeof(float)), LINE);
  }

  ElementRuns in(float *scratch, bool gradient) const {
    ElementRuns r = {};
    r.chunks = chunks, r.start = (int32_t *)scratch, r.offset = r.start + round_up(starts() + 1, LINE);
    r.number = (float *)r.offset + round_up(used, LINE);
    r.slot = gradient ? (int32_t *)r.number + round_up(used, LINE) : nullptr;
    r.noted = (NotedEntry *)(scratch + lists(gradient));
    return r;
  }
};

// Arrange the entries. Row r of subgrid q has those from first[q * rows + r] on: each(q, r, f) calls f(channel, offset, slot)
// for them, reading each once, or returns false if one is illegal. A strip is counted and then written from a copy that only
// its thread sees. The product notes values, the gradient slots.
template <bool GRADIENT, class Each>
bool arrange_runs(const RunsPlan &p, const ElementRuns &runs, const int32_t *first, const float *values, int threads, const Each &each) {
  const int64_t strips = p.strips(), count = p.chunks * STRIP;
  int32_t illegal = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < p.subgrids * strips; i++) {
    const int64_t q = i / strips, r0 = i % strips * STRIP;
    const int64_t rows = p.rows - r0 < STRIP ? p.rows - r0 : STRIP;
    NotedEntry *const noted = runs.noted + thread_number() * p.most, *to = noted;
    int32_t next[MOST_CHUNKS * STRIP] = {}, at = first[q * p.rows + r0];
    const int shift = p.shift;
    bool legal = true;
    for (int64_t l = 0; l < rows && legal; l++) {
      legal = each(q, r0 + l, [&](int64_t channel, int32_t offset, int32_t slot) {
        const int32_t cell = int32_t((channel >> shift) * STRIP + l);
        next[cell]++;
        to->cell = cell, to->offset = offset;
        if (GRADIENT) to->slot = slot;
        else to->number = values[slot];
        to++;
      });
    }
    if (!legal) {
      __atomic_store_n(&illegal, 1, __ATOMIC_RELAXED);
      continue;
    }
    for (int64_t k = 0; k < count; k++) {
      const int32_t entries = next[k];
      runs.start[i * count + k] = next[k] = at, at += entries;
    }
    const ElementRuns out = runs;
    for (const NotedEntry *n = noted; n < to; n++) {
      const int32_t e = next[n->cell]++;
      out.offset[e] = n->offset;
      if (GRADIENT) out.slot[e] = n->slot;
      else out.number[e] = n->number;
    }
  }
  runs.start[p.starts()] = int32_t(p.used);
  return !illegal;
}

// Read a number that another thread may write, so that what is checked is what is used. With an atomic load the compiler
// reloads everything else around it.
inline int32_t read_once(const int32_t *number) { return *(const volatile int32_t *)number; }

// Entries by row of the weight.
struct ForwardEntries {
  const Conv &c;
  const int64_t col_blocks, row_blocks, plane;
  std::vector<int32_t> pixel, block;  // by column of the weight

  ForwardEntries(const Conv &c, const Packing &p, const Axis &rows, const Axis &cols)
      : c(c), col_blocks(c.in_channels / c.groups), row_blocks(c.out_channels / c.groups), plane(p.plane) {
    for (int64_t i = 0; i < c.kernel[0]; i++) {
      for (int64_t j = 0; j < c.kernel[1]; j++) {
        const Tap tap = tap_of(p, rows, cols, i, j);
        for (int64_t b = 0; b < col_blocks; b++) pixel.push_back(int32_t(tap.pixel + b * plane)), block.push_back(int32_t(b));
      }
    }
  }

  template <class F> bool operator()(int64_t, int64_t r, const F &f) const {
    const int64_t before = r / row_blocks * col_blocks;
    const Order order = c.order;
    const int32_t *const blocks = block.data(), *const pixels = pixel.data(), first_pixel = int32_t(before * plane);
    for (int64_t e = order.ptr[r], last = order.ptr[r + 1]; e < last; e++) {
      const int32_t slot = read_once(order.slot + e);
      if (!inside(slot, order.slots)) return false;
      const int32_t column = read_once(order.other + slot);
      if (!inside(column, order.others)) return false;
      f(before + blocks[column], pixels[column] + first_pixel, slot);
    }
    return true;
  }
};

// Entries by input channel, in each phase of the stride: those of its taps, one after the other.
struct BackwardEntries {
  const Conv &c;
  const int64_t col_blocks, row_blocks, plane;
  std::vector<std::vector<std::pair<int64_t, int32_t>>> taps;  // of each phase: the number of the tap, where it begins
  std::vector<int32_t> first;
  bool legal = true;  // false: do not call it

  BackwardEntries(const Conv &c, const Packing &p, const Axis &rows, const Axis &cols)
      : c(c), col_blocks(c.in_channels / c.groups), row_blocks(c.out_channels / c.groups), plane(p.plane),
        taps(rows.from.size() * cols.from.size()) {
    for (int64_t i = 0; i < c.kernel[0]; i++)
      for (int64_t j = 0; j < c.kernel[1]; j++)
        taps[rows.phase[i] * cols.from.size() + cols.phase[j]].emplace_back(i * c.kernel[1] + j, int32_t(tap_of(p, rows, cols, i, j).pixel));
    first.reserve(taps.size() * c.in_channels + 1);
    const int64_t used = c.order.ptr[c.order.rows];
    int64_t at = 0;
    for (const auto &of_phase : taps) {
      for (int64_t r = 0; r < c.in_channels; r++) {
        first.push_back(int32_t(at));
        for (const auto &tap : of_phase) {
          const auto range = entries(tap.first, r);
          at = std::min(at + range.second - range.first, used + 1);
        }
      }
    }
    first.push_back(int32_t(at));
    legal = at == used;
  }

  // The entries of a channel and a tap. Groups share the columns of the weight, in which rows ascend.
  std::pair<int64_t, int64_t> entries(int64_t tap, int64_t r) const {
    const int64_t column = tap * col_blocks + r % col_blocks, group = r / col_blocks;
    const int32_t *slots = c.order.slot;
    const auto row_from = [&](int64_t row) {
      return std::partition_point(slots + c.order.ptr[column], slots + c.order.ptr[column + 1],
                                  [&](int32_t slot) { return inside(slot, c.order.slots) && c.order.other[slot] < row; }) - slots;
    };
    if (c.groups == 1) return {c.order.ptr[column], c.order.ptr[column + 1]};
    const int64_t first_entry = row_from(group * row_blocks);
    return {first_entry, std::max<int64_t>(row_from((group + 1) * row_blocks), first_entry)};
  }

  template <class F> bool operator()(int64_t q, int64_t r, const F &f) const {
    const Order order = c.order;
    const int32_t *begin = first.data() + q * c.in_channels + r, pitch = int32_t(plane);
    int64_t left = begin[1] - begin[0];  // with groups the lists are searched again and may have changed
    for (const auto &tap : taps[q]) {
      const auto range = entries(tap.first, r);
      left -= range.second - range.first;
      if (left < 0) return false;
      const int32_t at_tap = tap.second;
      for (int64_t e = range.first; e < range.second; e++) {
        const int32_t slot = read_once(order.slot + e);
        if (!inside(slot, order.slots)) return false;
        const int32_t row = read_once(order.other + slot);
        if (!inside(row, order.others)) return false;
        f(row, at_tap + row * pitch, slot);
      }
    }
    return left == 0;
  }
};

// Numbers of a channel that a tile of outputs reads, in all views, with the rows around it. Rows of images in turn are long.
int64_t lanes_read(const Packing &p, const Axis &rows, const Axis &cols, int64_t tile, bool in_turn) {
  const int64_t wide = in_turn ? tile / 2 : cols.outputs() + cols.reach;
  return p.row_views * p.col_views * (tile + rows.reach * wide + cols.reach);
}

}  // namespace
