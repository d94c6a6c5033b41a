// The stored blocks of a convolution's weight gradient from bfloat16: as outer_bf16.h, for whose tiles the including file
// has defined Unit and outer_group. Images lie in turn, rows of pixels of a panel are filled up to whole steps of
// HALF_TOKENS, and a view is packed for each column of the kernel: so pairs of pixels are pairs for every tap.
#pragma once
#include "bf16.h"
#include "conv_share.h"

namespace {

// 16 channels of a pixel, of which `width` are there.
INLINE Halves channels_at(const Half *pixel, int64_t channel, int64_t width) {
  if (!pixel || width <= 0) return Halves{};
  if (width >= 16) return *(const Halves *)(pixel + channel);
  Halves some = {};
  for (int64_t i = 0; i < width; i++) some[i] = pixel[channel + i];
  return some;
}

// Every 32 pixels of the packed rows: pack(sources, null where there is none; what is wanted; where they are in the panel).
template <class Pack>
INLINE void for_32_pixels(const Packing &p, const ConvPart &part, int64_t width, int64_t rows, const Pack &pack) {
  for (int64_t v = 0; v < p.row_views; v++) {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = (part.m0 + r) * p.row_step + p.row_base[v];
      for (int64_t u = 0; u < p.col_views; u++) {
        const int64_t view = v * p.col_views + u, at = view * p.view_pitch + r * p.row_pitch;
        int64_t n = part.n0, m = 0;
        for (int64_t t = 0; t < p.row_pitch; t += 32) {
          const Half *sources[32];
          for (int64_t l = 0; l < 32; l++) {
            const int64_t col = m * p.col_step + p.col_base[u];
            const bool inside = n < part.n1 && row >= 0 && row < p.height && col >= 0 && col < p.width;
            sources[l] = inside ? (const Half *)p.data + ((n * p.height + row) * p.width + col) * p.channels : nullptr;
            if (++m == width) m = 0, n++;
          }
          pack(sources, p.wanted + view * conv_blocks(p), at + t);
        }
      }
    }
  }
}

// x -> [block][channel / 16][pixel / 2][16][2].
INLINE void pack_conv_pairs(const Packing &p, const ConvPart &part, int64_t width, int64_t rows, Half *out) {
  const int64_t group_channels = p.channels / p.groups, per_group = blocks_of(group_channels, p.side), blocks = conv_blocks(p);
  for_32_pixels(p, part, width, rows, [&](const Half *const *sources, const uint8_t *wanted, int64_t at) {
    for (int64_t b = 0; b < blocks; b++) {
      if (!wanted[b]) continue;
      for (int64_t k = 0; k < p.pieces; k++) {
        const int64_t c = b % per_group * p.side + 16 * k, left = group_channels - c, channel = b / per_group * group_channels + c;
        Half *to = out + ((b * p.pieces + k) * p.plane + at) * 16;
        for (int64_t l = 0; l < 32; l += 2)
          store_pairs(to + l * 16, pairs(channels_at(sources[l], channel, left), channels_at(sources[l + 1], channel, left)));
      }
    }
  });
}

// dy -> [block][pixel / 32][side][32].
INLINE void pack_conv_turned(const Packing &p, const ConvPart &part, int64_t width, int64_t rows, Half *out) {
  const int64_t group_channels = p.channels / p.groups, per_group = blocks_of(group_channels, p.side), blocks = conv_blocks(p);
  for_32_pixels(p, part, width, rows, [&](const Half *const *sources, const uint8_t *wanted, int64_t at) {
    for (int64_t b = 0; b < blocks; b++) {
      if (!wanted[b]) continue;
      Half *to = out + (b * p.plane + at) * p.side;
      for (int64_t i = 0; i < p.side; i += 16) {
        const int64_t c = b % per_group * p.side + i, left = group_channels - c, channel = b / per_group * group_channels + c;
        Vector a[16];
        UNROLL for (int l = 0; l < 16; l++)
          a[l] = pairs(channels_at(sources[2 * l], channel, left), channels_at(sources[2 * l + 1], channel, left));
        transpose(a);
        UNROLL for (int l = 0; l < 16; l++) store_pairs(to + (i + l) * 32, a[l]);
      }
    }
  });
}

void conv_outer_bf16(const ConvOuter &m) {
  const int64_t panels = outer_panels(m), x_panel = conv_floats(m.x), dy_panel = conv_floats(m.dy), bo = m.dy.side;
  Half *xs = (Half *)m.scratch, *dys = xs + m.panels_at_once * x_panel;
  const int threads = m.threads;

#pragma omp parallel num_threads(threads)
  {
    const Share mine = my_share(m.order);
    for (int64_t p0 = 0; p0 < panels; p0 += m.panels_at_once) {
      const int64_t p1 = p0 + m.panels_at_once < panels ? p0 + m.panels_at_once : panels;
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < 2 * (p1 - p0); q++) {
        const int64_t p = p0 + q / 2;
        const ConvPart part = outer_part_at(m, p);
        if (q & 1) pack_conv_pairs(m.x, part, m.cols, part.m1 - part.m0 + m.reach, xs + (p - p0) * x_panel);
        else pack_conv_turned(m.dy, part, m.cols, part.m1 - part.m0, dys + (p - p0) * dy_panel);
      }
      const Unit unit(32);
      for (int64_t p = p0; p < p1; p++) {
        const ConvPart part = outer_part_at(m, p);
        const Half *x = xs + (p - p0) * x_panel, *dy = dys + (p - p0) * dy_panel;
        int64_t row = mine.row;
        for (int64_t e = mine.first; e < mine.last;) {
          while (m.order.ptr[row + 1] <= e) row++;
          const int64_t stop = m.order.ptr[row + 1] < mine.last ? m.order.ptr[row + 1] : mine.last;
          const HalfGroup group = {dy + row * m.dy.plane * bo, x, 16, m.x.plane * 16, m.offset + e, m.order.slot + e, m.out,
                                   stop - e, (part.m1 - part.m0) * m.dy.row_pitch, bo, m.x.side, p > 0};
          e += outer_group(group);
        }
      }
#pragma omp barrier
    }
    clear_phantom(m, mine);
  }
}

}  // namespace
