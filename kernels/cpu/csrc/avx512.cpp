// 512-bit vectors: 32 registers, 24 of them for a tile.
#include "api.h"
#if defined(WITH_AVX)
#define NAME avx512
#define VL 16
#define ACCUMULATORS 24
#define OUTER_ROWS 8
#include "kernels.inc"
#endif
