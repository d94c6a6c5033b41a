// 128-bit vectors, which every 64-bit x86 and ARM processor has: 16 registers on the one, 32 on the other.
#define NAME generic
#define VL 4
#if defined(__aarch64__)
#define ACCUMULATORS 16
#define OUTER_ROWS 8
#else
#define ACCUMULATORS 12
#define OUTER_ROWS 4
#endif
#include "kernels.inc"
