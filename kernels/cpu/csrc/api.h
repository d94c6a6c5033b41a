// The structures that Python passes, and the functions that each instruction set implements. Axes: kernels/contract.py.
//
// Words. entry: one stored block in an order of the index. slot: where its values are. panel: some tokens (or images), packed
// as the kernels read them. tile: sums that are held in registers. aside: where a tile is written that does not fit y.
// strip: successive rows of a 1x1 weight. piece: the strips whose entries are arranged at a time. chunk: successive
// features, or channels, at 1x1. run: the entries of a row in a chunk. slice: 16 or 32 features of a block in bfloat16.
// band: rows of one image. span: outputs of a convolution that lie in a row in a panel. group: of block rows, or of channels.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

// Not on macOS, which compiles a file for two processors at once, with the flags of one.
#if defined(__x86_64__) && !defined(__APPLE__)
#define WITH_AVX
#elif defined(__aarch64__) && defined(__linux__)
#define WITH_NEON
#endif

extern "C" {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// A strided matrix. Strides are in elements.
struct Matrix {
  void *data;
  int64_t rows, cols, row_stride, col_stride, dtype;
};

// The sizes of a convolution by axis: rows, columns. All zero for a linear layer.
struct Sizes {
  int64_t images, groups;
  int64_t in_size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];  // padding: before the first
};

// What Python passes for one product of a layer: `Call` of library.py. Each field has 64 bits.
struct Call {
  Matrix x, y;            // the input and the output, or their gradients; of a convolution the pixels, channels last
  float *values;          // (Z, bo, bi), contiguous: the blocks, or their gradient; bfloat16 if values_dtype says so
  const float *bias;      // one number for each output feature, or null
  const int32_t *ptr, *other, *slot;  // an order of the index, by block row, or by block column for dx
  int64_t lists, slots;   // block rows (block columns for dx); Z
  int64_t bo, bi, transposed, values_dtype, threads;  // transposed: dx = dy W
  Sizes sizes;
  const float *u, *v;     // a sketch: (features, pairs), pairs filled up to a multiple of GROUP_PAIRS; values are its output
  int64_t pairs;
};

// Batch norm and ReLU of channels-last images: `Norm` of norms.py, norm.h. Null what a function does not read or write.
struct NormCall {
  const float *x, *residual, *dy;      // (pixels, channels)
  float *y, *dx, *residual_grad;
  const float *weight, *bias;          // (channels)
  float *stats, *grads;                // (2, channels): mean and variance; gradients of weight and bias
  int64_t pixels, channels, threads;
  double eps;
};

// Attention of a contiguous tensor (batch, tokens, 3, heads, features): `Attention` of attention.py, attention.h. Backward if dqkv
// is given; then y is not.
struct AttentionCall {
  const float *qkv, *dy;               // dy like y
  float *y, *dqkv;                     // y (batch, tokens, heads, features); dqkv like qkv
  float *stats;                        // (2, batch, heads, tokens): largest score, 1 / sum of exp(score - largest)
  int64_t batch, tokens, heads, features, causal, threads;
  double scale;
};
}

struct Attention : AttentionCall {
  int64_t part, parts;   // queries that a thread computes at a time, and how often a head has as many
  char *scratch;
};

struct Norm : NormCall {
  int64_t chunk;         // pixels whose sums are formed together
  int32_t past;          // the result is written past the caches
  char *scratch;
};

// An order of the index, checked: the entries of block row r are ptr[r] to ptr[r + 1] of the other two lists.
struct Order {
  const int32_t *ptr, *other, *slot;
  int64_t rows;       // block rows (block columns for dx)
  int64_t slots;      // Z
  int64_t others;     // block columns (block rows for dx)
  int32_t *illegal;   // set to 1 by a kernel that finds an entry outside: see CheckedOrder of library.h
};

// 1x1: how rows, features and tokens are cut. See elements.h.
struct ElementPlan {
  int64_t lanes;                      // tokens of a panel; all of them where they are up to NARROW (elements_few.h)
  int64_t panels;                     // that are packed at a time
  int32_t alone;                      // each thread packs its own panels
  int32_t ahead;                      // the next chunk is prefetched: a packed panel does not stay in the L2 cache
  int64_t strip, strips;              // rows of a strip, strips of a piece
  int64_t chunks;                     // of 2^shift features
  int64_t entries, strip_entries;     // of the largest piece; of the largest strip, unless by column
  int32_t shift;
};

// y = x W' + bias (or dx = dy W): see product.h, few.h, elements.h and product_bf16.h.
struct Multiply {
  Matrix x, y;
  const float *values;   // (Z, bo, bi), contiguous; bfloat16 if values_dtype says so, which only HalfKernels take
  const float *bias;     // (y.cols) or null
  Order order;
  int32_t in, out;       // sides of a block: the one that is summed over, the one along y
  int32_t transposed;    // dx: values are read as they are stored
  int32_t values_dtype;  // HalfKernels round float32 values to bfloat16
  int32_t threads;
  int32_t past;          // y is written past the caches: see writes_past() of library.cpp
  const uint8_t *wanted; // by block of x: whether an entry reads it; the others are not packed
  int64_t panel;         // tokens that are packed at a time
  ElementPlan plan;      // 1x1
  int64_t groups;        // bfloat16: of block rows; see product_bf16.h
  int64_t group_entries; // of the largest group (or block row), if each is packed just before its use; else 0
  int32_t shared;        // bfloat16: the whole weight is packed first
  char *scratch;
};

