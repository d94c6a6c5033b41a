// y = x W' + bias for a few tokens (decoding): the lanes run along k, so that blocks are read as they are stored.
//
//   acc[o][t] += w[o][k ..] * x[t][k ..]      the VL accumulators are summed up over their lanes at the end of the row
//
// With few tokens the time is that of reading the stored blocks once; transposing them first would double it.
#pragma once
#include "pack.h"

namespace {

// Block row r times TOKENS tokens from t0 on (the last one again where there are no more).
template <int TOKENS> void few_row(const Multiply &m, int64_t r, const float *packed, int64_t t0) {
  constexpr int OUTS = VL / TOKENS;
  const int64_t in = m.in, size = in * m.out, count = m.x.rows;
  const int64_t start = m.order.ptr[r], stop = m.order.ptr[r + 1];
  const int64_t features = m.y.cols - r * m.out < m.out ? m.y.cols - r * m.out : m.out;
  int64_t at[TOKENS];
  UNROLL for (int t = 0; t < TOKENS; t++) at[t] = (t0 + t < count ? t0 + t : count - 1) * in;
  for (int64_t o = 0; o < features; o += OUTS) {
    Vector acc[VL] = {};
    for (int64_t e = start; e < stop; e++) {
      const float *w = m.values + m.order.slot[e] * size + o * in, *x = packed + m.order.other[e] * count * in;
      const float *next = m.values + m.order.slot[e + 1 < stop ? e + 1 : e] * size + o * in;
      for (int64_t k = 0; k < in; k += VL) {
        Vector xk[TOKENS];
        UNROLL for (int t = 0; t < TOKENS; t++) xk[t] = load(x + at[t] + k);
        UNROLL for (int i = 0; i < OUTS; i++) {
          __builtin_prefetch(next + i * in + k, 0, 3);
          Vector wk = load(w + i * in + k);
          UNROLL for (int t = 0; t < TOKENS; t++) acc[i * TOKENS + t] += wk * xk[t];
        }
      }
    }
    float line[VL];
    store(line, sums(acc));
    for (int i = 0; i < OUTS && o + i < features; i++) {
      for (int t = 0; t < TOKENS && t0 + t < count; t++) {
        float y = line[i * TOKENS + t] + (m.bias ? m.bias[r * m.out + o + i] : 0.f);
        write_row(m.y.data, (t0 + t) * m.y.row_stride + r * m.out + o + i, m.y.dtype, &y, 1);
      }
    }
  }
}

void multiply_few(const Multiply &m) {
  const int threads = m.threads;
  float *packed = (float *)m.scratch;
  pack_panel(m.x, 0, m.x.rows, m.in, packed);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < m.order.rows; r++) {
      for (int64_t t = 0; t < m.x.rows;) {
        if (VL >= 8 && m.x.rows - t > 2) few_row<VL >= 8 ? 4 : 2>(m, r, packed, t), t += 4;
        else if (m.x.rows - t > 1) few_row<2>(m, r, packed, t), t += 2;
        else few_row<1>(m, r, packed, t), t += 1;
      }
    }
  }
}

}  // namespace
