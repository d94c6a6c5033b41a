// The stored blocks of dy' x from bfloat16 into float32: panels of tokens, whole blocks (or a few of one block row) at a
// time. The file of an instruction set includes, before this one, what defines Unit (product_bf16.h) and
//
//   outer_group         adds a panel to the next blocks of one block row; returns how many
//
// Pairs of tokens never straddle panels, which are whole steps of HALF_TOKENS: a sum is the same for every panel length.
#pragma once
#include "conv_panels.h"
#include "pack_bf16.h"
#include "share.h"

namespace {

// Add a panel to the entries of a thread. `group` holds what is the same for all; block row r of dy is at r * dy_row, and
// entry e reads x at others[e] * group.x_block.
INLINE void add_entries(const Order &order, const Share &mine, HalfGroup group, int64_t dy_row, const int32_t *others) {
  const Half *dy = group.dy;
  int64_t row = mine.row;
  for (int64_t e = mine.first; e < mine.last;) {
    while (order.ptr[row + 1] <= e) row++;
    group.dy = dy + row * dy_row, group.other = others + e, group.slot = order.slot + e;
    group.count = (order.ptr[row + 1] < mine.last ? order.ptr[row + 1] : mine.last) - e;
    e += outer_group(group);
  }
}

void outer_bf16(const Outer &m) {
  const Panels<Half> s(m.scratch, m.panels_at_once, blocks_of(m.x.cols, m.bi) * m.bi * m.panel, blocks_of(m.dy.cols, m.bo) * m.bo * m.panel);
  const auto filled = [&](int64_t p) {  // tokens, with the zeros behind the last one
    const int64_t left = m.x.rows - p * m.panel;
    return left < m.panel ? round_up(left, HALF_TOKENS) : m.panel;
  };
  const int threads = m.threads;

#pragma omp parallel num_threads(threads)
  {
    const Share mine = my_share(m.order);
    for_panels(
        blocks_of(m.x.rows, m.panel), m.panels_at_once,
        [&](int64_t p, int64_t i, bool of_x) {
          if (of_x) pack_pairs(m.x, p * m.panel, filled(p), m.bi, m.wanted_x, s.x + i * s.x_panel);
          else pack_turned(m.dy, p * m.panel, filled(p), m.bo, m.wanted_dy, s.dy + i * s.dy_panel);
        },
        [&](int64_t p0, int64_t p1) {
          const Unit unit(32);
          for (int64_t p = p0; p < p1; p++) {
            const int64_t count = filled(p);
            const HalfGroup group = {s.dy + (p - p0) * s.dy_panel, s.x + (p - p0) * s.x_panel, count * m.bi, count * 16, nullptr, nullptr,
                                     m.out, 0, count, m.bo, m.bi, p > 0};
            add_entries(m.order, mine, group, count * m.bo, m.order.other);
          }
        });
    clear_rest(m.order, mine, edges_of(m), m.bo, m.bi, m.out);
  }
}

// The gradient of a convolution's weight. Images lie in turn, rows of pixels in a panel are filled up to multiples of
// HALF_TOKENS, and there is a view for each column of the kernel, so that pairs of pixels are pairs for every tap.

// VL channels of a pixel, zeros behind the first `width`.
INLINE Halves channels_at(const Half *pixel, int64_t channel, int64_t width) {
  if (!pixel || width <= 0) return Halves{};
  if (width >= VL) return *(const Halves *)(pixel + channel);
  Halves some = {};
  for (int64_t i = 0; i < width; i++) some[i] = pixel[channel + i];
  return some;
}

// Call pack(sources, wanted blocks, first pixel in the panel) for every 32 pixels of the packed rows; a source is null outside.
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
      for (int64_t k = 0; k < p.slices; k++) {
        const int64_t c = b % per_group * p.side + 16 * k, left = group_channels - c, channel = b / per_group * group_channels + c;
        Half *to = out + ((b * p.slices + k) * p.plane + at) * 16;
        for (int64_t l = 0; l < 32; l += 2)
          UNROLL for (int i = 0; i < 16; i += VL)
            store_pairs(to + l * 16 + i * 2, pairs(channels_at(sources[l], channel + i, left - i), channels_at(sources[l + 1], channel + i, left - i)));
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
        turn<16>(to + i * 32, [&](int l, int j) {
          return pairs(channels_at(sources[2 * l], channel + j, left - j), channels_at(sources[2 * l + 1], channel + j, left - j));
        });
      }
    }
  });
}

void conv_outer_bf16(const ConvOuter &m) {
  const Panels<Half> s(m.scratch, m.panels_at_once, conv_floats(m.x), conv_floats(m.dy));
  const int64_t bo = m.dy.side, bi = m.x.side;
  const int threads = m.threads;

#pragma omp parallel num_threads(threads)
  {
    const Share mine = my_share(m.order);
    for_panels(
        panels_of(m), m.panels_at_once,
        [&](int64_t p, int64_t i, bool of_x) {
          const ConvPart part = part_at(m, p);
          if (of_x) pack_conv_pairs(m.x, part, m.cols, part.m1 - part.m0 + m.reach, s.x + i * s.x_panel);
          else pack_conv_turned(m.dy, part, m.cols, part.m1 - part.m0, s.dy + i * s.dy_panel);
        },
        [&](int64_t p0, int64_t p1) {
          const Unit unit(32);
          for (int64_t p = p0; p < p1; p++) {
            const ConvPart part = part_at(m, p);
            const HalfGroup group = {s.dy + (p - p0) * s.dy_panel, s.x + (p - p0) * s.x_panel, 16, m.x.plane * 16, nullptr, nullptr,
                                     m.out, 0, (part.m1 - part.m0) * m.dy.row_pitch, bo, bi, p > 0};
            add_entries(m.order, mine, group, m.dy.plane * bo, m.offset);
          }
        });
    clear_rest(m.order, mine, edges_of(m), bo, bi, m.out);
  }
}

}  // namespace
