// Activations and blocks in bfloat16, packed as the processor's bf16 instructions read them: 32 bits are two neighbouring
// factors of a sum. These instructions take subnormal numbers for zero, and so does the rounding here.
#pragma once
#include "vector.h"

namespace {

typedef uint16_t Half;
typedef float Pairs __attribute__((vector_size(64), aligned(2), may_alias));

// 16 numbers, of values in either dtype.
INLINE Halves halves(const void *p, int64_t i, int dtype) {
  if (dtype == BFLOAT16) return *(const Halves *)((const Half *)p + i);
  return (Halves)_mm512_cvtneps_pbh((__m512)load((const float *)p + i));
}

// Lane l is the pair low[l], high[l].
INLINE Vector pairs(Halves low, Halves high) {
  return (Vector)(__builtin_convertvector(low, Bits) | (__builtin_convertvector(high, Bits) << 16));
}
INLINE void store_pairs(Half *to, Vector v) { *(Pairs *)to = v; }
INLINE Vector load_pairs(const Half *from) { return *(const Pairs *)from; }

// Prefetch a block: the hardware does not, for blocks lie anywhere.
INLINE void prefetch_block(const void *p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)p + i, 0, 2);
}

// Features b * side and on of token t: in place if all are inside, else a copy filled up with zeros.
INLINE const Half *slice_of(const Matrix &x, int64_t t, int64_t b, int64_t side, Half *copy) {
  const Half *from = (const Half *)x.data + t * x.row_stride;
  if (x.col_stride == 1 && t < x.rows && (b + 1) * side <= x.cols) return from + b * side;
  for (int64_t c = 0; c < side; c++) {
    int64_t col = b * side + c;
    copy[c] = t < x.rows && col < x.cols ? from[col * x.col_stride] : Half(0);
  }
  return copy;
}

// x[first .. first + count) -> out[block][token][side]: the blocks that are wanted. A side of more than 32 is cut into slices of 32, each a block here.
INLINE void pack_rows(const Matrix &x, int64_t first, int64_t count, int64_t side, const uint8_t *wanted, Half *out) {
  const int64_t slice = side < 32 ? side : 32, slices = side / slice, blocks = blocks_of(x.cols, side);
  Half copy[32];
  for (int64_t t = 0; t < count; t++) {
    for (int64_t b = 0; b < blocks; b++) {
      if (!wanted[b]) continue;
      for (int64_t p = b * slices; p < (b + 1) * slices; p++) {
        const Half *from = slice_of(x, first + t, p, slice, copy);
        Half *to = out + (p * count + t) * slice;
        if (slice == 32) store_pairs(to, load_pairs(from));
        else *(Halves *)to = *(const Halves *)from;
      }
    }
  }
}

// x[first .. first + count) -> out[feature / 16][token / 2][16][2].
INLINE void pack_pairs(const Matrix &x, int64_t first, int64_t count, int64_t side, const uint8_t *wanted, Half *out) {
  const int64_t slices = side / 16, blocks = blocks_of(x.cols, side);
  Half low[16], high[16];
  for (int64_t t = 0; t < count; t += 2) {
    for (int64_t b = 0; b < blocks; b++) {
      if (!wanted[b]) continue;
      for (int64_t p = b * slices; p < (b + 1) * slices; p++) {
        const Half *even = slice_of(x, first + t, p, 16, low), *odd = slice_of(x, first + t + 1, p, 16, high);
        store_pairs(out + (p * count + t) * 16, pairs(*(const Halves *)even, *(const Halves *)odd));
      }
    }
  }
}

// x[first .. first + count) -> out[block][token / 32][side][32].
INLINE void pack_turned(const Matrix &x, int64_t first, int64_t count, int64_t side, const uint8_t *wanted, Half *out) {
  const int64_t blocks = blocks_of(x.cols, side);
  Half copies[32][MOST_SIDE];
  for (int64_t t = 0; t < count; t += 32) {
    for (int64_t b = 0; b < blocks; b++) {
      if (!wanted[b]) continue;
      const Half *rows[32];
      for (int64_t l = 0; l < 32; l++) rows[l] = slice_of(x, first + t + l, b, side, copies[l]);
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

// 16 neighbouring pairs of values.
INLINE Vector line(const void *p, int64_t i, int dtype) {
  if (dtype == BFLOAT16) return load_pairs((const Half *)p + i);
  const float *from = (const float *)p + i;
  return (Vector)_mm512_cvtne2ps_pbh((__m512)load(from + 16), (__m512)load(from));
}

// A block (out, in) -> (out / 16, in / 2, 16, 2).
INLINE void pack_block_turned(const void *values, int64_t at, int dtype, int64_t out, int64_t in, Half *to) {
  Vector a[16];
  for (int64_t o = 0; o < out; o += 16) {
    if (in == 16) {
      UNROLL for (int l = 0; l < 16; l++)
        a[l] = (Vector)_mm512_zextsi256_si512((__m256i)halves(values, at + (o + l) * 16, dtype));
      transpose(a);
      UNROLL for (int l = 0; l < 8; l++) store_pairs(to + o * 16 + l * 32, a[l]);
    }
    for (int64_t i = 0; i + 32 <= in; i += 32) {
      UNROLL for (int l = 0; l < 16; l++) a[l] = line(values, at + (o + l) * in + i, dtype);
      transpose(a);
      UNROLL for (int l = 0; l < 16; l++) store_pairs(to + o * in + (i / 2 + l) * 32, a[l]);
    }
  }
}

// A block (in, out) -> (out / 16, in / 2, 16, 2).
INLINE void pack_block(const void *values, int64_t at, int dtype, int64_t in, int64_t out, Half *to) {
  for (int64_t i = 0; i < in; i += 2)
    for (int64_t o = 0; o < out; o += 16)
      store_pairs(to + o * in + i * 16,
                  pairs(halves(values, at + i * out + o, dtype), halves(values, at + (i + 1) * out + o, dtype)));
}

// The arguments of the tiles of HalfKernels.

struct HalfRow {            // the entries of one block row
  const Half *x;            // [in / 32][token][32] (in = 16: [token][16]) at the tile's first token; block b at b * x_block
  int64_t x_block;
  int64_t x_slice;          // from 32 numbers of a block to the next 32
  const Half *w;            // [out / 16][in / 2][16][2] at the tile's first output, in the order of the entries
  const int32_t *other;
  int64_t count, size;      // entries; numbers of a block
  int64_t in, out;
};

struct HalfGroup {          // the entries that are left of one block row
  const Half *dy;           // [token / 32][bo][32], of this block row
  const Half *x;            // [bi / 16][token / 2][16][2]; block b at x + b * x_block
  int64_t x_block;
  int64_t x_slice;          // from 16 numbers of a block to the next 16
  const int32_t *other, *slot;
  float *out;
  int64_t count, tokens, bo, bi;
  bool add;                 // to what an earlier panel left
};

}  // namespace
