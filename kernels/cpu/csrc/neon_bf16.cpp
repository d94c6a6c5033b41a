// bfloat16 on ARM's 128-bit vectors; the rest is as in generic.cpp. No kernels where the compiler does not know the instruction.
#include "api.h"
#if defined(WITH_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define VL 4
#include "mmla.h"
#include "outer_bf16.h"
#include "product_bf16.h"
const HalfKernels neon_bf16_kernels = {"neon_bf16", multiply_bf16, outer_bf16, convolve_bf16, conv_outer_bf16, 3};
#elif defined(WITH_NEON)
const HalfKernels neon_bf16_kernels = {"neon_bf16", nullptr, nullptr, nullptr, nullptr, 0};
#endif
