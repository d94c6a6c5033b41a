// y = x W' + bias by blocks: a tile of R tokens and C vectors of outputs stays in registers over a whole block row.
//
//   acc[r][c] += x[t + r][k] * w[k][n + c]      broadcast from a packed panel of x, vectors from the block
//
// Every element of y has one order of summation (the entries of its block row, k within a block), whatever the tile, the
// panel or the number of threads: results are the same to the bit.
#pragma once
#include <type_traits>

#include "pack.h"

namespace {

struct Row {           // the entries of one block row, as a tile reads them
  const float *x;      // the panel at the tile's first token; block b at x + b * x_block
  int64_t x_block;
  const float *w;      // transposed blocks in the order of the entries, or values as stored
  const int32_t *other, *slot;  // slot is null for the former
  int64_t count, size;          // entries; bo * bi
  int64_t out;                  // side along y: the stride of w[k]
  bool past;                    // y is written past the caches
};

template <int IN, int C, int R> void tile(const Row &row, float *y, int64_t y_stride, const float *bias) {
  Vector acc[R][C];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) acc[r][c] = bias ? load(bias + c * VL) : Vector{};
  const int64_t out = row.out;
  for (int64_t e = 0; e < row.count; e++) {
    const float *x = row.x + row.other[e] * row.x_block;
    const float *w = row.w + (row.slot ? row.slot[e] : e) * row.size;
    // The hardware does not prefetch the next block, which lies anywhere: it is prefetched here while this one is used.
    int64_t ahead = e + 1 < row.count ? e + 1 : 0;
    const float *next_x = row.x + row.other[ahead] * row.x_block + (ahead ? 0 : R * IN);
    const float *next_w = row.w + (row.slot ? row.slot[ahead] : ahead) * row.size;
    for (int k0 = 0; k0 < IN; k0 += FACTORS) {
      Factors xs[R];
      UNROLL for (int r = 0; r < R; r++) xs[r] = factors(x + r * IN + k0);
      UNROLL for (int i = 0; i < FACTORS; i++) {
        const int k = k0 + i;
        UNROLL for (int c = 0; c < C * VL; c += LINE) __builtin_prefetch(next_w + k * out + c, 0, 3);
        UNROLL for (int c = 0; c < R; c += LINE) __builtin_prefetch(next_x + k * R + c, 0, 3);
        Vector wk[C];
        UNROLL for (int c = 0; c < C; c++) wk[c] = load(w + k * out + c * VL);
        UNROLL for (int r = 0; r < R; r++) {
          Vector xk = all(xs[r][i]);
          UNROLL for (int c = 0; c < C; c++) acc[r][c] += xk * wk[c];
        }
      }
    }
  }
  if (C * VL % LINE == 0 && row.past) {  // whole lines
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) store_past(y + r * y_stride + c * VL, acc[r][c]);
  } else {
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) store(y + r * y_stride + c * VL, acc[r][c]);
  }
}

typedef void (*Tile)(const Row &, float *, int64_t, const float *);

template <int IN, int C, int R> struct Fill {
  static void into(Tile *table) { table[R] = tile<IN, C, R>, Fill<IN, C, R - 1>::into(table); }
};
template <int IN, int C> struct Fill<IN, C, 0> {
  static void into(Tile *) {}
};
template <int IN, int C> struct Tiles {  // a table by the number of tokens
  static constexpr int MOST = ACCUMULATORS / C;
  Tile by_rows[MOST + 1];
  Tiles() { by_rows[0] = nullptr, Fill<IN, C, MOST>::into(by_rows); }
};

// One panel of tokens times the block rows [first, last); w: the transposed blocks of these, or all values.
template <int IN, int C>
void panel_product(const Multiply &m, Row row, const float *packed, int64_t t0, int64_t count, int64_t first, int64_t last,
                   const float *w, const float *bias, float *aside) {
  static const Tiles<IN, C> tiles;
  const int64_t step = C * VL, tokens_each = Tiles<IN, C>::MOST, parts = blocks_of(count, tokens_each), before = m.order.ptr[first];
  for (int64_t r = first; r < last; r++) {
    int64_t start = m.order.ptr[r];
    row.count = m.order.ptr[r + 1] - start;
    row.other = m.order.other + start;
    row.slot = m.transposed ? m.order.slot + start : nullptr;
    int64_t features = m.y.cols - r * m.out < m.out ? m.y.cols - r * m.out : m.out;
    bool direct = features == m.out && m.y.dtype == FLOAT32;
    row.past = direct && m.past;
    for (int64_t n = 0; n < features; n += step) {
      row.w = (m.transposed ? w : w + (start - before) * row.size) + n;
      for (int64_t i = 0, t = 0; i < parts; i++) {
        int64_t rows = count / parts + (i < count % parts);
        row.x = packed + t * IN;
        const float *b = bias ? bias + r * m.out + n : nullptr;
        int64_t at = (t0 + t) * m.y.row_stride + r * m.out + n;
        if (direct) tiles.by_rows[rows](row, (float *)m.y.data + at, m.y.row_stride, b);
        else {
          tiles.by_rows[rows](row, aside, step, b);
          int64_t width = features - n < step ? features - n : step;
          for (int64_t j = 0; j < rows; j++) write_row(m.y.data, at + j * m.y.row_stride, m.y.dtype, aside + j * step, width);
        }
        t += rows;
      }
    }
  }
}

