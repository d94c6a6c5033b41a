// The stored blocks of a convolution's weight gradient: the tile of outer.h over rows of outputs.
//
//   acc[r][c] += dy[n][y][x][o + r] * x[n][y][x + offset][i + c]
//
// A thread owns a range of entries, and images are added in order: results are the same to the bit however many there are.
#pragma once
#include "conv_pack.h"
#include "outer.h"

namespace {

struct Rows {  // that a tile goes through
  const float *dy, *x;
  int64_t images, rows, cols;
  int64_t dy_image, dy_row, x_image, x_row;  // floats between them
};

template <int C, int R> INLINE void rows_tile(const Rows &g, int64_t bo, int64_t bi, float *out, bool add) {
  Vector acc[R][C];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) acc[r][c] = add ? load(out + r * bi + c * VL) : Vector{};
  for (int64_t n = 0; n < g.images; n++) {
    for (int64_t y = 0; y < g.rows; y++) {
      const float *dy = g.dy + n * g.dy_image + y * g.dy_row, *x = g.x + n * g.x_image + y * g.x_row;
      for (int64_t t = 0; t < g.cols; t++, dy += bo, x += bi) {
        Vector xt[C];
        UNROLL for (int c = 0; c < C; c++) xt[c] = load(x + c * VL);
        UNROLL for (int r = 0; r < R; r++) {
          Vector d = all(dy[r]);
          UNROLL for (int c = 0; c < C; c++) acc[r][c] += d * xt[c];
        }
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) store(out + r * bi + c * VL, acc[r][c]);
}

template <int C, int R> void rows_block(Rows g, int64_t bo, int64_t bi, float *out, bool add) {
  const float *dy = g.dy, *x = g.x;
  for (int64_t o = 0; o < bo; o += R) {
    for (int64_t i = 0; i < bi; i += C * VL) {
      g.dy = dy + o, g.x = x + i;
      rows_tile<C, R>(g, bo, bi, out + o * bi + i, add);
    }
  }
}

// Adds one panel to the entries of a thread, some rows at a time, for which the blocks of x and dy stay in the L1 cache.
INLINE void add_rows(const ConvOuter &m, const Share &mine, const float *xs, const float *dys, int64_t images, int64_t rows, bool add) {
  const int64_t bo = m.dy.side, bi = m.x.side;
  for (int64_t y = 0; y < rows; y += m.short_strip) {
    Rows g = {nullptr, nullptr, images, rows - y < m.short_strip ? rows - y : m.short_strip, m.cols,
              m.dy.image_pitch * bo, m.dy.row_pitch * bo, m.x.image_pitch * bi, m.x.row_pitch * bi};
    int64_t row = mine.row;
    for (int64_t e = mine.first; e < mine.last; e++) {
      while (m.order.ptr[row + 1] <= e) row++;
      g.dy = dys + (row * m.dy.plane + y * m.dy.row_pitch) * bo;
      g.x = xs + (m.offset[e] + y * m.x.row_pitch) * bi;
      float *out = m.out + m.order.slot[e] * bo * bi;
#if VL == 16
      if (bi == 16) {
        rows_block<1, 16>(g, bo, bi, out, add || y);
        continue;
      }
#endif
      rows_block<2, OUTER_ROWS>(g, bo, bi, out, add || y);
    }
  }
}

// Called by all threads at the end: phantom elements, in which a NaN may have met the filling, and free slots.
INLINE void clear_phantom(const ConvOuter &m, const Share &mine) {
  const int64_t bo = m.dy.side, bi = m.x.side, used = m.order.ptr[m.order.rows];
  const int64_t rows_left = m.dy.channels / m.dy.groups % bo, cols_left = m.x.channels / m.x.groups % bi;
  int64_t row = mine.row;
  for (int64_t e = mine.first; e < mine.last; e++) {
    while (m.order.ptr[row + 1] <= e) row++;
    float *out = m.out + m.order.slot[e] * bo * bi;
    if (rows_left && row % m.row_blocks == m.row_blocks - 1) std::memset(out + rows_left * bi, 0, (bo - rows_left) * bi * 4);
    if (cols_left && m.order.other[e] % m.col_blocks == m.col_blocks - 1)
      for (int64_t o = 0; o < bo; o++) std::memset(out + o * bi + cols_left, 0, (bi - cols_left) * 4);
  }
#pragma omp for schedule(static)
  for (int64_t e = used; e < m.order.slots; e++) std::memset(m.out + m.order.slot[e] * bo * bi, 0, bo * bi * 4);
}

void conv_outer(const ConvOuter &m) {
  const int64_t x_panel = conv_floats(m.x), dy_panel = conv_floats(m.dy);
  const int64_t strips = (m.rows + m.strip - 1) / m.strip, panels = (m.images + m.images_at_once - 1) / m.images_at_once * strips;
  float *xs = m.scratch, *dys = xs + m.panels_at_once * x_panel;
  const int threads = m.threads;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Share mine = my_share(m.order);
    for (int64_t p0 = 0; p0 < panels; p0 += m.panels_at_once) {
      const int64_t p1 = p0 + m.panels_at_once < panels ? p0 + m.panels_at_once : panels;
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < 2 * (p1 - p0); q++) {
        const int64_t p = p0 + q / 2, n0 = p / strips * m.images_at_once, y0 = p % strips * m.strip;
        const int64_t n1 = n0 + m.images_at_once < m.images ? n0 + m.images_at_once : m.images;
        const int64_t rows = m.rows - y0 < m.strip ? m.rows - y0 : m.strip;
        if (q & 1) pack_images(m.x, n0, n1, y0, rows + m.reach, xs + (p - p0) * x_panel);
        else pack_images(m.dy, n0, n1, y0, rows, dys + (p - p0) * dy_panel);
      }
      for (int64_t p = p0; p < p1; p++) {
        const int64_t n0 = p / strips * m.images_at_once, y0 = p % strips * m.strip;
        const int64_t images = m.images - n0 < m.images_at_once ? m.images - n0 : m.images_at_once;
        const int64_t rows = m.rows - y0 < m.strip ? m.rows - y0 : m.strip;
        add_rows(m, mine, xs + (p - p0) * x_panel, dys + (p - p0) * dy_panel, images, rows, p > 0);
      }
#pragma omp barrier
    }
    clear_phantom(m, mine);
  }
}

}  // namespace
