// Unstructured weights (1x1 blocks): tokens are the lanes. Kernels for a panel of tokens that is packed as [feature][lane].
//
//   y[o][lane]   += w[e] * x[col[e]][lane]
//   total[e]     += sum over lanes of dy[o][lane] * x[col[e]][lane]
//
// An entry reads a line of the panel anywhere, so what is read must sit in the L1 cache: the features of x are cut into
// chunks, and the entries are brought in the order (chunk, row), in which they are then streamed.
// `other` is by slot here, as the topology stores it (kernels/contract.py, Index).
#pragma once
#include "pack.h"

namespace {

constexpr int64_t ROWS_AT_ONCE = 256;  // their part of y stays in the L2 cache while the chunks go by

// The entries in the order (chunk, row); the buffers are scratch.
struct Arranged {
  int64_t chunks;
  int shift;                 // a chunk is 2^shift features of x
  int32_t *first;            // [chunk * rows + row]: the first of its entries; one more at the end
  int32_t *feature;          // by entry: the feature within its chunk
  int32_t *slot;             // by entry, for the gradient
  float *number;             // by entry: the weight, or its gradient
  int32_t *column;           // by entry in the order of the index, only while arranging
};

INLINE Arranged arranged_in(char *&scratch, const Order &order, int64_t chunks, int shift) {
  Arranged a = {chunks, shift, (int32_t *)scratch, nullptr, nullptr, nullptr, nullptr};
  a.feature = a.first + round_up(chunks * order.rows + 1, LINE);
  a.slot = a.feature + round_up(order.slots, LINE);
  a.number = (float *)(a.slot + round_up(order.slots, LINE));
  a.column = (int32_t *)(a.number + round_up(order.slots, LINE));
  scratch = (char *)(a.column + round_up(order.slots, LINE));
  return a;
}

// Called by all threads. Columns ascend within a row, so a chunk's entries are a run of it.
INLINE void arrange(const Order &order, const Arranged &a, const float *values) {
#pragma omp for schedule(static)
  for (int64_t r = 0; r < order.rows; r++) {
    int64_t e = order.ptr[r];
    const int64_t stop = order.ptr[r + 1];
    for (int64_t i = e; i < stop; i++) a.column[i] = order.other[order.slot[i]];  // slots lie anywhere: once is enough
    for (int64_t c = 0; c < a.chunks; c++) {
      const int64_t begin = e, end = (c + 1) << a.shift;
      while (e < stop && a.column[e] < end) e++;
      a.first[c * order.rows + r] = int32_t(e - begin);
    }
  }
#pragma omp single
  {
    int32_t total = 0;
    for (int64_t i = 0; i < a.chunks * order.rows; i++) {
      int32_t count = a.first[i];
      a.first[i] = total;
      total += count;
    }
    a.first[a.chunks * order.rows] = total;
  }
#pragma omp for schedule(static)
  for (int64_t r = 0; r < order.rows; r++) {
    int64_t e = order.ptr[r];
    for (int64_t c = 0; c < a.chunks; c++) {
      const int64_t first = a.first[c * order.rows + r], count = a.first[c * order.rows + r + 1] - first;
      const int32_t begin = int32_t(c << a.shift);
      for (int64_t i = 0; i < count; i++) a.feature[first + i] = a.column[e + i] - begin;
      if (values)
        for (int64_t i = 0; i < count; i++) a.number[first + i] = values[order.slot[e + i]];
      else
        for (int64_t i = 0; i < count; i++) a.slot[first + i] = order.slot[e + i], a.number[first + i] = 0.f;
      e += count;
    }
  }
}

// Writes VL outputs of a panel, given as [output][lane], to rows of y.
template <int T> INLINE void store_lanes(const Matrix &y, int64_t t0, int64_t count, int64_t feature, int64_t width, const float *lanes) {
  for (int64_t t = 0; t < count; t += VL) {
    Vector a[VL];
    UNROLL for (int l = 0; l < VL; l++) a[l] = load(lanes + l * T + t);
    transpose(a);
    for (int64_t l = 0; l < VL && t + l < count; l++) {
      float line[VL];
      store(line, a[l]);
      write_row(y.data, (t0 + t + l) * y.row_stride + feature, y.dtype, line, width);
    }
  }
}

// y[row][lane] += sum over the entries of a row in a chunk, for all lanes of a panel.
INLINE void add_row(const Arranged &a, int64_t first, int64_t last, const float *x, float *y) {
  constexpr int VECTORS = MULTIPLY_LANES / VL, AT_ONCE = VECTORS < 8 ? VECTORS : 8;
  for (int v0 = 0; v0 < VECTORS; v0 += AT_ONCE) {
    Vector acc[AT_ONCE];
    UNROLL for (int v = 0; v < AT_ONCE; v++) acc[v] = load(y + (v0 + v) * VL);
    for (int64_t e = first; e < last; e++) {
      const float *line = x + int64_t(a.feature[e]) * MULTIPLY_LANES + v0 * VL;
      Vector w = all(a.number[e]);
      UNROLL for (int v = 0; v < AT_ONCE; v++) acc[v] += w * load(line + v * VL);
    }
    UNROLL for (int v = 0; v < AT_ONCE; v++) store(y + (v0 + v) * VL, acc[v]);
  }
}

void multiply_elements(const Multiply &m) {
  constexpr int64_t T = MULTIPLY_LANES;
  const int64_t panels = (m.x.rows + T - 1) / T, rows = m.order.rows, strips = (rows + VL - 1) / VL;
  char *scratch = m.scratch;
  const Arranged a = arranged_in(scratch, m.order, m.chunks, m.shift);
  const int64_t stride = (m.x.cols + strips * VL) * T;  // of a thread: a panel of x and one of y
  const int threads = m.threads;
  const int64_t groups = threads > 1 && (panels < 2 * threads || panels % threads) ? 2 * threads : 1;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    arrange(m.order, a, m.values);
    float *x = (float *)scratch + thread_number() * stride, *y = x + m.x.cols * T;
    int64_t held = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < panels * groups; q++) {
      const int64_t p = q / groups, g = q % groups, t0 = p * T, count = m.x.rows - t0 < T ? m.x.rows - t0 : T;
      const int64_t s0 = strips * g / groups, s1 = strips * (g + 1) / groups, last = s1 * VL < rows ? s1 * VL : rows;
      if (p != held) pack_lanes<T>(m.x, t0, count, x), held = p;
      for (int64_t r = s0 * VL; r < s1 * VL; r++)
        for (int64_t t = 0; t < T; t += VL) store(y + r * T + t, all(m.bias && r < rows ? m.bias[r] : 0.f));
      for (int64_t r0 = s0 * VL; r0 < last; r0 += ROWS_AT_ONCE) {
        const int64_t r1 = r0 + ROWS_AT_ONCE < last ? r0 + ROWS_AT_ONCE : last;
        for (int64_t c = 0; c < a.chunks; c++) {
          const int32_t *first = a.first + c * rows;
          for (int64_t r = r0; r < r1; r++)
            if (first[r] < first[r + 1]) add_row(a, first[r], first[r + 1], x + (c << a.shift) * T, y + r * T);
        }
      }
      for (int64_t s = s0; s < s1; s++)
        store_lanes<T>(m.y, t0, count, s * VL, rows - s * VL < VL ? rows - s * VL : VL, y + s * VL * T);
    }
  }
}

