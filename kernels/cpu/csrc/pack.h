// Activations into panels of float32, blocks of the weight into the order in which they are read.
#pragma once
#include "vector.h"

namespace {

// x[first .. first + count) -> out[block][token][side]: the blocks that are wanted, the last one filled up with zeros.
// Some tokens at a time: rows of x are read side by side, and what is written for a block is longer than a line or two.
INLINE void pack_panel(const Matrix &x, int64_t first, int64_t count, int64_t side, const uint8_t *wanted, float *out) {
  constexpr int64_t AT_ONCE = 8;
  const int64_t blocks = blocks_of(x.cols, side), whole = x.col_stride == 1 ? x.cols / side : 0;
  for (int64_t t0 = 0; t0 < count; t0 += AT_ONCE) {
    const int64_t t1 = t0 + AT_ONCE < count ? t0 + AT_ONCE : count;
    for (int64_t b = 0; b < whole; b++) {
      if (!wanted[b]) continue;
      for (int64_t t = t0; t < t1; t++) {
        float *to = out + (b * count + t) * side;
        const int64_t from = (first + t) * x.row_stride + b * side;
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

// Some columns of a matrix.
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

}  // namespace
