// y = x W' + bias for a few tokens (decoding): the lanes run along k, so that blocks are read as they are stored.
//
//   acc[o][t] += w[o][k ..] * x[t][k ..]      the accumulators are summed up over their lanes at the end of the row
//
// With few tokens the time is that of reading the stored blocks once; transposing them first would double it. The outer loop
// goes over outputs and the inner one over a few tokens at a time, so that their rows of the blocks stay in the L1 cache.
#pragma once
#include "pack.h"

namespace {

constexpr int64_t READ_AHEAD = 512;  // floats of blocks that are prefetched

// `outs` features of block row r from o on, times TOKENS tokens from t0 on (the last one again where there are no more).
template <int TOKENS, int OUTS, bool FIRST>
void few_tile(const Multiply &m, int64_t r, int64_t o, int64_t outs, const float *packed, int64_t t0) {
  const int64_t in = m.in, size = in * m.out, count = m.x.rows;
  const int64_t start = m.order.ptr[r], stop = m.order.ptr[r + 1];
  // Blocks lie anywhere, so the hardware does not prefetch them. The last one of the row is followed by the first ones at
  // the next features, or by those of the next row; CheckedOrder puts zeros behind the lists, which are read here.
  const int64_t distance = READ_AHEAD / (OUTS * in) < 1 ? 1 : READ_AHEAD / (OUTS * in) > 8 ? 8 : READ_AHEAD / (OUTS * in);
  const int64_t wrapped = o + OUTS < m.out ? start - stop : 0, wrapped_o = o + OUTS < m.out ? o + OUTS : 0;
  int64_t at[TOKENS];
  UNROLL for (int t = 0; t < TOKENS; t++) at[t] = (t0 + t < count ? t0 + t : count - 1) * in;
  Vector acc[OUTS * TOKENS] = {};
  for (int64_t e = start; e < stop; e++) {
    const float *w = m.values + m.order.slot[e] * size + o * in, *x = packed + m.order.other[e] * count * in;
    const float *next = nullptr;
    if (FIRST) {
      const int64_t ahead = e + distance;
      next = m.values + (ahead < stop ? m.order.slot[ahead] * size + o * in : m.order.slot[ahead + wrapped] * size + wrapped_o * in);
    }
    for (int64_t k = 0; k < in; k += VL) {
      Vector xk[TOKENS];
      UNROLL for (int t = 0; t < TOKENS; t++) xk[t] = load(x + at[t] + k);
      UNROLL for (int i = 0; i < OUTS; i++) {
        if (FIRST) __builtin_prefetch(next + i * in + k, 0, 3);
        Vector wk = load(w + i * in + k);
        UNROLL for (int t = 0; t < TOKENS; t++) acc[i * TOKENS + t] += wk * xk[t];
      }
    }
  }
  float line[OUTS * TOKENS];
  UNROLL for (int i = 0; i < OUTS * TOKENS; i += VL) store(line + i, sums(acc + i));
  const int64_t tokens = count - t0 < TOKENS ? count - t0 : TOKENS, at_y = t0 * m.y.row_stride + r * m.out + o;
  for (int64_t i = 0; i < outs; i++) {
    const float bias = m.bias ? m.bias[r * m.out + o + i] : 0.f;
    for (int64_t t = 0; t < tokens; t++) {
      float y = line[i * TOKENS + t] + bias;
      write_row(m.y.data, at_y + t * m.y.row_stride + i, m.y.dtype, &y, 1);
    }
  }
}

template <int TOKENS, int OUTS> void few_row(const Multiply &m, int64_t r, const float *packed) {
  const int64_t features = m.y.cols - r * m.out < m.out ? m.y.cols - r * m.out : m.out;
  for (int64_t o = 0; o < features; o += OUTS) {
    const int64_t outs = features - o < OUTS ? features - o : OUTS;
    few_tile<TOKENS, OUTS, true>(m, r, o, outs, packed, 0);
    for (int64_t t = TOKENS; t < m.x.rows; t += TOKENS) few_tile<TOKENS, OUTS, false>(m, r, o, outs, packed, t);
  }
}

void multiply_few(const Multiply &m) {
  const int threads = m.threads;
  const int64_t blocks = blocks_of(m.x.cols, m.in), rows = m.order.rows, some = rows / (8 * threads) + 1;
  float *packed = (float *)m.scratch;

#pragma omp parallel num_threads(threads)
  {
    const int64_t me = thread_number(), all_of_us = thread_count();
    const int64_t first = blocks * me / all_of_us, last = blocks * (me + 1) / all_of_us;
    if (first < last) {
      const Matrix part = columns(m.x, first * m.in, (last - first) * m.in);
      pack_panel(part, 0, m.x.rows, m.in, m.wanted + first, packed + first * m.x.rows * m.in);
    }
#pragma omp barrier
#pragma omp for schedule(dynamic, some)
    for (int64_t r = 0; r < rows; r++) {
      if (m.x.rows == 1) few_row<1, VL>(m, r, packed);
      else if (m.x.rows == 2) few_row<2, VL / 2>(m, r, packed);
      else few_row<4, (VL >= 8 ? VL / 4 : 2)>(m, r, packed);
    }
  }
}

}  // namespace