typedef void (*PanelProduct)(const Multiply &, Row, const float *, int64_t, int64_t, int64_t, int64_t, const float *,
                             const float *, float *);

// Return f(the side that is summed over, vectors of a tile), both as constants.
template <class F> INLINE auto for_sides(int64_t in, int64_t out, const F &f) {
  const auto by_width = [&](auto side) {
#if VL == 16
    if (out == 16) return f(side, std::integral_constant<int, 1>());
#endif
    (void)out;
    return f(side, std::integral_constant<int, 2>());
  };
  return in == 16   ? by_width(std::integral_constant<int, 16>())
         : in == 32 ? by_width(std::integral_constant<int, 32>())
         : in == 64 ? by_width(std::integral_constant<int, 64>())
                    : by_width(std::integral_constant<int, 128>());
}

INLINE PanelProduct product_of(const Multiply &m) {
  return for_sides(m.in, m.out, [](auto in, auto c) -> PanelProduct { return panel_product<decltype(in)::value, decltype(c)::value>; });
}

// Transpose the entries [first, last). The hardware does not prefetch the next block.
INLINE void transpose_entries(const Multiply &m, int64_t first, int64_t last, float *to) {
  const int64_t size = int64_t(m.in) * m.out;
  for (int64_t e = first; e < last; e++, to += size) {
    const float *next = m.values + m.order.slot[e + 1 < last ? e + 1 : e] * size;
    for (int64_t i = 0; i < size; i += LINE) __builtin_prefetch(next + i, 0, 2);
    transpose_block(m.values + m.order.slot[e] * size, m.out, m.in, to);
  }
}

void multiply(const Multiply &m) {
  const PanelProduct product = product_of(m);
  const int64_t size = int64_t(m.in) * m.out, used = m.order.ptr[m.order.rows];
  const int64_t panels = (m.x.rows + m.panel - 1) / m.panel, packed = blocks_of(m.x.cols, m.in) * m.in * m.panel;
  // The scratch: all transposed blocks (forward), the bias filled up, and for each thread its panel and the tile written
  // aside. If one panel holds all tokens, each thread has the transposed blocks of one row instead.
  const bool by_row = m.group_entries > 0, at_first = !m.transposed && !by_row;
  float *w = (float *)m.scratch, *bias = w + (at_first ? round_up(used * size, LINE) : 0);
  float *mine = bias + (m.bias ? round_up(m.order.rows * m.out, LINE) : 0);
  const int64_t stride = round_up(packed + ASIDE + m.group_entries * size, LINE);
  if (m.bias)
    for (int64_t i = 0; i < m.order.rows * m.out; i++) bias[i] = i < m.y.cols ? m.bias[i] : 0.f;
  const int threads = m.threads;
  const int64_t groups = groups_of(panels, threads);  // every thread packs a panel for itself

#pragma omp parallel num_threads(threads)
  {
    if (at_first) {
      const int64_t me = thread_number(), all_of_us = thread_count(), first = used * me / all_of_us;
      transpose_entries(m, first, used * (me + 1) / all_of_us, w + first * size);
#pragma omp barrier
    }
    float *panel = mine + thread_number() * stride, *aside = panel + packed, *turned = aside + ASIDE;
    int64_t held = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < panels * groups; q++) {
      int64_t p = q / groups, g = q % groups, t0 = p * m.panel;
      int64_t count = m.x.rows - t0 < m.panel ? m.x.rows - t0 : m.panel;
      if (p != held) pack_panel(m.x, t0, count, m.in, m.wanted, panel), held = p;
      Row row = {nullptr, count * m.in, nullptr, nullptr, nullptr, 0, size, m.out, false};
      const int64_t first = m.order.rows * g / groups, last = m.order.rows * (g + 1) / groups, step = by_row ? 1 : last - first;
      for (int64_t r = first; r < last; r += step) {
        const float *blocks = m.transposed ? m.values : by_row ? turned : w + m.order.ptr[r] * size;
        if (by_row) transpose_entries(m, m.order.ptr[r], m.order.ptr[r + 1], turned);
        product(m, row, panel, t0, count, r, r + step, blocks, m.bias ? bias : nullptr, aside);
      }
    }
    fence();
  }
}

}  // namespace
