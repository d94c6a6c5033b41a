// 128-bit vectors, which every 64-bit x86 and ARM processor has.
#define NAME generic
#define VL 4
#define ACCUMULATORS 12
#define OUTER_ROWS 4
#include "kernels.inc"
