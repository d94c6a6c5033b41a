// What the tiles of the bf16 kernels are given; the layouts are those of pack_bf16.h.
#pragma once
#include "pack_bf16.h"

namespace {

struct HalfRow {            // the entries of one block row
  const Half *x;            // [in / 32][token][32] (in = 16: [token][16]) at the tile's first token; block b at b * x_block
  int64_t x_block;
  int64_t x_piece;          // from 32 numbers of a block to the next 32
  const Half *w;            // [out / 16][in / 2][16][2] at the tile's first output, in the order of the entries
  const int32_t *other;
  int64_t count, size;      // entries; numbers of a block
  int64_t in, out;
};

struct HalfGroup {          // the entries that are left of one block row
  const Half *dy;           // [token / 32][bo][32], of this block row
  const Half *x;            // [bi / 16][token / 2][16][2]; block b at x + b * x_block
  int64_t x_block;
  int64_t x_piece;          // from 16 numbers of a block to the next 16
  const int32_t *other, *slot;
  float *out;
  int64_t count, tokens, bo, bi;
  bool add;                 // to what an earlier panel left
};

}  // namespace
