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

constexpr int32_t DISTANT = 1 << 20;  // entries from which on their lists leave the caches, and are prefetched

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

// Where take_values() and take_slots() read the entries of a strip, and where they note them.
struct Lists {
  const int32_t *__restrict slots, *__restrict other;
  const float *__restrict values;
  const int32_t *__restrict columns;  // of the gradient's entries, in their order
  uint16_t *__restrict feature;
  float *__restrict number;
  int32_t *__restrict noted;
  uint32_t all;      // slots
  int32_t used;      // entries of the order
  bool distant;      // the lists do not stay in a cache
};

#if VL == 16
INLINE __mmask16 mask_of(int64_t count) { return count < 16 ? __mmask16((1 << count) - 1) : __mmask16(-1); }

// The lanes before the first one that is not set.
INLINE int32_t leading(__mmask16 lanes) { return __builtin_ctz(~uint32_t(lanes)); }
#endif

// Note from n on the entries of a row in [e, last) whose columns lie in [begin, begin + wide). Columns ascend within a row, so
// these are the first ones. Returns how many; an illegal slot ends them, too.
INLINE int32_t take_values(const Lists &l, int32_t e, int32_t last, uint32_t begin, uint32_t wide, int64_t n) {
  const int32_t start = e;
#if VL == 16
  // Slots that were never moved follow each other in the order by row. Others are read one by one: gathers are slower.
  const __m512i count_up = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i from = _mm512_set1_epi32(int32_t(begin)), width = _mm512_set1_epi32(int32_t(wide));
  while (e < last) {
    const __mmask16 some = mask_of(last - e);
    const __m512i slot = _mm512_maskz_loadu_epi32(some, l.slots + e);
    const uint32_t first = uint32_t(_mm_cvtsi128_si32(_mm512_castsi512_si128(slot)));
    const __m512i expected = _mm512_add_epi32(_mm512_set1_epi32(int32_t(first)), count_up);
    if (_mm512_mask_cmpeq_epi32_mask(some, slot, expected) != some || uint64_t(first) + 16 > l.all) break;
    const __m512i column = _mm512_sub_epi32(_mm512_loadu_si512(l.other + first), from);
    const int32_t count = leading(_mm512_mask_cmplt_epu32_mask(some, column, width));
    _mm256_mask_storeu_epi16(l.feature + n, mask_of(count), _mm512_cvtepi32_epi16(column));
    _mm512_mask_storeu_ps(l.number + n, mask_of(count), _mm512_loadu_ps(l.values + first));
    e += count, n += count;
    if (count < 16) return e - start;
  }
#endif
  for (; e < last; e++, n++) {
    const uint32_t slot = uint32_t(l.slots[e]);
    if (l.distant) {
      const int32_t far = l.slots[e + SLOTS_AHEAD < l.used ? e + SLOTS_AHEAD : e];
      prefetch_number(l.other, far);
      prefetch_number(l.values, far);
    }
    if (slot >= l.all) break;
    const uint32_t column = uint32_t(l.other[slot]) - begin;
    if (column >= wide) break;
    l.feature[n] = uint16_t(column);
    l.number[n] = l.values[slot];
  }
  return e - start;
}

// The same for the gradient, which notes slots.
INLINE int32_t take_slots(const Lists &l, int32_t e, int32_t last, uint32_t begin, uint32_t wide, int64_t n) {
  const int32_t start = e;
#if VL == 16
  const __m512i from = _mm512_set1_epi32(int32_t(begin)), width = _mm512_set1_epi32(int32_t(wide));
  while (e < last) {
    const __mmask16 some = mask_of(last - e);
    const __m512i slot = _mm512_maskz_loadu_epi32(some, l.slots + e);
    const __m512i column = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(some, l.columns + e), from);
    const __mmask16 legal = _mm512_mask_cmplt_epu32_mask(some, slot, _mm512_set1_epi32(int32_t(l.all)));
    const int32_t count = leading(_mm512_mask_cmplt_epu32_mask(legal, column, width));
    _mm256_mask_storeu_epi16(l.feature + n, mask_of(count), _mm512_cvtepi32_epi16(column));
    _mm512_mask_storeu_epi32(l.noted + n, mask_of(count), slot);
    e += count, n += count;
    if (count < 16) break;
  }
#else
  for (; e < last; e++, n++) {
    const uint32_t slot = uint32_t(l.slots[e]), column = uint32_t(l.columns[e]) - begin;
    if (slot >= l.all || column >= wide) break;
    l.feature[n] = uint16_t(column);
    l.noted[n] = int32_t(slot);
  }
#endif
  return e - start;
}

// Read the columns of all entries of a strip. An illegal slot is found by take_slots(), which reads it again.
INLINE void read_columns(const Lists &l, int32_t first, int32_t last, int32_t *columns) {
  for (int32_t e = first; e < last; e++) {
    uint32_t slot = uint32_t(l.slots[e]);
    asm("" : "+r"(slot));  // or the compiler gathers
    if (l.distant) prefetch_number(l.other, l.slots[e + SLOTS_AHEAD < l.used ? e + SLOTS_AHEAD : e]);
    columns[e] = l.other[slot < l.all ? slot : 0];
  }
}

// Arrange a strip. The gradient notes slots, the product values. Each number is checked where it is read; returns false if one
// is illegal or columns do not ascend, and then nothing may be computed. Goes chunk by chunk: in an order by column the slots of a row are
// far apart, and those of the neighbouring rows beside them. `mine` are two numbers for each row of a strip.
template <bool GRADIENT>
NOINLINE bool arrange(const Order &order, const Strip &strip, const ElementPlan &plan, const Arranged &a, const float *values, int32_t *mine) {
  const int32_t used = order.ptr[order.rows], entry = order.ptr[strip.r0];
  int32_t *columns = (int32_t *)(a.number + strip.entry) - entry;  // where the gradient's numbers will be
  const Lists lists = {order.slot, order.other, values, columns, a.feature, a.number, a.slot, uint32_t(order.slots), used, used > DISTANT};
  if (GRADIENT) read_columns(lists, entry, order.ptr[strip.r0 + strip.rows], columns);
  int32_t *next = mine, *counts = mine + plan.strip;  // by row: the next entry; the entries in the chunk
  Run *run = (Run *)strip.runs;
  int32_t *end = (int32_t *)strip.ends, n = int32_t(strip.entry);
  const int64_t rows = strip.rows, r0 = strip.r0;
  for (int64_t r = 0; r < rows; r++) next[r] = order.ptr[r0 + r];
  for (int64_t c = 0; c < plan.chunks; c++) {
    const uint32_t begin = uint32_t(c << plan.shift);
    const uint32_t wide = c + 1 < plan.chunks ? uint32_t(1) << plan.shift : uint32_t(order.others) - begin;
    const int32_t before = n;
    int32_t starts[SHORT + 2] = {};  // of the runs of each length; all long ones count as one length
    for (int64_t r = 0; r < rows; r++) {
      const int32_t last = order.ptr[r0 + r + 1];
      const int32_t count = counts[r] = (GRADIENT ? take_slots : take_values)(lists, next[r], last, begin, wide, n);
      next[r] += count, n += count;
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
