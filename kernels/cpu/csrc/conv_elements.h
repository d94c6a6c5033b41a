// Convolutions with unstructured weights (1x1 blocks): the outputs of a panel are the lanes, packed as [channel][pixel].
//
//   y[o][lane] += w[e] * x[offset[e] + lane]
//   number[e]  += sum over lanes of dy[o][lane] * x[offset[e] + lane]
//
// Entries read lines of the panel in any order, so these should be in the L1 cache: the channels are cut into chunks, and the
// entries are read in the order (strip of rows, chunk, row). The product computes rows as wide as they are packed and drops
// the lanes beside the outputs. In the gradient such lanes could spread a NaN, so images are always in turn there (conv.h).
#pragma once
#include "conv_product.h"

namespace {

constexpr int LANES_HELD = VL == 16 ? 16 : 8;  // vectors of dy in registers

// Add the runs of a strip in one chunk to N vectors of lanes of each row.
template <int N> void add_runs(const ElementRuns &runs, const int32_t *start, int64_t rows, const float *x, float *lanes, int64_t step) {
  for (int64_t l = 0; l < rows; l++, lanes += step) {
    const int64_t stop = start[l + 1];
    int64_t e = start[l];
    if (e == stop) continue;
    Vector acc[N];
    UNROLL for (int v = 0; v < N; v++) acc[v] = load(lanes + v * VL);
    for (; e < stop; e++) {
      const float *line = x + runs.offset[e];
      const Vector w = all(runs.number[e]);
      UNROLL for (int v = 0; v < N; v++) acc[v] += w * load(line + v * VL);
    }
    UNROLL for (int v = 0; v < N; v++) store(lanes + v * VL, acc[v]);
  }
}

void convolve_elements(const Convolve &c) {
  typedef void (*AddRuns)(const ElementRuns &, const int32_t *, int64_t, const float *, float *, int64_t);
  static const AddRuns by_vectors[] = {nullptr,     add_runs<1>, add_runs<2>, add_runs<3>, add_runs<4>,
                                       add_runs<5>, add_runs<6>, add_runs<7>, add_runs<8>};
  constexpr int64_t MOST = 8, T = MOST * VL;
  const int64_t packed = conv_floats(c.x) + c.slack, strips = blocks_of(c.channels, STRIP), panels = panels_of(c);
  const int threads = c.threads;
  const int64_t groups = groups_of(panels, threads);

#pragma omp parallel num_threads(threads)
  {
    float *panel = c.scratch + thread_number() * packed;
    float lanes[STRIP * T], tokens[VL * T];
    int64_t held = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < panels * groups; q++) {
      const int64_t p = q / groups, g = q % groups;
      const ConvPart part = part_at(c, p);
      if (p != held) pack_images(c.x, part.n0, part.n1, part.m0, part.m1 - part.m0 + c.reach, panel), held = p;
      for_subgrids(c, part, [&](const Subgrid &s, int64_t y0, int64_t y1) {
        const int64_t length = (y1 - y0) * c.x.row_pitch, vectors = blocks_of(length, VL), parts = blocks_of(vectors, MOST);
        const Outputs out(c, s, part, y0, y1);
        for (int64_t j = 0, t = 0; j < parts; j++) {
          const int64_t count = vectors / parts + (j < vectors % parts), wide = count * VL;
          const float *x = panel + (y0 - part.m0) * c.x.row_pitch + t;
          for (int64_t o = strips * g / groups * STRIP; o < strips * (g + 1) / groups * STRIP; o += STRIP) {
            const int64_t rows = c.channels - o < STRIP ? c.channels - o : STRIP;
            const int32_t *start = s.ptr + o * c.runs.chunks;
            for (int64_t l = 0; l < STRIP; l++)
              for (int64_t v = 0; v < wide; v += VL) store(lanes + l * T + v, all(c.bias && l < rows ? c.bias[o + l] : 0.f));
            for (int64_t k = 0; k < c.runs.chunks; k++) by_vectors[count](c.runs, start + k * STRIP, rows, x, lanes, T);
            for (int64_t r = 0; r < rows; r += VL) {
              for (int64_t v = 0; v < wide; v += VL) {
                Vector a[VL];
                UNROLL for (int l = 0; l < VL; l++) a[l] = load(lanes + (r + l) * T + v);
                transpose(a);
                UNROLL for (int l = 0; l < VL; l++) store(tokens + (v + l) * VL, a[l]);
              }
              scatter(out, t, length - t < wide ? length - t : wide, o + r, rows - r < VL ? rows - r : VL, tokens, VL);
            }
          }
          t += wide;
        }
      });
    }
    fence();
  }
}

