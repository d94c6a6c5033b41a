// Vectors of VL floats through the compilers' vector extensions: one source for AVX-512, AVX2 and 128-bit machines.
// Included by the file of one instruction set. Everything is local to that file: the linker might keep the AVX-512 copy of a
// shared function, for a machine without AVX-512.
#pragma once
#include <cstring>
#include "api.h"
#if defined(WITH_AVX)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define UNROLL _Pragma("GCC unroll 32")
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

namespace {

typedef float Vector __attribute__((vector_size(VL * 4)));
typedef float Unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t Lanes __attribute__((vector_size(VL * 4)));
typedef uint32_t Bits __attribute__((vector_size(VL * 4)));
typedef uint16_t Halves __attribute__((vector_size(VL * 2), aligned(2), may_alias));

INLINE Vector load(const float *p) { return *(const Unaligned *)p; }
INLINE void store(float *p, Vector v) { *(Unaligned *)p = v; }

// Store past the caches: a line is not fetched to be overwritten, and evicts nothing that is read again. p is a multiple of VL
// floats, and whole lines are written at once. Call fence() before other threads may read them.
INLINE void store_past(float *p, Vector v) {
#if VL == 16
  _mm512_stream_ps(p, (__m512)v);
#elif VL == 8
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
INLINE void fence() {
#if VL >= 8
  _mm_sfence();
#endif
}
INLINE Vector all(float x) { return x - Vector{}; }

// FACTORS neighbouring numbers, each of which multiplies a vector. An instruction of ARM takes its factor from a lane of a
// register, so that one load serves four; elsewhere a broadcast reads memory, and holding the numbers would cost registers.
#if defined(__aarch64__)
constexpr int FACTORS = 4;
typedef Vector Factors;
INLINE Factors factors(const float *p) { return load(p); }
#else
constexpr int FACTORS = 1;
typedef const float *Factors;
INLINE Factors factors(const float *p) { return p; }
#endif

// bfloat16: the upper half of a float, rounded to nearest even; NaN stays NaN.
INLINE float from_bfloat16(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return uint16_t((bits >> 16) | 64);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// float16, by bits where there is no instruction. Whether there is one follows from VL, not from __F16C__: a user's compiler
// flags may define that for the generic file too, which runs on every machine.
INLINE float from_float16(uint16_t h) {
#if VL >= 8
  return _cvtsh_ss(h);
#elif defined(__aarch64__)
  __fp16 x;
  std::memcpy(&x, &h, 2);
  return x;
#else
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, bits;
  if (exponent == 31) bits = sign | 0x7F800000 | (fraction << 13);
  else if (exponent) bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  else {  // subnormal: fraction * 2^-24
    float x = float(fraction) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &x, 4);
    bits |= sign;
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}
INLINE uint16_t to_float16(float x) {
#if VL >= 8
  return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const __fp16 rounded = x;
  uint16_t h;
  std::memcpy(&h, &rounded, 2);
  return h;
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7E00;             // NaN
  if (bits >= 0x477FF000) return sign | 0x7C00;            // rounds to infinity
  if (bits < 0x33000001) return sign;                      // rounds to zero
  if (bits < 0x38800000) {                                 // subnormal
    uint32_t shift = 126 - (bits >> 23), fraction = (bits & 0x7FFFFF) | 0x800000;
    uint32_t kept = fraction >> shift, rest = fraction & ((1u << shift) - 1), half = 1u << (shift - 1);
    return sign | uint16_t(kept + (rest > half || (rest == half && (kept & 1))));
  }
  bits += 0xFFF + ((bits >> 13) & 1);
  return sign | uint16_t((bits - 0x38000000) >> 13);
#endif
}

// One element of any dtype.
INLINE float read(const void *p, int64_t i, int dtype) {
  if (dtype == FLOAT32) return ((const float *)p)[i];
  return dtype == BFLOAT16 ? from_bfloat16(((const uint16_t *)p)[i]) : from_float16(((const uint16_t *)p)[i]);
}

// VL contiguous elements.
INLINE Vector read_vector(const void *p, int64_t i, int dtype) {
  if (dtype == FLOAT32) return load((const float *)p + i);
  const uint16_t *h = (const uint16_t *)p + i;
  if (dtype == BFLOAT16) return (Vector)(__builtin_convertvector(*(const Halves *)h, Bits) << 16);
#if VL == 16
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)h));
#elif VL == 8
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h));
#elif defined(__aarch64__)
  return (Vector)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h)));
#else
  Vector v;
  UNROLL for (int l = 0; l < VL; l++) v[l] = from_float16(h[l]);
  return v;
#endif
}

// Write n floats to contiguous elements of a dtype.
INLINE void write_row(void *p, int64_t i, int dtype, const float *from, int64_t n) {
  int64_t c = 0;
  if (dtype == FLOAT32) {
    float *to = (float *)p + i;
    for (; c + VL <= n; c += VL) store(to + c, load(from + c));
    for (; c < n; c++) to[c] = from[c];
    return;
  }
  uint16_t *to = (uint16_t *)p + i;
  if (dtype == BFLOAT16) {
    for (; c + VL <= n; c += VL) {
      Vector x = load(from + c);
      Bits bits = (Bits)x, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
      Lanes is_nan = x != x;
      rounded = (rounded & ~(Bits)is_nan) | (((bits >> 16) | 64) & (Bits)is_nan);
      *(Halves *)(to + c) = __builtin_convertvector(rounded, Halves);
    }
    for (; c < n; c++) to[c] = to_bfloat16(from[c]);
    return;
  }
#if VL == 16
  for (; c + VL <= n; c += VL)
    _mm256_storeu_si256((__m256i *)(to + c), _mm512_cvtps_ph((__m512)load(from + c), _MM_FROUND_TO_NEAREST_INT));
#elif VL == 8
  for (; c + VL <= n; c += VL)
    _mm_storeu_si128((__m128i *)(to + c), _mm256_cvtps_ph((__m256)load(from + c), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  for (; c + VL <= n; c += VL) vst1_u16(to + c, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)load(from + c))));
#endif
  for (; c < n; c++) to[c] = to_float16(from[c]);
}

// W floats, W at most VL.
template <int W> struct Of {
  typedef float Floats __attribute__((vector_size(W * 4)));
  typedef float Unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef int32_t Lanes __attribute__((vector_size(W * 4)));
};

// One step of the transposition of W vectors, the first N of them: exchange quadrants of side S.
template <int S, int N, int W> INLINE void exchange(typename Of<W>::Floats *a) {
  typename Of<W>::Lanes low, high;
  UNROLL for (int l = 0; l < W; l++) {
    low[l] = (l & S) ? W + l - S : l;
    high[l] = (l & S) ? W + l : l + S;
  }
  UNROLL for (int i = 0; i < N; i++) if (!(i & S)) {
    typename Of<W>::Floats x = a[i], y = a[i + S];
#if defined(__clang__)
    typename Of<W>::Floats u, v;
    UNROLL for (int l = 0; l < W; l++) {
      u[l] = low[l] < W ? x[low[l]] : y[low[l] - W];
      v[l] = high[l] < W ? x[high[l]] : y[high[l] - W];
    }
    a[i] = u, a[i + S] = v;
#else
    a[i] = __builtin_shuffle(x, y, low);
    a[i + S] = __builtin_shuffle(x, y, high);
#endif
  }
}

// Transpose VL vectors in registers.
INLINE void transpose(Vector *a) {
#if VL == 16
  exchange<8, VL, VL>(a);
#endif
#if VL >= 8
  exchange<4, VL, VL>(a);
#endif
  exchange<2, VL, VL>(a);
  exchange<1, VL, VL>(a);
}

// One step of sums(): 2 S vectors become S, whose lanes are sums of two lanes.
template <int S, int W = VL> INLINE void fold(typename Of<W>::Floats *a) {
  exchange<S, 2 * S, W>(a);
  UNROLL for (int i = 0; i < S; i++) a[i] += a[i + S];
}

// Lane l of the result is the sum of a[l]: half the exchanges of a transposition.
template <int W = VL> INLINE typename Of<W>::Floats sums(typename Of<W>::Floats *a) {
  if constexpr (W == 16) fold<8, W>(a);
  if constexpr (W >= 8) fold<4, W>(a);
  fold<2, W>(a);
  fold<1, W>(a);
  return a[0];
}

}  // namespace
