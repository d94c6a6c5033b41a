// What the Python side passes, and the functions that every instruction set implements. Axes: kernels/contract.py.
#pragma once
#include <cstddef>
#include <cstdint>

// Not on macOS: it compiles a file for two processors at once, and the flags are those of one.
#if defined(__x86_64__) && !defined(__APPLE__)
#define WITH_AVX
#endif

extern "C" {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// A strided matrix. Strides are in elements.
struct Matrix {
  void *data;
  int64_t rows, cols, row_stride, col_stride;
  int32_t dtype;
};

// One order of an index: the entries of block row r are ptr[r] .. ptr[r + 1] of the other two lists.
struct Order {
  const int32_t *ptr, *other, *slot;
  int64_t rows;       // block rows (block columns for dx)
  int64_t slots;      // Z
};

// y = x W' + bias (or dx = dy W): see product.h. `scratch` has multiply_bytes(...).
struct Multiply {
  Matrix x, y;
  const float *values;   // (Z, bo, bi), contiguous
  const float *bias;     // (y.cols) or null
  Order order;
  int32_t in, out;       // sides of a block: the one that is summed over, the one along y
  int32_t transposed;    // dx: values are read as they are stored
  int32_t threads;
  int64_t panel;         // tokens that are packed at a time
  int64_t chunks;        // 1x1: see elements.h
  int32_t shift;
  char *scratch;
};

// The stored blocks of dy' x: see outer.h. `scratch` has outer_bytes(...).
struct Outer {
  Matrix dy, x;
  float *out;            // (Z, bo, bi), contiguous
  Order order;
  int32_t bo, bi;
  int32_t threads;
  int64_t panel;         // tokens that are packed at a time
  int64_t panels_at_once;
  int64_t chunks;        // 1x1: see elements.h
  int32_t shift;
  char *scratch;
};

// The sketch of dy' x: see sketch.h.
struct Sketch {
  Matrix dy, x;
  const float *u, *v;    // (dy.cols, pairs) and (x.cols, pairs), pairs filled up to a multiple of GROUP_PAIRS
  float *out;            // (pairs, groups of block rows, groups of block columns, GROUP, GROUP)
  int64_t pairs;
  int32_t bo, bi;
  int32_t threads;
  int64_t panel;         // tokens whose projections are held at a time
  char *scratch;
};

// Both gradients of a layer, from one dy: see backward.h. The panels and the scratch are those of `dvalues`.
struct Backward {
  Multiply dx;
  Outer dvalues;
};
}

struct Convolve;
struct ConvOuter;

// What an instruction set offers.
struct Kernels {
  const char *name;
  void (*multiply)(const Multiply &);
  void (*multiply_few)(const Multiply &);
  void (*outer)(const Outer &);
  void (*backward)(const Backward &);
  void (*multiply_elements)(const Multiply &);
  void (*outer_elements)(const Outer &);
  void (*sketch)(const Sketch &);
  void (*convolve)(const Convolve &);
  void (*convolve_elements)(const Convolve &);
  void (*conv_outer)(const ConvOuter &);
  void (*conv_outer_elements)(const ConvOuter &);
};

extern const Kernels generic_kernels;
#if defined(WITH_AVX)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

// Shared by the planner (library.cpp) and the kernels, so that they agree on the layout of the scratch.
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t blocks_of(int64_t features, int64_t side) { return (features + side - 1) / side; }
constexpr int64_t LINE = 16;         // floats of a cache line: buffers start at one
constexpr int64_t MOST_ROWS = 24;    // tokens of the largest tile
constexpr int64_t ASIDE = MOST_ROWS * 2 * LINE;  // floats of a tile that is written aside first
constexpr int64_t FEW_TOKENS = 16;   // up to so many the forward reads blocks as they are stored
constexpr int64_t MULTIPLY_LANES = 64;  // tokens of a panel at 1x1
constexpr int64_t OUTER_LANES = 256;    // the same for the gradient: a constant, its sums are formed lane by lane
constexpr int64_t GROUP = 32;           // block rows (columns) of a sketch that are multiplied together
constexpr int64_t GROUP_PAIRS = 8;
constexpr int64_t SKETCH_TOKENS = 256;  // at most so many are projected before they are multiplied; a multiple of 32

inline int64_t sketch_groups(const Matrix &x, int64_t side) { return blocks_of(blocks_of(x.cols, side), GROUP); }
inline int64_t sketch_floats(int64_t pairs) { return 128 * 32 + round_up(pairs, GROUP_PAIRS) * 2 * 16 * 16; }  // a thread
