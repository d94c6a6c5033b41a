// Unstructured weights (1x1 blocks): tokens are the lanes. Kernels for a panel of tokens that is packed as [feature][lane].
//
//   y[o][lane]   += w[e] * x[col[e]][lane]
//
// Entries read lines of the panel in any order, so these should be near: a panel is packed just before its use and stays in
// the L2 cache, its features are cut into chunks for the L1 cache, and entries are read in the order (strip of rows, chunk,
// row), in which they are arranged once for all panels (arrange.h). A panel that does not fit the L2 cache is read once for
// each strip, so strips are long then. A sum runs over ascending columns, whatever the chunks, strips and panels are.
#pragma once
#include "arrange.h"
#include "elements_few.h"

namespace {

// Write some outputs of a panel, given as [output][lane], to rows of y.
template <int T>
NOINLINE void store_lanes(const Matrix &y, bool past, int64_t t0, int64_t count, int64_t feature, int64_t width, const float *lanes) {
  for (int64_t t = 0; t < count; t += VL) {  // all outputs of these tokens: lines of y that are far apart are slow
    for (int64_t f = 0; f < width; f += VL) {
      Vector a[VL];
      UNROLL for (int l = 0; l < VL; l++) a[l] = load(lanes + (f + l) * T + t);
      transpose(a);
      if (y.dtype == FLOAT32 && t + VL <= count && f + VL <= width) {
        float *to = (float *)y.data + (t0 + t) * y.row_stride + feature + f;
        if (past && VL % LINE == 0) UNROLL for (int l = 0; l < VL; l++) store_past(to + l * y.row_stride, a[l]);
        else UNROLL for (int l = 0; l < VL; l++) store(to + l * y.row_stride, a[l]);
        continue;
      }
      float square[VL * VL];
      UNROLL for (int l = 0; l < VL; l++) store(square + l * VL, a[l]);
      for (int64_t l = 0; l < VL && t + l < count; l++)
        write_row(y.data, (t0 + t + l) * y.row_stride + feature + f, y.dtype, square + l * VL, width - f < VL ? width - f : VL);
    }
  }
}

constexpr int64_t PACKED_AT_ONCE = 16 * VL;  // features

// Pack some features of a panel, [feature][T].
template <int T> NOINLINE void pack_part(const Matrix &x, int64_t panel, int64_t feature, float *out) {
  const int64_t left = x.rows - panel * T;
  pack_lanes<T>(columns(x, feature, PACKED_AT_ONCE), panel * T, left < T ? left : T, out + feature * T);
}

// Pack the panels [p0, p1). Called by all threads.
template <int T> INLINE void pack_panels(const Matrix &x, int64_t p0, int64_t p1, float *out) {
  const int64_t parts = blocks_of(x.cols, PACKED_AT_ONCE);
#pragma omp for schedule(static)
  for (int64_t q = 0; q < (p1 - p0) * parts; q++) {
    const int64_t p = q / parts;
    pack_part<T>(x, p0 + p, q % parts * PACKED_AT_ONCE, out + p * x.cols * T);
  }
}

// y[lane] += sum over the entries of a run, for all lanes of a panel.
template <int T> INLINE void add_run(const Arranged &a, int64_t first, int64_t count, const float *x, float *y) {
  constexpr int VECTORS = T / VL, AT_ONCE = VECTORS < 8 ? VECTORS : 8;
  for (int v0 = 0; v0 < VECTORS; v0 += AT_ONCE) {
    Vector acc[AT_ONCE];
    UNROLL for (int v = 0; v < AT_ONCE; v++) acc[v] = load(y + (v0 + v) * VL);
    for (int64_t e = first; e < first + count; e++) {
      const float *line = x + int64_t(a.feature[e]) * T + v0 * VL;
      asm("" : "+r"(line));  // or each vector takes an address of its own
      Vector w = all(a.number[e]);
      UNROLL for (int v = 0; v < AT_ONCE; v++) acc[v] += w * load(line + v * VL);
    }
    UNROLL for (int v = 0; v < AT_ONCE; v++) store(y + (v0 + v) * VL, acc[v]);
  }
}

// The strips [first, last) of a piece for a panel; `y` holds the lanes of a strip.
template <int T>
void multiply_strips(const Multiply &m, const Arranged &a, const Piece &piece, int64_t first, int64_t last, int64_t t0, const float *x, float *y) {
  const int64_t left = m.x.rows - t0, count = left < T ? left : T;
  for (int64_t s = first; s < last; s++) {
    const Strip strip = strip_of(piece, s, m.order, m.plan, a);
    for (int64_t r = 0; r < strip.rows; r++)
      for (int64_t t = 0; t < T; t += VL) store(y + r * T + t, all(m.bias ? m.bias[strip.r0 + r] : 0.f));
    const Run *run = strip.runs;
    for (int64_t c = 0; c < m.plan.chunks; c++) {
      const Run *end = a.runs + strip.ends[c];
      const float *chunk = x + (c << m.plan.shift) * T, *next = x + ((c + 1 < m.plan.chunks ? c + 1 : 0) << m.plan.shift) * T;
      const int64_t lines = m.plan.ahead && run < end ? blocks_of((T / LINE) << m.plan.shift, end - run) : 0;  // a run
      for (; run < end; run++) {
        for (int64_t i = 0; i < lines; i++, next += LINE) __builtin_prefetch(next, 0, 2);
        add_run<T>(a, run->first, run->count, chunk, y + run->row * T);
      }
    }
    store_lanes<T>(m.y, m.past, t0, count, strip.r0, strip.rows, y);
  }
}

// A piece times the packed panels [p0, p1). Called by all threads: each takes whole panels, or they share them.
template <int T>
INLINE void multiply_panels(const Multiply &m, const Arranged &a, const Piece &piece, int64_t p0, int64_t p1, const float *packed, float *y) {
  const int64_t panel = m.x.cols * T;
  if ((p1 - p0) % m.threads == 0) {
#pragma omp for schedule(static)
    for (int64_t p = p0; p < p1; p++) multiply_strips<T>(m, a, piece, 0, piece.strips, p * T, packed + (p - p0) * panel, y);
  } else {
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < (p1 - p0) * piece.strips; q++) {
      const int64_t p = q / piece.strips, s = q % piece.strips;
      multiply_strips<T>(m, a, piece, s, s + 1, (p0 + p) * T, packed + p * panel, y);
    }
  }
}

