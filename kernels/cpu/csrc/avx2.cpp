// 256-bit vectors: 16 registers, 12 of them for a tile.
#if defined(__AVX2__)
#define NAME avx2
#define VL 8
#define ACCUMULATORS 12
#define OUTER_ROWS 4
#define HELD 8
#include "kernels.inc"
#endif
