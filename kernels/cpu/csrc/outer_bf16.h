// The stored blocks of dy' x from bfloat16 into float32: panels of tokens, whole blocks (or a few of one block row) at a
// time. The file of an instruction set has included what defines Unit (product_bf16.h) and
//
//   outer_group         adds a panel to up to GROUP blocks of one block row; returns to how many
//
// Pairs of tokens never straddle panels, which are whole steps of HALF_TOKENS: a sum is the same for every panel length.
#pragma once
#include "pack_bf16.h"
#include "threads.h"

namespace {

void outer_bf16(const Outer &m) {
  const int64_t size = int64_t(m.bo) * m.bi, tokens = m.x.rows, used = m.order.ptr[m.order.rows];
  const int64_t panels = (tokens + m.panel - 1) / m.panel;
  const int64_t x_panel = blocks_of(m.x.cols, m.bi) * m.bi * m.panel, dy_panel = blocks_of(m.dy.cols, m.bo) * m.bo * m.panel;
  Half *xs = (Half *)m.scratch, *dys = xs + m.panels_at_once * x_panel;
  const int threads = m.threads;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t me = thread_number(), all_of_us = thread_count();
    const int64_t e0 = used * me / all_of_us, e1 = used * (me + 1) / all_of_us;
    int64_t first_row = 0;
    while (first_row < m.order.rows && m.order.ptr[first_row + 1] <= e0) first_row++;

    for (int64_t p0 = 0; p0 < panels; p0 += m.panels_at_once) {
      const int64_t p1 = p0 + m.panels_at_once < panels ? p0 + m.panels_at_once : panels;
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < 2 * (p1 - p0); q++) {
        const int64_t p = p0 + q / 2, t0 = p * m.panel, left = tokens - t0;
        const int64_t count = left < m.panel ? round_up(left, HALF_TOKENS) : m.panel;
        if (q & 1) pack_pairs(m.x, t0, count, m.bi, xs + (p - p0) * x_panel);
        else pack_turned(m.dy, t0, count, m.bo, dys + (p - p0) * dy_panel);
      }
      const Unit unit(32);
      for (int64_t p = p0; p < p1; p++) {
        const int64_t left = tokens - p * m.panel, count = left < m.panel ? round_up(left, HALF_TOKENS) : m.panel;
        const Half *x = xs + (p - p0) * x_panel, *dy = dys + (p - p0) * dy_panel;
        int64_t row = first_row;
        for (int64_t e = e0; e < e1;) {
          while (m.order.ptr[row + 1] <= e) row++;
          const int64_t stop = m.order.ptr[row + 1] < e1 ? m.order.ptr[row + 1] : e1;
          const HalfGroup group = {dy + row * count * m.bo, x, count * m.bi, m.order.other + e, m.order.slot + e, m.out,
                                   stop - e, count, m.bo, m.bi, p > 0};
          e += outer_group(group);
        }
      }
#pragma omp barrier
    }

    // Phantom elements, in which a NaN may have met the filling, and free slots.
    int64_t row = first_row;
    const int64_t rows_left = m.dy.cols % m.bo, cols_left = m.x.cols % m.bi, last_col = m.x.cols / m.bi;
    for (int64_t e = e0; e < e1; e++) {
      while (m.order.ptr[row + 1] <= e) row++;
      float *out = m.out + m.order.slot[e] * size;
      if (rows_left && row == m.order.rows - 1) std::memset(out + rows_left * m.bi, 0, (m.bo - rows_left) * m.bi * 4);
      if (cols_left && m.order.other[e] == last_col)
        for (int64_t o = 0; o < m.bo; o++) std::memset(out + o * m.bi + cols_left, 0, (m.bi - cols_left) * 4);
    }
#pragma omp for schedule(static)
    for (int64_t e = used; e < m.order.slots; e++) std::memset(m.out + m.order.slot[e] * size, 0, size * 4);
  }
}

}  // namespace
