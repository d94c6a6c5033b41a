// bfloat16 on matrix registers; the rest is as in avx512.cpp. No kernels where the compiler does not know them.
#include "api.h"
#if defined(WITH_AVX) && (defined(__AMX_BF16__) || defined(__AMXBF16__)) // the latter by clang before 16
#define VL 16
#include "amx.h"
#include "outer_bf16.h"
#include "product_bf16.h"
const HalfKernels amx_kernels = {"amx", multiply_bf16, outer_bf16, convolve_bf16, conv_outer_bf16, 5};
#elif defined(WITH_AVX)
const HalfKernels amx_kernels = {"amx", nullptr, nullptr, nullptr, nullptr, 0};
#endif
