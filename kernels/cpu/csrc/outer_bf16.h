// The stored blocks of dy' x from bfloat16 into float32: panels of tokens, whole blocks (or a few of one block row) at a
// time. The file of an instruction set has included what defines Unit (product_bf16.h) and
//
//   outer_group         adds a panel to up to GROUP blocks of one block row; returns to how many
//
// Pairs of tokens never straddle panels, which are whole steps of HALF_TOKENS: a sum is the same for every panel length.
#pragma once
#include "pack_bf16.h"
#include "share.h"

namespace {

void outer_bf16(const Outer &m) {
  const int64_t tokens = m.x.rows;
  const int64_t panels = (tokens + m.panel - 1) / m.panel;
  const int64_t x_panel = blocks_of(m.x.cols, m.bi) * m.bi * m.panel, dy_panel = blocks_of(m.dy.cols, m.bo) * m.bo * m.panel;
  Half *xs = (Half *)m.scratch, *dys = xs + m.panels_at_once * x_panel;
  const int threads = m.threads;

#pragma omp parallel num_threads(threads)
  {
    const Share mine = my_share(m.order);
    for (int64_t p0 = 0; p0 < panels; p0 += m.panels_at_once) {
      const int64_t p1 = p0 + m.panels_at_once < panels ? p0 + m.panels_at_once : panels;
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < 2 * (p1 - p0); q++) {
        const int64_t p = p0 + q / 2, t0 = p * m.panel, left = tokens - t0;
        const int64_t count = left < m.panel ? round_up(left, HALF_TOKENS) : m.panel;
        if (q & 1) pack_pairs(m.x, t0, count, m.bi, m.wanted_x, xs + (p - p0) * x_panel);
        else pack_turned(m.dy, t0, count, m.bo, m.wanted_dy, dys + (p - p0) * dy_panel);
      }
      const Unit unit(32);
      for (int64_t p = p0; p < p1; p++) {
        const int64_t left = tokens - p * m.panel, count = left < m.panel ? round_up(left, HALF_TOKENS) : m.panel;
        const Half *x = xs + (p - p0) * x_panel, *dy = dys + (p - p0) * dy_panel;
        int64_t row = mine.row;
        for (int64_t e = mine.first; e < mine.last;) {
          while (m.order.ptr[row + 1] <= e) row++;
          const int64_t stop = m.order.ptr[row + 1] < mine.last ? m.order.ptr[row + 1] : mine.last;
          const HalfGroup group = {dy + row * count * m.bo, x, count * m.bi, count * 16, m.order.other + e, m.order.slot + e, m.out,
                                   stop - e, count, m.bo, m.bi, p > 0};
          e += outer_group(group);
        }
      }
#pragma omp barrier
    }
    clear_rest(m, mine);
  }
}

}  // namespace
