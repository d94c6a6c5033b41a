// Batch norm and ReLU over the pixels of channels-last images, in as few passes over memory as the sums allow.
//
//   forward     mean and variance of each channel | y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual)
//   backward    g = dy where y > 0 | sums of g and of g * (x - mean) | dx
//
// Sums are formed by chunks of pixels that fit the L2 cache, and those of the chunks are added in order: results are the same to
// the bit for any number of threads.
#pragma once
#include <cmath>
#include "vector.h"

namespace {

INLINE void get(Vector &v, const float *p) { v = load(p); }
INLINE void get(float &v, const float *p) { v = *p; }
INLINE void put(float *p, Vector v) { store(p, v); }
INLINE void put(float *p, float v) { *p = v; }
INLINE void put_past(float *p, Vector v) { store_past(p, v); }
INLINE void put_past(float *p, float v) { *p = v; }

// NaN stays NaN, and passes gradients on, as in PyTorch.
INLINE Vector relu(Vector v) { return (Vector)((Bits)v & ~(Bits)(v < Vector{})); }
INLINE float relu(float v) { return v < 0.f ? 0.f : v; }
INLINE Vector where_positive(Vector y, Vector g) { return (Vector)((Bits)g & ~(Bits)(y <= Vector{})); }
INLINE float where_positive(float y, float g) { return y <= 0.f ? 0.f : g; }

// Call f(T(), c) for all channels: a vector of them, or one, at a time.
template <class F> INLINE void for_channels(int64_t channels, const F &f) {
  int64_t c = 0;
  for (; c + VL <= channels; c += VL) f(Vector(), c);
  for (; c < channels; c++) f(float(), c);
}

// to[c] += sum over pixels of f(T(), at): four pixels at a time, so that sums are read and written seldom.
template <class F> INLINE void add_pixels(int64_t first, int64_t last, int64_t channels, float *to, const F &f) {
  int64_t p = first;
  for (; p + 4 <= last; p += 4)
    for_channels(channels, [&](auto t, int64_t c) {
      decltype(t) sum;
      get(sum, to + c);
      const int64_t at = p * channels + c;
      put(to + c, sum + ((f(t, at, c) + f(t, at + channels, c)) + (f(t, at + 2 * channels, c) + f(t, at + 3 * channels, c))));
    });
  for (; p < last; p++)
    for_channels(channels, [&](auto t, int64_t c) {
      decltype(t) sum;
      get(sum, to + c);
      put(to + c, sum + f(t, p * channels + c, c));
    });
}

INLINE int64_t chunk_end(const Norm &m, int64_t chunk) {
  const int64_t last = (chunk + 1) * m.chunk;
  return last < m.pixels ? last : m.pixels;
}

// The mean of a chunk, and the sum of the squares of what differs from it.
INLINE void sum_chunk(const Norm &m, int64_t first, int64_t last, float *mean, float *squares) {
  const int64_t channels = m.channels;
  std::memset(mean, 0, channels * 4);
  std::memset(squares, 0, channels * 4);
  add_pixels(first, last, channels, mean, [&](auto t, int64_t at, int64_t) {
    get(t, m.x + at);
    return t;
  });
  for (int64_t c = 0; c < channels; c++) mean[c] /= float(last - first);
  add_pixels(first, last, channels, squares, [&](auto t, int64_t at, int64_t c) {
    decltype(t) middle;
    get(t, m.x + at), get(middle, mean + c);
    t -= middle;
    return t * t;
  });
}

// Chan, Golub, LeVeque: the mean and the squares of two sets of numbers from those of each. `joined` has room for both.
INLINE void join_chunks(const Norm &m, const float *sums, int64_t chunks, double *joined) {
  const int64_t channels = m.channels;
  double *mean = joined, *squares = joined + channels;
  for (int64_t c = 0; c < channels; c++) mean[c] = sums[c], squares[c] = sums[channels + c];
  for (int64_t i = 1; i < chunks; i++) {
    const float *next = sums + i * 2 * channels;
    const double before = double(i) * m.chunk, count = double(chunk_end(m, i) - i * m.chunk);
    const double share = count / (before + count), weight = before * share;
    for (int64_t c = 0; c < channels; c++) {
      const double apart = next[c] - mean[c];
      squares[c] += next[channels + c] + apart * apart * weight;
      mean[c] += apart * share;
    }
  }
  for (int64_t c = 0; c < channels; c++) m.stats[c] = float(mean[c]), m.stats[channels + c] = float(squares[c] / m.pixels);
}

// scale and shift of each channel: y = x * scale + shift.
INLINE void find_affine(const Norm &m, float *scale, float *shift) {
  for (int64_t c = 0; c < m.channels; c++) {
    scale[c] = m.weight[c] / std::sqrt(m.stats[m.channels + c] + float(m.eps));
    shift[c] = m.bias[c] - m.stats[c] * scale[c];
  }
}

template <bool PAST> INLINE void put_result(float *p, Vector v) {
  if (PAST) put_past(p, v);
  else put(p, v);
}
template <bool PAST> INLINE void put_result(float *p, float v) { put(p, v); }

template <bool PAST> void apply_norm(const Norm &m, const float *scale, const float *shift, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; p++)
    for_channels(m.channels, [&](auto t, int64_t c) {
      decltype(t) a, b, more;
      const int64_t at = p * m.channels + c;
      get(t, m.x + at), get(a, scale + c), get(b, shift + c);
      t = t * a + b;
      if (m.residual) get(more, m.residual + at), t += more;
      put_result<PAST>(m.y + at, relu(t));
    });
}

