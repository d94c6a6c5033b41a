#include "api.h"
#if defined(WITH_AVX)
const HalfKernels avx512_bf16_kernels = {"avx512_bf16", nullptr, nullptr};
#endif
