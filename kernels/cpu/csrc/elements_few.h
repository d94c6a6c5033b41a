// Unstructured weights (1x1 blocks) and so few tokens that one or two vectors hold them. Entries are read once, in the order of
// the index: arranging them first (arrange.h) would cost more than the products.
#pragma once
#include "pack.h"
#include "share.h"

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

// Strip by strip and chunk by chunk of features: in an order by column the slots of a row are far apart, and those of the
// neighbouring rows beside them.
template <int L> void multiply_narrow(const Multiply &m) {
  typedef float Narrow __attribute__((vector_size(L * 4), aligned(4), may_alias));
  const int64_t rows = m.order.rows, strip = m.plan.strip, strips = (rows + strip - 1) / strip;
  const int32_t *slots = m.order.slot, *other = m.order.other;
  const float *values = m.values;
  const uint32_t all = uint32_t(m.order.slots);
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
        const uint32_t limit = uint32_t(c + 1 < m.plan.chunks ? (c + 1) << m.plan.shift : m.x.cols);
        for (int64_t r = 0; r < count; r++) {
          const int32_t *at = slots + next[r], *last = slots + m.order.ptr[r0 + r + 1];
          Narrow even = *(const Narrow *)(y + r * L), odd = {};  // two chains, or each addition waits for the last
#pragma GCC unroll 2
          for (; at < last; at++) {
            const uint32_t slot = uint32_t(*at);
            if (slot >= all) break;  // in this and each later chunk, so that it is found below
            const uint32_t column = uint32_t(other[slot]);
            if (column >= limit) break;
            Narrow sum = even + values[slot] * *(const Narrow *)(packed + int64_t(column) * L);
            even = odd, odd = sum;
          }
          next[r] = int32_t(at - slots);
          *(Narrow *)(y + r * L) = even + odd;
        }
      }
      for (int64_t r = 0; r < count; r++)
        if (next[r] != m.order.ptr[r0 + r + 1]) refuse(m.order);
      for (int64_t t = 0; t < m.x.rows; t++) {
        for (int64_t r = 0; r < count; r++) out[t * strip + r] = y[r * L + t];
        write_row(m.y.data, t * m.y.row_stride + r0, m.y.dtype, out + t * strip, count);
      }
    }
  }
}

// Up to W entries of a row, whose gradient is g: L tokens, W at a time. False if an entry is illegal.
template <int L, int W>
INLINE bool outer_entries(const Outer &m, const int32_t *slots, int64_t count, const float *x, const typename Of<W>::Floats *g) {
  const uint32_t wide = uint32_t(m.order.others);
  typename Of<W>::Floats partial[W] = {};
  UNROLL for (int64_t e = 0; e < count; e++) {
    const uint32_t column = uint32_t(m.order.other[slots[e]]);
    if (column >= wide) return false;
    const float *line = x + int64_t(column) * L;
    UNROLL for (int v = 0; v < L / W; v++) partial[e] += g[v] * *(const typename Of<W>::Unaligned *)(line + v * W);
  }
  const typename Of<W>::Floats total = sums<W>(partial);
  UNROLL for (int64_t e = 0; e < count; e++) m.out[slots[e]] = total[e];
  return true;
}

// One row of the weight; false if an entry is illegal.
template <int L> INLINE bool outer_row(const Outer &m, int64_t r, const float *x, const float *dy) {
  constexpr int W = L < VL ? L : VL, AT_ONCE = 256;
  const int64_t last = m.order.ptr[r + 1];
  typename Of<W>::Floats g[L / W];
  std::memcpy(g, dy + r * L, sizeof(g));
  int32_t slots[AT_ONCE];
  for (int64_t e0 = m.order.ptr[r]; e0 < last; e0 += AT_ONCE) {
    const int64_t some = last - e0 < AT_ONCE ? last - e0 : AT_ONCE;
    std::memcpy(slots, m.order.slot + e0, some * 4);
    if (!all_inside(slots, some, m.order.slots)) return false;
    int64_t e = 0;
    for (; e + W <= some; e += W)
      if (!outer_entries<L, W>(m, slots + e, W, x, g)) return false;
    if (e < some && !outer_entries<L, W>(m, slots + e, some - e, x, g)) return false;
  }
  return true;
}

template <int L> void outer_narrow(const Outer &m) {
  const int64_t rows = m.order.rows, strip = m.plan.strip, strips = (rows + strip - 1) / strip;
  const int threads = m.threads;
  float *x = (float *)m.scratch, *dy = x + m.x.cols * L;

#pragma omp parallel num_threads(threads)
  {
    pack_narrow<L>(m.x, x);
    pack_narrow<L>(m.dy, dy);
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < strips; q++) {
      for (int64_t r = q * strip; r < (q + 1) * strip && r < rows; r++)
        if (!outer_row<L>(m, r, x, dy)) refuse(m.order);
    }
    clear_free(m.order, m.out);
  }
}

}  // namespace