void norm_forward(const Norm &m) {
  const int64_t chunks = blocks_of(m.pixels, m.chunk), channels = m.channels;
  double *joined = (double *)m.scratch;
  float *scale = (float *)(joined + 2 * channels), *shift = scale + channels, *sums = shift + channels;

#pragma omp parallel num_threads(m.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; i++)
      sum_chunk(m, i * m.chunk, chunk_end(m, i), sums + i * 2 * channels, sums + (i * 2 + 1) * channels);
#pragma omp single
    join_chunks(m, sums, chunks, joined), find_affine(m, scale, shift);
#pragma omp for schedule(static)
    for (int64_t i = chunks - 1; i >= 0; i--)  // the caches hold what was read last
      (m.past ? apply_norm<true> : apply_norm<false>)(m, scale, shift, i * m.chunk, chunk_end(m, i));
    fence();
  }
}

// dy of one or more channels where y is positive. With a residual, y is read; without one, it is computed again from x.
template <class T> INLINE T gradient(const Norm &m, int64_t at, int64_t c, T x, const float *scale, const float *shift) {
  T g, y, a, b;
  get(g, m.dy + at);
  if (m.residual_grad) {
    get(y, m.y + at);
    return where_positive(y, g);
  }
  get(a, scale + c), get(b, shift + c);
  return where_positive(x * a + b, g);
}

// Add g and g * (x - mean) of the pixels of a chunk to `sums`. With a residual, g is its gradient and is written.
INLINE void sum_gradients(const Norm &m, int64_t first, int64_t last, const float *scale, const float *shift, float *sums) {
  const int64_t channels = m.channels;
  std::memset(sums, 0, 2 * channels * 4);
  for (int64_t p = first; p < last; p++)
    for_channels(channels, [&](auto x, int64_t c) {
      decltype(x) mean, sum, dot;
      const int64_t at = p * channels + c;
      get(x, m.x + at), get(mean, m.stats + c), get(sum, sums + c), get(dot, sums + channels + c);
      const auto g = gradient(m, at, c, x, scale, shift);
      put(sums + c, sum + g), put(sums + channels + c, dot + g * (x - mean));
      if (m.residual_grad) put(m.residual_grad + at, g);
    });
}

// dx = g * of_g + x * of_x + rest
struct Slopes {
  float *of_g, *of_x, *rest;
};

template <bool PAST>
void apply_gradients(const Norm &m, const float *scale, const float *shift, const Slopes &s, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; p++)
    for_channels(m.channels, [&](auto x, int64_t c) {
      decltype(x) g, a, b, d;
      const int64_t at = p * m.channels + c;
      get(x, m.x + at), get(a, s.of_g + c), get(b, s.of_x + c), get(d, s.rest + c);
      if (m.residual_grad) get(g, m.residual_grad + at);
      else g = gradient(m, at, c, x, scale, shift);
      put_result<PAST>(m.dx + at, g * a + (x * b + d));
    });
}

void norm_backward(const Norm &m) {
  const int64_t chunks = blocks_of(m.pixels, m.chunk), channels = m.channels;
  double *joined = (double *)m.scratch, *sum = joined, *dot = joined + channels;
  float *scale = (float *)(joined + 2 * channels), *shift = scale + channels, *sums = shift + 4 * channels;
  const Slopes s = {shift + channels, shift + 2 * channels, shift + 3 * channels};
  find_affine(m, scale, shift);
  std::memset(joined, 0, 2 * channels * 8);

#pragma omp parallel num_threads(m.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; i++)
      sum_gradients(m, i * m.chunk, chunk_end(m, i), scale, shift, sums + i * 2 * channels);
#pragma omp single
    {
      for (int64_t i = 0; i < chunks; i++)
        for (int64_t c = 0; c < channels; c++) sum[c] += sums[i * 2 * channels + c], dot[c] += sums[(i * 2 + 1) * channels + c];
      // dx = scale * (g - mean of g - (x - mean) * mean of g * (x - mean) / (var + eps))
      for (int64_t c = 0; c < channels; c++) {
        const double spread = double(m.stats[channels + c]) + m.eps, wide = m.weight[c] / std::sqrt(spread);
        const double slope = wide * dot[c] / spread / m.pixels;
        s.of_g[c] = float(wide), s.of_x[c] = float(-slope), s.rest[c] = float(slope * m.stats[c] - wide * sum[c] / m.pixels);
        m.grads[c] = float(dot[c] / std::sqrt(spread)), m.grads[channels + c] = float(sum[c]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = chunks - 1; i >= 0; i--)
      (m.past ? apply_gradients<true> : apply_gradients<false>)(m, scale, shift, s, i * m.chunk, chunk_end(m, i));
    fence();
  }
}

}  // namespace