// A mask of the first lanes of a vector; only() sets the others to zero, also where they are NaN.
INLINE Bits first_lanes(int64_t count) {
  Bits mask;
  for (int l = 0; l < VL; l++) mask[l] = l < count ? ~0u : 0u;
  return mask;
}
INLINE Vector only(Bits mask, Vector v) { return (Vector)((Bits)v & mask); }

// Add N vectors of lanes to the runs of a strip in one chunk. PART: of the last vector only the lanes of the mask.
template <int N, bool PART>
void add_lanes(const ElementRuns &runs, const int32_t *start, int64_t rows, const float *x, const float *dy, int64_t step, Bits mask) {
  for (int64_t r = 0; r < rows; r++, dy += step) {
    const int64_t stop = start[r + 1];
    if (start[r] == stop) continue;
    Vector g[N];
    UNROLL for (int v = 0; v < N; v++) g[v] = load(dy + v * VL);
    if (PART) g[N - 1] = only(mask, g[N - 1]);
    for (int64_t e0 = start[r]; e0 < stop; e0 += VL) {
      const int64_t n = stop - e0 < VL ? stop - e0 : VL;
      Vector partial[VL] = {};
      for (int64_t l = 0; l < n; l++) {
        const float *line = x + runs.offset[e0 + l];
        Vector sum[2] = {};  // two chains, or each addition waits for the last
        UNROLL for (int v = 0; v < N; v++) {
          const Vector lanes = load(line + v * VL);
          sum[v & 1] += g[v] * (PART && v == N - 1 ? only(mask, lanes) : lanes);
        }
        partial[l] = sum[0] + sum[1];
      }
      float line[VL];
      store(line, sums(partial));
      for (int64_t l = 0; l < n; l++) runs.number[e0 + l] += line[l];
    }
  }
}

typedef void (*AddLanes)(const ElementRuns &, const int32_t *, int64_t, const float *, const float *, int64_t, Bits);

template <bool PART, int N> struct FillLanes {
  static void into(AddLanes *table) { table[N] = add_lanes<N, PART>, FillLanes<PART, N - 1>::into(table); }
};
template <bool PART> struct FillLanes<PART, 0> {
  static void into(AddLanes *) {}
};
struct LanesTable {  // tables by the number of vectors
  AddLanes whole[LANES_HELD + 1] = {}, part[LANES_HELD + 1] = {};
  LanesTable() { FillLanes<false, LANES_HELD>::into(whole), FillLanes<true, LANES_HELD>::into(part); }
};

void conv_outer_elements(const ConvOuter &m) {
  static const LanesTable table;
  const int64_t used = m.order.ptr[m.order.rows], strips = blocks_of(m.order.rows, STRIP), panels = panels_of(m);
  float *x = m.scratch, *dy = x + conv_floats(m.x), *number = m.runs.number;
  const int threads = m.threads;

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t e = 0; e < used; e++) number[e] = 0.f;
    for (int64_t p = 0; p < panels; p++) {
      const ConvPart at = part_at(m, p);
      const int64_t rows = at.m1 - at.m0, length = rows * m.dy.row_pitch;
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < 2 * m.images_at_once; q++) {
        const int64_t shift = q / 2, n = at.n0 + shift;  // images missing in the last panel are zeros
        Packing part = q & 1 ? m.x : m.dy;
        const int64_t high = q & 1 ? rows + m.reach : rows;
        float *out = (q & 1 ? x : dy) + shift * part.image_pitch;
        if (n >= at.n1) part.height = 0;
        pack_images(part, n < at.n1 ? n : 0, n < at.n1 ? n + 1 : 1, at.m0, high, out);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t s = 0; s < strips; s++) {
        const int64_t r0 = s * STRIP, some = m.order.rows - r0 < STRIP ? m.order.rows - r0 : STRIP;
        const int32_t *start = m.runs.start + r0 * m.runs.chunks;
        const float *g = dy + r0 * m.dy.plane;
        const int64_t vectors = blocks_of(length, VL), rest = length % VL, parts = blocks_of(vectors, LANES_HELD);
        const Bits mask = first_lanes(rest);
        for (int64_t j = 0, t = 0; j < parts; j++) {
          const int64_t wide = vectors / parts + (j < vectors % parts);
          const AddLanes add = (rest && j + 1 == parts ? table.part : table.whole)[wide];
          for (int64_t k = 0; k < m.runs.chunks; k++) add(m.runs, start + k * STRIP, some, x + t, g + t, m.dy.plane, mask);
          t += wide * VL;
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t e = 0; e < used; e++) m.out[m.runs.slot[e]] = number[e];
    clear_free(m.order, m.out);
  }
}

}  // namespace
