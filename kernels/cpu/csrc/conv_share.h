// How the gradient of a convolution's weight goes through the images, and what is cleared of it at the end.
#pragma once
#include "conv_part.h"
#include "share.h"

namespace {

INLINE int64_t outer_strips(const ConvOuter &m) { return (m.rows + m.strip - 1) / m.strip; }
INLINE int64_t outer_panels(const ConvOuter &m) { return (m.images + m.images_at_once - 1) / m.images_at_once * outer_strips(m); }

INLINE ConvPart outer_part_at(const ConvOuter &m, int64_t panel) {
  const int64_t strips = outer_strips(m), n0 = panel / strips * m.images_at_once, m0 = panel % strips * m.strip;
  return {n0, n0 + m.images_at_once < m.images ? n0 + m.images_at_once : m.images, m0, m0 + m.strip < m.rows ? m0 + m.strip : m.rows};
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

}  // namespace
