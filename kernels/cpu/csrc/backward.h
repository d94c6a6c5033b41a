// Both gradients of a layer: the panels of dy that dx reads are those of dvalues, so that they are packed once.
//
//   a superpanel:  pack dy and x | dx = dy W, mostly every thread those it packed | dvalues += dy' x, every thread its entries |
//
// Every sum has the order that it has in product.h and outer.h: the results are theirs to the bit.
#pragma once
#include "outer.h"
#include "product.h"

namespace {

void backward(const Backward &b) {
  const Multiply &m = b.dx;
  const Outer &d = b.dvalues;
  const PanelProduct product = product_of(m);
  const int64_t size = int64_t(d.bo) * d.bi, panels = (d.x.rows + d.panel - 1) / d.panel;
  const Superpanel s = superpanel_in(d.scratch, d);
  float *tiles = s.dy + d.panels_at_once * s.dy_panel;  // one a thread
  const int threads = d.threads;

#pragma omp parallel num_threads(threads)
  {
    const Share mine = my_share(d.order);
    float *aside = tiles + thread_number() * ASIDE;
    for (int64_t p0 = 0; p0 < panels; p0 += d.panels_at_once) {
      const int64_t p1 = p0 + d.panels_at_once < panels ? p0 + d.panels_at_once : panels;
      pack_both(d, s, p0, p1);
      const int64_t groups = groups_of(p1 - p0, threads);
#pragma omp for schedule(static) nowait
      for (int64_t q = 0; q < (p1 - p0) * groups; q++) {
        const int64_t p = p0 + q / groups, g = q % groups, count = tokens_of(d, p);
        const Row row = {nullptr, count * m.in, nullptr, nullptr, nullptr, 0, size, m.out, false};
        product(m, row, s.dy + (p - p0) * s.dy_panel, p * d.panel, count, m.order.rows * g / groups,
                m.order.rows * (g + 1) / groups, m.values, nullptr, aside);
      }
      add_panels(d, s, mine, p0, p1);
#pragma omp barrier
    }
    clear_rest(d, mine);
    fence();
  }
}

}  // namespace
