// Which rows (or columns) of a tensor the taps of a convolution read: for its planner, compiled for the baseline alone.
#pragma once
#include <algorithm>
#include <vector>

#include "conv.h"

namespace {

typedef std::vector<int64_t> Numbers;

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
