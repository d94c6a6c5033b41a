// The sketch of dy' x: for each of a few pairs (u, v) the matrix of u' G v over the blocks of G = dy' x.
//
//   left[q][t][r]    = sum over o in block row r of dy[t][o] * u[q][o]       right[q][t][c] the same of x and v
//   out[q][r][c]     = sum over t of left[q][t][r] * right[q][t][c]
//
// dy and x are read once for all pairs: tokens are the lanes, and the numbers in registers are multiplied by every u.
// Projections are kept as [pair][group][token][GROUP], a group being GROUP block rows; their product is that of outer.h.
// The tokens of a convolution are the pixels of y; x is read in place, once for each tap.
#pragma once
#include "outer.h"

namespace {

constexpr int64_t PROJECTED = 2 * VL;                 // tokens at a time
constexpr int PAIRS = VL == 16 ? 8 : 4;               // vectors u at a time, whose sums fit the registers
constexpr int64_t PACKED_FEATURES = 128;               // packed at a time

// The features that are projected: taps with the same channels, in blocks that end with each tap. A linear layer has one tap.
struct Features {
  int64_t taps, channels, side;
  const float *u;  // (taps * channels, pairs filled up)

  int64_t tap_blocks() const { return blocks_of(channels, side); }
  int64_t blocks() const { return taps * tap_blocks(); }
};

// Project one group of blocks for up to PROJECTED tokens. `lanes` has PACKED_FEATURES * PROJECTED floats, into which
// pack(tap, channel, count, lanes) writes some channels of these tokens.
template <class Pack>
void project(const Features &f, int64_t pairs, int64_t group, float *lanes, float *aside, float *out, int64_t out_stride,
             const Pack &pack) {
  constexpr int64_t T = PROJECTED;
  const int64_t blocks = f.blocks(), per_tap = f.tap_blocks(), padded = round_up(pairs, GROUP_PAIRS), most = PACKED_FEATURES / f.side;
  for (int64_t b0 = group * GROUP, half = 0; half < GROUP; half += VL, b0 += VL) {
    const int64_t n = blocks - b0 < 0 ? 0 : blocks - b0 < VL ? blocks - b0 : VL;
    for (int64_t b = 0, first = 0, packed = 0; b < n; b++) {
      const int64_t tap = (b0 + b) / per_tap, block = (b0 + b) % per_tap, channel = block * f.side, left = f.channels - channel;
      const int64_t width = left < f.side ? left : f.side;
      if (b == packed) {
        int64_t count = n - b < most ? n - b : most;
        if (per_tap - block < count) count = per_tap - block;
        pack(tap, channel, left < count * f.side ? left : count * f.side, lanes);
        first = b, packed = b + count;
      }
      const float *line = lanes + (b - first) * f.side * T, *factors = f.u + (tap * f.channels + channel) * padded;
      for (int64_t q = 0; q < pairs; q += PAIRS) {
        Vector acc[PAIRS][2] = {};
        for (int64_t i = 0; i < width; i++) {
          const float *factor = factors + i * padded + q;
          const Vector a = load(line + i * T), b = load(line + i * T + VL);
          UNROLL for (int p = 0; p < PAIRS; p++) {
            const Vector of = all(factor[p]);
            acc[p][0] += of * a, acc[p][1] += of * b;
          }
        }
        UNROLL for (int p = 0; p < PAIRS; p++) {
          store(aside + (2 * (q + p) * VL + b) * VL, acc[p][0]);
          store(aside + ((2 * (q + p) + 1) * VL + b) * VL, acc[p][1]);
        }
      }
    }
    for (int64_t q = 0; q < 2 * pairs; q++) {
      Vector a[VL];
      UNROLL for (int l = 0; l < VL; l++) a[l] = l < n ? load(aside + (q * VL + l) * VL) : Vector{};
      transpose(a);
      UNROLL for (int l = 0; l < VL; l++) store(out + q / 2 * out_stride + ((q % 2) * VL + l) * GROUP + half, a[l]);
    }
  }
}

// Add the product of the projections of `count` tokens to GROUP x GROUP numbers of the sketch, of whose rows only `rows` are
// needed, rounded up to whole tiles of outer.h.
INLINE void add_projections(const float *left, const float *right, int64_t rows, int64_t count, float *out, bool add) {
  for (int64_t o = 0; o < rows && o < GROUP; o += OUTER_ROWS)
    for (int64_t i = 0; i < GROUP; i += 2 * VL)
      outer_tile<2, OUTER_ROWS>(left + o, GROUP, right + i, GROUP, count, out + o * GROUP + i, add, right, 0, out);
}

// The pixels of x that a tap sees from `count` pixels of y, `first` and on: the first element of each, -1 for padding.
INLINE void pixels_seen(const Sizes &c, int64_t channels, int64_t first, int64_t count, int64_t tap, int64_t *at) {
  const int64_t i = tap / c.kernel[1] * c.dilation[0] - c.padding[0], j = tap % c.kernel[1] * c.dilation[1] - c.padding[1];
  const int64_t width = c.out_size[1], height = c.out_size[0];
  int64_t x = first % width, y = first / width % height, n = first / width / height;
  for (int64_t l = 0; l < PROJECTED; l++) {
    const int64_t row = y * c.stride[0] + i, col = x * c.stride[1] + j;
    const bool inside = l < count && row >= 0 && row < c.in_size[0] && col >= 0 && col < c.in_size[1];
    at[l] = inside ? ((n * c.in_size[0] + row) * c.in_size[1] + col) * channels : -1;
    if (++x == width) {
      x = 0;
      if (++y == height) y = 0, n++;
    }
  }
}

// Some channels of these pixels -> out[channel][PROJECTED]; zeros for padding.
INLINE void pack_seen(const Matrix &x, const int64_t *at, int64_t channel, int64_t wide, float *out) {
  for (int64_t l0 = 0; l0 < PROJECTED; l0 += VL) {
    int64_t f = 0;
    for (; f + VL <= wide; f += VL) {
      Vector a[VL];
      UNROLL for (int l = 0; l < VL; l++) a[l] = at[l0 + l] < 0 ? Vector{} : read_vector(x.data, at[l0 + l] + channel + f, x.dtype);
      transpose(a);
      UNROLL for (int l = 0; l < VL; l++) store(out + (f + l) * PROJECTED + l0, a[l]);
    }
    for (; f < wide; f++)
      for (int64_t l = l0; l < l0 + VL; l++) out[f * PROJECTED + l] = at[l] < 0 ? 0.f : read(x.data, at[l] + channel + f, x.dtype);
  }
}

// Projects and multiplies one panel of tokens after the other.
void sketch(const Sketch &m) {
  const Call &c = m.call;
  const Sizes &s = c.sizes;
  const int64_t taps = s.kernel[0] * s.kernel[1], groups = s.groups, tokens = c.y.rows, pairs = c.pairs;
  const int64_t group_out = c.y.cols / groups, group_in = c.x.cols / groups;
  const Features left_of = {1, group_out, c.bo, c.u}, right_of = {taps, group_in, c.bi, c.v};
  // A linear layer and a 1x1 convolution: pixel t of y is of pixel t of x.
  const bool in_order = taps == 1 && c.x.rows == tokens && s.stride[0] == 1 && s.stride[1] == 1 && !s.padding[0] && !s.padding[1];
  const int64_t left_groups = blocks_of(left_of.blocks(), GROUP), right_groups = blocks_of(right_of.blocks(), GROUP);
  const int64_t size = m.panel * GROUP, left_stride = groups * left_groups * size, right_stride = groups * right_groups * size;
  float *left = (float *)m.scratch, *right = left + pairs * left_stride, *mine = right + pairs * right_stride;
  const int threads = m.threads;

#pragma omp parallel num_threads(threads)
  {
    float *lanes = mine + thread_number() * sketch_floats(pairs), *aside = lanes + PACKED_FEATURES * PROJECTED;
    for (int64_t t0 = 0; t0 < tokens; t0 += m.panel) {
      const int64_t count = tokens - t0 < m.panel ? tokens - t0 : m.panel, parts = blocks_of(count, PROJECTED);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < parts * groups * (left_groups + right_groups); task++) {
        const int64_t t = task % parts * PROJECTED, some = count - t < PROJECTED ? count - t : PROJECTED, q = task / parts;
        if (q < groups * left_groups) {
          const int64_t g = q / left_groups;
          Features f = left_of;
          f.u += g * group_out * round_up(pairs, GROUP_PAIRS);
          project(f, pairs, q % left_groups, lanes, aside, left + q * size + t * GROUP, left_stride,
                  [&](int64_t, int64_t channel, int64_t wide, float *to) {
                    pack_lanes<PROJECTED>(columns(c.y, g * group_out + channel, wide), t0 + t, some, to);
                  });
        } else {
          const int64_t h = q - groups * left_groups, first = h / right_groups * group_in;
          project(right_of, pairs, h % right_groups, lanes, aside, right + h * size + t * GROUP, right_stride,
                  [&](int64_t tap, int64_t channel, int64_t wide, float *to) {
                    if (in_order) return pack_lanes<PROJECTED>(columns(c.x, first + channel, wide), t0 + t, some, to);
                    int64_t at[PROJECTED];
                    pixels_seen(s, c.x.cols, t0 + t, some, tap, at);
                    pack_seen(c.x, at, first + channel, wide, to);
                  });
        }
      }
#pragma omp for schedule(static)
      for (int64_t task = 0; task < pairs * groups * left_groups * right_groups; task++) {
        const int64_t row = task / right_groups, q = row / (groups * left_groups), r = row % (groups * left_groups);
        const int64_t column = r / left_groups * right_groups + task % right_groups;
        add_projections(left + q * left_stride + r * size, right + q * right_stride + column * size,
                        left_of.blocks() - r % left_groups * GROUP, count, c.values + task * GROUP * GROUP, t0 > 0);
      }
    }
  }
}

}  // namespace
