// What the planners share: library.cpp of the linear layer, conv_library.cpp of the convolution.
#pragma once
#include "api.h"

const Kernels &kernels();  // of the chosen instruction set
const HalfKernels *half_kernels();  // null if it has none of its own for bfloat16

struct Arena;

// Memory for one call, kept for the next. `memory` is null where there is none.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  char *memory = nullptr;

 private:
  Arena *arena = nullptr;
};

// `step`: bytes between rows, or between groups of channels: all of them begin at a cache line.
bool writes_past(const void *data, int64_t step, int64_t bytes, int threads);

// A fresh output of this size comes from the system page by page: asks for large ones before they are touched.
void expect_large(void *data, int64_t bytes);

int threads_for(int64_t flops, int threads);

// Panels of an outer product of which all threads pack some before they part. One thread packs the next panel when it is
// done with the last.
inline int64_t panels_at_once(int64_t panels, int threads) {
  const int64_t most = threads == 1 ? 1 : 2 * threads;
  return panels < most ? panels : most;
}

// Floats that fill half of the L2 cache.
int64_t half_of_l2();

inline int64_t itemsize(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }
