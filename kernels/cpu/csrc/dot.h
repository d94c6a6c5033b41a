// The tiles of AVX512_BF16: one instruction adds two products of bfloat16 numbers to each of 16 float32 sums. Pairs of one
// factor are broadcast, those of the other are a vector, as in product.h and outer.h.
#pragma once
#include "pack_bf16.h"

namespace {

class Unit {
 public:
  explicit Unit(int64_t) {}
};

INLINE __m512 dot(__m512 sums, __m512i left, __m512i right) { return _mm512_dpbf16_ps(sums, (__m512bh)left, (__m512bh)right); }
INLINE __m512i vector_at(const Half *p) { return _mm512_loadu_si512(p); }
INLINE __m512i pair_at(const Half *p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return _mm512_set1_epi32(pair);
}

// R tokens and C vectors of outputs over a block row.
template <int C, int R> void dot_product(const HalfRow &row, int64_t token, const float *bias, float *aside) {
  const int64_t depth = row.in < 32 ? row.in : 32;
  __m512 acc[R][C];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) acc[r][c] = bias ? _mm512_loadu_ps(bias + c * 16) : _mm512_setzero_ps();
  for (int64_t e = 0; e < row.count; e++) {
    const Half *x = row.x + row.other[e] * row.x_block + token * depth, *w = row.w + e * row.size;
    for (int64_t k0 = 0; k0 < row.in; k0 += depth, x += row.x_slice) {
      for (int64_t k = 0; k < depth; k += 2, w += 32) {
        __m512i wk[C];
        UNROLL for (int c = 0; c < C; c++) wk[c] = vector_at(w + c * 16 * row.in);
        UNROLL for (int r = 0; r < R; r++) {
          const __m512i xk = pair_at(x + r * depth + k);
          UNROLL for (int c = 0; c < C; c++) acc[r][c] = dot(acc[r][c], xk, wk[c]);
        }
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) _mm512_storeu_ps(aside + ((token + r) * C + c) * 16, acc[r][c]);
}

template <int C, int R> INLINE void dot_tiles(const HalfRow &row, int64_t tokens, const float *bias, float *aside) {
  int64_t t = 0;
  for (; t + R <= tokens; t += R) dot_product<C, R>(row, t, bias, aside);
  for (; t + 4 <= tokens; t += 4) dot_product<C, 4>(row, t, bias, aside);
  for (; t < tokens; t++) dot_product<C, 1>(row, t, bias, aside);
}

inline void product_tile(const HalfRow &row, int64_t tokens, const float *bias, float *aside) {
  if (row.out == 16) dot_tiles<1, 16>(row, tokens, bias, aside);
  else if (tokens % 12 > 8 || tokens < 16) dot_tiles<2, 12>(row, tokens, bias, aside);
  else dot_tiles<2, 8>(row, tokens, bias, aside);
}

// R rows and C vectors of one block over a panel.
template <int C, int R>
INLINE void dot_outer(const Half *dy, const Half *x, int64_t x_slice, int64_t tokens, int64_t bo, int64_t bi, float *out,
                      bool add) {
  __m512 acc[R][C];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) acc[r][c] = add ? _mm512_loadu_ps(out + r * bi + c * 16) : _mm512_setzero_ps();
  for (int64_t t = 0; t < tokens; t += 32, dy += 32 * bo) {
    for (int64_t l = 0; l < 32; l += 2, x += 32) {
      __m512i xt[C];
      UNROLL for (int c = 0; c < C; c++) xt[c] = vector_at(x + c * x_slice);
      UNROLL for (int r = 0; r < R; r++) {
        const __m512i d = pair_at(dy + r * 32 + l);
        UNROLL for (int c = 0; c < C; c++) acc[r][c] = dot(acc[r][c], d, xt[c]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) _mm512_storeu_ps(out + r * bi + c * 16, acc[r][c]);
}

inline int64_t outer_group(const HalfGroup &group) {
  const int64_t bo = group.bo, bi = group.bi;
  const Half *x = group.x + group.other[0] * group.x_block;
  float *out = group.out + group.slot[0] * bo * bi;
  if (bi == 16) {
    for (int64_t o = 0; o < bo; o += 16)
      dot_outer<1, 16>(group.dy + o * 32, x, group.x_slice, group.tokens, bo, bi, out + o * bi, group.add);
    return 1;
  }
  for (int64_t o = 0; o < bo; o += 8)
    for (int64_t i = 0; i < bi; i += 32)
      dot_outer<2, 8>(group.dy + o * 32, x + i / 16 * group.x_slice, group.x_slice, group.tokens, bo, bi, out + o * bi + i,
                      group.add);
  return 1;
}

}  // namespace
