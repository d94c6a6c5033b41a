// Calls of the convolution: plan how its products are cut up, lend scratch memory, dispatch. Compiled for the baseline.
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

Conv conv_of(const Call &from, const Order &order) {
  Conv c = {from.sizes, from.x.data, from.y.data, from.values, from.bias, order, from.x.cols, from.y.cols,
            int32_t(from.bo), int32_t(from.bi), int32_t(from.transposed), int32_t(from.x.dtype), int32_t(from.threads)};
  for (int axis = 0; axis < 2; axis++) {
    if (c.kernel[axis] == 1) c.dilation[axis] = 1;  // it says nothing then
    if (c.out_size[axis] == 1 && c.stride[axis] > 1024) c.stride[axis] = 1;  // the same, and a phase each is too many
  }
  return c;
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

}  // namespace

int conv_multiply(const Call &call, const Order &order) {
  return guarded([&] {
    const Conv c = conv_of(call, order);
    return of_elements(c) ? multiply_elements(c) : multiply(c);
  });
}

int conv_outer(const Call &call, const Order &order) {
  return guarded([&] {
    const Conv c = conv_of(call, order);
    return of_elements(c) ? outer_elements(c) : outer(c);
  });
}

int conv_backward(const Call &dx, const Order &by_col, const Call &dvalues, const Order &by_row) {
  return guarded([&] { return backward(conv_of(dx, by_col), conv_of(dvalues, by_row)); });
}
