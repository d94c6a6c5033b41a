// 256-bit vectors: 16 registers, 12 of them for a tile.
#include "api.h"
#if defined(WITH_AVX)
#define NAME avx2
#define VL 8
#define ACCUMULATORS 12
#define OUTER_ROWS 4
#include "kernels.inc"
#endif
