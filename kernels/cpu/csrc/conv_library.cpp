// The exported functions of the convolution: plan, lend scratch memory, dispatch. For the baseline.
#include "conv_parts.h"
#include "conv_plan_outer.h"
#include "conv_runs.h"

namespace {

// Null: float32 tiles, of what is packed as float32.
const HalfKernels *half_kernels_for(const Conv &c) { return c.dtype == BFLOAT16 ? half_kernels() : nullptr; }

int multiply(const Conv &c) {
  const HalfKernels *half = half_kernels_for(c);
  MultiplyPlan p;
  plan_multiply(p, c, 0, half != nullptr);
  Convolve &v = p.v;
  if (half) {
    Scratch scratch(4 * (round_up(v.used * c.bo * c.bi / 2, LINE) + v.threads * half_thread_floats(v.x)));
    if (!scratch.memory) return NO_MEMORY;
    v.scratch = (float *)scratch.memory;
    half->convolve(v);
    return 0;
  }
  const int64_t transposed = c.transposed ? 0 : round_up(v.used * c.bo * c.bi, LINE);
  Scratch scratch(4 * (transposed + v.threads * (conv_floats(v.x) + ASIDE)));
  if (!scratch.memory) return NO_MEMORY;
  v.scratch = (float *)scratch.memory;
  kernels().convolve(v);
  return 0;
}

// Row r of subgrid q has the entries first[q * rows + r] and on: see arrange_runs.
template <class Each> int multiply_runs(MultiplyPlan &p, const Conv &c, const int32_t *first, const Each &each) {
  Convolve &v = p.v;
  const int64_t lanes = lanes_read(v.x, p.rows, p.cols, 128, v.in_turn);
  const RunsPlan plan(v.subgrids, v.channels, first, v.x.channels, c.groups, lanes);
  const int64_t lists = plan.floats(false, v.threads);
  Scratch scratch(4 * (lists + v.threads * (conv_floats(v.x) + v.slack)));
  if (!scratch.memory) return NO_MEMORY;
  v.runs = plan.in((float *)scratch.memory, false), v.scratch = (float *)scratch.memory + lists;
  for (size_t q = 0; q < p.l.subgrids.size(); q++) p.l.subgrids[q].ptr = v.runs.start + q * plan.strips() * STRIP * plan.chunks;
  if (!arrange_runs<false>(plan, v.runs, first, c.values, v.threads, each)) return REFUSED;
  kernels().convolve_elements(v);
  return 0;
}

int multiply_elements(const Conv &c) {
  MultiplyPlan p;
  plan_multiply(p, c, 0, false);
  if (!c.transposed) return multiply_runs(p, c, c.order.ptr, ForwardEntries(c, p.v.x, p.rows, p.cols));
  const BackwardEntries each(c, p.v.x, p.rows, p.cols);
  return each.legal ? multiply_runs(p, c, each.first.data(), each) : REFUSED;
}

int outer_part(const Conv &c) {
  OuterPlan p;
  plan_outer(p, c);
  ConvOuter &m = p.m;
  Scratch scratch(4 * m.panels_at_once * (conv_floats(m.x) + conv_floats(m.dy)));
  if (!scratch.memory) return NO_MEMORY;
  m.scratch = (float *)scratch.memory;
  kernels().conv_outer(m);
  return 0;
}

int outer(const Conv &c) {
  if (const HalfKernels *half = half_kernels_for(c)) {
    OuterPlan p;
    if (plan_outer_half(p, c, half->most_packed)) {
      ConvOuter &m = p.m;
      Scratch scratch(2 * m.panels_at_once * (conv_floats(m.x) + conv_floats(m.dy)));
      if (!scratch.memory) return NO_MEMORY;
      m.scratch = (float *)scratch.memory;
      half->conv_outer(m);
      return 0;
    }
  }
  return by_parts(c, [](const Conv &part, int64_t, int64_t) { return outer_part(part); });
}

int outer_elements_part(const Conv &c) {
  OuterPlan p;
  plan_outer(p, c);
  ConvOuter &m = p.m;
  const RunsPlan plan(1, m.order.rows, c.order.ptr, m.x.channels, c.groups, lanes_read(m.x, p.rows, p.cols, 256, true));
  const int64_t lists = plan.floats(true, m.threads);
  Scratch scratch(4 * (lists + conv_floats(m.x) + conv_floats(m.dy) + LINE));  // the last vector may read beyond
  if (!scratch.memory) return NO_MEMORY;
  m.runs = plan.in((float *)scratch.memory, true), m.scratch = (float *)scratch.memory + lists;
  if (!arrange_runs<true>(plan, m.runs, c.order.ptr, nullptr, m.threads, ForwardEntries(c, m.x, p.rows, p.cols))) return REFUSED;
  kernels().conv_outer_elements(m);
  return 0;
}

int outer_elements(const Conv &c) {
  return by_parts(c, [](const Conv &part, int64_t, int64_t) { return outer_elements_part(part); });
}

bool of_elements(const Conv &c) { return c.bo == 1 && c.bi == 1; }

// Runs run(the convolution with a checked order): see CheckedOrder.
template <class F> int checked(const Conv &given, const F &run) {
  const int64_t by_row = given.groups * blocks_of(given.out_channels / given.groups, given.bo);
  const int64_t by_col = given.kernel[0] * given.kernel[1] * blocks_of(given.in_channels / given.groups, given.bi);
  if ((!given.x && given.in_size[0] && given.in_size[1]) || !given.y || (given.order.slots && !given.values)) return NO_STORAGE;
  const CheckedOrder order(given.order, given.transposed ? by_col : by_row, given.transposed ? by_row : by_col, of_elements(given));
  if (order.failed) return order.failed;
  Conv c = given;
  c.order = order.order;
  for (int axis = 0; axis < 2; axis++) {
    if (c.kernel[axis] == 1) c.dilation[axis] = 1;  // it says nothing then
    if (c.out_size[axis] == 1 && c.stride[axis] > 1024) c.stride[axis] = 1;  // the same, and a phase each is too many
  }
  const int failed = guarded([&] { return run(c); });
  return failed ? failed : order.result();
}

// Runs one product, and unless it failed the other.
template <class First, class Second> int both(const First &first, const Second &second) {
  const int failed = first();
  return failed ? failed : second();
}

int backward_part(const Conv &for_dx, const Conv &for_dvalues, bool past) {
  ConvBackward b = {};
  MultiplyPlan dx;
  OuterPlan dvalues;
  if (!plan_backward(b, dx, dvalues, for_dx, for_dvalues)) 
    return both([&] { return multiply(for_dx); }, [&] { return outer_part(for_dvalues); });
  b.dx.past = past;
  ConvOuter &m = b.dvalues;
  Scratch scratch(4 * (m.panels_at_once * (conv_floats(m.x) + conv_floats(m.dy)) + m.threads * ASIDE));
  if (!scratch.memory) return NO_MEMORY;
  m.scratch = (float *)scratch.memory;
  kernels().conv_backward(b);
  return 0;
}

int backward(const Conv &dx, const Conv &dvalues) {
  if (of_elements(dx)) return both([&] { return multiply_elements(dx); }, [&] { return outer_elements(dvalues); });  // they pack differently
  if (half_kernels_for(dx)) return both([&] { return multiply(dx); }, [&] { return outer(dvalues); });
  const bool past = writes_past(dx);
  return by_parts(dvalues, [&](const Conv &part, int64_t first, int64_t last) {
    return backward_part(of_images(dx, first, last, part.threads), part, past);
  });
}

int sketch(ConvSketch &m) {
  Conv &c = m.conv;
  if ((!c.x && c.in_size[0] && c.in_size[1]) || !c.y || !m.u || !m.v) return NO_STORAGE;
  const int64_t taps = c.kernel[0] * c.kernel[1], group_out = c.out_channels / c.groups, group_in = c.in_channels / c.groups;
  const int64_t tokens = c.images * c.out_size[0] * c.out_size[1];
  const int64_t groups = blocks_of(blocks_of(group_out, c.bo), GROUP) + blocks_of(taps * blocks_of(group_in, c.bi), GROUP);
  c.threads = threads_for(2 * tokens * (c.out_channels + taps * c.in_channels) * round_up(m.pairs, GROUP_PAIRS), c.threads);
  m.plan = sketch_plan(c.groups * groups, m.pairs, tokens, c.threads);
  Scratch scratch(m.plan.floats * 4);
  if (!scratch.memory) return NO_MEMORY;
  m.scratch = scratch.memory;
  kernels().conv_sketch(m);
  return 0;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// All return 0, or what library.h says.
int sk_conv_multiply(const Conv *c) {
  return checked(*c, [](const Conv &c) { return of_elements(c) ? multiply_elements(c) : multiply(c); });
}

int sk_conv_outer(const Conv *c) {
  return checked(*c, [](const Conv &c) { return of_elements(c) ? outer_elements(c) : outer(c); });
}

int sk_conv_backward(const ConvGradients *c) {
  return checked(c->dx, [&](const Conv &dx) {
    return checked(c->dvalues, [&](const Conv &dvalues) { return backward(dx, dvalues); });
  });
}

int sk_conv_sketch(ConvSketch *m) { return sketch(*m); }

}  // extern "C"
#pragma GCC visibility pop
