// The sketch of dy' x: for each of a few pairs (u, v) the matrix of u' G v over the blocks of G = dy' x.
//
//   left[q][t][r]    = sum over o in block row r of dy[t][o] * u[q][o]       right[q][t][c] the same of x and v
//   out[q][r][c]     = sum over t of left[q][t][r] * right[q][t][c]
//
// dy and x are read once for all pairs: tokens are the lanes, and a block of them in registers meets every u. Projections
// are kept as [pair][group][token][GROUP], a group being so many block rows; their product is then that of outer.h. A
// convolution (conv_sketch.h) is the same with several taps and with groups of channels of its own.
#pragma once
#include "outer.h"

namespace {

constexpr int64_t PROJECTED = 2 * VL;                 // tokens at a time
constexpr int PAIRS = VL == 16 ? 8 : 4;               // u that share what was loaded; their accumulators fit the registers
constexpr int64_t STRIP_FEATURES = 128;               // that are packed at a time

// The features that are projected: some taps with the same channels, in blocks cut inside each tap. A linear layer has one.
struct Features {
  int64_t taps, channels, side;
  const float *u;  // (taps * channels, pairs filled up)

  int64_t tap_blocks() const { return blocks_of(channels, side); }
  int64_t blocks() const { return taps * tap_blocks(); }
};

// One group of blocks of up to PROJECTED tokens. `lanes` has STRIP_FEATURES * PROJECTED floats, into which
// pack(tap, channel, count, lanes) writes some channels of these tokens.
template <class Pack>
void project(const Features &f, int64_t pairs, int64_t group, float *lanes, float *aside, float *out, int64_t out_stride,
             const Pack &pack) {
  constexpr int64_t T = PROJECTED;
  const int64_t blocks = f.blocks(), per_tap = f.tap_blocks(), padded = round_up(pairs, GROUP_PAIRS), strip = STRIP_FEATURES / f.side;
  for (int64_t b0 = group * GROUP, half = 0; half < GROUP; half += VL, b0 += VL) {
    const int64_t n = blocks - b0 < 0 ? 0 : blocks - b0 < VL ? blocks - b0 : VL;
    for (int64_t b = 0, first = 0, packed = 0; b < n; b++) {
      const int64_t tap = (b0 + b) / per_tap, block = (b0 + b) % per_tap, channel = block * f.side, left = f.channels - channel;
      const int64_t width = left < f.side ? left : f.side;
      if (b == packed) {
        int64_t count = n - b < strip ? n - b : strip;
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

// Adds the product of the projections of `count` tokens to a tile of the sketch; of its rows only those that are wanted,
// up to a whole tile of outer.h.
INLINE void add_projections(const float *left, const float *right, int64_t rows, int64_t count, float *out, bool add) {
  for (int64_t o = 0; o < rows && o < GROUP; o += OUTER_ROWS)
    for (int64_t i = 0; i < GROUP; i += 2 * VL)
      outer_tile<2, OUTER_ROWS>(left + o, GROUP, right + i, GROUP, count, out + o * GROUP + i, add, right, 0, out);
}

// Of all tokens, a panel at a time; see sketch_plan() of api.h. pack_left and pack_right take the group (of a convolution),
// the first token and how many, and what project() passes on.
template <class PackLeft, class PackRight>
void sketch_in_panels(const SketchPlan &p, const Features &left_of, const Features &right_of, int64_t groups, int64_t tokens,
                      int64_t pairs, float *out, char *scratch, int threads, const PackLeft &pack_left, const PackRight &pack_right) {
  const int64_t left_groups = blocks_of(left_of.blocks(), GROUP), right_groups = blocks_of(right_of.blocks(), GROUP);
  const int64_t piece = p.panel * GROUP, left_stride = groups * left_groups * piece, right_stride = groups * right_groups * piece;
  float *left = (float *)scratch, *right = left + pairs * left_stride, *mine = right + pairs * right_stride;

#pragma omp parallel num_threads(threads)
  {
    float *lanes = mine + thread_number() * sketch_floats(pairs), *aside = lanes + STRIP_FEATURES * PROJECTED;
    for (int64_t t0 = 0; t0 < tokens; t0 += p.panel) {
      const int64_t count = tokens - t0 < p.panel ? tokens - t0 : p.panel, parts = blocks_of(count, PROJECTED);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < parts * groups * (left_groups + right_groups); task++) {
        const int64_t t = task % parts * PROJECTED, some = count - t < PROJECTED ? count - t : PROJECTED, q = task / parts;
        if (q < groups * left_groups) {
          const int64_t g = q / left_groups;
          Features f = left_of;
          f.u += g * f.channels * round_up(pairs, GROUP_PAIRS);
          project(f, pairs, q % left_groups, lanes, aside, left + q * piece + t * GROUP, left_stride,
                  [&](int64_t, int64_t channel, int64_t wide, float *to) { pack_left(g, t0 + t, some, channel, wide, to); });
        } else {
          const int64_t h = q - groups * left_groups, g = h / right_groups;
          project(right_of, pairs, h % right_groups, lanes, aside, right + h * piece + t * GROUP, right_stride,
                  [&](int64_t tap, int64_t channel, int64_t wide, float *to) { pack_right(g, t0 + t, some, tap, channel, wide, to); });
        }
      }
#pragma omp for schedule(static)
      for (int64_t task = 0; task < pairs * groups * left_groups * right_groups; task++) {
        const int64_t row = task / right_groups, q = row / (groups * left_groups), r = row % (groups * left_groups);
        const int64_t c = r / left_groups * right_groups + task % right_groups;
        add_projections(left + q * left_stride + r * piece, right + q * right_stride + c * piece,
                        left_of.blocks() - r % left_groups * GROUP, count, out + task * GROUP * GROUP, t0 > 0);
      }
    }
  }
}

void sketch(const Sketch &m) {
  sketch_in_panels(
      m.plan, {1, m.dy.cols, m.bo, m.u}, {1, m.x.cols, m.bi, m.v}, 1, m.x.rows, m.pairs, m.out, m.scratch, m.threads,
      [&](int64_t, int64_t first, int64_t count, int64_t channel, int64_t wide, float *lanes) {
        pack_lanes<PROJECTED>(columns(m.dy, channel, wide), first, count, lanes);
      },
      [&](int64_t, int64_t first, int64_t count, int64_t, int64_t channel, int64_t wide, float *lanes) {
        pack_lanes<PROJECTED>(columns(m.x, channel, wide), first, count, lanes);
      });
}

}  // namespace
