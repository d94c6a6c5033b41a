// Activations and images (see conv.h) into panels of float32, blocks of the weight into the order in which they are read.
#pragma once
#include "conv.h"
#include "vector.h"

namespace {

// x[first .. first + count) -> out[block][token][side]: the blocks that are wanted, the last one filled up with zeros. Some
// tokens at a time, so that rows of x are read side by side and several lines of a block are written at once.
INLINE void pack_panel(const Matrix &x, int64_t first, int64_t count, int64_t side, const uint8_t *wanted, float *out) {
  constexpr int64_t AT_ONCE = 8, READ_AHEAD = 2 * AT_ONCE;
  const int64_t blocks = blocks_of(x.cols, side), whole = x.col_stride == 1 ? x.cols / side : 0, bytes = x.dtype == FLOAT32 ? 4 : 2;
  for (int64_t t0 = 0; t0 < count; t0 += AT_ONCE) {
    const int64_t t1 = t0 + AT_ONCE < count ? t0 + AT_ONCE : count;
    const int64_t ahead = first + t1 + READ_AHEAD <= x.rows ? READ_AHEAD * x.row_stride : 0;  // else what is read anyway
    for (int64_t b = 0; b < whole; b++) {
      if (!wanted[b]) continue;
      for (int64_t t = t0; t < t1; t++) {
        float *to = out + (b * count + t) * side;
        const int64_t from = (first + t) * x.row_stride + b * side;
        for (int64_t c = 0; c < side; c += LINE) __builtin_prefetch((const char *)x.data + (from + ahead + c) * bytes, 0, 2);
        for (int64_t c = 0; c < side; c += VL) store(to + c, read_vector(x.data, from + c, x.dtype));
      }
    }
    for (int64_t b = whole; b < blocks; b++) {
      if (!wanted[b]) continue;
      for (int64_t t = t0; t < t1; t++) {
        float *to = out + (b * count + t) * side;
        for (int64_t c = 0; c < side; c++) {
          const int64_t col = b * side + c;
          to[c] = col < x.cols ? read(x.data, (first + t) * x.row_stride + col * x.col_stride, x.dtype) : 0.f;
        }
      }
    }
  }
}

// Columns of a matrix from `first` on, at most this many.
INLINE Matrix columns(Matrix x, int64_t first, int64_t most) {
  x.data = (char *)x.data + first * x.col_stride * (x.dtype == FLOAT32 ? 4 : 2);
  x.cols = x.cols - first < most ? x.cols - first : most;
  return x;
}

// x[first .. first + count) -> out[feature][T]: tokens become lanes; missing ones are zero.
template <int64_t T> INLINE void pack_lanes(const Matrix &x, int64_t first, int64_t count, float *out) {
  for (int64_t t0 = 0; t0 < T; t0 += VL) {
    int64_t f = 0;
    if (t0 + VL <= count && x.col_stride == 1) {
      for (; f + VL <= x.cols; f += VL) {
        Vector a[VL];
        UNROLL for (int l = 0; l < VL; l++) a[l] = read_vector(x.data, (first + t0 + l) * x.row_stride + f, x.dtype);
        transpose(a);
        UNROLL for (int l = 0; l < VL; l++) store(out + (f + l) * T + t0, a[l]);
      }
    }
    for (; f < x.cols; f++) {
      for (int l = 0; l < VL; l++) {
        int64_t t = t0 + l;
        out[f * T + t] =
            t < count ? read(x.data, (first + t) * x.row_stride + f * x.col_stride, x.dtype) : 0.f;
      }
    }
  }
}

// A block (out, in) -> (in, out).
INLINE void transpose_block(const float *from, int64_t out, int64_t in, float *to) {
  for (int64_t o = 0; o < out; o += VL) {
    for (int64_t i = 0; i < in; i += VL) {
      Vector a[VL];
      UNROLL for (int l = 0; l < VL; l++) a[l] = load(from + (o + l) * in + i);
      transpose(a);
      UNROLL for (int l = 0; l < VL; l++) store(to + (i + l) * out + o, a[l]);
    }
  }
}

// The packed columns of a view that lie inside the tensor; the view begins at column `base` of it.
struct Columns {
  int64_t first, last;
};

INLINE Columns columns_of(const Packing &p, bool inside, int64_t base) {
  if (!inside) return {0, 0};
  int64_t first = base < 0 ? (-base + p.col_step - 1) / p.col_step : 0;
  int64_t last = p.width > base ? (p.width - base + p.col_step - 1) / p.col_step : 0;
  if (first > p.cols) first = p.cols;
  return {first, last < first ? first : last > p.cols ? p.cols : last};
}

// 1x1: one packed row of all channels, in one view. Pixels become lanes.
INLINE void pack_lane_row(const Packing &p, int64_t pixel, Columns has, int64_t base, const uint8_t *wanted, float *out) {
  for (int64_t c0 = 0; c0 < p.channels; c0 += VL) {
    const int64_t channels = p.channels - c0 < VL ? p.channels - c0 : VL;
    if (!std::memchr(wanted + c0, 1, channels)) continue;
    for (int64_t c = 0; c < channels; c++) {
      float *to = out + (c0 + c) * p.plane;
      for (int64_t m = 0; m < has.first; m++) to[m] = 0.f;
      for (int64_t m = has.last; m < p.cols; m++) to[m] = 0.f;
    }
    int64_t m = has.first;
    for (; channels == VL && m + VL <= has.last; m += VL) {
      Vector a[VL];
      UNROLL for (int l = 0; l < VL; l++) a[l] = read_vector(p.data, (pixel + base + (m + l) * p.col_step) * p.channels + c0, p.dtype);
      transpose(a);
      UNROLL for (int l = 0; l < VL; l++) store(out + (c0 + l) * p.plane + m, a[l]);
    }
    for (; m < has.last; m++)
      for (int64_t c = 0; c < channels; c++)
        out[(c0 + c) * p.plane + m] = read(p.data, (pixel + base + m * p.col_step) * p.channels + c0 + c, p.dtype);
  }
}

// One packed row of all blocks, in one view: columns col_step * m + base of a row of the tensor, zeros outside it. Some pixels
// at a time with all their blocks, so that the tensor is read in its own order. What comes next is prefetched here: the
// hardware stops at the end of each page of memory.
INLINE void pack_row(const Packing &p, int64_t pixel, Columns has, int64_t base, const uint8_t *wanted, float *out) {
  constexpr int64_t AT_ONCE = 8, READ_AHEAD = 4096;
  const int64_t group_channels = p.channels / p.groups, side = p.side, step = p.col_step * p.channels;
  const int64_t from = (pixel + base) * p.channels, blocks = conv_blocks(p), bytes = p.dtype == FLOAT32 ? 4 : 2;
  for (int64_t b = 0; b < blocks; b++) {
    if (!wanted[b]) continue;
    std::memset(out + b * p.plane * side, 0, has.first * side * 4);
    std::memset(out + (b * p.plane + has.last) * side, 0, (p.cols - has.last) * side * 4);
  }
  for (int64_t m0 = has.first; m0 < has.last; m0 += AT_ONCE) {
    const int64_t m1 = m0 + AT_ONCE < has.last ? m0 + AT_ONCE : has.last;
    const char *next = (const char *)p.data + (from + m0 * step) * bytes + READ_AHEAD;
    for (int64_t i = 0; i < (m1 - m0) * step * bytes; i += 4 * LINE) __builtin_prefetch(next + i, 0, 2);
    int64_t b = 0;
    for (int64_t g = 0; g < p.groups; g++) {
      for (int64_t c = 0; c < group_channels; c += side, b++) {
        if (!wanted[b]) continue;
        const int64_t width = group_channels - c < side ? group_channels - c : side;
        float *to = out + (b * p.plane + m0) * side;
        for (int64_t m = m0; m < m1; m++, to += side) {
          const int64_t at = from + m * step + g * group_channels + c;
          if (width == side) {
            for (int64_t i = 0; i < side; i += VL) store(to + i, read_vector(p.data, at + i, p.dtype));
          } else {
            for (int64_t i = 0; i < side; i++) to[i] = i < width ? read(p.data, at + i, p.dtype) : 0.f;
          }
        }
      }
    }
  }
}

// Pack `rows` rows of every view from row_step * m0 + row_base on, of images [first, last), each by pack(pixel, columns inside,
// base, wanted, the pixel of the panel at which the row begins).
template <class Pack>
INLINE void pack_images_by(const Packing &p, int64_t first, int64_t last, int64_t m0, int64_t rows, const Pack &pack) {
  for (int64_t n = first; n < last; n++) {
    for (int64_t v = 0; v < p.row_views; v++) {
      for (int64_t r = 0; r < rows; r++) {
        const int64_t row = (m0 + r) * p.row_step + p.row_base[v];
        for (int64_t u = 0; u < p.col_views; u++) {
          const int64_t at = (v * p.col_views + u) * p.view_pitch + (n - first) * p.image_pitch + r * p.row_pitch;
          const int64_t pixel = (n * p.height + row) * p.width, base = p.col_base[u];
          const uint8_t *wanted = p.wanted + (v * p.col_views + u) * conv_blocks(p);
          pack(pixel, columns_of(p, row >= 0 && row < p.height, base), base, wanted, at);
        }
      }
    }
  }
}

INLINE void pack_images(const Packing &p, int64_t first, int64_t last, int64_t m0, int64_t rows, float *out) {
  pack_images_by(p, first, last, m0, rows, [&](int64_t pixel, Columns has, int64_t base, const uint8_t *wanted, int64_t at) {
    if (p.side == 1) pack_lane_row(p, pixel, has, base, wanted, out + at);
    else pack_row(p, pixel, has, base, wanted, out + at * p.side);
  });
}

// Prefetches the memory that is packed next, some lines at a time, while the last panel is multiplied.
struct Ahead {
  const char *at = nullptr;
  int64_t lines = 0;
  const char *then = nullptr;  // a second tensor's
  int64_t then_lines = 0;

