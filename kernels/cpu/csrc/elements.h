// Unstructured weights (1x1 blocks): tokens are the lanes. Kernels for a panel of tokens that is packed as [feature][lane].
//
//   y[o][lane]   += w[e] * x[col[e]][lane]
//   total[e]     += sum over lanes of dy[o][lane] * x[col[e]][lane]
//
// Entries read lines of the panel in any order, so these should be in the L1 cache: the features of x are cut into chunks, and
// the entries are read in the order (strip of rows, chunk, row). A thread arranges those of a few strips at a time, a piece,
// which stays in its L2 cache while it goes through all panels. A panel that does not fit the L2 cache is read once for each
// strip, so strips are long then. A sum runs over ascending columns, whatever the chunks, strips and panels are.
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

// Pack the panels of some tokens, each [feature][T]. Called by all threads.
template <int T> NOINLINE void pack_panels(const Matrix &x, int64_t t0, int64_t count, float *out) {
  const int64_t wide = 16 * VL, parts = (x.cols + wide - 1) / wide, panels = (count + T - 1) / T;
#pragma omp for schedule(dynamic, 1)
  for (int64_t q = 0; q < panels * parts; q++) {
    const int64_t p = q / parts, f = q % parts * wide, left = count - p * T;
    pack_lanes<T>(columns(x, f, wide), t0 + p * T, left < T ? left : T, out + (p * x.cols + f) * T);
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

template <int T> void multiply_lanes(const Multiply &m) {
  const ElementPlan &plan = m.plan;
  const int64_t rows = m.order.rows, tokens = m.x.rows, features = m.x.cols;
  const int64_t piece = plan.strips * plan.strip, pieces = (rows + piece - 1) / piece;
  const int threads = m.threads;
  float *packed = (float *)m.scratch;

#pragma omp parallel num_threads(threads)
  {
    float *mine = packed + plan.tokens * features + thread_number() * thread_floats(plan, false);
    float *y = mine;
    const Arranged a = arranged_in(mine + plan.strip * T, plan, false);
    for (int64_t t0 = 0; t0 < tokens; t0 += plan.tokens) {
      const int64_t some = tokens - t0 < plan.tokens ? tokens - t0 : plan.tokens;
      pack_panels<T>(m.x, t0, some, packed);
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < pieces; q++) {
        const int64_t start = q * piece, stop = start + piece < rows ? start + piece : rows;
        if (!arrange<false>(m.order, start, stop, plan, a, m.values)) {
          refuse(m.order);
          continue;
        }
        for (int64_t p = 0; p < some; p += T) {
          const int64_t count = some - p < T ? some - p : T;
          const float *x = packed + p * features;
          const Run *run = a.runs;
          const int32_t *end = a.ends;
          for (int64_t r0 = start; r0 < stop; r0 += plan.strip) {
            const int64_t r1 = r0 + plan.strip < stop ? r0 + plan.strip : stop;
            for (int64_t r = r0; r < r1; r++)
              for (int64_t t = 0; t < T; t += VL) store(y + (r - r0) * T + t, all(m.bias ? m.bias[r] : 0.f));
            for (int64_t c = 0; c < plan.chunks; c++) {
              for (const Run *last = a.runs + *end++; run < last; run++)
                add_run<T>(a, run->first, run->count, x + (c << plan.shift) * T, y + run->row * T);
            }
            store_lanes<T>(m.y, m.past, t0 + p, count, r0, r1 - r0, y);
          }
        }
      }
    }
    fence();
  }
}

// Multiply a run by a row of dy, into vectors that add_sums() adds up over their lanes.
template <int T> INLINE void dot_run(const uint16_t *feature, int64_t count, const float *x, const float *dy, Vector *partial) {
  constexpr int VECTORS = T / VL, AT_ONCE = VECTORS < 8 ? VECTORS : 8;
  for (int v0 = 0; v0 < VECTORS; v0 += AT_ONCE) {
    Vector g[AT_ONCE];
    UNROLL for (int v = 0; v < AT_ONCE; v++) g[v] = load(dy + (v0 + v) * VL);
    for (int64_t e = 0; e < count; e++) {
      const float *line = x + int64_t(feature[e]) * T + v0 * VL;
      asm("" : "+r"(line));
      Vector acc = v0 ? partial[e] : Vector{}, more = {};  // two chains, or each addition waits for the last
      UNROLL for (int v = 0; v < AT_ONCE; v += 2) {
        acc += g[v] * load(line + v * VL);
        more += g[v + 1] * load(line + (v + 1) * VL);
      }
      partial[e] = acc + more;
    }
  }
}

// Add the sums over the lanes of the first `held` vectors to as many totals.
NOINLINE void add_sums(Vector *partial, int64_t held, float *total) {
  int64_t e = 0;
  for (; e + VL <= held; e += VL) store(total + e, load(total + e) + sums(partial + e));
  if (e < held) {
    float line[VL];
    store(line, sums(partial + e));  // the vectors behind are of former entries; their sums are not used
    for (int64_t l = 0; e + l < held; l++) total[e + l] += line[l];
  }
}

template <int T> void outer_lanes(const Outer &m) {
  constexpr int64_t MOST = 64;  // entries whose vectors wait in the L1 cache
  const ElementPlan &plan = m.plan;
  const int64_t rows = m.order.rows, tokens = m.x.rows, features = m.x.cols;
  const int64_t piece = plan.strips * plan.strip, pieces = (rows + piece - 1) / piece;
  const int threads = m.threads;
  float *packed = (float *)m.scratch;

#pragma omp parallel num_threads(threads)
  {
    float *mine = packed + plan.tokens * features + thread_number() * thread_floats(plan, true);
    float *dy = mine;
    const Arranged a = arranged_in(mine + plan.strip * T, plan, true);
    Vector partial[MOST] = {};
    for (int64_t t0 = 0; t0 < tokens; t0 += plan.tokens) {
      const int64_t some = tokens - t0 < plan.tokens ? tokens - t0 : plan.tokens;
      pack_panels<T>(m.x, t0, some, packed);
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < pieces; q++) {
        const int64_t start = q * piece, stop = start + piece < rows ? start + piece : rows;
        if (!arrange<true>(m.order, start, stop, plan, a, nullptr)) {
          refuse(m.order);
          continue;
        }
        const Run *runs_end = a.runs + a.ends[(stop - start + plan.strip - 1) / plan.strip * plan.chunks - 1];
        float *total = a.number;  // in the order of the runs
        for (const Run *run = a.runs; run < runs_end; run++)
          for (int64_t i = 0; i < run->count; i++) *total++ = t0 ? m.out[a.slot[run->first + i]] : 0.f;
        for (int64_t p = 0; p < some; p += T) {
          const int64_t count = some - p < T ? some - p : T;
          const Run *run = a.runs;
          const int32_t *end = a.ends;
          int64_t held = 0;  // vectors that wait for add_sums()
          total = a.number;
          for (int64_t r0 = start; r0 < stop; r0 += plan.strip) {
            pack_lanes<T>(columns(m.dy, r0, r0 + plan.strip < stop ? plan.strip : stop - r0), t0 + p, count, dy);
            for (int64_t c = 0; c < plan.chunks; c++) {
              const float *x = packed + p * features + (c << plan.shift) * T;
              for (const Run *last = a.runs + *end++; run < last; run++) {
                for (int64_t i = 0, n; i < run->count; i += n, held += n) {
                  if (held == MOST) add_sums(partial, MOST, total), total += MOST, held = 0;
                  n = run->count - i < MOST - held ? run->count - i : MOST - held;
                  dot_run<T>(a.feature + run->first + i, n, x, dy + run->row * T, partial + held);
                }
              }
            }
          }
          add_sums(partial, held, total);
        }
        total = a.number;
        const int64_t entries = m.order.ptr[stop] - m.order.ptr[start];
        for (const Run *run = a.runs; run < runs_end; run++) {
          for (int64_t e = run->first; e < run->first + run->count; e++) {
            __builtin_prefetch(m.out + a.slot[e + SLOTS_AHEAD < entries ? e + SLOTS_AHEAD : e], 1, 3);
            m.out[a.slot[e]] = *total++;
          }
        }
      }
    }
    clear_free(m.order, m.out);
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

void outer_elements(const Outer &m) {
  if (m.plan.lanes == 16) outer_narrow(m);
  else if (m.plan.lanes == 32) outer_lanes<32>(m);
  else if (m.plan.lanes == 64) outer_lanes<64>(m);
  else outer_lanes<128>(m);
}

}  // namespace
