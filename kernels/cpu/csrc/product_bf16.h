// y = x W' + bias in bfloat16, with sums in float32: packed panels of x, the stored blocks packed in pairs once a call,
// and a tile of tokens and outputs that stays in registers over a whole block row. The file of an instruction set has
// included what defines
//
//   Unit                an object that a thread holds while it multiplies
//   product_tile        a tile from one panel and one block row, into `aside`: float32, `width` numbers a token
//
// Every element of y has one order of summation, whatever the tile, the panel or the number of threads.
#pragma once
#include "pack_bf16.h"
#include "threads.h"

namespace {

// One panel of tokens times the block rows [first, last).
inline void panel_product_bf16(const Multiply &m, HalfRow row, const Half *packed, int64_t t0, int64_t count, int64_t first,
                               int64_t last, const Half *w, const float *bias, float *aside) {
  const int64_t width = m.out == 16 ? 16 : 32;
  Half *y = (Half *)m.y.data;
  for (int64_t r = first; r < last; r++) {
    const int64_t start = m.order.ptr[r];
    row.count = m.order.ptr[r + 1] - start;
    row.other = m.order.other + start;
    const int64_t features = m.y.cols - r * m.out < m.out ? m.y.cols - r * m.out : m.out;
    for (int64_t n = 0; n < features; n += width) {
      row.w = w + start * row.size + 2 * n;
      const int64_t left = features - n < width ? features - n : width;
      for (int64_t t = 0; t < count;) {
        row.x = packed + t * m.in;
        const int64_t done = product_tile(row, count - t, bias ? bias + r * m.out + n : nullptr, aside);
        Half *to = y + (t0 + t) * m.y.row_stride + r * m.out + n;
        for (int64_t j = 0; j < done; j++, to += m.y.row_stride) {
          const float *from = aside + j * width;
          if (left == 32) {
            Halves low = halves(from, 0, FLOAT32), high = halves(from, 16, FLOAT32);
            *(Halves *)to = low, *(Halves *)(to + 16) = high;
          } else if (left == 16) *(Halves *)to = halves(from, 0, FLOAT32);
          else write_row(to, 0, BFLOAT16, from, left);
        }
        t += done;
      }
    }
  }
}

void multiply_bf16(const Multiply &m) {
  const int64_t size = int64_t(m.in) * m.out, used = m.order.ptr[m.order.rows];
  const int64_t panels = (m.x.rows + m.panel - 1) / m.panel, packed = blocks_of(m.x.cols, m.in) * m.in * m.panel;
  // The scratch: packed blocks, the bias filled up, and for each thread its panel and its tile.
  Half *w = (Half *)m.scratch;
  float *bias = (float *)(w + used * size), *mine = bias + (m.bias ? round_up(m.order.rows * m.out, LINE) : 0);
  const int64_t stride = packed / 2 + HALF_TILE;
  if (m.bias)
    for (int64_t i = 0; i < m.order.rows * m.out; i++) bias[i] = i < m.y.cols ? m.bias[i] : 0.f;
  const int threads = m.threads;
  // Few panels are shared: each is cut into groups of block rows, and every thread packs it for itself.
  const int64_t groups = threads > 1 && (panels < 2 * threads || panels % threads) ? 2 * threads : 1;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t e = 0; e < used; e++) {
      const int64_t at = m.order.slot[e] * size;
      if (m.transposed) pack_block(m.values, at, m.values_dtype, m.in, m.out, w + e * size);
      else pack_block_turned(m.values, at, m.values_dtype, m.out, m.in, w + e * size);
    }
    const Unit unit(m.in < 32 ? m.in : 32);
    float *aside = mine + thread_number() * stride;
    Half *panel = (Half *)(aside + HALF_TILE);
    int64_t held = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < panels * groups; q++) {
      int64_t p = q / groups, g = q % groups, t0 = p * m.panel;
      const int64_t count = m.x.rows - t0 < m.panel ? m.x.rows - t0 : m.panel, filled = round_up(count, HALF_TOKENS);
      if (p != held) pack_rows(m.x, t0, filled, m.in, panel), held = p;
      HalfRow row = {nullptr, filled * m.in, nullptr, nullptr, 0, size, m.in, m.out};
      panel_product_bf16(m, row, panel, t0, count, m.order.rows * g / groups, m.order.rows * (g + 1) / groups, w,
                         m.bias ? bias : nullptr, aside);
    }
  }
}

}  // namespace
