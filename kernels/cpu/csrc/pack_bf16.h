// Activations and blocks in bfloat16 into the orders in which the processor's bf16 instructions read them: 32 bits are two
// neighbouring products of a sum. These instructions take subnormal numbers for zero, and so does the rounding here.
#pragma once
#include "vector.h"

namespace {

typedef uint16_t Half;

// 16 numbers, of values in either dtype.
INLINE Halves halves(const void *p, int64_t i, int dtype) {
  if (dtype == BFLOAT16) return *(const Halves *)((const Half *)p + i);
  return (Halves)_mm512_cvtneps_pbh((__m512)load((const float *)p + i));
}

// Lane l is the pair low[l], high[l].
INLINE Vector pairs(Halves low, Halves high) {
  return (Vector)(__builtin_convertvector(low, Bits) | (__builtin_convertvector(high, Bits) << 16));
}
INLINE void store_pairs(Half *to, Vector v) { store((float *)to, v); }

// Block b of token t: where it lies if it is whole there, else a copy filled up with zeros.
INLINE const Half *piece(const Matrix &x, int64_t t, int64_t b, int64_t side, Half *copy) {
  const Half *from = (const Half *)x.data + t * x.row_stride;
  if (x.col_stride == 1 && t < x.rows && (b + 1) * side <= x.cols) return from + b * side;
  for (int64_t c = 0; c < side; c++) {
    int64_t col = b * side + c;
    copy[c] = t < x.rows && col < x.cols ? from[col * x.col_stride] : Half(0);
  }
  return copy;
}

// x[first .. first + count) -> out[block][token][side].
INLINE void pack_rows(const Matrix &x, int64_t first, int64_t count, int64_t side, Half *out) {
  const int64_t blocks = blocks_of(x.cols, side);
  Half copy[MOST_SIDE];
  for (int64_t t = 0; t < count; t++) {
    for (int64_t b = 0; b < blocks; b++) {
      const Half *from = piece(x, first + t, b, side, copy);
      Half *to = out + (b * count + t) * side;
      for (int64_t c = 0; c < side; c += 16) *(Halves *)(to + c) = *(const Halves *)(from + c);
    }
  }
}

// x[first .. first + count) -> out[block][token / 2][side][2].
INLINE void pack_pairs(const Matrix &x, int64_t first, int64_t count, int64_t side, Half *out) {
  const int64_t blocks = blocks_of(x.cols, side);
  Half low[MOST_SIDE], high[MOST_SIDE];
  for (int64_t t = 0; t < count; t += 2) {
    for (int64_t b = 0; b < blocks; b++) {
      const Half *even = piece(x, first + t, b, side, low), *odd = piece(x, first + t + 1, b, side, high);
      Half *to = out + (b * count + t) * side;
      for (int64_t c = 0; c < side; c += 16) store_pairs(to + 2 * c, pairs(*(const Halves *)(even + c), *(const Halves *)(odd + c)));
    }
  }
}

// x[first .. first + count) -> out[block][token / 32][side][32].
INLINE void pack_turned(const Matrix &x, int64_t first, int64_t count, int64_t side, Half *out) {
  const int64_t blocks = blocks_of(x.cols, side);
  Half copies[32][MOST_SIDE];
  for (int64_t t = 0; t < count; t += 32) {
    for (int64_t b = 0; b < blocks; b++) {
      const Half *rows[32];
      for (int64_t l = 0; l < 32; l++) rows[l] = piece(x, first + t + l, b, side, copies[l]);
      Half *to = out + (b * count + t) * side;
      for (int64_t c = 0; c < side; c += 16) {
        Vector a[16];
        UNROLL for (int l = 0; l < 16; l++) a[l] = pairs(*(const Halves *)(rows[2 * l] + c), *(const Halves *)(rows[2 * l + 1] + c));
        transpose(a);
        UNROLL for (int l = 0; l < 16; l++) store_pairs(to + (c + l) * 32, a[l]);
      }
    }
  }
}

// A block (out, in) -> (in / 2, out, 2).
INLINE void pack_block_turned(const void *values, int64_t at, int dtype, int64_t out, int64_t in, Half *to) {
  for (int64_t o = 0; o < out; o += 16) {
    for (int64_t i = 0; i < in; i += 32) {
      Half line[32] = {};
      Vector a[16];
      UNROLL for (int l = 0; l < 16; l++) {
        *(Halves *)line = halves(values, at + (o + l) * in + i, dtype);
        if (in > 16) *(Halves *)(line + 16) = halves(values, at + (o + l) * in + i + 16, dtype);
        std::memcpy(&a[l], line, 64);
      }
      transpose(a);
      UNROLL for (int l = 0; l < 8; l++) store_pairs(to + ((i / 2 + l) * out + o) * 2, a[l]);
      if (in > 16) UNROLL for (int l = 8; l < 16; l++) store_pairs(to + ((i / 2 + l) * out + o) * 2, a[l]);
    }
  }
}

// A block (in, out) -> (in / 2, out, 2).
INLINE void pack_block(const void *values, int64_t at, int dtype, int64_t in, int64_t out, Half *to) {
  for (int64_t i = 0; i < in; i += 2)
    for (int64_t o = 0; o < out; o += 16)
      store_pairs(to + i * out + 2 * o,
                  pairs(halves(values, at + i * out + o, dtype), halves(values, at + (i + 1) * out + o, dtype)));
}

}  // namespace
