// The sketch of a convolution's weight gradient: that of sketch.h, the tokens being the pixels of y.
//
// x is read where it lies, once for each tap: the pixels that a tap sees become lanes as the tokens of a linear layer do.
#pragma once
#include "conv.h"
#include "sketch.h"

namespace {

// Where a tap looks from `count` pixels of y, `first` and on: the first element of each pixel of x, -1 for padding.
INLINE void pixels_seen(const Conv &c, int64_t first, int64_t count, int64_t tap, int64_t *at) {
  const int64_t i = tap / c.kernel[1] * c.dilation[0] - c.padding[0], j = tap % c.kernel[1] * c.dilation[1] - c.padding[1];
  const int64_t width = c.out_size[1], height = c.out_size[0];
  int64_t x = first % width, y = first / width % height, n = first / width / height;
  for (int64_t l = 0; l < PROJECTED; l++) {
    const int64_t row = y * c.stride[0] + i, col = x * c.stride[1] + j;
    const bool inside = l < count && row >= 0 && row < c.in_size[0] && col >= 0 && col < c.in_size[1];
    at[l] = inside ? ((n * c.in_size[0] + row) * c.in_size[1] + col) * c.in_channels : -1;
    if (++x == width) {
      x = 0;
      if (++y == height) y = 0, n++;
    }
  }
}

// Some channels of these pixels -> out[channel][PROJECTED]; zeros for padding.
INLINE void pack_seen(const Conv &c, const int64_t *at, int64_t channel, int64_t wide, float *out) {
  for (int64_t l0 = 0; l0 < PROJECTED; l0 += VL) {
    int64_t f = 0;
    for (; f + VL <= wide; f += VL) {
      Vector a[VL];
      UNROLL for (int l = 0; l < VL; l++) a[l] = at[l0 + l] < 0 ? Vector{} : read_vector(c.x, at[l0 + l] + channel + f, c.dtype);
      transpose(a);
      UNROLL for (int l = 0; l < VL; l++) store(out + (f + l) * PROJECTED + l0, a[l]);
    }
    for (; f < wide; f++)
      for (int64_t l = l0; l < l0 + VL; l++) out[f * PROJECTED + l] = at[l] < 0 ? 0.f : read(c.x, at[l] + channel + f, c.dtype);
  }
}

void conv_sketch(const ConvSketch &m) {
  const Conv &c = m.conv;
  const int64_t tokens = c.images * c.out_size[0] * c.out_size[1];
  const int64_t group_out = c.out_channels / c.groups, group_in = c.in_channels / c.groups;
  const Matrix dy = {c.y, tokens, c.out_channels, c.out_channels, 1, c.dtype};
  sketch_in_panels(
      m.plan, {1, group_out, c.bo, m.u}, {c.kernel[0] * c.kernel[1], group_in, c.bi, m.v}, c.groups, tokens, m.pairs, m.out,
      m.scratch, c.threads,
      [&](int64_t group, int64_t first, int64_t count, int64_t channel, int64_t wide, float *lanes) {
        pack_lanes<PROJECTED>(columns(dy, group * group_out + channel, wide), first, count, lanes);
      },
      [&](int64_t group, int64_t first, int64_t count, int64_t tap, int64_t channel, int64_t wide, float *lanes) {
        int64_t at[PROJECTED];
        pixels_seen(c, first, count, tap, at);
        pack_seen(c, at, group * group_in + channel, wide, lanes);
      });
}

}  // namespace
