// Both gradients of a layer: the panels of dy that dx reads are those of dvalues, so that they are packed once.
//
//   for some panels:  pack dy and x | dx = dy W, each thread mostly those it packed | dvalues += dy' x, each thread its entries
//
// Every sum has the order that it has in the single products, so the results are the same to the bit.
#pragma once
#include "conv_outer.h"
#include "conv_product.h"

namespace {

void backward(const Backward &b) {
  const Multiply &m = b.dx;
  const Outer &d = b.dvalues;
  const PanelProduct product = product_of(m);
  const int64_t size = int64_t(d.bo) * d.bi;
  const Panels<float> s = panels_in(d.scratch, d);
  const int threads = d.threads;

#pragma omp parallel num_threads(threads)
  {
    const Share mine = my_share(d.order);
    float *aside = s.end + thread_number() * ASIDE;
    for_panels(
        blocks_of(d.x.rows, d.panel), d.panels_at_once, [&](int64_t p, int64_t i, bool of_x) { pack_factor(d, s, p, i, of_x); },
        [&](int64_t p0, int64_t p1) {
          const int64_t groups = groups_of(p1 - p0, threads);
#pragma omp for schedule(static) nowait
          for (int64_t q = 0; q < (p1 - p0) * groups; q++) {
            const int64_t p = p0 + q / groups, g = q % groups, count = tokens_of(d, p);
            const Row row = {nullptr, count * m.in, nullptr, nullptr, nullptr, 0, size, m.out, false};
            product(m, row, s.dy + (p - p0) * s.dy_panel, p * d.panel, count, m.order.rows * g / groups,
                    m.order.rows * (g + 1) / groups, m.values, nullptr, aside);
          }
          add_panels(d, s, mine, p0, p1);
        });
    clear_rest(d.order, mine, edges_of(d), d.bo, d.bi, d.out);
    fence();
  }
}

// The rows of dy that a panel adds to dvalues: each row of an image is in one panel.
INLINE ConvPart rows_of_dy(const ConvBackward &b, int64_t panel) {
  const Convolve &c = b.dx;
  const int64_t bands = bands_of(c), rows = b.dvalues.last_row;
  ConvPart part = part_at(c, panel);
  part.m0 = panel % bands == 0 ? 0 : part.m0 < rows ? part.m0 : rows;
  part.m1 = panel % bands == bands - 1 ? rows : part.m1 < rows ? part.m1 : rows;
  return part;
}

void conv_backward(const ConvBackward &b) {
  const Convolve &c = b.dx;
  const ConvOuter &m = b.dvalues;
  const ConvPanel product = conv_product_of(c);
  const Panels<float> s = panels_in(m.scratch, m);
  const int threads = m.threads;
  const int64_t panels = panels_of(c);

#pragma omp parallel num_threads(threads)
  {
    const Share mine = my_share(m.order);
    float *aside = s.end + thread_number() * ASIDE;
    Ahead ahead;
    for_panels(
        panels, m.panels_at_once,
        [&](int64_t p, int64_t i, bool of_x) {
          const ConvPart part = part_at(c, p), of_dy = rows_of_dy(b, p);
          if (!of_x) pack_images(m.dy, part.n0, part.n1, part.m0, part.m1 - part.m0 + c.reach, s.dy + i * s.dy_panel);
          else if (of_dy.m0 < of_dy.m1)
            pack_images(m.x, part.n0, part.n1, of_dy.m0, of_dy.m1 - of_dy.m0 + m.reach, s.x + i * s.x_panel);
        },
        [&](int64_t p0, int64_t p1) {
          if (threads == 1 && p1 < panels) {
            const ConvPart next = part_at(c, p1), of_dy = rows_of_dy(b, p1);
            ahead = first_then(ahead_of(m.dy, next.n0, next.n1, next.m0, next.m1 - next.m0 + c.reach),
                               ahead_of(m.x, next.n0, next.n1, of_dy.m0, of_dy.m1 - of_dy.m0 + m.reach));
          }
          const int64_t groups = groups_of(p1 - p0, threads);
#pragma omp for schedule(static) nowait
          for (int64_t q = 0; q < (p1 - p0) * groups; q++) {
            const int64_t p = p0 + q / groups;
            convolve_panel(c, product, part_at(c, p), s.dy + (p - p0) * s.dy_panel, q % groups, groups, c.values, aside, ahead);
          }
          for (int64_t p = p0; p < p1; p++) {
            const ConvPart part = part_at(c, p), of_dy = rows_of_dy(b, p);
            const int64_t at = b.dy_at + (of_dy.m0 - part.m0 - b.dy_base) * m.dy.row_pitch;
            if (of_dy.m0 < of_dy.m1)
              add_rows(m, mine, s.x + (p - p0) * s.x_panel, s.dy + (p - p0) * s.dy_panel + at * m.dy.side, part.n1 - part.n0,
                       of_dy.m1 - of_dy.m0, p > 0, ahead);
          }
        });
    clear_rest(m.order, mine, edges_of(m), m.dy.side, m.x.side, m.out);
    fence();
  }
}

}  // namespace
