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

// Up to VL entries of a row, whose gradient is g; false if an entry is illegal.
INLINE bool outer_entries(const Outer &m, const int32_t *slots, int64_t count, const float *x, const Vector *g) {
  constexpr int L = 16, VECTORS = L / VL;
  const uint32_t wide = uint32_t(m.order.others);
  Vector partial[VL] = {};
  UNROLL for (int64_t l = 0; l < count; l++) {
    const uint32_t column = uint32_t(m.order.other[slots[l]]);
    if (column >= wide) return false;
    const float *line = x + int64_t(column) * L;
    UNROLL for (int v = 0; v < VECTORS; v++) partial[l] += g[v] * load(line + v * VL);
  }
  float line[VL];
  store(line, sums(partial));
  UNROLL for (int64_t l = 0; l < count; l++) m.out[slots[l]] = line[l];
  return true;
}

// One row of the weight; false if an entry is illegal.
INLINE bool outer_row(const Outer &m, int64_t r, const float *x, const float *dy) {
  constexpr int L = 16, VECTORS = L / VL, AT_ONCE = 256;
  const int64_t last = m.order.ptr[r + 1];
  Vector g[VECTORS];
  UNROLL for (int v = 0; v < VECTORS; v++) g[v] = load(dy + r * L + v * VL);
  int32_t slots[AT_ONCE];
  for (int64_t e0 = m.order.ptr[r]; e0 < last; e0 += AT_ONCE) {
    const int64_t some = last - e0 < AT_ONCE ? last - e0 : AT_ONCE;
    std::memcpy(slots, m.order.slot + e0, some * 4);
    if (!all_inside(slots, some, m.order.slots)) return false;
    int64_t e = 0;
    for (; e + VL <= some; e += VL)
      if (!outer_entries(m, slots + e, VL, x, g)) return false;
    if (e < some && !outer_entries(m, slots + e, some - e, x, g)) return false;
  }
  return true;
}

void outer_narrow(const Outer &m) {
  constexpr int L = 16;
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
        if (!outer_row(m, r, x, dy)) refuse(m.order);
    }
    clear_free(m.order, m.out);
  }
}

}  // namespace
