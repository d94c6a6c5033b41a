// y = x W' + bias in bfloat16, with sums in float32: packed panels of x, packed groups of block rows, and a tile of tokens
// and outputs that stays in registers over a whole block row. Dense products are fast enough here for the memory to
// decide: where one or two panels hold all tokens, a group of the weight is packed just before its use and stays in the
// cache, and y is written tile by tile along its rows. The file of an instruction set has included what defines
//
//   Unit                an object that a thread holds while it multiplies
//   product_tile        a tile from one panel and one block row, into `aside`: float32, `width` numbers a token
//
// Every element of y has one order of summation, whatever the tile, the panel or the number of threads.
#pragma once
#include "pack_bf16.h"
#include "threads.h"

namespace {

// `tokens` numbers a row of `aside` to y from token t, block row r and feature n of it on.
INLINE void write_tile(const Multiply &m, int64_t t, int64_t r, int64_t n, int64_t width, int64_t tokens, const float *aside) {
  const int64_t features = m.y.cols - r * m.out < m.out ? m.y.cols - r * m.out : m.out;
  const int64_t left = features - n < width ? features - n : width;
  Half *to = (Half *)m.y.data + t * m.y.row_stride + r * m.out + n;
  for (int64_t j = 0; j < tokens; j++, to += m.y.row_stride, aside += width) {
    if (left == 32) store_pairs(to, line(aside, 0, FLOAT32));
    else if (left == 16) *(Halves *)to = halves(aside, 0, FLOAT32);
    else write_row(to, 0, BFLOAT16, aside, left);
  }
}

// One panel of tokens times the block rows [first, last), whose packed entries start at w.
inline void panel_product_bf16(const Multiply &m, HalfRow row, const Half *packed, int64_t t0, int64_t count, int64_t first,
                               int64_t last, const Half *w, const float *bias, float *aside) {
  const int64_t width = m.out == 16 ? 16 : 32, step = HALF_TILE / width;
  for (int64_t t = 0; t < count; t += step) {
    const int64_t tokens = count - t < step ? count - t : step;
    row.x = packed + t * (m.in < 32 ? m.in : 32);
    for (int64_t r = first; r < last; r++) {
      row.count = m.order.ptr[r + 1] - m.order.ptr[r];
      row.other = m.order.other + m.order.ptr[r];
      for (int64_t n = 0; n < m.out && r * m.out + n < m.y.cols; n += width) {
        row.w = w + (m.order.ptr[r] - m.order.ptr[first]) * row.size + n * m.in;
        product_tile(row, tokens, bias ? bias + r * m.out + n : nullptr, aside);
        write_tile(m, t0 + t, r, n, width, tokens, aside);
      }
    }
  }
}

// Entry e, in pairs.
INLINE void pack_entry(const Multiply &m, int64_t e, int64_t stop, Half *to) {
  const int64_t size = int64_t(m.in) * m.out, item = m.values_dtype == FLOAT32 ? 4 : 2, at = m.order.slot[e] * size;
  ask_for((const char *)m.values + m.order.slot[e + 1 < stop ? e + 1 : e] * size * item, size * item);
  if (m.transposed) pack_block(m.values, at, m.values_dtype, m.in, m.out, to);
  else pack_block_turned(m.values, at, m.values_dtype, m.out, m.in, to);
}

// The first block row of group g: groups have about as many entries each.
INLINE int64_t group_start(const Multiply &m, int64_t g) {
  if (g == m.groups) return m.order.rows;
  const int64_t entry = m.order.ptr[m.order.rows] * g / m.groups;
  int64_t low = 0, high = g ? m.order.rows : 0;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (m.order.ptr[middle] < entry) low = middle + 1;
    else high = middle;
  }
  return low;
}

void multiply_bf16(const Multiply &m) {
  const int64_t size = int64_t(m.in) * m.out, used = m.order.ptr[m.order.rows];
  const int64_t panels = (m.x.rows + m.panel - 1) / m.panel, packed = blocks_of(m.x.cols, m.in) * m.in * m.panel;
  // The scratch: packed blocks if they are shared, the bias filled up, and for each thread its tile, panel and group.
  Half *w = (Half *)m.scratch;
  float *bias = (float *)(w + (m.shared ? used * size : 0)), *mine = bias + (m.bias ? round_up(m.order.rows * m.out, LINE) : 0);
  const int64_t stride = HALF_TILE + (packed + m.group_entries * size) / 2;
  if (m.bias)
    for (int64_t i = 0; i < m.order.rows * m.out; i++) bias[i] = i < m.y.cols ? m.bias[i] : 0.f;
  const int threads = m.threads;
  const int64_t together = m.shared ? m.groups : 1;  // a thread takes a whole panel, or one group of it

#pragma omp parallel num_threads(threads)
  {
    if (m.shared) {
#pragma omp for schedule(static)
      for (int64_t e = 0; e < used; e++) pack_entry(m, e, used, w + e * size);
    }
    const Unit unit(m.in < 32 ? m.in : 32);
    float *aside = mine + thread_number() * stride;
    Half *panel = (Half *)(aside + HALF_TILE), *group = panel + packed;
    int64_t held = -1;
#pragma omp for schedule(dynamic, together)
    for (int64_t q = 0; q < panels * m.groups; q++) {
      const int64_t p = q / m.groups, t0 = p * m.panel;
      const int64_t count = m.x.rows - t0 < m.panel ? m.x.rows - t0 : m.panel, filled = round_up(count, HALF_TOKENS);
      const int64_t first = group_start(m, q % m.groups), last = group_start(m, q % m.groups + 1);
      if (p != held) pack_rows(m.x, t0, filled, m.in, m.wanted, panel), held = p;
      const int64_t e0 = m.order.ptr[first], e1 = m.order.ptr[last];
      if (!m.shared)
        for (int64_t e = e0; e < e1; e++) pack_entry(m, e, e1, group + (e - e0) * size);
      const HalfRow row = {nullptr, filled * m.in, filled * 32, nullptr, nullptr, 0, size, m.in, m.out};
      panel_product_bf16(m, row, panel, t0, count, first, last, m.shared ? w + e0 * size : group, m.bias ? bias : nullptr, aside);
    }
  }
}

}  // namespace
