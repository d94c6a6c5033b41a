// Which rows (or columns) of a tensor the taps of a convolution read: for its planner, compiled for the baseline alone.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "conv.h"

namespace {

typedef std::vector<int64_t> Numbers;

// Thrown where the sizes of a convolution are too large for its plan.
struct TooLarge {};

// The product of sizes.
int64_t product_of(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(product, size, &product)) throw TooLarge();
  return product;
}

// Paddings, strides and dilations may be anything: of what passes here, sums and products of two fit into 64 bits.
void check_sizes(const Conv &c) {
  constexpr int64_t MOST_PHASES = int64_t(1) << 20;
  for (int axis = 0; axis < 2; axis++)
    for (const int64_t size : {c.in_size[axis], c.out_size[axis], c.kernel[axis], c.stride[axis], c.dilation[axis], std::abs(c.padding[axis])})
      if (size > INT32_MAX) throw TooLarge();
  if (c.transposed && c.stride[0] * c.stride[1] > MOST_PHASES) throw TooLarge();
}

int64_t floor_of(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
int64_t ceil_of(int64_t a, int64_t b) { return -floor_of(-a, b); }

// One axis of a convolution. Outputs m of `first` to `last`; tap i reads element m + shift[i] of view[i], and element m of
// view v is number step * m + base[v] of the tensor.
struct Axis {
  Numbers base, view, shift;
  int64_t step = 1, first = 0, last = 0, reach = 0;
  std::vector<int64_t> phase, from, to;  // of each tap; the outputs of each phase

  int64_t outputs() const { return last - first; }
  void tap(int64_t its_base, int64_t its_shift) {
    const int64_t v = std::find(base.begin(), base.end(), its_base) - base.begin();
    if (v == (int64_t)base.size()) base.push_back(its_base);
    view.push_back(v), shift.push_back(its_shift), reach = std::max(reach, its_shift);
  }
};

// Output m sees element m * stride + i * dilation - padding: a view for each phase of the stride, or for each tap.
Axis forward_axis(const Conv &c, int axis, bool by_tap) {
  Axis a;
  const int64_t stride = c.stride[axis];
  a.step = stride, a.last = c.out_size[axis];
  for (int64_t i = 0; i < c.kernel[axis]; i++) {
    const int64_t at = i * c.dilation[axis];
    a.phase.push_back(0);
    if (by_tap) a.tap(at - c.padding[axis], 0);
    else a.tap(at % stride - c.padding[axis], at / stride);
  }
  a.from = {0}, a.to = {a.last};
  return a;
}

// Element m * stride + phase - padding of x was seen by output m - i * dilation / stride through tap i of that phase.
Axis backward_axis(const Conv &c, int axis, bool by_tap) {
  Axis a;
  const int64_t stride = c.stride[axis], farthest = (c.kernel[axis] - 1) * c.dilation[axis] / stride;
  for (int64_t i = 0; i < c.kernel[axis]; i++) {
    const int64_t at = i * c.dilation[axis];
    a.phase.push_back(at % stride);
    if (by_tap) a.tap(-(at / stride), 0);
    else a.tap(-farthest, farthest - at / stride);
  }
  a.first = INT64_MAX, a.last = INT64_MIN;
  for (int64_t p = 0; p < stride; p++) {
    a.from.push_back(ceil_of(c.padding[axis] - p, stride));
    a.to.push_back(floor_of(c.padding[axis] + c.in_size[axis] - 1 - p, stride) + 1);
    if (a.from[p] < a.to[p]) a.first = std::min(a.first, a.from[p]), a.last = std::max(a.last, a.to[p]);
  }
  return a;
}

}  // namespace