// The stored blocks of dy' x: see outer.h, elements.h and outer_bf16.h.
struct Outer {
  Matrix dy, x;
  float *out;            // (Z, bo, bi), contiguous
  Order order;
  int32_t bo, bi;
  int32_t threads;
  int64_t panel;         // tokens that are packed at a time
  int64_t panels_at_once;
  const uint8_t *wanted_dy, *wanted_x;  // by block, as in Multiply
  ElementPlan plan;      // 1x1
  char *scratch;
};

// The sketch of dy' x: see sketch.h. A linear layer comes with the sizes of a 1x1 convolution whose images are one pixel.
struct Sketch {
  Call call;
  int64_t panel;         // tokens whose projections are held at a time
  int threads;
  char *scratch;
};

// Both gradients of a layer, from one dy: see backward.h. The panels and the scratch are those of `dvalues`.
struct Backward {
  Multiply dx;
  Outer dvalues;
};

struct Convolve;
struct ConvOuter;
struct ConvBackward;

// The kernels of an instruction set.
struct Kernels {
  const char *name;
  void (*multiply)(const Multiply &);
  void (*multiply_few)(const Multiply &);
  void (*outer)(const Outer &);
  void (*backward)(const Backward &);
  void (*multiply_elements)(const Multiply &);
  void (*outer_elements)(const Outer &);
  void (*backward_elements)(const Backward &);  // where each is one piece
  void (*sketch)(const Sketch &);
  void (*convolve)(const Convolve &);
  void (*convolve_elements)(const Convolve &);
  void (*conv_outer)(const ConvOuter &);
  void (*conv_outer_elements)(const ConvOuter &);
  void (*conv_backward)(const ConvBackward &);
  void (*norm_forward)(const Norm &);
  void (*norm_backward)(const Norm &);
  void (*attention)(const Attention &);
  bool (*all_inside)(const int32_t *numbers, int64_t count, int64_t bound);
};

// Its kernels for inputs in bfloat16, by instructions of its own; null where the compiler lacks them. There are none for
// float16: AVX512_FP16 forms its sums in float16.
struct HalfKernels {
  const char *name;
  void (*multiply)(const Multiply &);  // any number of tokens
  void (*outer)(const Outer &);
  void (*convolve)(const Convolve &);
  void (*conv_outer)(const ConvOuter &);
  int most_packed;  // conv_outer packs at most this many pixels for every two real ones: float32 is faster with more
};

extern const Kernels generic_kernels;
#if defined(WITH_AVX)
extern const Kernels avx2_kernels, avx512_kernels;
extern const HalfKernels avx512_bf16_kernels, amx_kernels;
#elif defined(WITH_NEON)
extern const HalfKernels neon_bf16_kernels;
#endif

// Checks of the numbers in an index: whatever they are, nothing outside the tensors is read or written.
inline bool inside(int32_t number, int64_t count) { return uint32_t(number) < uint64_t(count); }
inline void refuse(const Order &order) { __atomic_store_n(order.illegal, 1, __ATOMIC_RELAXED); }

// Shared by the planners (linear.cpp, conv.cpp) and the kernels, so that they agree on the layout of the scratch.
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t blocks_of(int64_t features, int64_t side) { return (features + side - 1) / side; }
constexpr int64_t LINE = 16;         // floats of a cache line: buffers start at one
constexpr int64_t MOST_ROWS = 24;    // tokens of the largest tile
constexpr int64_t ASIDE = MOST_ROWS * 2 * LINE;  // floats of a tile that is written aside
constexpr int64_t FEW_TOKENS = 16;   // for up to this many the forward reads blocks as they are stored
constexpr int64_t MOST_SIDE = 128;   // of a block
constexpr int64_t HALF_TOKENS = 32;  // panels of bfloat16 are multiples of it, the last one filled up with zeros
constexpr int64_t HALF_TILE = 1024;  // sums of the largest tile of HalfKernels
constexpr int64_t GROUP = 32;           // block rows (columns) of a sketch that are multiplied together
constexpr int64_t GROUP_PAIRS = 8;
constexpr int64_t SKETCH_TOKENS = 256;  // the most that are projected before they are multiplied; a multiple of 32

inline int64_t sketch_floats(int64_t pairs) { return 128 * 32 + round_up(pairs, GROUP_PAIRS) * 2 * 16 * 16; }  // a thread

constexpr int64_t NARROW = 16;       // for up to this many tokens 1x1 needs no panels: elements_few.h

// Floats of a piece that is arranged: arranged_in() of arrange.h.
inline int64_t arranged_floats(const ElementPlan &p) {
  return round_up(p.strips * p.chunks * (3 * p.strip + 1) + p.entries + round_up(p.entries, 2) / 2, LINE);
}

// Floats that a thread needs beside it and the packed panels: room_in() of arrange.h.
inline int64_t thread_floats(const ElementPlan &p) { return round_up(p.strip * (p.lanes + 2) + 2 * p.strip_entries, LINE); }

// Floats that a thread needs: keys and values, a block of queries, scores and their gradients; for the widest vectors.
inline int64_t attention_floats(const AttentionCall &c) {
  return round_up(c.tokens, 2 * LINE) * (2 * c.features + 4 * LINE) + 2 * LINE * c.features;
}

namespace {

// OpenMP's threads, or one where the library is built without.
#if defined(_OPENMP)
inline long thread_number() { return omp_get_thread_num(); }
inline long thread_count() { return omp_get_num_threads(); }
#else
inline long thread_number() { return 0; }
inline long thread_count() { return 1; }
#endif

// Groups of block rows into which a panel is cut: threads share panels where these are few.
inline long groups_of(long panels, long threads) {
  return threads > 1 && (panels < 2 * threads || panels % threads) ? 2 * threads : 1;
}

}  // namespace
