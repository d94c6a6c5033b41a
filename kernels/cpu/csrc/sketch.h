// The sketch of dy' x: for each of a few pairs (u, v) the matrix of u' G v over the blocks of G = dy' x.
//
//   left[q][t][r]    = sum over o in block row r of dy[t][o] * u[q][o]       right[q][t][c] the same of x and v
//   out[q][r][c]     = sum over t of left[q][t][r] * right[q][t][c]
//
// dy and x are read once for all pairs: tokens are the lanes, and a block of them in registers meets every u. Projections
// are kept as [pair][group][token][GROUP], a group being so many block rows; their product is then that of outer.h.
#pragma once
#include "outer.h"

namespace {

constexpr int64_t PROJECTED = 2 * VL;                 // tokens at a time
constexpr int PAIRS = VL == 16 ? 8 : 4;               // u that share what was loaded; their accumulators fit the registers
constexpr int64_t STRIP = 128;                        // features that are packed at a time

// One group of blocks of up to PROJECTED tokens from t0 on. `lanes` has STRIP * PROJECTED floats.
void project(const Sketch &m, const Matrix &x, const float *u, int64_t side, int64_t t0, int64_t group, float *lanes,
             float *aside, float *out, int64_t out_stride) {
  constexpr int64_t T = PROJECTED;
  const int64_t blocks = blocks_of(x.cols, side), padded = round_up(m.pairs, GROUP_PAIRS), strip = STRIP / side;
  const int64_t count = m.x.rows - t0 < T ? m.x.rows - t0 : T;
  for (int64_t b0 = group * GROUP, half = 0; half < GROUP; half += VL, b0 += VL) {
    const int64_t n = blocks - b0 < 0 ? 0 : blocks - b0 < VL ? blocks - b0 : VL;
    for (int64_t b = 0; b < n; b++) {
      const int64_t f = (b0 + b) * side, within = b % strip, width = x.cols - f < side ? x.cols - f : side;
      if (within == 0) {
        const int64_t wide = (n - b < strip ? n - b : strip) * side;
        Matrix part = x;
        part.data = (char *)part.data + f * part.col_stride * (part.dtype == FLOAT32 ? 4 : 2);
        part.cols = x.cols - f < wide ? x.cols - f : wide;
        pack_lanes<T>(part, t0, count, lanes);
      }
      const float *line = lanes + within * side * T;
      for (int64_t q = 0; q < m.pairs; q += PAIRS) {
        Vector acc[PAIRS][2] = {};
        for (int64_t i = 0; i < width; i++) {
          const float *factor = u + (f + i) * padded + q;
          const Vector first = load(line + i * T), second = load(line + i * T + VL);
          UNROLL for (int p = 0; p < PAIRS; p++) {
            const Vector of = all(factor[p]);
            acc[p][0] += of * first, acc[p][1] += of * second;
          }
        }
        UNROLL for (int p = 0; p < PAIRS; p++) {
          store(aside + (2 * (q + p) * VL + b) * VL, acc[p][0]);
          store(aside + ((2 * (q + p) + 1) * VL + b) * VL, acc[p][1]);
        }
      }
    }
    for (int64_t q = 0; q < 2 * m.pairs; q++) {
      Vector a[VL];
      UNROLL for (int l = 0; l < VL; l++) a[l] = l < n ? load(aside + (q * VL + l) * VL) : Vector{};
      transpose(a);
      UNROLL for (int l = 0; l < VL; l++) store(out + q / 2 * out_stride + ((q % 2) * VL + l) * GROUP + half, a[l]);
    }
  }
}

void sketch(const Sketch &m) {
  const int64_t left_groups = sketch_groups(m.dy, m.bo), right_groups = sketch_groups(m.x, m.bi), piece = m.panel * GROUP;
  const int64_t left_stride = left_groups * piece, right_stride = right_groups * piece;
  float *left = (float *)m.scratch, *right = left + m.pairs * left_stride, *mine = right + m.pairs * right_stride;
  const int threads = m.threads;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float *lanes = mine + thread_number() * sketch_floats(m.pairs), *aside = lanes + STRIP * PROJECTED;
    for (int64_t t0 = 0; t0 < m.x.rows; t0 += m.panel) {
      const int64_t count = m.x.rows - t0 < m.panel ? m.x.rows - t0 : m.panel, parts = blocks_of(count, PROJECTED);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < parts * (left_groups + right_groups); task++) {
        const int64_t t = task % parts * PROJECTED, g = task / parts;
        if (g < left_groups) {
          project(m, m.dy, m.u, m.bo, t0 + t, g, lanes, aside, left + g * piece + t * GROUP, left_stride);
        } else {
          const int64_t h = g - left_groups;
          project(m, m.x, m.v, m.bi, t0 + t, h, lanes, aside, right + h * piece + t * GROUP, right_stride);
        }
      }
#pragma omp for schedule(static)
      for (int64_t task = 0; task < m.pairs * left_groups * right_groups; task++) {
        const int64_t q = task / (left_groups * right_groups), r = task / right_groups % left_groups, c = task % right_groups;
        const float *dy = left + q * left_stride + r * piece, *x = right + q * right_stride + c * piece;
        outer_block<2, OUTER_ROWS>(dy, GROUP, x, GROUP, count, m.out + task * GROUP * GROUP, t0 > 0, x);
      }
    }
  }
}

}  // namespace
