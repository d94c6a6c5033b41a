// The convolution and its input gradient in bfloat16: images packed as such, and the tiles of product_bf16.h, for which the
// including file has defined Unit and product_tile. A pixel of a panel is one token of these; a tile may read some pixels
// beyond its run, whose sums are not written.
#pragma once
#include "bf16.h"
#include "conv_part.h"

namespace {

// As pack_row of conv_pack.h, in pieces of up to 32 channels.
INLINE void pack_half_row(const Packing &p, int64_t pixel, Columns has, int64_t base, const uint8_t *wanted, Half *out) {
  const int64_t group_channels = p.channels / p.groups, per_group = blocks_of(group_channels, p.side), piece = p.side / p.pieces;
  const int64_t step = p.col_step * p.channels, blocks = conv_blocks(p);
  for (int64_t b = 0; b < blocks; b++) {
    if (!wanted[b]) continue;
    const int64_t first = b / per_group * group_channels, channel = b % per_group * p.side;
    for (int64_t k = 0; k < p.pieces; k++) {
      const int64_t c = channel + k * piece, width = group_channels - c < piece ? group_channels - c : piece;
      const Half *from = (const Half *)p.data + (pixel + base) * p.channels + first + c;
      Half *to = out + (b * p.pieces + k) * p.plane * piece;
      std::memset(to, 0, has.first * piece * 2);
      std::memset(to + has.last * piece, 0, (p.cols - has.last) * piece * 2);
      for (int64_t m = has.first; m < has.last; m++) {
        const Half *source = from + m * step;
        Half *target = to + m * piece;
        if (width == 32) store_pairs(target, load_pairs(source));
        else if (width == piece) *(Halves *)target = *(const Halves *)source;
        else for (int64_t i = 0; i < piece; i++) target[i] = i < width ? source[i] : Half(0);
      }
    }
  }
}

// A panel's rows [y0, y1) of a subgrid, block by block of the channels [first, last).
INLINE void conv_panel_bf16(const Convolve &c, const Subgrid &s, const Half *packed, const ConvPart &p, int64_t y0, int64_t y1,
                            int64_t first, int64_t last, const Half *w, float *aside) {
  const int64_t piece = c.x.side / c.x.pieces, size = int64_t(c.in) * c.out, width = c.out == 16 ? 16 : 32, step = HALF_TILE / width;
  const int64_t group_channels = c.channels / c.x.groups, turn = c.x.cols;
  const Place place = {c, s, p.n0, p.n1, y0, turn};
  // In turn all rows of all images are one run, else each is its own.
  const int64_t per_image = c.in_turn ? 1 : y1 - y0, runs = c.in_turn ? 1 : (p.n1 - p.n0) * per_image;
  const int64_t length = c.in_turn ? (y1 - y0) * c.images_at_once * turn : s.x1 - s.x0;
  for (int64_t r = first; r < last; r++) {
    const int64_t start = s.ptr[r], block = r % c.group_blocks, left = group_channels - block * c.out;
    const int64_t channel = r / c.group_blocks * group_channels + block * c.out, channels = left < c.out ? left : c.out;
    HalfRow row = {nullptr, piece, c.x.plane * piece, nullptr, c.offset + start, s.ptr[r + 1] - start, size, c.in, c.out};
    for (int64_t o = 0; o < channels; o += width) {
      const int64_t some = channels - o < width ? channels - o : width;
      const float *bias = c.bias ? c.bias + r * c.out + o : nullptr;
      row.w = w + start * size + o * c.in;
      for (int64_t run = 0; run < runs; run++) {
        const int64_t n = run / per_image, y = run % per_image + y0;
        const Half *x = packed + (n * c.x.image_pitch + (y - p.m0) * c.x.row_pitch + (c.in_turn ? 0 : s.x0 - c.first_col)) * piece;
        for (int64_t t = 0; t < length; t += step) {
          const int64_t tokens = length - t < step ? length - t : step;
          row.x = x + t * piece;
          product_tile(row, tokens, bias, aside);
          if (c.in_turn) scatter(place, t, tokens, channel + o, some, aside, width);
          else for (int64_t j = 0; j < tokens; j++)
            write_row(c.y, place.at(p.n0 + n, y, s.x0 + t + j) + channel + o, BFLOAT16, aside + j * width, some);
        }
      }
    }
  }
}

void convolve_bf16(const Convolve &c) {
  const int64_t size = int64_t(c.in) * c.out, blocks = c.x.groups * c.group_blocks, piece = c.x.side / c.x.pieces;
  Half *w = (Half *)c.scratch;
  float *mine = c.scratch + round_up(c.used * size / 2, LINE);
  const int threads = c.threads;
  const int64_t panels = panels_of(c), groups = groups_of(panels, threads);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t e = 0; e < c.used; e++) {
      if (c.transposed) pack_block(c.values, c.slot[e] * size, FLOAT32, c.in, c.out, w + e * size);
      else pack_block_turned(c.values, c.slot[e] * size, FLOAT32, c.out, c.in, w + e * size);
    }
    const Unit unit(piece);
    float *aside = mine + thread_number() * half_thread_floats(c.x);
    Half *panel = (Half *)(aside + HALF_TILE);
    int64_t held = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < panels * groups; q++) {
      const int64_t p = q / groups, g = q % groups;
      const ConvPart part = part_at(c, p);
      if (p != held) {
        pack_images_by(c.x, part.n0, part.n1, part.m0, part.m1 - part.m0 + c.reach,
                       [&](int64_t pixel, Columns has, int64_t base, const uint8_t *wanted, int64_t at) {
                         pack_half_row(c.x, pixel, has, base, wanted, panel + at * piece);
                       });
        held = p;
      }
      for_subgrids(c, part, [&](const Subgrid &s, int64_t y0, int64_t y1) {
        conv_panel_bf16(c, s, panel, part, y0, y1, blocks * g / groups, blocks * (g + 1) / groups, w, aside);
      });
    }
  }
}

}  // namespace
