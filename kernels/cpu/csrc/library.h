// What library.cpp offers to the planners in linear.cpp and conv.cpp, and what they offer to it.
#pragma once
#include <optional>

#include "api.h"

const Kernels &kernels();  // of the chosen instruction set
const HalfKernels *half_kernels();  // null if it has none of its own for bfloat16

// What the exported functions return where all is not well. REFUSED: a number outside the range that it was said to have.
constexpr int NO_MEMORY = 1, REFUSED = 2, NO_STORAGE = 3, TOO_LARGE = 4;

struct Arena;

// Memory for one call, kept for the next. `memory` is null where there is none.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch &) = delete;
  char *memory = nullptr;

 private:
  Arena *arena = nullptr;
};

// A copy of an order that only this call sees: every number is read once, and the copy is what is checked and computed
// with, so that nothing which an index holds, or which another thread writes into it meanwhile, makes a kernel read or
// write outside its tensors. At 1x1 the entries are as many as the values: only where rows begin is copied here, and the
// kernels check each entry where they read it.
class CheckedOrder {
 public:
  explicit CheckedOrder(const Call &c);
  CheckedOrder(const CheckedOrder &) = delete;
  Order order;
  int failed = 0;  // then nothing may be computed
  int result() const { return illegal ? REFUSED : 0; }  // when all is computed

 private:
  static constexpr int64_t NEAR = 2048;
  int32_t illegal = 0;
  std::optional<Scratch> far;
  alignas(64) int32_t near[NEAR];  // for small ones
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

inline bool of_convolution(const Call &c) { return c.sizes.groups > 0; }
inline bool of_elements(const Call &c) { return c.bo == 1 && c.bi == 1; }
inline int64_t itemsize(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

// The products of a call with a checked order: for dx by block column, else by block row. They return 0, or a code as above.
int linear_multiply(const Call &c, const Order &order);
int linear_outer(const Call &c, const Order &order);
int linear_backward(const Call &dx, const Order &by_col, const Call &dvalues, const Order &by_row);
int conv_multiply(const Call &c, const Order &order);
int conv_outer(const Call &c, const Order &order);
int conv_backward(const Call &dx, const Order &by_col, const Call &dvalues, const Order &by_row);
