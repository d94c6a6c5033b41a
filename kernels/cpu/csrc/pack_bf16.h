// Activations and blocks in bfloat16, packed as the processor's bf16 instructions read them: 32 bits are two neighbouring
// factors of a sum. These instructions take subnormal numbers for zero, and so does x86's rounding.
#pragma once
#include "vector.h"

namespace {

typedef uint16_t Half;
typedef float Pairs __attribute__((vector_size(VL * 4), aligned(2), may_alias));

// VL numbers, of values in either dtype.
INLINE Halves halves(const void *p, int64_t i, int dtype) {
  if (dtype == BFLOAT16) return *(const Halves *)((const Half *)p + i);
#if VL == 16
  return (Halves)_mm512_cvtneps_pbh((__m512)load((const float *)p + i));
#else
  return (Halves)vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)load((const float *)p + i)));
#endif
}

// Lane l is the pair low[l], high[l].
INLINE Vector pairs(Halves low, Halves high) {
  return (Vector)(__builtin_convertvector(low, Bits) | (__builtin_convertvector(high, Bits) << 16));
}
INLINE void store_pairs(Half *to, Vector v) { *(Pairs *)to = v; }
INLINE Vector load_pairs(const Half *from) { return *(const Pairs *)from; }

// VL neighbouring pairs of values.
INLINE Vector line(const void *p, int64_t i, int dtype) {
  if (dtype == BFLOAT16) return load_pairs((const Half *)p + i);
  const float *from = (const float *)p + i;
#if VL == 16
  return (Vector)_mm512_cvtne2ps_pbh((__m512)load(from + 16), (__m512)load(from));
#else
  return (Vector)vreinterpretq_f32_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)load(from)), (float32x4_t)load(from + 4)));
#endif
}

// Copy a slice, 16 or 32 numbers.
INLINE void copy_slice(Half *to, const Half *from, int64_t slice) {
  if (slice == 32) UNROLL for (int c = 0; c < 32; c += 2 * VL) store_pairs(to + c, load_pairs(from + c));
  else UNROLL for (int c = 0; c < 16; c += VL) *(Halves *)(to + c) = *(const Halves *)(from + c);
}

// Round float32 numbers.
INLINE void write_halves(Half *to, const float *from, int64_t count) {
  if (count == 32) UNROLL for (int c = 0; c < 32; c += 2 * VL) store_pairs(to + c, line(from, c, FLOAT32));
  else if (count == 16) UNROLL for (int c = 0; c < 16; c += VL) *(Halves *)(to + c) = halves(from, c, FLOAT32);
  else write_row(to, 0, BFLOAT16, from, count);
}

// Transpose 16 rows of COLUMNS pairs; read(row, column) returns VL pairs of a row. Row c of the result is at to + c * 32.
template <int COLUMNS, class Read> INLINE void turn(Half *to, const Read &read) {
  constexpr int STORED = COLUMNS < VL ? COLUMNS : VL;
  UNROLL for (int r = 0; r < 16; r += VL) {
    UNROLL for (int c = 0; c < COLUMNS; c += VL) {
      Vector a[VL];
      UNROLL for (int l = 0; l < VL; l++) a[l] = read(r + l, c);
      transpose(a);
      UNROLL for (int l = 0; l < STORED; l++) store_pairs(to + (c + l) * 32 + r * 2, a[l]);
    }
  }
}

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
        copy_slice(out + (p * count + t) * slice, from, slice);
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
        UNROLL for (int c = 0; c < 16; c += VL)
          store_pairs(out + (p * count + t) * 16 + c * 2, pairs(*(const Halves *)(even + c), *(const Halves *)(odd + c)));
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
      for (int64_t i = 0; i < side; i += 16)
        turn<16>(to + i * 32, [&](int l, int c) {
          return pairs(*(const Halves *)(rows[2 * l] + i + c), *(const Halves *)(rows[2 * l + 1] + i + c));
        });
    }
  }
}

// A block (out, in) -> (out / 16, in / 2, 16, 2).
INLINE void pack_block_turned(const void *values, int64_t at, int dtype, int64_t out, int64_t in, Half *to) {
  for (int64_t o = 0; o < out; o += 16) {
    const int64_t from = at + o * in;
    Half *rows = to + o * in;
    if (in == 16)
      turn<8>(rows, [&](int l, int c) {
#if VL == 16
        return (Vector)_mm512_zextsi256_si512((__m256i)halves(values, from + l * 16, dtype));  // the row ends here
#else
        return line(values, from + l * 16 + c * 2, dtype);
#endif
      });
    for (int64_t i = 0; i + 32 <= in; i += 32)
      turn<16>(rows + i * 16, [&](int l, int c) { return line(values, from + l * in + i + c * 2, dtype); });
  }
}

// A block (in, out) -> (out / 16, in / 2, 16, 2).
INLINE void pack_block(const void *values, int64_t at, int dtype, int64_t in, int64_t out, Half *to) {
  for (int64_t i = 0; i < in; i += 2)
    for (int64_t o = 0; o < out; o += 16)
      UNROLL for (int c = 0; c < 16; c += VL)
        store_pairs(to + o * in + i * 16 + c * 2,
                    pairs(halves(values, at + i * out + o + c, dtype), halves(values, at + (i + 1) * out + o + c, dtype)));
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
