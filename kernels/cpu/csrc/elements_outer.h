// Unstructured weights (1x1 blocks): the gradient of the weight, alone or together with that of the input. The order of all
// is that of elements.h.
//
//   total[e] += sum over lanes of dy[o][lane] * x[col[e]][lane]
#pragma once
#include "elements.h"

namespace {

// An entry's products, of which the lanes are added up later, VL entries at a time. Half of the sum is formed at once where
// they all fit into registers: halves are added first in sums(), too.
#if VL == 16
constexpr int HELD = VL / 2;  // numbers that are held for an entry
INLINE void hold(float *to, Vector v) {
  _mm256_storeu_ps(to, _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1)));
}
INLINE Vector sums_of_held(const float *held) {
  Vector a[VL / 2];  // lane l of vector i: of entry 2 * i in its first half, of the next one in the second
  UNROLL for (int i = 0; i < VL / 2; i++) a[i] = load(held + i * VL);
  fold<4>(a), fold<2>(a), fold<1>(a);
  return (Vector)_mm512_permutexvar_ps(_mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0), (__m512)a[0]);
}
#else
constexpr int HELD = VL;
INLINE void hold(float *to, Vector v) { store(to, v); }
INLINE Vector sums_of_held(const float *held) {
  Vector a[VL];
  UNROLL for (int i = 0; i < VL; i++) a[i] = load(held + i * VL);
  return sums(a);
}
#endif

// Multiply a run by a row of dy, for add_sums().
template <int T> INLINE void dot_run(const uint16_t *feature, int64_t count, const float *x, const float *dy, float *held) {
  constexpr int VECTORS = T / VL, AT_ONCE = VECTORS < 8 ? VECTORS : 8;
  static_assert(VECTORS == AT_ONCE || HELD == VL, "what is held is added to");
  for (int v0 = 0; v0 < VECTORS; v0 += AT_ONCE) {
    Vector g[AT_ONCE];
    UNROLL for (int v = 0; v < AT_ONCE; v++) g[v] = load(dy + (v0 + v) * VL);
    for (int64_t e = 0; e < count; e++) {
      const float *line = x + int64_t(feature[e]) * T + v0 * VL;
      asm("" : "+r"(line));
      Vector acc = v0 ? load(held + e * HELD) : Vector{}, more = {};  // two chains, or each addition waits for the last
      UNROLL for (int v = 0; v < AT_ONCE; v += 2) {
        acc += g[v] * load(line + v * VL);
        more += g[v + 1] * load(line + (v + 1) * VL);
      }
      hold(held + e * HELD, acc + more);
    }
  }
}

// Add the sums of the first `count` entries that are held to as many totals.
NOINLINE void add_sums(const float *held, int64_t count, float *total) {
  int64_t e = 0;
  for (; e + VL <= count; e += VL) store(total + e, load(total + e) + sums_of_held(held + e * HELD));
  if (e < count) {
    float line[VL];
    store(line, sums_of_held(held + e * HELD));  // those behind are former entries, whose sums are not used
    for (int64_t l = 0; e + l < count; l++) total[e + l] += line[l];
  }
}

// One strip for the packed panel of x that begins at token t0; `dy`: the lanes of its rows.
template <int T>
void add_strip(const Outer &m, const Arranged &a, const Strip &strip, const float *x, const float *dy) {
  constexpr int64_t MOST = 64;  // entries that are held in the L1 cache
  float held[MOST * HELD] = {};
  int64_t waiting = 0;  // entries that are held
  float *total = a.number + strip.entry;
  const Run *run = strip.runs;
  for (int64_t c = 0; c < m.plan.chunks; c++) {
    const float *chunk = x + (c << m.plan.shift) * T;
    for (const Run *end = a.runs + strip.ends[c]; run < end; run++) {
      for (int64_t i = 0, n; i < run->count; i += n, waiting += n) {
        if (waiting == MOST) add_sums(held, MOST, total), total += MOST, waiting = 0;
        n = run->count - i < MOST - waiting ? run->count - i : MOST - waiting;
        dot_run<T>(a.feature + run->first + i, n, chunk, dy + run->row * T, held + waiting * HELD);
      }
    }
  }
  add_sums(held, waiting, total);
}

// Add the packed panels [p0, p1) of x to the totals of a piece. Called by all threads. `dy`: its packed panels, or null; then
// each strip of it is packed into `mine`.
template <int T>
INLINE void add_panels(const Outer &m, const Arranged &a, const Piece &piece, int64_t p0, int64_t p1, const float *x, const float *dy, float *mine) {
  const int64_t most = m.threads > 1 ? 4 * m.threads : 1, groups = piece.strips < most ? piece.strips : most;
#pragma omp for schedule(dynamic, 1)
  for (int64_t g = 0; g < groups; g++) {
    const int64_t first = piece.strips * g / groups, last = piece.strips * (g + 1) / groups;
    for (int64_t p = p0; p < p1; p++) {
      const int64_t left = m.x.rows - p * T;
      for (int64_t s = first; s < last; s++) {
        const Strip strip = strip_of(piece, s, m.order, m.plan, a);
        if (!dy) pack_lanes<T>(columns(m.dy, strip.r0, strip.rows), p * T, left < T ? left : T, mine);
        add_strip<T>(m, a, strip, x + (p - p0) * m.x.cols * T, dy ? dy + ((p - p0) * m.dy.cols + strip.r0) * T : mine);
      }
    }
  }
}

INLINE void copy_run(const float *from, int32_t count, float *to) {
#if VL == 16
  for (int32_t i = 0; i < count; i += 16) {
    const __mmask16 some = mask_of(count - i);
    _mm512_mask_storeu_ps(to + i, some, _mm512_maskz_loadu_ps(some, from + i));
  }
#else
  for (int32_t i = 0; i < count; i++) to[i] = from[i];
#endif
}

