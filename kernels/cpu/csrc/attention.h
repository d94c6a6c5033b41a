// Softmax attention of one tensor that holds queries, keys and values, and its gradient.
//
//   forward     S = scale * K Q' | P = exp(S - largest of each query) | y = P' V / sums of P
//   backward    P = exp(S - largest) / sums | dP = V dy' | dS = P * (dP - sum of P * dP) * scale | dQ = dS' K, dK = dS Q, dV = P dy
//
// The largest score and the sum are kept apart: their one logarithm, largest + log(sum), is rounded as coarsely as large scores are,
// P would no longer sum to 1, and the differences of dP, which cancel where one key outweighs all, would lose what remains.
//
// A head, or a part of its queries, is computed by one thread, some queries at a time: these are the lanes of a row of S for each
// key, so that the largest and the sums of all keys are formed without exchanges, and S and dP of a block of queries stay in the L1
// cache. dK and dV are sums over all parts: all but the last, which sees all keys, write theirs into scratch.
#pragma once
#include <cmath>
#include "pack.h"

namespace {

constexpr int64_t QUERIES = 2 * VL;  // of a block, and keys of a packed panel
constexpr int HEIGHT = OUTER_ROWS;   // rows of a tile, which is two vectors wide
constexpr int64_t CHAIN = 128;       // keys whose sum is one chain of additions: the rounding of longer ones adds up

// e^x for x up to 0 or so, to 2 units in the last place; 0 below the smallest normal number.
INLINE Vector exponential(Vector x) {
  const Vector shift = all(12582912.f + 127.f), rounded = x * 1.44269504f + shift, n = rounded - shift;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f, p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f;
  const Vector power = (Vector)((Bits)rounded << 23);
  return (Vector)((Bits)((p * (r * r) + r + 1.f) * power) & ~(Bits)(x < all(-87.33654f)));
}

// The sum of f(j) over the keys.
template <class F> INLINE Vector sum_chains(int64_t keys, const F &f) {
  Vector sum = {};
  for (int64_t first = 0; first < keys; first += CHAIN) {
    Vector part = {};
    for (int64_t j = first; j < keys && j < first + CHAIN; j++) part += f(j);
    sum += part;
  }
  return sum;
}

struct TileSums {
  Vector sum[HEIGHT][2];
};

// Sums over k of a[r * ROW + k * COL] * b[k * step + lane].
template <int64_t ROW, int64_t COL> INLINE TileSums sum_tile(const float *a, const float *b, int64_t step, int64_t count) {
  TileSums t = {};
  for (int64_t k = 0; k < count; k++, a += COL, b += step) {
    const Vector first = load(b), second = load(b + VL);
    UNROLL for (int r = 0; r < HEIGHT; r++) t.sum[r][0] += first * a[r * ROW], t.sum[r][1] += second * a[r * ROW];
  }
  return t;
}

// A part of a head: where the head's rows begin, the part's queries, and how many keys these see. Rows of q, k, v and dq are `step`
// apart, those of y `width`, those of dk and dv `sum_step`.
struct Head {
  const float *q, *k, *v, *dy;
  float *y, *dq, *dk, *dv, *largest, *shares;
  int64_t step, width, sum_step, tokens, features, first, last, seen;
  float scale;
  bool causal;

