// The convolution and its input gradient by blocks: the tile of product.h over the packed images of conv.h.
//
// Every element of the result has one order of summation: the entries of its list (for the gradient: tap by tap), k within
// a block. Panels and threads have no part in it.
#pragma once
#include "conv_part.h"
#include "product.h"

namespace {

// A panel's rows [y0, y1) of a subgrid, block by block of the channels [first, last).
template <int IN, int C>
void conv_panel(const Convolve &c, const Subgrid &s, const float *packed, int64_t n0, int64_t n1, int64_t panel_row, int64_t y0,
                int64_t y1, int64_t first, int64_t last, const float *w, float *aside, Ahead &ahead) {
  static const Tiles<IN, C> tiles;
  const int64_t step = C * VL, most = Tiles<IN, C>::MOST, size = int64_t(c.in) * c.out;
  const int64_t group_channels = c.channels / (c.x.groups), turn = c.x.cols;
  const Place place = {c, s, n0, n1, y0, turn};
  // In turn all rows of all images are one run, else each is its own.
  const int64_t per_image = c.in_turn ? 1 : y1 - y0, runs = c.in_turn ? 1 : (n1 - n0) * per_image;
  const int64_t length = c.in_turn ? (y1 - y0) * c.images_at_once * turn : s.x1 - s.x0;
  const int64_t pieces = (length + most - 1) / most;
  const bool in_place = c.in_turn && c.images_at_once == 1 && s.x1 - s.x0 == turn && c.col_step == 1 && c.row_step == 1 && turn == c.width;
  for (int64_t r = first; r < last; r++) {
    const int64_t start = s.ptr[r], block = r % c.group_blocks, left = group_channels - block * c.out;
    const int64_t channel = r / c.group_blocks * group_channels + block * c.out, channels = left < c.out ? left : c.out;
    const bool whole = channels == c.out && c.dtype == FLOAT32;
    Row row = {nullptr, IN, nullptr, c.offset + start, c.transposed ? c.slot + start : nullptr, s.ptr[r + 1] - start, size,
               c.out, whole && c.past && (!c.in_turn || in_place)};
    for (int64_t o = 0; o < channels; o += step) {
      const int64_t width = channels - o < step ? channels - o : step;
      const float *b = c.bias ? c.bias + r * c.out + o : nullptr;
      row.w = (c.transposed ? w : w + start * size) + o;
      for (int64_t run = 0; run < runs; run++) {
        const int64_t n = run / per_image, y = run % per_image + y0;
        const float *x = packed + (n * c.x.image_pitch + (y - panel_row) * c.x.row_pitch + (c.in_turn ? 0 : s.x0 - c.first_col)) * IN;
        for (int64_t i = 0, t = 0; i < pieces; i++) {
          const int64_t rows = length / pieces + (i < length % pieces);
          row.x = x + t * IN;
          ahead.fetch(row.count * IN / 8);  // one in 40 cycles or so: more would fill the buffers that loads wait in
          if (whole && (!c.in_turn || in_place)) {
            tiles.by_rows[rows](row, (float *)c.y + place.at(n0 + n, y, s.x0 + t) + channel + o, c.col_step * c.channels, b);
          } else {
            tiles.by_rows[rows](row, aside, step, b);
            if (c.in_turn) scatter(place, t, rows, channel + o, width, aside, step);
            else for (int64_t j = 0; j < rows; j++)
              write_row(c.y, place.at(n0 + n, y, s.x0 + t + j) + channel + o, c.dtype, aside + j * step, width);
          }
          t += rows;
        }
      }
    }
  }
}

typedef void (*ConvPanel)(const Convolve &, const Subgrid &, const float *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, const float *, float *, Ahead &);

template <int IN> ConvPanel conv_by_width(int64_t out) {
#if VL == 16
  if (out == 16) return conv_panel<IN, 1>;
#endif
  (void)out;
  return conv_panel<IN, 2>;
}

ConvPanel conv_product_of(const Convolve &c) {
  return c.in == 16   ? conv_by_width<16>(c.out)
         : c.in == 32 ? conv_by_width<32>(c.out)
         : c.in == 64 ? conv_by_width<64>(c.out)
                      : conv_by_width<128>(c.out);
}

// One panel times some of the groups of block rows of every subgrid.
INLINE void convolve_panel(const Convolve &c, ConvPanel product, const ConvPart &p, const float *panel, int64_t g, int64_t groups,
                           const float *w, float *aside, Ahead &ahead) {
  const int64_t blocks = c.x.groups * c.group_blocks;
  for_subgrids(c, p, [&](const Subgrid &s, int64_t y0, int64_t y1) {
    product(c, s, panel, p.n0, p.n1, p.m0, y0, y1, blocks * g / groups, blocks * (g + 1) / groups, w, aside, ahead);
  });
}

void convolve(const Convolve &c) {
  const ConvPanel product = conv_product_of(c);
  const int64_t size = int64_t(c.in) * c.out, packed = conv_floats(c.x);
  float *w = c.scratch, *mine = w + (c.transposed ? 0 : round_up(c.used * size, LINE));
  const int threads = c.threads;
  const int64_t panels = panels_of(c), groups = groups_of(panels, threads);

#pragma omp parallel num_threads(threads)
  {
    if (!c.transposed) {
#pragma omp for schedule(static)
      for (int64_t e = 0; e < c.used; e++) transpose_block(c.values + c.slot[e] * size, c.out, c.in, w + e * size);
    }
    float *panel = mine + thread_number() * (packed + ASIDE), *aside = panel + packed;
    Ahead ahead;
    int64_t held = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < panels * groups; q++) {
      const int64_t p = q / groups, g = q % groups;
      const ConvPart part = part_at(c, p);
      if (p != held) {
        pack_images(c.x, part.n0, part.n1, part.m0, part.m1 - part.m0 + c.reach, panel), held = p;
        if (p + threads < panels) {  // likely the next one of this thread
          const ConvPart next = part_at(c, p + threads);
          ahead = ahead_of(c.x, next.n0, next.n1, next.m0, next.m1 - next.m0 + c.reach);
        }
      }
      convolve_panel(c, product, part, panel, g, groups, c.transposed ? c.values : w, aside, ahead);
    }
    fence();
  }
}

}  // namespace
