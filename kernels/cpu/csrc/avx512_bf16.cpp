// bfloat16 on 512-bit vectors; the rest is as in avx512.cpp. No kernels where the compiler does not know the instruction.
#include "api.h"
#if defined(WITH_AVX) && defined(__AVX512BF16__)
#define VL 16
#include "dot.h"
#include "outer_bf16.h"
#include "product_bf16.h"
const HalfKernels avx512_bf16_kernels = {"avx512_bf16", multiply_bf16, outer_bf16, convolve_bf16, conv_outer_bf16, 3};
#elif defined(WITH_AVX)
const HalfKernels avx512_bf16_kernels = {"avx512_bf16", nullptr, nullptr, nullptr, nullptr, 0};
#endif
