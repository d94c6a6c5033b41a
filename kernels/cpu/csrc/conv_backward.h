// Both gradients of a convolution: the panels of dy that dx reads are those of dvalues, so that they are packed once.
//
//   some panels:  pack dy and x | dx = dy * W', mostly every thread those it packed | dvalues += dy' x, every thread its entries |
//
// Every sum has the order that it has in conv_product.h and conv_outer.h: the results are theirs to the bit.
#pragma once
#include "conv_outer.h"
#include "conv_product.h"

namespace {

// The rows of dy that a panel adds to dvalues: each row of an image is in one panel.
INLINE ConvPart rows_of_dy(const ConvBackward &b, int64_t panel) {
  const Convolve &c = b.dx;
  const int64_t strips = strips_of(c), rows = b.dvalues.rows;
  ConvPart part = part_at(c, panel);
  part.m0 = panel % strips == 0 ? 0 : part.m0 < rows ? part.m0 : rows;
  part.m1 = panel % strips == strips - 1 ? rows : part.m1 < rows ? part.m1 : rows;
  return part;
}

void conv_backward(const ConvBackward &b) {
  const Convolve &c = b.dx;
  const ConvOuter &m = b.dvalues;
  const ConvPanel product = conv_product_of(c);
  const ConvPanels s = conv_panels_in(m.scratch, m);
  float *tiles = s.dy + m.panels_at_once * s.dy_panel;  // one a thread
  const int threads = m.threads;
  const int64_t panels = panels_of(c);

#pragma omp parallel num_threads(threads)
  {
    const Share mine = my_share(m.order);
    float *aside = tiles + thread_number() * ASIDE;
    Ahead ahead;
    for (int64_t p0 = 0; p0 < panels; p0 += m.panels_at_once) {
      const int64_t p1 = p0 + m.panels_at_once < panels ? p0 + m.panels_at_once : panels;
#pragma omp for schedule(static)
      for (int64_t q = 0; q < 2 * (p1 - p0); q++) {
        const int64_t p = p0 + q / 2;
        const ConvPart part = part_at(c, p), of_dy = rows_of_dy(b, p);
        if (!(q & 1)) pack_images(m.dy, part.n0, part.n1, part.m0, part.m1 - part.m0 + c.reach, s.dy + (p - p0) * s.dy_panel);
        else if (of_dy.m0 < of_dy.m1)
          pack_images(m.x, part.n0, part.n1, of_dy.m0, of_dy.m1 - of_dy.m0 + m.reach, s.x + (p - p0) * s.x_panel);
      }
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
#pragma omp barrier
    }
    clear_phantom(m, mine);
    fence();
  }
}

}  // namespace
