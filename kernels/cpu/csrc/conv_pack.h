// Images into panels of float32: see conv.h.
#pragma once
#include "conv.h"
#include "vector.h"

namespace {

// One packed row of all blocks, in one view: columns col_step * m + base of a row of the tensor, zeros where there is none.
INLINE void pack_row(const Packing &p, int64_t pixel, bool inside, int64_t base, float *out) {
  int64_t first = 0, last = 0;  // the packed columns that the tensor has
  if (inside) {
    first = base < 0 ? (-base + p.col_step - 1) / p.col_step : 0;
    last = p.width > base ? (p.width - base + p.col_step - 1) / p.col_step : 0;
    if (first > p.cols) first = p.cols;
    last = last < first ? first : last > p.cols ? p.cols : last;
  }
  const int64_t group_channels = p.channels / p.groups, side = p.side;
  for (int64_t g = 0; g < p.groups; g++) {
    for (int64_t c = 0; c < group_channels; c += side, out += p.plane * side) {
      const int64_t width = group_channels - c < side ? group_channels - c : side;
      const int64_t from = (pixel + base + first * p.col_step) * p.channels + g * group_channels + c;
      std::memset(out, 0, first * side * 4);
      float *to = out + first * side;
      for (int64_t m = first; m < last; m++, to += side) {
        const int64_t at = from + (m - first) * p.col_step * p.channels;
        if (width == side) {
          for (int64_t i = 0; i < side; i += VL) store(to + i, read_vector(p.data, at + i, p.dtype));
        } else {
          for (int64_t i = 0; i < side; i++) to[i] = i < width ? read(p.data, at + i, p.dtype) : 0.f;
        }
      }
      std::memset(to, 0, (p.cols - last) * side * 4);
    }
  }
}

// Packs `rows` rows of every view from row_step * m0 + row_base on, of images [first, last).
INLINE void pack_images(const Packing &p, int64_t first, int64_t last, int64_t m0, int64_t rows, float *out) {
  for (int64_t n = first; n < last; n++) {
    for (int64_t v = 0; v < p.row_views; v++) {
      for (int64_t r = 0; r < rows; r++) {
        const int64_t row = (m0 + r) * p.row_step + p.row_base[v];
        for (int64_t u = 0; u < p.col_views; u++) {
          const int64_t at = (v * p.col_views + u) * p.view_pitch + (n - first) * p.image_pitch + r * p.row_pitch;
          pack_row(p, (n * p.height + row) * p.width, row >= 0 && row < p.height, p.col_base[u], out + at * p.side);
        }
      }
    }
  }
}

}  // namespace
