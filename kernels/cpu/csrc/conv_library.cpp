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
    if (!scratch.memory) return 1;
    v.scratch = (float *)scratch.memory;
    half->convolve(v);
    return 0;
  }
  const int64_t transposed = c.transposed ? 0 : round_up(v.used * c.bo * c.bi, LINE);
  Scratch scratch(4 * (transposed + v.threads * (conv_floats(v.x) + ASIDE)));
  if (!scratch.memory) return 1;
  v.scratch = (float *)scratch.memory;
  kernels().convolve(v);
  return 0;
}

int multiply_elements(const Conv &c) {
  MultiplyPlan p;
  plan_multiply(p, c, 0, false);
  Convolve &v = p.v;
  const int64_t lanes = lanes_read(v.x, p.rows, p.cols, 128, v.in_turn);
  const RunsPlan plan(v.subgrids, v.channels, v.used, v.x.channels, c.groups, lanes);
  const int64_t lists = plan.floats(false);
  Scratch scratch(4 * (lists + v.threads * (conv_floats(v.x) + v.slack)));
  if (!scratch.memory) return 1;
  v.runs = plan.in((float *)scratch.memory, false), v.scratch = (float *)scratch.memory + lists;
  for (size_t q = 0; q < p.l.subgrids.size(); q++) p.l.subgrids[q].ptr = v.runs.start + q * plan.strips() * STRIP * plan.chunks;
  if (c.transposed) {
    const BackwardEntries each(c, v.x, p.rows, p.cols);
    arrange_runs(plan, v.runs, each.first.data(), c.values, v.threads, each);
  } else {
    arrange_runs(plan, v.runs, c.order.ptr, c.values, v.threads, ForwardEntries(c, v.x, p.rows, p.cols));
  }
  kernels().convolve_elements(v);
  return 0;
}

int outer_part(const Conv &c) {
  OuterPlan p;
  plan_outer(p, c);
  ConvOuter &m = p.m;
  Scratch scratch(4 * m.panels_at_once * (conv_floats(m.x) + conv_floats(m.dy)));
  if (!scratch.memory) return 1;
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
      if (!scratch.memory) return 1;
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
  const RunsPlan plan(1, m.order.rows, c.order.ptr[c.order.rows], m.x.channels, c.groups, lanes_read(m.x, p.rows, p.cols, 256, true));
  const int64_t lists = plan.floats(true);
  Scratch scratch(4 * (lists + conv_floats(m.x) + conv_floats(m.dy) + LINE));  // the last vector may read beyond
  if (!scratch.memory) return 1;
  m.runs = plan.in((float *)scratch.memory, true), m.scratch = (float *)scratch.memory + lists;
  arrange_runs(plan, m.runs, c.order.ptr, nullptr, m.threads, ForwardEntries(c, m.x, p.rows, p.cols));
  kernels().conv_outer_elements(m);
  return 0;
}

int outer_elements(const Conv &c) {
  return by_parts(c, [](const Conv &part, int64_t, int64_t) { return outer_elements_part(part); });
}

bool of_elements(const Conv &c) { return c.bo == 1 && c.bi == 1; }

int backward_part(const Conv &for_dx, const Conv &for_dvalues, bool past) {
  ConvBackward b = {};
  MultiplyPlan dx;
  OuterPlan dvalues;
  if (!plan_backward(b, dx, dvalues, for_dx, for_dvalues)) return multiply(for_dx) || outer_part(for_dvalues);
  b.dx.past = past;
  ConvOuter &m = b.dvalues;
  Scratch scratch(4 * (m.panels_at_once * (conv_floats(m.x) + conv_floats(m.dy)) + m.threads * ASIDE));
  if (!scratch.memory) return 1;
  m.scratch = (float *)scratch.memory;
  kernels().conv_backward(b);
  return 0;
}

int backward(const ConvGradients &c) {
  if (of_elements(c.dx)) return multiply_elements(c.dx) || outer_elements(c.dvalues);  // they pack differently
  if (half_kernels_for(c.dx)) return multiply(c.dx) || outer(c.dvalues);
  const bool past = writes_past(c.dx);
  return by_parts(c.dvalues, [&](const Conv &dvalues, int64_t first, int64_t last) {
    return backward_part(of_images(c.dx, first, last, dvalues.threads), dvalues, past);
  });
}

int sketch(ConvSketch &m) {
  Conv &c = m.conv;
  const int64_t taps = c.kernel[0] * c.kernel[1], group_out = c.out_channels / c.groups, group_in = c.in_channels / c.groups;
  const int64_t tokens = c.images * c.out_size[0] * c.out_size[1];
  const int64_t groups = blocks_of(blocks_of(group_out, c.bo), GROUP) + blocks_of(taps * blocks_of(group_in, c.bi), GROUP);
  c.threads = threads_for(2 * tokens * (c.out_channels + taps * c.in_channels) * round_up(m.pairs, GROUP_PAIRS), c.threads);
  m.plan = sketch_plan(c.groups * groups, m.pairs, tokens, c.threads);
  Scratch scratch(m.plan.floats * 4);
  if (!scratch.memory) return 1;
  m.scratch = scratch.memory;
  kernels().conv_sketch(m);
  return 0;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// All return 0, or 1 when there is no memory.
int sk_conv_multiply(const Conv *c) {
  return guarded([&] { return of_elements(*c) ? multiply_elements(*c) : multiply(*c); });
}

int sk_conv_outer(const Conv *c) {
  return guarded([&] { return of_elements(*c) ? outer_elements(*c) : outer(*c); });
}

int sk_conv_backward(const ConvGradients *c) {
  return guarded([&] { return backward(*c); });
}

int sk_conv_sketch(ConvSketch *m) { return sketch(*m); }

}  // extern "C"
#pragma GCC visibility pop
