// The stored blocks of dy' x: a tile of R rows and C vectors of a block stays in registers over a panel of tokens, or a part.
//
//   acc[r][c] += dy[t][o + r] * x[t][i + c]
//
// A thread owns a range of entries, so nothing is reduced across threads; panels are added in order.
#pragma once
#include "pack.h"
#include "share.h"

namespace {

template <int C, int R>
INLINE void outer_tile(const float *dy, int64_t bo, const float *x, int64_t bi, int64_t tokens, float *out, bool add,
                       const float *next, int64_t next_step, const float *next_out) {
  Vector acc[R][C];
  // The next tile may lie far away.
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C * VL; c += LINE) __builtin_prefetch(next_out + r * bi + c, 1, 3);
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) acc[r][c] = add ? load(out + r * bi + c * VL) : Vector{};
  for (int64_t t = 0; t < tokens; t++) {
    __builtin_prefetch(next + t * next_step, 0, 3);
    Vector xt[C];
    UNROLL for (int c = 0; c < C; c++) xt[c] = load(x + t * bi + c * VL);
    UNROLL for (int r = 0; r < R; r += FACTORS) {
      const Factors dys = factors(dy + t * bo + r);
      UNROLL for (int i = 0; i < FACTORS; i++) {
        Vector d = all(dys[i]);
        UNROLL for (int c = 0; c < C; c++) acc[r + i][c] += d * xt[c];
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) store(out + r * bi + c * VL, acc[r][c]);
}

// A whole block. Its tiles share the prefetches of the next block of x.
template <int C, int R>
INLINE void outer_part(const float *dy, int64_t bo, const float *x, int64_t bi, int64_t tokens, float *out, bool add,
                       const float *next, const float *next_out) {
  const int64_t tiles = (bo / R) * (bi / (C * VL)), step = bi / tiles > 0 ? bi / tiles : 1;
  int64_t q = 0;
  for (int64_t o = 0; o < bo; o += R)
    for (int64_t i = 0; i < bi; i += C * VL, q++)
      outer_tile<C, R>(dy + o, bo, x + i, bi, tokens, out + o * bi + i, add, next + q * tokens * step % (tokens * bi), step,
                       i + C * VL < bi ? out + o * bi + i + C * VL : o + R < bo ? out + (o + R) * bi : next_out);
}

// Some tokens of a long panel at a time, for which x and dy stay in the L1 cache: every tile reads them.
template <int C, int R>
void outer_block(const float *dy, int64_t bo, const float *x, int64_t bi, int64_t tokens, float *out, bool add,
                 const float *next, const float *next_out) {
  const int64_t most = bi > 32 ? 64 : 128, parts = (tokens + most - 1) / most;
  for (int64_t i = 0; i < parts; i++) {
    const int64_t from = tokens * i / parts, to = tokens * (i + 1) / parts;
    const bool last = i + 1 == parts;
    outer_part<C, R>(dy + from * bo, bo, x + from * bi, bi, to - from, out, add || i, last ? next : x + to * bi, last ? next_out : out);
  }
}

INLINE Panels<float> panels_in(char *scratch, const Outer &m) {
  return {scratch, m.panels_at_once, blocks_of(m.x.cols, m.bi) * m.bi * m.panel, blocks_of(m.dy.cols, m.bo) * m.bo * m.panel};
}

INLINE int64_t tokens_of(const Outer &m, int64_t panel) {
  const int64_t left = m.x.rows - panel * m.panel;
  return left < m.panel ? left : m.panel;
}

INLINE void pack_factor(const Outer &m, const Panels<float> &s, int64_t p, int64_t i, bool of_x) {
  const int64_t t0 = p * m.panel, count = tokens_of(m, p);
  if (of_x) pack_panel(m.x, t0, count, m.bi, m.wanted_x, s.x + i * s.x_panel);
  else pack_panel(m.dy, t0, count, m.bo, m.wanted_dy, s.dy + i * s.dy_panel);
}

// Add the panels [p0, p1) to the blocks of a thread. Panel 0 writes them.
INLINE void add_panels(const Outer &m, const Panels<float> &s, const Share &mine, int64_t p0, int64_t p1) {
  const int64_t size = int64_t(m.bo) * m.bi;
  for (int64_t p = p0; p < p1; p++) {
    const int64_t count = tokens_of(m, p);
    const float *x = s.x + (p - p0) * s.x_panel, *dy = s.dy + (p - p0) * s.dy_panel;
    int64_t row = mine.row;
    for (int64_t e = mine.first; e < mine.last; e++) {
      while (m.order.ptr[row + 1] <= e) row++;
      const float *block = x + m.order.other[e] * count * m.bi, *g = dy + row * count * m.bo;
      const int64_t ahead = e + 1 < mine.last ? e + 1 : e;
      const float *next = x + m.order.other[ahead] * count * m.bi, *next_out = m.out + m.order.slot[ahead] * size;
      float *out = m.out + m.order.slot[e] * size;
#if VL == 16
      if (m.bi == 16) {
        outer_block<1, 16>(g, m.bo, block, m.bi, count, out, p > 0, next, next_out);
        continue;
      }
#endif
      outer_block<2, OUTER_ROWS>(g, m.bo, block, m.bi, count, out, p > 0, next, next_out);
    }
  }
}

void outer(const Outer &m) {
  const Panels<float> s = panels_in(m.scratch, m);
  const int threads = m.threads;

#pragma omp parallel num_threads(threads)
  {
    const Share mine = my_share(m.order);
    for_panels(blocks_of(m.x.rows, m.panel), m.panels_at_once, [&](int64_t p, int64_t i, bool of_x) { pack_factor(m, s, p, i, of_x); },
               [&](int64_t p0, int64_t p1) { add_panels(m, s, mine, p0, p1); });
    clear_rest(m.order, mine, edges_of(m), m.bo, m.bi, m.out);
  }
}

}  // namespace
