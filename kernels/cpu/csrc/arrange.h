// 1x1: the entries of a few rows, arranged in the order in which the kernels of elements.h read them. `other` is by slot
// here, as the topology stores it (Index in kernels/contract.py).
#pragma once
#include "pack.h"

namespace {

constexpr int32_t SLOTS_AHEAD = 96;  // entries by which a slot is prefetched: blocks that have moved lie anywhere

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
  uint16_t *feature;    // by entry: the feature within its chunk
};

INLINE Arranged arranged_in(float *scratch, const ElementPlan &plan) {
  Arranged a;
  a.runs = (Run *)scratch;
  a.ends = (int32_t *)(a.runs + plan.strips * plan.strip * plan.chunks);
  a.number = (float *)a.ends + plan.strips * plan.chunks;
  a.feature = (uint16_t *)(a.number + plan.entries);
  return a;
}

// What a thread needs beside it for a strip.
struct Room {
  float *lanes;            // rows of y, or of dy
  int32_t *next, *counts;  // by row: its next entry; its entries in the chunk
  int32_t *columns;        // by entry, in the order of the index
  float *numbers;          // the same: values, or their gradient
};

INLINE Room room_in(float *scratch, const ElementPlan &plan) {
  Room room;
  room.lanes = scratch;
  room.next = (int32_t *)(scratch + plan.strip * plan.lanes);
  room.counts = room.next + plan.strip;
  room.columns = room.counts + plan.strip;
  room.numbers = (float *)(room.columns + plan.strip_entries);
  return room;
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
  int32_t first, last;  // its entries in the index
  int64_t entry;        // the first of them in the piece
  const Run *runs;
  const int32_t *ends;
};

INLINE Strip strip_of(const Piece &piece, int64_t number, const Order &order, const ElementPlan &plan, const Arranged &a) {
  const int64_t r0 = piece.start + number * plan.strip, left = piece.stop - r0, rows = left < plan.strip ? left : plan.strip;
  const int32_t first = order.ptr[r0];
  return {r0, rows, first, order.ptr[r0 + rows], first - order.ptr[piece.start], a.runs + number * plan.strip * plan.chunks,
          a.ends + number * plan.chunks};
}

#if VL == 16
INLINE __mmask16 mask_of(int64_t count) { return count < 16 ? __mmask16((1 << count) - 1) : __mmask16(-1); }
#endif

// Prefetch a number of a list that may be shorter.
template <int WRITE> INLINE void prefetch_number(const void *list, uint32_t number) {
  __builtin_prefetch((const void *)(uintptr_t(list) + number * uintptr_t(4)), WRITE, 3);
}

// Visit the entries of a strip in the order of the index by one(entry, slot), or by many(entry, first slot) where 16 slots follow
// each other. Nothing else waits for what is read, so that the accesses to slots that lie apart overlap; those of `list`, and of
// `more` unless it is null, are prefetched, to be written or read. Returns false at an illegal slot.
template <int WRITE, class Many, class One>
INLINE bool for_slots(const Order &order, const Strip &strip, const void *list, const void *more, const Many &many, const One &one) {
  constexpr int32_t AT_ONCE = 16;
  const int32_t *slots = order.slot, used = order.ptr[order.rows];
  int32_t some[AT_ONCE];  // a copy: the index may change after it was checked
#if VL == 16
  const __m512i count_up = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#endif
  for (int32_t e = strip.first, stop; e < strip.last; e = stop) {
    stop = strip.last - e < AT_ONCE ? strip.last : e + AT_ONCE;
#if VL == 16
    const __m512i checked = _mm512_maskz_loadu_epi32(mask_of(stop - e), slots + e);
    if (_mm512_cmpge_epu32_mask(checked, _mm512_set1_epi32(int32_t(order.slots)))) return false;
    const int32_t first = _mm_cvtsi128_si32(_mm512_castsi512_si128(checked));
    const __m512i following = _mm512_add_epi32(_mm512_set1_epi32(first), count_up);
    if (stop - e == AT_ONCE && !_mm512_cmpneq_epi32_mask(checked, following)) {
      many(e - strip.first, first);
      continue;
    }
    _mm512_storeu_si512(some, checked);
#else
    for (int32_t i = 0; i < stop - e; i++) {
      some[i] = slots[e + i];
      if (!inside(some[i], order.slots)) return false;
    }
#endif
    const int32_t *later = slots + e + (used - stop > SLOTS_AHEAD ? SLOTS_AHEAD : 0);
    for (int32_t i = 0; i < stop - e; i++) {
      int32_t slot = some[i];
      asm("" : "+r"(slot));  // or the compiler gathers, which is slower
      prefetch_number<WRITE>(list, uint32_t(later[i]));
      if (more) prefetch_number<WRITE>(more, uint32_t(later[i]));
      one(e - strip.first + i, slot);
    }
  }
  return true;
}

// Read the columns of a strip's entries, and for a product their values. Returns false at an illegal slot.
template <bool VALUES> INLINE bool read_entries(const Order &order, const Strip &strip, const float *values, const Room &room) {
  const int32_t *__restrict other = order.other;
  int32_t *__restrict columns = room.columns;
  float *__restrict numbers = room.numbers;
  return for_slots<0>(order, strip, other, VALUES ? values : nullptr,
    [&](int32_t e, int32_t first) {
      std::memcpy(columns + e, other + first, 64);
      if (VALUES) std::memcpy(numbers + e, values + first, 64);
    },
    [&](int32_t e, int32_t slot) {
      columns[e] = other[slot];
      if (VALUES) numbers[e] = values[slot];
    });
}

