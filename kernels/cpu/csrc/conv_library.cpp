// The exported functions of the convolution: plan, lend scratch memory, dispatch. For the baseline.
#include <new>

#include "conv_plan.h"

namespace {

int multiply(const Conv &c) {
  const bool elements = c.bo == 1 && c.bi == 1;
  MultiplyPlan p;
  plan_multiply(p, c, 0);
  Convolve &v = p.v;
  const int64_t transposed = c.transposed || elements ? 0 : round_up(v.used * c.bo * c.bi, LINE);
  Scratch scratch(4 * (transposed + v.threads * (v.slack + conv_floats(v.x) + ASIDE)));
  if (!scratch.memory) return 1;
  v.scratch = (float *)scratch.memory;
  (elements ? kernels().convolve_elements : kernels().convolve)(v);
  return 0;
}

int outer(const Conv &c) {
  const bool elements = c.bo == 1 && c.bi == 1;
  OuterPlan p;
  plan_outer(p, c);
  ConvOuter &m = p.m;
  Scratch scratch(4 * (m.panels_at_once * (conv_floats(m.x) + conv_floats(m.dy)) + (elements ? c.order.ptr[c.order.rows] : 0)));
  if (!scratch.memory) return 1;
  m.scratch = (float *)scratch.memory;
  (elements ? kernels().conv_outer_elements : kernels().conv_outer)(m);
  return 0;
}

int backward(const ConvGradients &c) {
  if (c.dx.bo == 1 && c.dx.bi == 1) return multiply(c.dx) || outer(c.dvalues);  // they pack differently
  ConvBackward b = {};
  MultiplyPlan dx;
  OuterPlan dvalues;
  if (!plan_backward(b, dx, dvalues, c.dx, c.dvalues)) return multiply(c.dx) || outer(c.dvalues);
  ConvOuter &m = b.dvalues;
  Scratch scratch(4 * (m.panels_at_once * (conv_floats(m.x) + conv_floats(m.dy)) + m.threads * ASIDE));
  if (!scratch.memory) return 1;
  m.scratch = (float *)scratch.memory;
  kernels().conv_backward(b);
  return 0;
}

// What runs out of memory in its lists is told like what finds none for its scratch.
template <class F> int guarded(F run) {
  try {
    return run();
  } catch (const std::bad_alloc &) {
    return 1;
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// All return 0, or 1 when there is no memory.
int sk_conv_multiply(const Conv *c) {
  return guarded([&] { return multiply(*c); });
}

int sk_conv_outer(const Conv *c) {
  return guarded([&] { return outer(*c); });
}

int sk_conv_backward(const ConvGradients *c) {
  return guarded([&] { return backward(*c); });
}

}  // extern "C"
#pragma GCC visibility pop