  inline __attribute__((always_inline)) void fetch(int64_t count) {
    if (lines == 0) at = then, lines = then_lines, then_lines = 0;
    if (count > lines) count = lines;
    lines -= count;
    for (; count > 0; count--, at += 4 * LINE) __builtin_prefetch(at, 0, 2);
  }
};

// The memory that pack_images will read: from the first row of the first image to the last row of the last image.
INLINE Ahead ahead_of(const Packing &p, int64_t first, int64_t last, int64_t m0, int64_t rows) {
  if (last <= first) return {};
  int64_t low = p.height, high = 0;
  for (int64_t v = 0; v < p.row_views; v++) {
    const int64_t from = m0 * p.row_step + p.row_base[v], to = from + (rows - 1) * p.row_step + 1;
    if (from < low) low = from;
    if (to > high) high = to;
  }
  if (low < 0) low = 0;
  if (high > p.height) high = p.height;
  const int64_t row = p.width * p.channels * (p.dtype == FLOAT32 ? 4 : 2);
  const int64_t bytes = ((last - 1 - first) * p.height + high - low) * row;
  Ahead a;
  a.at = (const char *)p.data + (first * p.height + low) * row, a.lines = bytes > 0 ? bytes / (4 * LINE) : 0;
  return a;
}

INLINE Ahead first_then(Ahead first, const Ahead &then) {
  first.then = then.at, first.then_lines = then.lines;
  return first;
}

}  // namespace