  int64_t keys(int64_t query) const { return causal && query + QUERIES < tokens ? query + QUERIES : tokens; }
};

INLINE Head head_of(const Attention &c, int64_t i, int64_t part) {
  const int64_t n = i / c.heads, h = i % c.heads, width = c.heads * c.features, step = 3 * width;
  const int64_t at = n * c.tokens * step + h * c.features, out = n * c.tokens * width + h * c.features;
  Head a = {};
  a.q = c.qkv + at, a.k = a.q + width, a.v = a.k + width;
  if (c.dqkv) a.dy = c.dy + out, a.dq = c.dqkv + at, a.dk = a.dq + width, a.dv = a.dk + width;
  else a.y = c.y + out;
  a.largest = c.stats + i * c.tokens, a.shares = a.largest + c.batch * c.heads * c.tokens;
  a.step = a.sum_step = step, a.width = width, a.tokens = c.tokens, a.features = c.features;
  a.scale = float(c.scale), a.causal = c.causal;
  a.first = part * c.part, a.last = part + 1 < c.parts ? a.first + c.part : c.tokens, a.seen = a.causal ? a.last : a.tokens;
  if (part + 1 < c.parts) {
    const int64_t size = c.tokens * c.features;
    a.dk = (float *)c.scratch + c.threads * attention_floats(c) + (i * (c.parts - 1) + part) * 2 * size, a.dv = a.dk + size;
    a.sum_step = c.features;
  }
  return a;
}

// The rows of the keys that a part sees -> panels [features][QUERIES].
INLINE void pack_head(const float *rows, int64_t step, const Head &a, float *to) {
  const Matrix x = {(void *)rows, a.tokens, a.features, step, 1, FLOAT32};
  for (int64_t i = 0; i < a.seen; i += QUERIES, to += a.features * QUERIES)
    pack_lanes<QUERIES>(x, i, a.tokens - i < QUERIES ? a.tokens - i : QUERIES, to);
}

// to[key][query] = scale * (row of the key) * (row of the query), of a block of queries and the first `keys`.
INLINE void multiply_keys(const float *keys_packed, const float *queries, const Head &a, int64_t keys, float scale, float *to) {
  for (int64_t j = 0; j < keys; j += HEIGHT) {
    const float *panel = keys_packed + j / QUERIES * QUERIES * a.features + j % QUERIES;
    const TileSums t = sum_tile<1, QUERIES>(panel, queries, QUERIES, a.features);
    UNROLL for (int r = 0; r < HEIGHT; r++)
      UNROLL for (int v = 0; v < 2; v++) store(to + (j + r) * QUERIES + v * VL, t.sum[r][v] * scale);
  }
}

// Set the scores of keys that come after their query to minus infinity.
INLINE void hide_later(const Head &a, int64_t query, int64_t keys, float *scores) {
  Lanes lane;
  for (int l = 0; l < VL; l++) lane[l] = l;
  for (int64_t j = query + 1; a.causal && j < keys; j++)
    for (int v = 0; v < 2; v++) {
      float *at = scores + j * QUERIES + v * VL;
      const Lanes hidden = lane + int32_t(v * VL) < Lanes{} + int32_t(j - query);
      store(at, (Vector)(((Bits)load(at) & ~(Bits)hidden) | ((Bits)all(-INFINITY) & (Bits)hidden)));
    }
}

// to[query] = sums over keys of factors[key][query] * rows[key], times the factor of the query.
INLINE void sum_keys(const float *factors, const float *rows, const Head &a, int64_t query, int64_t keys, float *to,
                     int64_t step, const float *times) {
  for (int64_t i = 0; i < QUERIES && query + i < a.tokens; i += HEIGHT)
    for (int64_t f = 0; f < a.features; f += 2 * VL) {
      TileSums t = {};
      for (int64_t j = 0; j < keys; j += CHAIN) {
        const int64_t count = keys - j < CHAIN ? keys - j : CHAIN;
        const TileSums part = sum_tile<1, QUERIES>(factors + j * QUERIES + i, rows + j * a.step + f, a.step, count);
        UNROLL for (int r = 0; r < HEIGHT; r++)
          UNROLL for (int v = 0; v < 2; v++) t.sum[r][v] += part.sum[r][v];
      }
      UNROLL for (int r = 0; r < HEIGHT; r++) {
        if (query + i + r >= a.tokens) break;
        UNROLL for (int v = 0; v < 2; v++) store(to + (query + i + r) * step + f + v * VL, t.sum[r][v] * times[i + r]);
      }
    }
}

void attend(const Head &a, float *packed, float *queries, float *scores) {
  pack_head(a.k, a.step, a, packed);
  const Matrix q = {(void *)a.q, a.tokens, a.features, a.step, 1, FLOAT32};
  for (int64_t i = a.first; i < a.last; i += QUERIES) {
    const int64_t keys = a.keys(i), count = a.tokens - i < QUERIES ? a.tokens - i : QUERIES;
    pack_lanes<QUERIES>(q, i, count, queries);
    multiply_keys(packed, queries, a, keys, a.scale, scores);
    hide_later(a, i, keys, scores);
    float largest[QUERIES], shares[QUERIES];
    UNROLL for (int v = 0; v < 2; v++) {
      float *s = scores + v * VL;
      Vector most = all(-INFINITY);
      for (int64_t j = 0; j < keys; j++) {
        const Vector x = load(s + j * QUERIES);
        most = most > x ? most : x;
      }
      const Vector sum = sum_chains(keys, [&](int64_t j) {
        const Vector p = exponential(load(s + j * QUERIES) - most);
        store(s + j * QUERIES, p);
        return p;
      });
      store(largest + v * VL, most), store(shares + v * VL, 1.f / sum);
    }
    for (int64_t l = 0; l < count; l++) a.largest[i + l] = largest[l], a.shares[i + l] = shares[l];
    sum_keys(scores, a.v, a, i, keys, a.y, a.width, shares);
  }
}

// to[key] (+)= sums over a block of queries of factors[key][query] * rows[query].
INLINE void add_queries(const float *factors, const float *rows, int64_t rows_step, const Head &a, int64_t query, int64_t keys, float *to) {
  const int64_t count = a.tokens - query < QUERIES ? a.tokens - query : QUERIES;
  for (int64_t j = 0; j < keys; j += HEIGHT) {
    const int64_t own = j / QUERIES * QUERIES;
    const bool fresh = query == (a.causal && own > a.first ? own : a.first);  // no block of the part before has seen these keys
    for (int64_t f = 0; f < a.features; f += 2 * VL) {
      const TileSums t = sum_tile<QUERIES, 1>(factors + j * QUERIES, rows + query * rows_step + f, rows_step, count);
      UNROLL for (int r = 0; r < HEIGHT; r++) {
        if (j + r >= keys) break;
        UNROLL for (int v = 0; v < 2; v++) {
          float *at = to + (j + r) * a.sum_step + f + v * VL;
          store(at, fresh ? t.sum[r][v] : load(at) + t.sum[r][v]);
        }
      }
    }
  }
}

void attend_backward(const Head &a, float *packed_k, float *packed_v, float *queries, float *scores, float *slopes) {
  float largest[QUERIES], shares[QUERIES], ones[QUERIES];
  for (int64_t l = 0; l < QUERIES; l++) ones[l] = 1.f;
  pack_head(a.k, a.step, a, packed_k), pack_head(a.v, a.step, a, packed_v);
  const Matrix q = {(void *)a.q, a.tokens, a.features, a.step, 1, FLOAT32};
  const Matrix dy = {(void *)a.dy, a.tokens, a.features, a.width, 1, FLOAT32};
  for (int64_t i = a.first; i < a.last; i += QUERIES) {
    const int64_t keys = a.keys(i), count = a.tokens - i < QUERIES ? a.tokens - i : QUERIES;
    for (int64_t l = 0; l < QUERIES; l++) largest[l] = l < count ? a.largest[i + l] : 0.f, shares[l] = l < count ? a.shares[i + l] : 0.f;
    pack_lanes<QUERIES>(q, i, count, queries);
    multiply_keys(packed_k, queries, a, keys, a.scale, scores);
    hide_later(a, i, keys, scores);
    pack_lanes<QUERIES>(dy, i, count, queries);
    multiply_keys(packed_v, queries, a, keys, 1.f, slopes);
    UNROLL for (int v = 0; v < 2; v++) {
      float *s = scores + v * VL, *d = slopes + v * VL;
      const Vector most = load(largest + v * VL), share = load(shares + v * VL);
      const Vector sum = sum_chains(keys, [&](int64_t j) {
        const Vector p = exponential(load(s + j * QUERIES) - most) * share;
        store(s + j * QUERIES, p);
        return p * load(d + j * QUERIES);
      });
      for (int64_t j = 0; j < keys; j++)
        store(d + j * QUERIES, load(s + j * QUERIES) * (load(d + j * QUERIES) - sum) * a.scale);
    }
    sum_keys(slopes, a.k, a, i, keys, a.dq, a.step, ones);
    add_queries(slopes, a.q, a.step, a, i, keys, a.dk);
    add_queries(scores, a.dy, a.width, a, i, keys, a.dv);
  }
}

// Add the dk and dv of the parts before the last, of the keys whose tokens are the queries of this part.
void add_parts(const Attention &c, int64_t head, int64_t part) {
  const Head all = head_of(c, head, c.parts - 1), mine = head_of(c, head, part);
  for (int64_t p = all.causal ? part : 0; p + 1 < c.parts; p++) {
    const Head a = head_of(c, head, p);
    for (int64_t j = mine.first; j < mine.last; j++)
      for (int64_t f = 0; f < c.features; f += VL) {
        float *dk = all.dk + j * all.sum_step + f, *dv = all.dv + j * all.sum_step + f;
        store(dk, load(dk) + load(a.dk + j * a.sum_step + f)), store(dv, load(dv) + load(a.dv + j * a.sum_step + f));
      }
  }
}

// Forward, or backward where dqkv is wanted.
void attention(const Attention &c) {
  const int64_t heads = c.batch * c.heads, panels = round_up(c.tokens, QUERIES) * c.features;
  const int64_t rows = round_up(c.tokens, QUERIES) * QUERIES;
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < heads * c.parts; i++) {  // of causal ones the last parts first: they are the largest
      float *packed = (float *)c.scratch + thread_number() * attention_floats(c), *more = packed + panels;
      float *queries = more + panels, *scores = queries + c.features * QUERIES, *slopes = scores + rows;
      const Head a = head_of(c, i % heads, c.parts - 1 - i / heads);
      if (c.dqkv) attend_backward(a, packed, more, queries, scores, slopes);
      else attend(a, packed, queries, scores);
    }
    if (c.dqkv && c.parts > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads * c.parts; i++) add_parts(c, i % heads, i / heads);
    }
  }
}

}  // namespace
