// The tiles of AMX: 8 registers of 16 rows of 64 bytes. One instruction adds 32 products of bfloat16 numbers to each of 16 x 16
// float32 sums. It takes 16 cycles, and its sums are ready for the next one after about 50, so four tiles of sums are held.
// The _tile_* functions need literal register numbers.
#pragma once
#include "pack_bf16.h"

namespace {

// Compilers do not know what memory a tile instruction reads and writes.
INLINE void memory_is_written() { asm volatile("" ::: "memory"); }

// The shapes of the registers: sums and left factors have 16 rows, right factors one for each pair of the `depth` numbers.
class Unit {
 public:
  explicit Unit(int64_t depth) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = 16;
    shapes.bytes[4] = shapes.bytes[5] = uint16_t(2 * depth);
    shapes.rows[6] = shapes.rows[7] = uint8_t(depth / 2);
    asm volatile("" ::"r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
  }
  ~Unit() { _tile_release(); }
  Unit(const Unit &) = delete;
};

// M x N tiles of tokens and outputs over a block row. Registers: sums 0 to 3, x 4 and 5, w 6 and 7.
template <int M, int N> INLINE void amx_product(const HalfRow &row, const float *bias, float *aside) {
  static const float zeros[16] = {};  // static: a tile is not loaded from a line whose store still waits for those before it
  const int64_t depth = row.in < 32 ? row.in : 32, x_step = depth * 2;
  const float *start = bias ? bias : zeros;
  const int64_t second = bias && N == 2 ? 16 : 0;
  memory_is_written();
  _tile_loadd(0, start, 0);
  if constexpr (N == 2) _tile_loadd(1, start + second, 0);
  if constexpr (N == 2 && M == 2) _tile_loadd(2, start, 0);
  if constexpr (N == 2 && M == 2) _tile_loadd(3, start + second, 0);
  if constexpr (N == 1 && M > 1) _tile_loadd(1, start, 0);
  if constexpr (N == 1 && M > 2) _tile_loadd(2, start, 0);
  if constexpr (N == 1 && M > 3) _tile_loadd(3, start, 0);
  for (int64_t e = 0; e < row.count; e++) {
    const Half *x = row.x + row.other[e] * row.x_block, *w = row.w + e * row.size;
    for (int64_t k = 0; k < row.in; k += depth, x += row.x_slice, w += depth * 16) {
      _tile_loadd(6, w, 64);
      _tile_loadd(4, x, x_step);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N == 2) {
        _tile_loadd(7, w + 16 * row.in, 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (M == 2) {
          _tile_loadd(5, x + 16 * depth, x_step);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      } else {
        if constexpr (M > 1) {
          _tile_loadd(5, x + 16 * depth, x_step);
          _tile_dpbf16ps(1, 5, 6);
        }
        if constexpr (M > 2) {
          _tile_loadd(4, x + 32 * depth, x_step);
          _tile_dpbf16ps(2, 4, 6);
        }
        if constexpr (M > 3) {
          _tile_loadd(5, x + 48 * depth, x_step);
          _tile_dpbf16ps(3, 5, 6);
        }
      }
    }
  }
  constexpr int64_t line = N * 64;
  if constexpr (N == 2) {
    _tile_stored(0, aside, line);
    _tile_stored(1, aside + 16, line);
    if constexpr (M == 2) {
      _tile_stored(2, aside + 512, line);
      _tile_stored(3, aside + 528, line);
    }
  } else {
    _tile_stored(0, aside, line);
    if constexpr (M > 1) _tile_stored(1, aside + 256, line);
    if constexpr (M > 2) _tile_stored(2, aside + 512, line);
    if constexpr (M > 3) _tile_stored(3, aside + 768, line);
  }
  memory_is_written();
}

inline void product_tile(const HalfRow &row, int64_t tokens, const float *bias, float *aside) {
  if (row.out == 16) {
    if (tokens > 48) amx_product<4, 1>(row, bias, aside);
    else if (tokens > 32) amx_product<3, 1>(row, bias, aside);
    else if (tokens > 16) amx_product<2, 1>(row, bias, aside);
    else amx_product<1, 1>(row, bias, aside);
  } else if (tokens > 16) amx_product<2, 2>(row, bias, aside);
  else amx_product<1, 2>(row, bias, aside);
}

// M x N tiles of one block over a panel. Registers: sums 0 to 3, dy 4 and 5, x 6 and 7.
template <int M, int N>
INLINE void amx_outer(const Half *dy, const Half *x, int64_t x_slice, int64_t tokens, int64_t bo, int64_t bi, float *out,
                      bool add) {
  const int64_t step = bi * 4;
  memory_is_written();
  if (add) {
    _tile_loadd(0, out, step);
    if constexpr (N == 2) _tile_loadd(1, out + 16, step);
    if constexpr (M == 2) _tile_loadd(2, out + 16 * bi, step);
    if constexpr (M == 2 && N == 2) _tile_loadd(3, out + 16 * bi + 16, step);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t t = 0; t < tokens; t += 32, dy += 32 * bo, x += 512) {
    _tile_loadd(4, dy, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, x + x_slice, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M == 2) {
      _tile_loadd(5, dy + 512, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, step);
  if constexpr (N == 2) _tile_stored(1, out + 16, step);
  if constexpr (M == 2) _tile_stored(2, out + 16 * bi, step);
  if constexpr (M == 2 && N == 2) _tile_stored(3, out + 16 * bi + 16, step);
  memory_is_written();
}

// N blocks of 16 x 16 at once: one alone would wait for its sums.
template <int N> INLINE void amx_outer_16(const HalfGroup &group) {
  const Half *dy = group.dy, *x[N];
  float *out[N];
  UNROLL for (int i = 0; i < N; i++) x[i] = group.x + group.other[i] * group.x_block, out[i] = group.out + group.slot[i] * 256;
  memory_is_written();
  if (group.add) {
    _tile_loadd(0, out[0], 64);
    if constexpr (N > 1) _tile_loadd(1, out[1], 64);
    if constexpr (N > 2) _tile_loadd(2, out[2], 64);
    if constexpr (N > 3) _tile_loadd(3, out[3], 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t t = 0; t < group.tokens; t += 32, dy += 512) {
    _tile_loadd(4, dy, 64);
    _tile_loadd(6, x[0] + t * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, x[1] + t * 16, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (N > 2) {
      _tile_loadd(6, x[2] + t * 16, 64);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (N > 3) {
      _tile_loadd(7, x[3] + t * 16, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, out[0], 64);
  if constexpr (N > 1) _tile_stored(1, out[1], 64);
  if constexpr (N > 2) _tile_stored(2, out[2], 64);
  if constexpr (N > 3) _tile_stored(3, out[3], 64);
  memory_is_written();
}

inline int64_t outer_group(const HalfGroup &group) {
  const int64_t bo = group.bo, bi = group.bi;
  if (bo == 16 && bi == 16) {
    if (group.count > 3) return amx_outer_16<4>(group), 4;
    if (group.count > 2) return amx_outer_16<3>(group), 3;
    if (group.count > 1) return amx_outer_16<2>(group), 2;
    return amx_outer_16<1>(group), 1;
  }
  const Half *x = group.x + group.other[0] * group.x_block;
  float *out = group.out + group.slot[0] * bo * bi;
  for (int64_t o = 0; o < bo; o += 32) {
    for (int64_t i = 0; i < bi; i += 32) {
      const Half *left = group.dy + o * 32, *right = x + i / 16 * group.x_slice;
      float *to = out + o * bi + i;
      if (bo == 16) amx_outer<1, 2>(left, right, group.x_slice, group.tokens, bo, bi, to, group.add);
      else if (bi == 16) amx_outer<2, 1>(left, right, group.x_slice, group.tokens, bo, bi, to, group.add);
      else amx_outer<2, 2>(left, right, group.x_slice, group.tokens, bo, bi, to, group.add);
    }
  }
  return 1;
}

}  // namespace
