// Unstructured weights (1x1 blocks) and so few tokens that one or two vectors hold them: entries are read once, as the
// topology has them. Bringing them into a better order first (arrange.h) would cost more than the products.
#pragma once
#include "pack.h"

namespace {

// x -> out[feature][L]: tokens become lanes; missing ones are zero. Called by all threads.
template <int L> INLINE void pack_narrow(const Matrix &x, float *out) {
#pragma omp for schedule(static)
  for (int64_t f0 = 0; f0 < x.cols; f0 += LINE) {
    const int64_t f1 = f0 + LINE < x.cols ? f0 + LINE : x.cols;
    for (int64_t t = 0; t < L; t++)
      for (int64_t f = f0; f < f1; f++)
        out[f * L + t] = t < x.rows ? read(x.data, t * x.row_stride + f * x.col_stride, x.dtype) : 0.f;
  }
}

// Strip by strip and chunk by chunk of features: by column, the slots of a row lie far apart, and those of its
// neighbours beside them.
template <int L> void multiply_narrow(const Multiply &m) {
  typedef float Narrow __attribute__((vector_size(L * 4), aligned(4), may_alias));
  const int64_t rows = m.order.rows, strip = m.plan.strip, strips = (rows + strip - 1) / strip;
  const int32_t *slots = m.order.slot, *other = m.order.other;
  const float *values = m.values;
  const int threads = m.threads;
  float *packed = (float *)m.scratch;

#pragma omp parallel num_threads(threads)
  {
    float *y = packed + m.x.cols * L + thread_number() * strip * (2 * L + 1), *out = y + strip * L;
    int32_t *next = (int32_t *)(out + strip * L);
    pack_narrow<L>(m.x, packed);
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < strips; q++) {
      const int64_t r0 = q * strip, count = r0 + strip < rows ? strip : rows - r0;
      for (int64_t r = 0; r < count; r++) {
        next[r] = m.order.ptr[r0 + r];
        *(Narrow *)(y + r * L) = (m.bias ? m.bias[r0 + r] : 0.f) - Narrow{};
      }
      for (int64_t c = 0; c < m.plan.chunks; c++) {
        const int32_t limit = c + 1 < m.plan.chunks ? int32_t((c + 1) << m.plan.shift) : INT32_MAX;
        for (int64_t r = 0; r < count; r++) {
          const int32_t last = m.order.ptr[r0 + r + 1];
          int32_t e = next[r];
          Narrow even = *(const Narrow *)(y + r * L), odd = {};  // two chains, or each addition waits for the last
          for (; e < last; e++) {
            const int32_t slot = slots[e], column = other[slot];
            if (column >= limit) break;
            Narrow sum = even + values[slot] * *(const Narrow *)(packed + int64_t(column) * L);
            even = odd, odd = sum;
          }
          next[r] = e;
          *(Narrow *)(y + r * L) = even + odd;
        }
      }
      for (int64_t t = 0; t < m.x.rows; t++) {
        for (int64_t r = 0; r < count; r++) out[t * strip + r] = y[r * L + t];
        write_row(m.y.data, t * m.y.row_stride + r0, m.y.dtype, out + t * strip, count);
      }
    }
  }
}

void outer_narrow(const Outer &m) {
  constexpr int L = 16, VECTORS = L / VL;
  const int64_t rows = m.order.rows, strip = m.plan.strip, strips = (rows + strip - 1) / strip;
  const int threads = m.threads;
  float *x = (float *)m.scratch, *dy = x + m.x.cols * L;

#pragma omp parallel num_threads(threads)
  {
    pack_narrow<L>(m.x, x);
    pack_narrow<L>(m.dy, dy);
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < strips; q++) {
      for (int64_t r = q * strip; r < (q + 1) * strip && r < rows; r++) {
        Vector g[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) g[v] = load(dy + r * L + v * VL);
        for (int64_t e = m.order.ptr[r]; e < m.order.ptr[r + 1]; e += VL) {
          const int64_t n = m.order.ptr[r + 1] - e < VL ? m.order.ptr[r + 1] - e : VL;
          Vector partial[VL] = {};
          for (int64_t l = 0; l < n; l++) {
            const float *line = x + int64_t(m.order.other[m.order.slot[e + l]]) * L;
            UNROLL for (int v = 0; v < VECTORS; v++) partial[l] += g[v] * load(line + v * VL);
          }
          float line[VL];
          store(line, sums(partial));
          for (int64_t l = 0; l < n; l++) m.out[m.order.slot[e + l]] = line[l];
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t e = m.order.ptr[rows]; e < m.order.slots; e++) m.out[m.order.slot[e]] = 0.f;
  }
}

}  // namespace
