// Convolutions: the panels, and where the outputs of a tile are in the result.
#pragma once
#include "pack.h"
#include "share.h"

namespace {

// A panel: some images, or a band of one; rows [m0, m1) of the subgrids.
struct ConvPart {
  int64_t n0, n1, m0, m1;
};

INLINE int64_t bands_of(const Cut &c) { return blocks_of(c.last_row - c.first_row, c.band); }
INLINE int64_t panels_of(const Cut &c) { return blocks_of(c.images, c.images_at_once) * bands_of(c); }

INLINE ConvPart part_at(const Cut &c, int64_t panel) {
  const int64_t bands = bands_of(c), n0 = panel / bands * c.images_at_once, m0 = c.first_row + panel % bands * c.band;
  return {n0, n0 + c.images_at_once < c.images ? n0 + c.images_at_once : c.images, m0, m0 + c.band < c.last_row ? m0 + c.band : c.last_row};
}

// Call run(subgrid, its first row in a panel, the row behind its last) for each subgrid that has any.
template <class F> INLINE void for_subgrids(const Convolve &c, const ConvPart &p, const F &run) {
  for (int64_t i = 0; i < c.subgrids; i++) {
    const Subgrid &s = c.subgrid[i];
    const int64_t y0 = s.y0 > p.m0 ? s.y0 : p.m0, y1 = s.y1 < p.m1 ? s.y1 : p.m1;
    if (y0 < y1 && s.x0 < s.x1) run(s, y0, y1);
  }
}

// The outputs of a panel in a subgrid, as spans: see conv.h.
struct Outputs {
  const Convolve &c;
  const Subgrid &s;
  const ConvPart &part;
  int64_t y0, y1;           // rows of the subgrid
  int64_t per_image, spans, length;

  Outputs(const Convolve &c, const Subgrid &s, const ConvPart &part, int64_t y0, int64_t y1)
      : c(c), s(s), part(part), y0(y0), y1(y1), per_image(c.in_turn ? 1 : y1 - y0), spans(c.in_turn ? 1 : (part.n1 - part.n0) * per_image),
        length(c.in_turn ? (y1 - y0) * c.images_at_once * c.x.cols : s.x1 - s.x0) {}

  // The pixel of the panel at which a span begins.
  int64_t start(int64_t span) const {
    const int64_t n = span / per_image, y = span % per_image + y0;
    return n * c.x.image_pitch + (y - part.m0) * c.x.row_pitch + (c.in_turn ? 0 : s.x0 - c.first_col);
  }
  // Where output x of row y of image n is in the result.
  int64_t at(int64_t n, int64_t y, int64_t x) const {
    return ((n * c.height + y * c.row_step + s.row_base) * c.width + x * c.col_step + s.col_base) * c.channels;
  }
  // The same of output t of a span, not in turn.
  int64_t at(int64_t span, int64_t t) const { return at(part.n0 + span / per_image, span % per_image + y0, s.x0 + t); }
};

// The channels of a block row of the result: their first, and how many there are.
struct Channels {
  int64_t first, count;
};
INLINE Channels channels_of(const Convolve &c, int64_t r) {
  const int64_t group_channels = c.channels / c.x.groups, block = r % c.group_blocks, left = group_channels - block * c.out;
  return {r / c.group_blocks * group_channels + block * c.out, left < c.out ? left : c.out};
}

// Call write(where it is in the result, j) for the outputs t + j < t + count of a panel in turn, except those beside the subgrid.
template <class Write> INLINE void scatter(const Outputs &o, int64_t t, int64_t count, const Write &write) {
  const Convolve &c = o.c;
  const int64_t turn = c.x.cols, wide = c.images_at_once * turn;
  int64_t y = o.y0 + t / wide, n = o.part.n0 + t % wide / turn, x = c.first_col + t % turn;
  for (int64_t j = 0; j < count; j++) {
    if (n < o.part.n1 && x >= o.s.x0 && x < o.s.x1) write(o.at(n, y, x), j);
    if (++x == c.first_col + turn) {
      x = c.first_col;
      if (++n == o.part.n0 + c.images_at_once) n = o.part.n0, y++;
    }
  }
}

// The same from float32 sums, `width` channels from `channel` on.
INLINE void scatter(const Outputs &o, int64_t t, int64_t count, int64_t channel, int64_t width, const float *from, int64_t step) {
  const Convolve &c = o.c;
  const bool past = c.past && width % LINE == 0;
  scatter(o, t, count, [&](int64_t at, int64_t j) {
    if (past) for (int64_t i = 0; i < width; i += VL) store_past((float *)c.y + at + channel + i, load(from + j * step + i));
    else write_row(c.y, at + channel, c.dtype, from + j * step, width);
  });
}

INLINE Edges edges_of(const ConvOuter &m) {
  return {m.dy.channels / m.dy.groups % m.dy.side, m.row_blocks, m.x.channels / m.x.groups % m.x.side, m.col_blocks};
}

}  // namespace
