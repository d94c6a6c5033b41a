// The tiles of ARM's bfmmla: one instruction multiplies 2 x 4 by 4 x 2 bfloat16 numbers and adds the products to 2 x 2 float32
// sums. Factors are packed as for AVX512_BF16: zips of two registers bring together four numbers of two rows, or of two columns.
#pragma once
#include "pack_bf16.h"

namespace {

class Unit {
 public:
  explicit Unit(int64_t) {}
};

struct Zipped {
  bfloat16x8_t low, high;
};

// From eight numbers of two rows: `low` has the first four of both, `high` the others.
INLINE Zipped two_rows(const Half *a, const Half *b) {
  const uint64x2_t x = vreinterpretq_u64_u16(vld1q_u16(a)), y = vreinterpretq_u64_u16(vld1q_u16(b));
  return {vreinterpretq_bf16_u64(vzip1q_u64(x, y)), vreinterpretq_bf16_u64(vzip2q_u64(x, y))};
}

// From two rows of pairs, four columns: `low` has the four numbers of the first column and of the second, `high` the others'.
INLINE Zipped four_columns(const Half *a, const Half *b) {
  const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16(a)), y = vreinterpretq_u32_u16(vld1q_u16(b));
  return {vreinterpretq_bf16_u32(vzip1q_u32(x, y)), vreinterpretq_bf16_u32(vzip2q_u32(x, y))};
}

// The sums of 2 R rows and 8 columns: those of rows 2 r, 2 r + 1 and columns 2 c, 2 c + 1 are acc[r][c].
template <int R> struct Sums {
  float32x4_t acc[R][4];

  // Rows are `step` numbers apart.
  INLINE Sums from(const float *p, int64_t step) {
    Sums s;
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int c = 0; c < 4; c++)
        s.acc[r][c] = vcombine_f32(vld1_f32(p + 2 * r * step + 2 * c), vld1_f32(p + (2 * r + 1) * step + 2 * c));
    return s;
  }
  __attribute__((always_inline)) void write(float *p, int64_t step) const {
    UNROLL for (int r = 0; r < R; r++) {
      UNROLL for (int c = 0; c < 4; c++) {
        vst1_f32(p + 2 * r * step + 2 * c, vget_low_f32(acc[r][c]));
        vst1_f32(p + (2 * r + 1) * step + 2 * c, vget_high_f32(acc[r][c]));
      }
    }
  }
  // Add eight products to each: of rows of `left`, `step` numbers apart, and of `right`, four rows of 16 pairs.
  __attribute__((always_inline)) void add(const Half *left, int64_t step, const Half *right) {
    Zipped rows[R];
    UNROLL for (int r = 0; r < R; r++) rows[r] = two_rows(left + 2 * r * step, left + (2 * r + 1) * step);
    UNROLL for (int h = 0; h < 2; h++, right += 64) {
      const Zipped a = four_columns(right, right + 32), b = four_columns(right + 8, right + 40);
      UNROLL for (int r = 0; r < R; r++) {
        const bfloat16x8_t x = h ? rows[r].high : rows[r].low;
        acc[r][0] = vbfmmlaq_f32(acc[r][0], x, a.low), acc[r][1] = vbfmmlaq_f32(acc[r][1], x, a.high);
        acc[r][2] = vbfmmlaq_f32(acc[r][2], x, b.low), acc[r][3] = vbfmmlaq_f32(acc[r][3], x, b.high);
      }
    }
  }
};

// 2 R tokens and 8 outputs over a block row, from `token` and output `n` on.
template <int R> void mmla_product(const HalfRow &row, int64_t token, int64_t n, int64_t width, const float *bias, float *aside) {
  static const float zeros[8] = {};
  const int64_t depth = row.in < 32 ? row.in : 32;
  Sums<R> sums = Sums<R>::from(bias ? bias + n : zeros, 0);
  for (int64_t e = 0; e < row.count; e++) {
    const Half *x = row.x + row.other[e] * row.x_block + token * depth, *w = row.w + e * row.size + n / 16 * 16 * row.in + n % 16 * 2;
    for (int64_t k0 = 0; k0 < row.in; k0 += depth, x += row.x_slice)
      for (int64_t k = 0; k < depth; k += 8, w += 128) sums.add(x + k, depth, w);
  }
  sums.write(aside + token * width + n, width);
}

// An odd token is computed with the one behind it, whose sums are not read.
inline void product_tile(const HalfRow &row, int64_t tokens, const float *bias, float *aside) {
  const int64_t width = row.out == 16 ? 16 : 32;
  for (int64_t n = 0; n < width; n += 8) {
    int64_t t = 0;
    for (; t + 6 < tokens; t += 8) mmla_product<4>(row, t, n, width, bias, aside);
    for (; t < tokens; t += 2) mmla_product<1>(row, t, n, width, bias, aside);
  }
}

inline int64_t outer_group(const HalfGroup &group) {
  const int64_t bo = group.bo, bi = group.bi;
  static const float zeros[8] = {};
  for (int64_t o = 0; o < bo; o += 8) {
    for (int64_t i = 0; i < bi; i += 8) {
      float *out = group.out + group.slot[0] * bo * bi + o * bi + i;
      const Half *dy = group.dy + o * 32, *x = group.x + group.other[0] * group.x_block + i / 16 * group.x_slice + i % 16 * 2;
      Sums<4> sums = group.add ? Sums<4>::from(out, bi) : Sums<4>::from(zeros, 0);
      for (int64_t t = 0; t < group.tokens; t += 32, dy += 32 * bo)
        for (int64_t l = 0; l < 32; l += 8, x += 128) sums.add(dy + l, 32, x);
      sums.write(out, bi);
    }
  }
  return 1;
}

}  // namespace