void outer_elements(const Outer &m) {
  constexpr int64_t T = OUTER_LANES;
  constexpr int VECTORS = T / VL, AT_ONCE = VECTORS < HELD ? VECTORS : HELD;
  const int64_t tokens = m.x.rows, rows = m.order.rows, panels = (tokens + T - 1) / T;
  char *scratch = m.scratch;
  const Arranged a = arranged_in(scratch, m.order, m.chunks, m.shift);
  float *x = (float *)scratch, *dy = x + m.x.cols * T;
  const int threads = m.threads;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    arrange(m.order, a, nullptr);
    for (int64_t p = 0; p < panels; p++) {
      const int64_t t0 = p * T, count = tokens - t0 < T ? tokens - t0 : T;
      const int64_t wide = 16 * VL, x_parts = (m.x.cols + wide - 1) / wide, dy_parts = (m.dy.cols + wide - 1) / wide;
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < x_parts + dy_parts; q++) {
        const bool of_x = q < x_parts;
        const int64_t f = (of_x ? q : q - x_parts) * wide;
        Matrix part = of_x ? m.x : m.dy;
        part.data = (char *)part.data + f * part.col_stride * (part.dtype == FLOAT32 ? 4 : 2);
        part.cols = part.cols - f < wide ? part.cols - f : wide;
        pack_lanes<T>(part, t0, count, (of_x ? x : dy) + f * T);
      }
      // A thread has rows, not chunks: balanced by their entries, they never meet.
      const int64_t pieces = 8 * thread_count();
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < pieces; q++) {
        const int64_t r0 = rows * q / pieces, r1 = rows * (q + 1) / pieces;
        for (int64_t c = 0; c < a.chunks; c++) {
          const float *chunk = x + (c << a.shift) * T;
          for (int64_t r = r0; r < r1; r++) {
            const int64_t last = a.first[c * rows + r + 1];
            for (int64_t e0 = a.first[c * rows + r]; e0 < last; e0 += VL) {
              const int64_t n = last - e0 < VL ? last - e0 : VL;
              Vector partial[VL] = {};
              for (int v0 = 0; v0 < VECTORS; v0 += AT_ONCE) {
                Vector g[AT_ONCE];
                UNROLL for (int v = 0; v < AT_ONCE; v++) g[v] = load(dy + r * T + (v0 + v) * VL);
                for (int64_t l = 0; l < n; l++) {
                  const float *line = chunk + int64_t(a.feature[e0 + l]) * T + v0 * VL;
                  Vector acc = partial[l], more = {};  // two chains, or each addition waits for the last
                  UNROLL for (int v = 0; v < AT_ONCE; v += 2) {
                    acc += g[v] * load(line + v * VL);
                    more += g[v + 1] * load(line + (v + 1) * VL);
                  }
                  partial[l] = acc + more;
                }
              }
              float line[VL];
              store(line, sums(partial));
              for (int64_t l = 0; l < n; l++) a.number[e0 + l] += line[l];
            }
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t e = 0; e < a.first[a.chunks * rows]; e++) m.out[a.slot[e]] = a.number[e];
#pragma omp for schedule(static)
    for (int64_t e = m.order.ptr[rows]; e < m.order.slots; e++) m.out[m.order.slot[e]] = 0.f;
  }
}

}  // namespace