template <int T> void multiply_lanes(const Multiply &m) {
  const ElementPlan &plan = m.plan;
  const int64_t rows = m.order.rows, panels = blocks_of(m.x.rows, T), step = plan.strips * plan.strip;
  const int threads = m.threads;
  float *packed = (float *)m.scratch, *lists = packed + plan.panels * m.x.cols * T, *rest = lists + arranged_floats(plan);

  const auto arrange_it = [&](const Piece &piece, const Arranged &a, const Room &room) {
    return m.transposed ? arrange_piece<BY_COL>(m.order, piece, plan, a, m.values, room)
                        : arrange_piece<BY_ROW>(m.order, piece, plan, a, m.values, room);
  };

#pragma omp parallel num_threads(threads)
  {
    const Arranged a = arranged_in(lists, plan);
    const Room room = room_in(rest + thread_number() * thread_floats(plan), plan);
    if (plan.alone) {
      const Piece piece = piece_from(0, m.order, plan);
      float *own = packed + thread_number() * m.x.cols * T;
      if (arrange_it(piece, a, room)) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t p = 0; p < panels; p++) {
          for (int64_t f = 0; f < m.x.cols; f += PACKED_AT_ONCE) pack_part<T>(m.x, p, f, own);
          multiply_strips<T>(m, a, piece, 0, piece.strips, p * T, own, room.lanes);
        }
      }
    } else {
      bool legal = true;
      for (int64_t p0 = 0; p0 < panels && legal; p0 += plan.panels) {
        const int64_t p1 = p0 + plan.panels < panels ? p0 + plan.panels : panels;
        pack_panels<T>(m.x, p0, p1, packed);
        for (int64_t start = 0; start < rows; start += step) {
          const Piece piece = piece_from(start, m.order, plan);
          legal = arrange_it(piece, a, room);
          if (!legal) break;
          multiply_panels<T>(m, a, piece, p0, p1, packed, room.lanes);
        }
      }
    }
    fence();
  }
}

void multiply_elements(const Multiply &m) {
  if (m.plan.lanes == 4) multiply_narrow<4>(m);
  else if (m.plan.lanes == 8) multiply_narrow<8>(m);
  else if (m.plan.lanes == 16) multiply_narrow<16>(m);
  else if (m.plan.lanes == 32) multiply_lanes<32>(m);
  else if (m.plan.lanes == 64) multiply_lanes<64>(m);
  else multiply_lanes<128>(m);
}

}  // namespace
