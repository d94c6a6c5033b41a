// The stored blocks of a convolution's weight gradient: the tile of outer.h over rows of outputs.
//
//   acc[r][c] += dy[n][y][x][o + r] * x[n][y][x + offset][i + c]
//
// A thread owns a range of entries, and images are added in order: results are the same to the bit however many there are.
#pragma once
#include "conv_panels.h"
#include "outer.h"

namespace {

struct Rows {  // of outputs that are added to a tile
  const float *dy, *x;
  int64_t images, rows, cols;
  int64_t dy_image, dy_row, x_image, x_row;  // floats between them
};

template <int C, int R> INLINE void rows_tile(const Rows &g, int64_t bo, int64_t bi, float *out, bool add, Ahead &ahead) {
  Vector acc[R][C];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) acc[r][c] = add ? load(out + r * bi + c * VL) : Vector{};
  for (int64_t n = 0; n < g.images; n++) {
    for (int64_t y = 0; y < g.rows; y++) {
      const float *dy = g.dy + n * g.dy_image + y * g.dy_row, *x = g.x + n * g.x_image + y * g.x_row;
      ahead.fetch((g.cols + 5) / 6);
      for (int64_t t = 0; t < g.cols; t++, dy += bo, x += bi) {
        Vector xt[C];
        UNROLL for (int c = 0; c < C; c++) xt[c] = load(x + c * VL);
        UNROLL for (int r = 0; r < R; r += FACTORS) {
          const Factors dys = factors(dy + r);
          UNROLL for (int i = 0; i < FACTORS; i++) {
            Vector d = all(dys[i]);
            UNROLL for (int c = 0; c < C; c++) acc[r + i][c] += d * xt[c];
          }
        }
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) store(out + r * bi + c * VL, acc[r][c]);
}

template <int C, int R> void rows_block(Rows g, int64_t bo, int64_t bi, float *out, bool add, Ahead &ahead) {
  const float *dy = g.dy, *x = g.x;
  for (int64_t o = 0; o < bo; o += R) {
    for (int64_t i = 0; i < bi; i += C * VL) {
      g.dy = dy + o, g.x = x + i;
      rows_tile<C, R>(g, bo, bi, out + o * bi + i, add, ahead);
    }
  }
}

// Add some images to the entries of a thread, some rows at a time, for which the blocks of x and dy stay in the L1 cache.
INLINE void add_some(const ConvOuter &m, const Share &mine, const float *xs, const float *dys, int64_t images, int64_t rows, bool add,
                     Ahead &ahead) {
  const int64_t bo = m.dy.side, bi = m.x.side;
  for (int64_t y = 0; y < rows; y += m.few_rows) {
    Rows g = {nullptr, nullptr, images, rows - y < m.few_rows ? rows - y : m.few_rows, m.cols,
              m.dy.image_pitch * bo, m.dy.row_pitch * bo, m.x.image_pitch * bi, m.x.row_pitch * bi};
    int64_t row = mine.row;
    for (int64_t e = mine.first; e < mine.last; e++) {
      while (m.order.ptr[row + 1] <= e) row++;
      g.dy = dys + (row * m.dy.plane + y * m.dy.row_pitch) * bo;
      g.x = xs + (m.offset[e] + y * m.x.row_pitch) * bi;
      float *out = m.out + m.order.slot[e] * bo * bi;
#if VL == 16
      if (bi == 16) {
        rows_block<1, 16>(g, bo, bi, out, add || y, ahead);
        continue;
      }
#endif
      rows_block<2, OUTER_ROWS>(g, bo, bi, out, add || y, ahead);
    }
  }
}

// Add one panel, few images at a time: sums run in the order of the pixels, whatever the panel.
INLINE void add_rows(const ConvOuter &m, const Share &mine, const float *xs, const float *dys, int64_t images, int64_t rows, bool add,
                     Ahead &ahead) {
  for (int64_t n = 0; n < images; n += m.few_images)
    add_some(m, mine, xs + n * m.x.image_pitch * m.x.side, dys + n * m.dy.image_pitch * m.dy.side,
             images - n < m.few_images ? images - n : m.few_images, rows, add || n, ahead);
}

INLINE Panels<float> panels_in(float *scratch, const ConvOuter &m) { return {scratch, m.panels_at_once, conv_floats(m.x), conv_floats(m.dy)}; }

void conv_outer(const ConvOuter &m) {
  const int64_t panels = panels_of(m);
  const Panels<float> s = panels_in(m.scratch, m);
  const int threads = m.threads;

#pragma omp parallel num_threads(threads)
  {
    const Share mine = my_share(m.order);
    Ahead ahead;
    for_panels(
        panels, m.panels_at_once,
        [&](int64_t p, int64_t i, bool of_x) {
          const ConvPart part = part_at(m, p);
          if (of_x) pack_images(m.x, part.n0, part.n1, part.m0, part.m1 - part.m0 + m.reach, s.x + i * s.x_panel);
          else pack_images(m.dy, part.n0, part.n1, part.m0, part.m1 - part.m0, s.dy + i * s.dy_panel);
        },
        [&](int64_t p0, int64_t p1) {
          if (threads == 1 && p1 < panels) {
            const ConvPart next = part_at(m, p1);
            ahead = first_then(ahead_of(m.dy, next.n0, next.n1, next.m0, next.m1 - next.m0),
                               ahead_of(m.x, next.n0, next.n1, next.m0, next.m1 - next.m0 + m.reach));
          }
          for (int64_t p = p0; p < p1; p++) {
            const ConvPart part = part_at(m, p);
            add_rows(m, mine, s.x + (p - p0) * s.x_panel, s.dy + (p - p0) * s.dy_panel, part.n1 - part.n0, part.m1 - part.m0, p > 0, ahead);
          }
        });
    clear_rest(m.order, mine, edges_of(m), m.dy.side, m.x.side, m.out);
  }
}

}  // namespace