// Write the totals of a piece to their slots, or read them there. Called by all threads.
template <bool WRITE> INLINE void move_totals(const Outer &m, const Arranged &a, const Piece &piece, const Room &room) {
  const auto move = [&](float *number, float *out, int64_t count) { std::memcpy(WRITE ? out : number, WRITE ? number : out, count * 4); };
#pragma omp for schedule(dynamic, 1)
  for (int64_t s = 0; s < piece.strips; s++) {
    const Strip strip = strip_of(piece, s, m.order, m.plan, a);
    const auto move_slots = [&] {
      const bool legal = for_slots<WRITE>(m.order, strip, m.out, nullptr,
        [&](int32_t e, int32_t first) { move(room.numbers + e, m.out + first, 16); },
        [&](int32_t e, int32_t slot) { move(room.numbers + e, m.out + slot, 1); });
      if (!legal) refuse(m.order);
    };
    if (!WRITE) move_slots();
    for (int64_t r = 0; r < strip.rows; r++) room.next[r] = m.order.ptr[strip.r0 + r] - strip.first;
    float *total = a.number + strip.entry;
    for (const Run *run = strip.runs, *end = a.runs + strip.ends[m.plan.chunks - 1]; run < end; run++) {
      float *number = room.numbers + room.next[run->row];
      copy_run(WRITE ? total : number, run->count, WRITE ? number : total);
      room.next[run->row] += run->count, total += run->count;
    }
    if (WRITE) move_slots();
  }
}

template <int T> void outer_lanes(const Outer &m) {
  const ElementPlan &plan = m.plan;
  const int64_t rows = m.order.rows, panels = blocks_of(m.x.rows, T), step = plan.strips * plan.strip;
  const bool one = step >= rows;  // piece, which is arranged once
  const int threads = m.threads;
  float *packed = (float *)m.scratch, *lists = packed + plan.panels * m.x.cols * T, *rest = lists + arranged_floats(plan);

#pragma omp parallel num_threads(threads)
  {
    const Arranged a = arranged_in(lists, plan);
    const Room room = room_in(rest + thread_number() * thread_floats(plan), plan);
    bool legal = true;
    for (int64_t p0 = 0; p0 < panels && legal; p0 += plan.panels) {
      const int64_t p1 = p0 + plan.panels < panels ? p0 + plan.panels : panels;
      pack_panels<T>(m.x, p0, p1, packed);
      for (int64_t start = 0; start < rows; start += step) {
        const Piece piece = piece_from(start, m.order, plan);
        if (p0 == 0 || !one) legal = arrange_piece<FEATURES>(m.order, piece, plan, a, nullptr, room);
        if (!legal) break;
        if (p0 && !one) move_totals<false>(m, a, piece, room);
        add_panels<T>(m, a, piece, p0, p1, packed, nullptr, room.lanes);
        if (p1 == panels || !one) move_totals<true>(m, a, piece, room);
      }
    }
    clear_free(m.order, m.out);
  }
}

void outer_elements(const Outer &m) {
  if (m.plan.lanes == 4) outer_narrow<4>(m);
  else if (m.plan.lanes == 8) outer_narrow<8>(m);
  else if (m.plan.lanes == 16) outer_narrow<16>(m);
  else if (m.plan.lanes == 32) outer_lanes<32>(m);
  else if (m.plan.lanes == 64) outer_lanes<64>(m);
  else outer_lanes<128>(m);
}

// Both gradients, each of one piece: panels of dy are packed once.
template <int T> void backward_lanes(const Backward &b) {
  const Multiply &m = b.dx;
  const Outer &d = b.dvalues;
  const int64_t panels = blocks_of(d.x.rows, T), at_once = d.plan.panels;
  const int threads = d.threads;
  float *x = (float *)d.scratch, *dy = x + at_once * d.x.cols * T, *by_col = dy + at_once * d.dy.cols * T;
  float *by_row = by_col + arranged_floats(m.plan), *rest = by_row + arranged_floats(d.plan);

#pragma omp parallel num_threads(threads)
  {
    float *mine = rest + thread_number() * (thread_floats(m.plan) + thread_floats(d.plan));
    const Room col_room = room_in(mine, m.plan), row_room = room_in(mine + thread_floats(m.plan), d.plan);
    const Arranged cols = arranged_in(by_col, m.plan), rows = arranged_in(by_row, d.plan);
    const Piece all_cols = piece_from(0, m.order, m.plan), all_rows = piece_from(0, d.order, d.plan);
    const bool legal = arrange_piece<BY_COL>(m.order, all_cols, m.plan, cols, m.values, col_room);
    if (arrange_piece<FEATURES>(d.order, all_rows, d.plan, rows, nullptr, row_room) && legal) {
      for (int64_t p0 = 0; p0 < panels; p0 += at_once) {
        const int64_t p1 = p0 + at_once < panels ? p0 + at_once : panels;
        pack_panels<T>(d.dy, p0, p1, dy);
        multiply_panels<T>(m, cols, all_cols, p0, p1, dy, col_room.lanes);
        pack_panels<T>(d.x, p0, p1, x);
        add_panels<T>(d, rows, all_rows, p0, p1, x, dy, nullptr);
      }
      move_totals<true>(d, rows, all_rows, row_room);
    }
    clear_free(d.order, d.out);
    fence();
  }
}

void backward_elements(const Backward &b) {
  if (b.dvalues.plan.lanes == 32) backward_lanes<32>(b);
  else if (b.dvalues.plan.lanes == 64) backward_lanes<64>(b);
  else backward_lanes<128>(b);
}

}  // namespace
