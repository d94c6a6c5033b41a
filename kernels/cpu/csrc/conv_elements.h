// Convolutions with unstructured weights (1x1 blocks): the outputs of a panel are the lanes, packed as [channel][pixel].
//
//   y[o][lane] += w[e] * x[offset[e] + lane]
//   number[e]  += sum over lanes of dy[o][lane] * x[offset[e] + lane]
//
// In the product rows are as wide as they are packed: lanes beside the outputs are computed and thrown away. In the gradient
// they would carry a NaN where it does not belong, so there the images always lie in turn (conv.h).
#pragma once
#include "conv_product.h"

namespace {

constexpr int LANES_HELD = VL == 16 ? 16 : 8;  // vectors of dy in registers

void convolve_elements(const Convolve &c) {
  constexpr int AT_ONCE = 8;
  constexpr int64_t T = AT_ONCE * VL;
  const int64_t packed = conv_floats(c.x) + c.slack, strips_out = (c.channels + VL - 1) / VL;
  const int64_t strips = (c.last_row - c.first_row + c.strip - 1) / c.strip;
  const int64_t panels = (c.images + c.images_at_once - 1) / c.images_at_once * strips;
  const int threads = c.threads;
  const int64_t groups = groups_of(panels, threads);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float *panel = c.scratch + thread_number() * packed;
    float lanes[VL * T], tokens[VL * T];
    int64_t held = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t q = 0; q < panels * groups; q++) {
      const int64_t p = q / groups, g = q % groups;
      const int64_t n0 = p / strips * c.images_at_once, n1 = n0 + c.images_at_once < c.images ? n0 + c.images_at_once : c.images;
      const int64_t m0 = c.first_row + p % strips * c.strip, m1 = m0 + c.strip < c.last_row ? m0 + c.strip : c.last_row;
      if (p != held) pack_images(c.x, n0, n1, m0, m1 - m0 + c.reach, panel), held = p;
      for (int64_t i = 0; i < c.subgrids; i++) {
        const Subgrid &s = c.subgrid[i];
        const int64_t y0 = s.y0 > m0 ? s.y0 : m0, y1 = s.y1 < m1 ? s.y1 : m1, length = (y1 - y0) * c.x.row_pitch;
        const Place place = {c, s, n0, n1, y0, c.x.cols};
        for (int64_t t = 0; t < length; t += T) {
          const float *x = panel + (y0 - m0) * c.x.row_pitch + t;
          for (int64_t o = strips_out * g / groups * VL; o < strips_out * (g + 1) / groups * VL; o += VL) {
            const int64_t width = c.channels - o < VL ? c.channels - o : VL;
            for (int64_t l = 0; l < width; l++) {
              Vector acc[AT_ONCE];
              UNROLL for (int v = 0; v < AT_ONCE; v++) acc[v] = all(c.bias ? c.bias[o + l] : 0.f);
              for (int64_t e = s.ptr[o + l]; e < s.ptr[o + l + 1]; e++) {
                const float *line = x + c.offset[e];
                const Vector w = all(c.values[e]);
                UNROLL for (int v = 0; v < AT_ONCE; v++) acc[v] += w * load(line + v * VL);
              }
              UNROLL for (int v = 0; v < AT_ONCE; v++) store(lanes + l * T + v * VL, acc[v]);
            }
            for (int64_t v = 0; v < T; v += VL) {
              Vector a[VL];
              UNROLL for (int l = 0; l < VL; l++) a[l] = load(lanes + l * T + v);
              transpose(a);
              UNROLL for (int l = 0; l < VL; l++) store(tokens + (v + l) * VL, a[l]);
            }
            scatter(place, t, length - t < T ? length - t : T, o, width, tokens, VL);
          }
        }
      }
    }
  }
}

INLINE Vector part_of(const float *p, int64_t count) {
  Vector v = {};
  std::memcpy(&v, p, count * 4);
  return v;
}

