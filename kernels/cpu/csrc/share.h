// Shared by the outer products: panels that all threads pack, the entries of each thread, the zeros at the edges.
#pragma once
#include <cstring>
#include "vector.h"

namespace {

// Whether all numbers are from 0 to below `bound`.
[[maybe_unused]] bool all_inside(const int32_t *numbers, int64_t count, int64_t bound) {
  const uint32_t top = uint32_t(bound - 1);
  uint32_t sign = 0;  // of a difference or of the number itself
  for (int64_t i = 0; i < count; i++) sign |= uint32_t(numbers[i]) | (top - uint32_t(numbers[i]));
  return !(sign >> 31);
}

// Room for `at_once` packed panels of x and of dy.
template <class T> struct Panels {
  T *x, *dy, *end;
  int64_t x_panel, dy_panel;  // numbers a panel

  Panels(void *scratch, int64_t at_once, int64_t x_panel, int64_t dy_panel)
      : x((T *)scratch), dy(x + at_once * x_panel), end(dy + at_once * dy_panel), x_panel(x_panel), dy_panel(dy_panel) {}
};

// Go through all panels, `at_once` at a time: pack(p, i, of_x) packs panel p of x or dy as number i of those held, then each
// thread calls use(p0, p1). Called by all threads.
template <class Pack, class Use> INLINE void for_panels(int64_t panels, int64_t at_once, const Pack &pack, const Use &use) {
  for (int64_t p0 = 0; p0 < panels; p0 += at_once) {
    const int64_t p1 = p0 + at_once < panels ? p0 + at_once : panels;
#pragma omp for schedule(static)
    for (int64_t q = 0; q < 2 * (p1 - p0); q++) pack(p0 + q / 2, q / 2, bool(q & 1));
    use(p0, p1);
#pragma omp barrier
  }
}

// The entries of one thread.
struct Share {
  int64_t first, last, row;  // the block row of the first
};

INLINE Share my_share(const Order &order) {
  const int64_t used = order.ptr[order.rows], me = thread_number(), all_of_us = thread_count();
  Share mine = {used * me / all_of_us, used * (me + 1) / all_of_us, 0};
  while (mine.row < order.rows && order.ptr[mine.row + 1] <= mine.first) mine.row++;
  return mine;
}

// The rows and columns that features fill in the last block row of every `row_blocks` and in the last block column of every
// `col_blocks`; 0 if they fill all.
struct Edges {
  int64_t rows, row_blocks, cols, col_blocks;
};

INLINE Edges edges_of(const Outer &m) { return {m.dy.cols % m.bo, m.order.rows, m.x.cols % m.bi, m.order.others}; }

// Write zeros outside the features, where a NaN may have met the filling, and to free slots. Called by all threads.
INLINE void clear_rest(const Order &order, const Share &mine, const Edges &edges, int64_t bo, int64_t bi, float *blocks) {
  const int64_t used = order.ptr[order.rows];
  int64_t row = mine.row;
  for (int64_t e = mine.first; e < mine.last; e++) {
    while (order.ptr[row + 1] <= e) row++;
    float *out = blocks + order.slot[e] * bo * bi;
    if (edges.rows && row % edges.row_blocks == edges.row_blocks - 1) std::memset(out + edges.rows * bi, 0, (bo - edges.rows) * bi * 4);
    if (edges.cols && order.other[e] % edges.col_blocks == edges.col_blocks - 1)
      for (int64_t o = 0; o < bo; o++) std::memset(out + o * bi + edges.cols, 0, (bi - edges.cols) * 4);
  }
#pragma omp for schedule(static)
  for (int64_t e = used; e < order.slots; e++) std::memset(blocks + order.slot[e] * bo * bi, 0, bo * bi * 4);
}

// Write zeros to free slots at 1x1, where slots are not checked yet. Called by all threads.
INLINE void clear_free(const Order &order, float *out) {
#pragma omp for schedule(static)
  for (int64_t e = order.ptr[order.rows]; e < order.slots; e++) {
    const int32_t slot = order.slot[e];
    if (inside(slot, order.slots)) out[slot] = 0.f;
    else refuse(order);
  }
}

}  // namespace
