// What library.cpp offers to the planners in linear.cpp and conv.cpp, and what they offer to it.
#pragma once
#include <optional>

#include "api.h"

const Kernels &kernels();  // of the chosen instruction set
const HalfKernels *half_kernels();  // null if it has none of its own for bfloat16

// Error codes of the exported functions. REFUSED: a number is outside its range.
constexpr int NO_MEMORY = 1, REFUSED = 2, NO_STORAGE = 3, TOO_LARGE = 4;

struct Arena;

// Scratch memory of one call, kept for the next. `memory` is null if the system gave none.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch &) = delete;
  char *memory = nullptr;

 private:
  Arena *arena = nullptr;
};

// Returns run(scratch of this many floats), or NO_MEMORY.
template <class F> int with_scratch(int64_t floats, const F &run) {
  Scratch scratch(floats * 4);
  return scratch.memory ? run((float *)scratch.memory) : NO_MEMORY;
}

// A private copy of an order. Every number is read once; the copy is checked, and the kernels use the copy alone. So nothing
// that an index holds, or that another thread writes into it meanwhile, makes a kernel read or write outside its tensors.
// At 1x1 there are as many entries as values: only `ptr` is copied, and the kernels check each entry as they read it.
class CheckedOrder {
 public:
  explicit CheckedOrder(const Call &c);
  CheckedOrder(const CheckedOrder &) = delete;
  Order order;
  int failed = 0;  // an error code: nothing may be computed
  int result() const { return illegal ? REFUSED : 0; }  // after the kernel has run

 private:
  static constexpr int64_t NEAR = 2048;
  int32_t illegal = 0;
  std::optional<Scratch> far;
  alignas(64) int32_t near[NEAR];  // of small orders
};

// Whether an output is written past the caches; see library.cpp. `step`: bytes between rows, or between groups of channels.
bool writes_past(const void *data, int64_t step, int64_t bytes, int threads);

// Ask for huge pages for a fresh output before it is touched: the system hands it out page by page.
void expect_large(void *data, int64_t bytes);

int threads_for(int64_t flops, int threads);

// Panels of an outer product that the threads pack together before each adds them to its own entries. One thread packs one
// at a time.
inline int64_t panels_at_once(int64_t panels, int threads) {
  const int64_t most = threads == 1 ? 1 : 2 * threads;
  return panels < most ? panels : most;
}

// Floats that fill half the L2 cache.
int64_t half_of_l2();

inline bool of_convolution(const Call &c) { return c.sizes.groups > 0; }
inline bool of_elements(const Call &c) { return c.bo == 1 && c.bi == 1; }
inline int64_t itemsize(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

// The products of a call with a checked order (dx: by block column). They return 0 or an error code.
int linear_multiply(const Call &c, const Order &order);
int linear_outer(const Call &c, const Order &order);
int linear_backward(const Call &dx, const Order &by_col, const Call &dvalues, const Order &by_row);
int conv_multiply(const Call &c, const Order &order);
int conv_outer(const Call &c, const Order &order);
int conv_backward(const Call &dx, const Order &by_col, const Call &dvalues, const Order &by_row);
