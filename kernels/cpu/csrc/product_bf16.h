// y = x W' + bias in bfloat16, with sums in float32: packed panels of x, packed groups of block rows, and a tile of tokens
// and outputs that stays in registers over a whole block row. Products are so fast here that memory decides: if one or two
// panels hold all tokens, a group of the weight is packed just before its use and stays in the cache, and y is written tile
// by tile along its rows. The file of an instruction set includes, before this one, what defines
//
//   Unit                an object that a thread holds while it multiplies
//   product_tile        a tile from one panel and one block row, into `aside`: float32, `width` numbers a token
//
// Every element of y has one order of summation, whatever the tile, the panel or the number of threads.
#pragma once
#include "conv_panels.h"
#include "pack_bf16.h"

namespace {

// Write a tile from aside to y: to `tokens` rows from token t on, at feature n of block row r.
INLINE void write_tile(const Multiply &m, int64_t t, int64_t r, int64_t n, int64_t width, int64_t tokens, const float *aside) {
  const int64_t features = m.y.cols - r * m.out < m.out ? m.y.cols - r * m.out : m.out;
  const int64_t left = features - n < width ? features - n : width;
  Half *to = (Half *)m.y.data + t * m.y.row_stride + r * m.out + n;
  for (int64_t j = 0; j < tokens; j++, to += m.y.row_stride, aside += width) write_halves(to, aside, left);
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

// Pack entry e in pairs.
INLINE void pack_entry(const Multiply &m, int64_t e, int64_t stop, Half *to) {
  const int64_t size = int64_t(m.in) * m.out, item = m.values_dtype == FLOAT32 ? 4 : 2, at = m.order.slot[e] * size;
  prefetch_block((const char *)m.values + m.order.slot[e + 1 < stop ? e + 1 : e] * size * item, size * item);
  if (m.transposed) pack_block(m.values, at, m.values_dtype, m.in, m.out, to);
  else pack_block_turned(m.values, at, m.values_dtype, m.out, m.in, to);
}

// The first block row of group g; all groups have about the same number of entries.
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
  const int64_t together = m.shared ? m.groups : 1;  // a thread takes a whole panel at a time, or one group

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

// The convolution and its input gradient, on images packed as such.

// As pack_row of pack.h, in slices of up to 32 channels.
INLINE void pack_half_row(const Packing &p, int64_t pixel, Columns has, int64_t base, const uint8_t *wanted, Half *out) {
  const int64_t group_channels = p.channels / p.groups, per_group = blocks_of(group_channels, p.side), slice = p.side / p.slices;
  const int64_t step = p.col_step * p.channels, blocks = conv_blocks(p);
  for (int64_t b = 0; b < blocks; b++) {
    if (!wanted[b]) continue;
    const int64_t first = b / per_group * group_channels, channel = b % per_group * p.side;
    for (int64_t k = 0; k < p.slices; k++) {
      const int64_t c = channel + k * slice, width = group_channels - c < slice ? group_channels - c : slice;
      const Half *from = (const Half *)p.data + (pixel + base) * p.channels + first + c;
      Half *to = out + (b * p.slices + k) * p.plane * slice;
      std::memset(to, 0, has.first * slice * 2);
      std::memset(to + has.last * slice, 0, (p.cols - has.last) * slice * 2);
      for (int64_t m = has.first; m < has.last; m++) {
        const Half *source = from + m * step;
        Half *target = to + m * slice;
        if (width == slice) copy_slice(target, source, slice);
        else for (int64_t i = 0; i < slice; i++) target[i] = i < width ? source[i] : Half(0);
      }
    }
  }
}

// Outputs of one panel, block by block of the channels [first, last). A pixel of a panel is a token of the tiles, which may
// read some pixels beyond their span: those sums are not written.
INLINE void conv_panel_bf16(const Outputs &out, const Half *packed, int64_t first, int64_t last, const Half *w, float *aside) {
  const Convolve &c = out.c;
  const int64_t slice = c.x.side / c.x.slices, size = int64_t(c.in) * c.out, width = c.out == 16 ? 16 : 32, step = HALF_TILE / width;
  for (int64_t r = first; r < last; r++) {
    const int64_t start = out.s.ptr[r];
    const Channels channels = channels_of(c, r);
    HalfRow row = {nullptr, slice, c.x.plane * slice, nullptr, c.offset + start, out.s.ptr[r + 1] - start, size, c.in, c.out};
    for (int64_t o = 0; o < channels.count; o += width) {
      const int64_t some = channels.count - o < width ? channels.count - o : width, channel = channels.first + o;
      const float *bias = c.bias ? c.bias + r * c.out + o : nullptr;
      row.w = w + start * size + o * c.in;
      for (int64_t span = 0; span < out.spans; span++) {
        const Half *x = packed + out.start(span) * slice;
        for (int64_t t = 0; t < out.length; t += step) {
          const int64_t tokens = out.length - t < step ? out.length - t : step;
          row.x = x + t * slice;
          product_tile(row, tokens, bias, aside);
          if (c.in_turn) scatter(out, t, tokens, [&](int64_t at, int64_t j) { write_halves((Half *)c.y + at + channel, aside + j * width, some); });
          else for (int64_t j = 0; j < tokens; j++) write_halves((Half *)c.y + out.at(span, t + j) + channel, aside + j * width, some);
        }
      }
    }
  }
}

void convolve_bf16(const Convolve &c) {
  const int64_t size = int64_t(c.in) * c.out, blocks = c.x.groups * c.group_blocks, slice = c.x.side / c.x.slices;
  Half *w = (Half *)c.scratch;
  float *mine = c.scratch + round_up(c.used * size / 2, LINE);
  const int threads = c.threads;
  const int64_t panels = panels_of(c), groups = groups_of(panels, threads);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t e = 0; e < c.used; e++) {
      if (c.transposed) pack_block(c.values, c.slot[e] * size, FLOAT32, c.in, c.out, w + e * size);
      else pack_block_turned(c.values, c.slot[e] * size, FLOAT32, c.out, c.in, w + e * size);
    }
    const Unit unit(slice);
    float *aside = mine + thread_number() * half_thread_floats(c.x);
    Half *panel = (Half *)(aside + HALF_TILE);
    int64_t held = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < panels * groups; q++) {
      const int64_t p = q / groups, g = q % groups;
      const ConvPart part = part_at(c, p);
      if (p != held) {
        pack_images_by(c.x, part.n0, part.n1, part.m0, part.m1 - part.m0 + c.reach,
                       [&](int64_t pixel, Columns has, int64_t base, const uint8_t *wanted, int64_t at) {
                         pack_half_row(c.x, pixel, has, base, wanted, panel + at * slice);
                       });
        held = p;
      }
      for_subgrids(c, part, [&](const Subgrid &s, int64_t y0, int64_t y1) {
        conv_panel_bf16(Outputs(c, s, part, y0, y1), panel, blocks * g / groups, blocks * (g + 1) / groups, w, aside);
      });
    }
  }
}

}  // namespace