// Adds some lanes to the entries of rows [r0, r1) of dy: AT_ONCE vectors, or one that may be a part.
template <int AT_ONCE>
INLINE void add_lanes(const ConvOuter &m, const float *x, const float *dy, int64_t r0, int64_t r1, int64_t count, float *number) {
  for (int64_t r = r0; r < r1; r++) {
    Vector g[AT_ONCE];
    UNROLL for (int v = 0; v < AT_ONCE; v++) g[v] = AT_ONCE > 1 ? load(dy + r * m.dy.plane + v * VL) : part_of(dy + r * m.dy.plane, count);
    for (int64_t e0 = m.order.ptr[r]; e0 < m.order.ptr[r + 1]; e0 += VL) {
      const int64_t n = m.order.ptr[r + 1] - e0 < VL ? m.order.ptr[r + 1] - e0 : VL;
      Vector partial[VL] = {};
      for (int64_t l = 0; l < n; l++) {
        const float *line = x + m.offset[e0 + l];
        if (AT_ONCE > 1) {
          Vector acc = {}, more = {};  // two chains, or each addition waits for the last
          UNROLL for (int v = 0; v + 1 < AT_ONCE; v += 2) {
            acc += g[v] * load(line + v * VL);
            more += g[v + 1] * load(line + (v + 1) * VL);
          }
          partial[l] = acc + more;
        } else partial[l] = g[0] * part_of(line, count);
      }
      float line[VL];
      store(line, sums(partial));
      for (int64_t l = 0; l < n; l++) number[e0 + l] += line[l];
    }
  }
}

void conv_outer_elements(const ConvOuter &m) {
  constexpr int64_t T = LANES_HELD * VL;
  const int64_t x_panel = conv_floats(m.x), dy_panel = conv_floats(m.dy), used = m.order.ptr[m.order.rows];
  const int64_t strips = (m.rows + m.strip - 1) / m.strip, panels = (m.images + m.images_at_once - 1) / m.images_at_once * strips;
  float *x = m.scratch, *dy = x + x_panel, *number = dy + dy_panel;
  const int threads = m.threads;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t rows_of_dy = m.order.rows, pieces = threads > 1 ? 8 * thread_count() : 1;
#pragma omp for schedule(static)
    for (int64_t e = 0; e < used; e++) number[e] = 0.f;
    for (int64_t p = 0; p < panels; p++) {
      const int64_t n0 = p / strips * m.images_at_once, y0 = p % strips * m.strip;
      const int64_t n1 = n0 + m.images_at_once < m.images ? n0 + m.images_at_once : m.images;
      const int64_t rows = m.rows - y0 < m.strip ? m.rows - y0 : m.strip, length = rows * m.dy.row_pitch;
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < 2 * m.images_at_once; q++) {
        const int64_t n = n0 + q / 2, shift = q / 2;  // images that are not there, in the last panel, are zeros
        Packing part = q & 1 ? m.x : m.dy;
        const int64_t high = q & 1 ? rows + m.reach : rows;
        float *out = (q & 1 ? x : dy) + shift * part.image_pitch;
        if (n >= n1) part.height = 0;
        pack_images(part, n < n1 ? n : 0, n < n1 ? n + 1 : 1, y0, high, out);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t q = 0; q < pieces; q++) {
        const int64_t r0 = rows_of_dy * q / pieces, r1 = rows_of_dy * (q + 1) / pieces;
        int64_t t = 0;
        for (; t + T <= length; t += T) add_lanes<LANES_HELD>(m, x + t, dy + t, r0, r1, T, number);
        for (; t < length; t += VL) add_lanes<1>(m, x + t, dy + t, r0, r1, length - t < VL ? length - t : VL, number);
      }
    }
#pragma omp for schedule(static)
    for (int64_t e = 0; e < used; e++) m.out[m.order.slot[e]] = number[e];
#pragma omp for schedule(static)
    for (int64_t e = used; e < m.order.slots; e++) m.out[m.order.slot[e]] = 0.f;
  }
}

}  // namespace