// Note from n on the entries of a row in [e, last) whose columns lie in [begin, begin + wide): the first ones, as columns ascend
// within a row. Returns how many. `end`: of the strip, up to which more may be overwritten.
template <bool VALUES>
INLINE int32_t take_run(const Arranged &a, const Room &room, int32_t e, int32_t last, uint32_t begin, uint32_t wide, int64_t n, int64_t end) {
  const int32_t start = e;
#if VL == 16
  const __m512i from = _mm512_set1_epi32(int32_t(begin)), width = _mm512_set1_epi32(int32_t(wide));
  while (n + 16 <= end) {
    const __mmask16 some = mask_of(last - e);
    const __m512i column = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(some, room.columns + e), from);
    const int32_t count = __builtin_ctz(~uint32_t(_mm512_mask_cmplt_epu32_mask(some, column, width)));
    _mm256_storeu_si256((__m256i *)(a.feature + n), _mm512_cvtepi32_epi16(column));
    if (VALUES) _mm512_storeu_ps(a.number + n, _mm512_maskz_loadu_ps(some, room.numbers + e));
    e += count, n += count;
    if (count < 16) return e - start;
  }
#endif
  for (; e < last; e++, n++) {
    const uint32_t column = uint32_t(room.columns[e]) - begin;
    if (column >= wide) break;
    a.feature[n] = uint16_t(column);
    if (VALUES) a.number[n] = room.numbers[e];
  }
  return e - start;
}

// The same in an order by column, whose slots lie apart, and those of neighbouring rows beside them: chunk by chunk they stay in
// the caches, without a copy. An illegal slot ends the entries, too.
INLINE int32_t take_apart(const Order &order, const float *__restrict values, const Arranged &a, int32_t e, int32_t last, uint32_t begin, uint32_t wide, int64_t n) {
  constexpr int32_t DISTANT = 1 << 18, AHEAD = 32;  // entries from which on their lists leave the caches, and are prefetched
  const int32_t *__restrict slots = order.slot, *__restrict other = order.other, used = order.ptr[order.rows], start = e;
  uint16_t *__restrict feature = a.feature;
  float *__restrict number = a.number;
  const uint32_t all = uint32_t(order.slots);
  for (; e < last; e++, n++) {
    const uint32_t slot = uint32_t(slots[e]);
    if (used > DISTANT) {
      const uint32_t far = uint32_t(slots[e + AHEAD < used ? e + AHEAD : e]);
      prefetch_number<0>(other, far);
      prefetch_number<0>(values, far);
    }
    if (slot >= all) break;
    const uint32_t column = uint32_t(other[slot]) - begin;
    if (column >= wide) break;
    feature[n] = uint16_t(column);
    number[n] = values[slot];
  }
  return e - start;
}

enum Reading { FEATURES, BY_ROW, BY_COL };  // of the gradient only features; of a product values, too

// Arrange a strip. Each number is checked where it is read; returns false if one is illegal or columns do not ascend, and then
// nothing may be computed.
template <Reading READING>
NOINLINE bool arrange(const Order &order, const Strip &strip, const ElementPlan &plan, const Arranged &a, const float *values, const Room &room) {
  if (READING != BY_COL && !read_entries<READING == BY_ROW>(order, strip, values, room)) return false;
  Run *run = (Run *)strip.runs;
  int32_t *end = (int32_t *)strip.ends, *next = room.next, *counts = room.counts, n = int32_t(strip.entry);
  const int32_t *stop = order.ptr + strip.r0 + 1;
  const int64_t rows = strip.rows, last = strip.entry + strip.last - strip.first;
  const int32_t origin = READING == BY_COL ? 0 : strip.first;  // of `next`
  for (int64_t r = 0; r < rows; r++) next[r] = stop[r - 1] - origin;
  for (int64_t c = 0; c < plan.chunks; c++) {
    const uint32_t begin = uint32_t(c << plan.shift);
    const uint32_t wide = c + 1 < plan.chunks ? uint32_t(1) << plan.shift : uint32_t(order.others) - begin;
    const int32_t before = n;
    int32_t starts[SHORT + 2] = {};  // of the runs of each length; all long ones count as one length
    for (int64_t r = 0; r < rows; r++) {
      const int32_t count = READING == BY_COL ? take_apart(order, values, a, next[r], stop[r], begin, wide, n)
                                              : take_run<READING == BY_ROW>(a, room, next[r], stop[r] - origin, begin, wide, n, last);
      counts[r] = count, next[r] += count, n += count;
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
    if (next[r] != stop[r] - origin) return false;
  return true;
}

// Arrange a piece; the gradient's numbers become zero. Called by all threads. Returns whether all entries
// so far are legal: the same to each thread.
template <Reading READING>
INLINE bool arrange_piece(const Order &order, const Piece &piece, const ElementPlan &plan, const Arranged &a, const float *values, const Room &room) {
#pragma omp for schedule(dynamic, 1)
  for (int64_t s = 0; s < piece.strips; s++) {
    const Strip strip = strip_of(piece, s, order, plan, a);
    if (!arrange<READING>(order, strip, plan, a, values, room)) refuse(order);
    if (READING == FEATURES) std::memset(a.number + strip.entry, 0, (strip.last - strip.first) * 4);
  }
  return !__atomic_load_n(order.illegal, __ATOMIC_RELAXED);
}

}  // namespace
