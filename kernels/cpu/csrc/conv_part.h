// How a convolution and its input gradient go through the images: panels, and where the outputs of a tile lie.
#pragma once
#include "conv_pack.h"
#include "threads.h"

namespace {

// A panel: some images, or a strip of one; rows [m0, m1) of the subgrids.
struct ConvPart {
  int64_t n0, n1, m0, m1;
};

INLINE int64_t strips_of(const Convolve &c) { return (c.last_row - c.first_row + c.strip - 1) / c.strip; }
INLINE int64_t panels_of(const Convolve &c) { return (c.images + c.images_at_once - 1) / c.images_at_once * strips_of(c); }

INLINE ConvPart part_at(const Convolve &c, int64_t panel) {
  const int64_t strips = strips_of(c), n0 = panel / strips * c.images_at_once, m0 = c.first_row + panel % strips * c.strip;
  return {n0, n0 + c.images_at_once < c.images ? n0 + c.images_at_once : c.images, m0,
          m0 + c.strip < c.last_row ? m0 + c.strip : c.last_row};
}

// run(subgrid, its first row in a panel, the row behind its last), where there is any.
template <class F> INLINE void for_subgrids(const Convolve &c, const ConvPart &p, const F &run) {
  for (int64_t i = 0; i < c.subgrids; i++) {
    const Subgrid &s = c.subgrid[i];
    const int64_t y0 = s.y0 > p.m0 ? s.y0 : p.m0, y1 = s.y1 < p.m1 ? s.y1 : p.m1;
    if (y0 < y1 && s.x0 < s.x1) run(s, y0, y1);
  }
}

struct Place {  // of a tile's outputs in y
  const Convolve &c;
  const Subgrid &s;
  int64_t n0, n1, y0, turn;  // images of the panel; its first row; columns in turn

  int64_t at(int64_t n, int64_t y, int64_t x) const {
    return ((n * c.height + y * c.row_step + s.row_base) * c.width + x * c.col_step + s.col_base) * c.channels;
  }
};

// A tile that was written aside, to the rows of y of outputs t and on of a panel in turn; those beside the subgrid are not.
INLINE void scatter(const Place &p, int64_t t, int64_t count, int64_t channel, int64_t width, const float *from, int64_t step) {
  const int64_t wide = p.c.images_at_once * p.turn;
  const bool past = p.c.past && width % LINE == 0;
  int64_t y = p.y0 + t / wide, n = p.n0 + t % wide / p.turn, x = p.c.first_col + t % p.turn;
  for (int64_t j = 0; j < count; j++) {
    if (n < p.n1 && x >= p.s.x0 && x < p.s.x1) {
      const int64_t at = p.at(n, y, x) + channel;
      if (past) for (int64_t c = 0; c < width; c += VL) store_past((float *)p.c.y + at + c, load(from + j * step + c));
      else write_row(p.c.y, at, p.c.dtype, from + j * step, width);
    }
    if (++x == p.c.first_col + p.turn) {
      x = p.c.first_col;
      if (++n == p.n0 + p.c.images_at_once) n = p.n0, y++;
    }
  }
}

}  // namespace
