// The convolution and its input gradient by blocks: the tile of product.h over the packed images of conv.h.
//
// Every element of the result has one order of summation: the entries of its list (for the gradient: tap by tap), k within
// a block. Panels and threads have no part in it.
#pragma once
#include "conv_panels.h"
#include "product.h"

namespace {

// The outputs of one panel, for the block rows [first, last).
template <int IN, int C>
void conv_panel(const Outputs &out, const float *packed, int64_t first, int64_t last, const float *w, float *aside, Ahead &ahead) {
  static const Tiles<IN, C> tiles;
  const Convolve &c = out.c;
  const Subgrid &s = out.s;
  const int64_t step = C * VL, tokens_each = Tiles<IN, C>::MOST, size = int64_t(c.in) * c.out, turn = c.x.cols;
  const int64_t length = out.length, parts = blocks_of(length, tokens_each);
  const bool in_place = c.in_turn && c.images_at_once == 1 && s.x1 - s.x0 == turn && c.col_step == 1 && c.row_step == 1 && turn == c.width;
  for (int64_t r = first; r < last; r++) {
    const int64_t start = s.ptr[r];
    const Channels channels = channels_of(c, r);
    const bool whole = channels.count == c.out && c.dtype == FLOAT32, direct = whole && (!c.in_turn || in_place);
    Row row = {nullptr, IN, nullptr, c.offset + start, c.transposed ? c.slot + start : nullptr, s.ptr[r + 1] - start, size,
               c.out, direct && c.past};
    for (int64_t o = 0; o < channels.count; o += step) {
      const int64_t width = channels.count - o < step ? channels.count - o : step, channel = channels.first + o;
      const float *b = c.bias ? c.bias + r * c.out + o : nullptr;
      row.w = (c.transposed ? w : w + start * size) + o;
      for (int64_t span = 0; span < out.spans; span++) {
        const float *x = packed + out.start(span) * IN;
        for (int64_t i = 0, t = 0; i < parts; i++) {
          const int64_t rows = length / parts + (i < length % parts);
          row.x = x + t * IN;
          ahead.fetch(row.count * IN / 8);  // about one in 40 cycles: more would fill the load buffers
          if (direct) {
            tiles.by_rows[rows](row, (float *)c.y + out.at(span, t) + channel, c.col_step * c.channels, b);
          } else {
            tiles.by_rows[rows](row, aside, step, b);
            if (c.in_turn) scatter(out, t, rows, channel, width, aside, step);
            else for (int64_t j = 0; j < rows; j++) write_row(c.y, out.at(span, t + j) + channel, c.dtype, aside + j * step, width);
          }
          t += rows;
        }
      }
    }
  }
}

typedef void (*ConvPanel)(const Outputs &, const float *, int64_t, int64_t, const float *, float *, Ahead &);

INLINE ConvPanel conv_product_of(const Convolve &c) {
  return for_sides(c.in, c.out, [](auto in, auto vectors) -> ConvPanel { return conv_panel<decltype(in)::value, decltype(vectors)::value>; });
}

// One panel times group g of the block rows of every subgrid.
INLINE void convolve_panel(const Convolve &c, ConvPanel product, const ConvPart &p, const float *panel, int64_t g, int64_t groups,
                           const float *w, float *aside, Ahead &ahead) {
  const int64_t blocks = c.x.groups * c.group_blocks;
  for_subgrids(c, p, [&](const Subgrid &s, int64_t y0, int64_t y1) {
    product(Outputs(c, s, p, y0, y1), panel, blocks * g / groups, blocks * (g + 1) / groups, w, aside, ahead);
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
