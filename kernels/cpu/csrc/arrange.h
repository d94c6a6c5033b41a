// 1x1: the entries of a few rows, arranged in the order in which the kernels of elements.h read them. `other` is by slot
// here, as the topology stores it (Index in kernels/contract.py).
#pragma once
#include "pack.h"

namespace {

constexpr int SLOTS_AHEAD = 32;  // entries by which a slot is prefetched: blocks that have moved lie anywhere

// Prefetch a number of a list that may be shorter.
INLINE void prefetch_number(const void *list, int32_t number) {
  __builtin_prefetch((const void *)(uintptr_t(list) + uint32_t(number) * uintptr_t(4)), 0, 3);
}

constexpr int SHORT = 64;  // entries: the lengths of longer runs do not matter

struct Run {        // the entries of one row in one chunk
  int32_t first, count;
  int32_t row;      // within its strip
};

// The entries of a piece in the order (strip, chunk, row); the buffers are scratch, which all threads share.
struct Arranged {
  Run *runs;            // those of a (strip, chunk) by length, so that the kernel's loops are predicted
  int32_t *ends;        // of each (strip, chunk) in `runs`
  float *number;        // by entry: the weight, or by entry in the order of the runs: its gradient
  int32_t *slot;        // by entry, for the gradient
  uint16_t *feature;    // by entry: the feature within its chunk
};

INLINE Arranged arranged_in(float *scratch, const ElementPlan &plan, bool gradient) {
  Arranged a;
  a.runs = (Run *)scratch;
  a.ends = (int32_t *)(a.runs + plan.strips * plan.strip * plan.chunks);
  a.number = (float *)a.ends + plan.strips * plan.chunks;
  a.slot = (int32_t *)(a.number + plan.entries);
  a.feature = (uint16_t *)(a.slot + (gradient ? plan.entries : 0));
  return a;
}

// The rows of a piece, and their strips.
struct Piece {
  int64_t start, stop, strips;
};

INLINE Piece piece_from(int64_t start, const Order &order, const ElementPlan &plan) {
  const int64_t rows = plan.strips * plan.strip, stop = start + rows < order.rows ? start + rows : order.rows;
  return {start, stop, blocks_of(stop - start, plan.strip)};
}

// One strip of a piece.
struct Strip {
  int64_t r0, rows;
  int64_t entry;   // the first of it in the piece
  const Run *runs;
  const int32_t *ends;
};

INLINE Strip strip_of(const Piece &piece, int64_t number, const Order &order, const ElementPlan &plan, const Arranged &a) {
  const int64_t r0 = piece.start + number * plan.strip, left = piece.stop - r0;
  return {r0, left < plan.strip ? left : plan.strip, order.ptr[r0] - order.ptr[piece.start],
          a.runs + number * plan.strip * plan.chunks, a.ends + number * plan.chunks};
}

// Arrange a strip. Columns ascend within a row, so the entries of a chunk follow each other. The gradient notes slots, the
// product values. Each entry is read once; returns false if one is illegal or columns do not ascend, and then nothing may be
// computed. Goes chunk by chunk: in an order by column the slots of a row are far apart, and those of the neighbouring rows
// beside them. `mine` are two numbers for each row of a strip.
template <bool GRADIENT>
NOINLINE bool arrange(const Order &order, const Strip &strip, const ElementPlan &plan, const Arranged &a, const float *values, int32_t *mine) {
  const int32_t *__restrict slots = order.slot, *__restrict other = order.other;
  uint16_t *__restrict feature = a.feature;
  float *__restrict number = a.number;
  int32_t *__restrict noted = a.slot;
  const int32_t used = order.ptr[order.rows];
  const uint32_t all = uint32_t(order.slots);
  int32_t *next = mine, *counts = mine + plan.strip;  // by row: the next entry; the entries in the chunk
  Run *run = (Run *)strip.runs;
  int32_t *end = (int32_t *)strip.ends, n = int32_t(strip.entry);
  const int64_t rows = strip.rows, r0 = strip.r0;
  for (int64_t r = 0; r < rows; r++) next[r] = order.ptr[r0 + r];
  for (int64_t c = 0; c < plan.chunks; c++) {
    const int32_t begin = int32_t(c << plan.shift);
    const uint32_t wide = c + 1 < plan.chunks ? uint32_t(1) << plan.shift : uint32_t(order.others) - uint32_t(begin);
    const int32_t before = n;
    int32_t starts[SHORT + 2] = {};  // of the runs of each length; all long ones count as one length
    for (int64_t r = 0; r < rows; r++) {
      int32_t e = next[r];
      const int32_t last = order.ptr[r0 + r + 1], first = n;
      for (; e < last; e++, n++) {
        const uint32_t slot = uint32_t(slots[e]);
        const int32_t far = slots[e + SLOTS_AHEAD < used ? e + SLOTS_AHEAD : e];
        prefetch_number(other, far);
        if (!GRADIENT) prefetch_number(values, far);
        if (slot >= all) return false;
        const uint32_t column = uint32_t(other[slot]) - uint32_t(begin);
        if (column >= wide) {  // of a later chunk, or of none
          __builtin_prefetch(slots + e + LINE, 0, 3);
          __builtin_prefetch(other + slot + LINE, 0, 3);
          if (!GRADIENT) __builtin_prefetch(values + slot, 0, 3), __builtin_prefetch(values + slot + LINE, 0, 3);
          break;
        }
        feature[n] = uint16_t(column);
        if (GRADIENT) noted[n] = int32_t(slot);
        else number[n] = values[slot];
      }
      next[r] = e;
      const int32_t count = counts[r] = n - first;
      starts[(count < SHORT ? count : SHORT) + 1]++;
    }
    const int32_t empty = starts[1];
    starts[1] = 0;
    for (int i = 1; i <= SHORT; i++) starts[i + 1] += starts[i];
    int32_t first = before;
    for (int64_t r = 0; r < rows; r++) {
      const int32_t count = counts[r];
      if (count) run[starts[count < SHORT ? count : SHORT]++] = {first, count, int32_t(r)};
      first += count;
    }
    run += rows - empty;
    *end++ = int32_t(run - a.runs);
  }
  for (int64_t r = 0; r < rows; r++)
    if (next[r] != order.ptr[r0 + r + 1]) return false;
  return true;
}

// Arrange a piece; the gradient's numbers become zero. Called by all threads. Returns whether all entries so far are legal:
// the same to each thread.
template <bool GRADIENT>
INLINE bool arrange_piece(const Order &order, const Piece &piece, const ElementPlan &plan, const Arranged &a, const float *values, int32_t *mine) {
#pragma omp for schedule(dynamic, 1)
  for (int64_t s = 0; s < piece.strips; s++) {
    const Strip strip = strip_of(piece, s, order, plan, a);
    if (!arrange<GRADIENT>(order, strip, plan, a, values, mine)) refuse(order);
    if (GRADIENT) std::memset(a.number + strip.entry, 0, (order.ptr[strip.r0 + strip.rows] - order.ptr[strip.r0]) * 4);
  }
  return !__atomic_load_n(order.illegal, __ATOMIC_RELAXED);
}

}  // namespace
