// Products of the convolution: plan, allocate scratch memory, call the kernel. Compiled for the baseline.
#include <exception>

#include "conv_plan_outer.h"
#include "conv_runs.h"

namespace {

// Returns run(), or an error code if its lists find no memory or the sizes are too large.
template <class F> int guarded(const F &run) {
  try {
    return run();
  } catch (const TooLarge &) {
    return TOO_LARGE;
  } catch (const std::exception &) {  // of a vector: no memory, or more than there ever is
    return NO_MEMORY;
  }
}

// The gradient of the weight is the sum of those of some parts of the images. Two threads that add to the same blocks read
// each other's packed panels, through the caches of both; with a part each they share nothing until the end. The number of
// parts follows from the sizes alone, so that the sums are the same to the bit for any number of threads.
constexpr int64_t PARTS = 2;

// A further part reads and writes all blocks once more, and dx reads them again, so the blocks must be few beside the images.
// (At this limit one thread takes 1 % longer, at twice the limit 3 %; two threads gain up to 13 %.)
int64_t parts_of(const Conv &c) {
  const int64_t blocks = c.order.slots * c.bo * c.bi;
  const int64_t x = c.images * c.in_size[0] * c.in_size[1] * c.in_channels, dy = c.images * c.out_size[0] * c.out_size[1] * c.out_channels;
  const bool even = c.images % PARTS == 0 || c.images >= 8 * PARTS;
  return even && 4 * PARTS * blocks <= x + dy ? PARTS : 1;
}

// The convolution of the images from `first` to below `last`.
Conv of_images(Conv c, int64_t first, int64_t last, int threads) {
  const int64_t item = itemsize(c.dtype);
  c.x = (char *)c.x + first * c.in_size[0] * c.in_size[1] * c.in_channels * item;
  c.y = (char *)c.y + first * c.out_size[0] * c.out_size[1] * c.out_channels * item;
  c.images = last - first, c.threads = threads;
  return c;
}

// Calls run(part, its first image, the image behind its last) for each part and adds up the gradients that they write to
// `values`. Returns 0 or an error code.
template <class F> int by_parts(const Conv &c, const F &run) {
  const int64_t parts = parts_of(c), size = int64_t(c.bo) * c.bi, blocks = c.order.slots * size;
  if (parts == 1) return run(c, 0, c.images);
  Scratch others(4 * (parts - 1) * blocks);
  if (!others.memory) return NO_MEMORY;
  float *sums = (float *)others.memory;
  const int threads = threads_of(c);
  int failed[PARTS] = {};
  const auto run_part = [&](int64_t q, int its_threads) {
    const int64_t first = c.images * q / parts, last = c.images * (q + 1) / parts;
    Conv part = of_images(c, first, last, its_threads);
    if (q) part.values = sums + (q - 1) * blocks;
    failed[q] = guarded([&] { return run(part, first, last); });
  };
  if (threads == 1 || parts % threads) {
    for (int64_t q = 0; q < parts; q++) run_part(q, threads);
  } else {
#pragma omp parallel num_threads(threads)
    for (int64_t q = thread_number(); q < parts; q += thread_count()) run_part(q, 1);
  }
  for (int64_t q = 0; q < parts; q++)
    if (failed[q]) return failed[q];
  for (int64_t e = 0; e < c.order.ptr[c.order.rows]; e++) {
    const int32_t slot = c.order.slot[e];
    if (!inside(slot, c.order.slots)) return REFUSED;
    float *out = c.values + slot * size;
    for (int64_t q = 1; q < parts; q++) {
      const float *more = sums + (q - 1) * blocks + slot * size;
      for (int64_t i = 0; i < size; i++) out[i] += more[i];
    }
  }
  return 0;
}

bool of_elements(const Conv &c) { return c.bo == 1 && c.bi == 1; }

// Null: the inputs are packed as float32.
const HalfKernels *half_kernels_for(const Conv &c) { return c.dtype == BFLOAT16 ? half_kernels() : nullptr; }

// Row r of subgrid q has the entries first[q * rows + r] and on: see arrange_runs.
template <class Each> int multiply_runs(MultiplyPlan &p, const Conv &c, const int32_t *first, const Each &each) {
  Convolve &v = p.v;
  const int64_t lanes = lanes_read(v.x, p.rows, p.cols, 128, v.in_turn);
  const RunsPlan plan(v.subgrids, v.channels, first, v.x.channels, c.groups, lanes);
  const int64_t lists = plan.floats(false, v.threads);
  return with_scratch(lists + v.threads * (conv_floats(v.x) + v.slack), [&](float *memory) {
    v.runs = plan.in(memory, false), v.scratch = memory + lists;
    for (size_t q = 0; q < p.l.subgrids.size(); q++) p.l.subgrids[q].ptr = v.runs.start + q * plan.strips() * STRIP * plan.chunks;
    if (!arrange_runs<false>(plan, v.runs, first, c.values, v.threads, each)) return REFUSED;
    kernels().convolve_elements(v);
    return 0;
  });
}

int multiply(const Conv &c) {
  const HalfKernels *half = of_elements(c) ? nullptr : half_kernels_for(c);
  MultiplyPlan p;
  plan_multiply(p, c, 0, half != nullptr);
  Convolve &v = p.v;
  if (of_elements(c)) {
    if (!c.transposed) return multiply_runs(p, c, c.order.ptr, ForwardEntries(c, v.x, p.rows, p.cols));
    const BackwardEntries each(c, v.x, p.rows, p.cols);
    return each.legal ? multiply_runs(p, c, each.first.data(), each) : REFUSED;
  }
  const int64_t blocks = v.used * c.bo * c.bi;  // packed first, but for those of dx in float32
  const int64_t floats = half ? round_up(blocks / 2, LINE) + v.threads * half_thread_floats(v.x)
                              : (c.transposed ? 0 : round_up(blocks, LINE)) + v.threads * (conv_floats(v.x) + ASIDE);
  return with_scratch(floats, [&](float *memory) {
    v.scratch = memory;
    (half ? half->convolve : kernels().convolve)(v);
    return 0;
  });
}

int outer_part(const Conv &c) {
  OuterPlan p;
  plan_outer(p, c);
  ConvOuter &m = p.m;
  if (!of_elements(c)) {
    return with_scratch(m.panels_at_once * (conv_floats(m.x) + conv_floats(m.dy)), [&](float *memory) {
      m.scratch = memory;
      kernels().conv_outer(m);
      return 0;
    });
  }
  const RunsPlan plan(1, m.order.rows, c.order.ptr, m.x.channels, c.groups, lanes_read(m.x, p.rows, p.cols, 256, true));
  const int64_t lists = plan.floats(true, m.threads);
  return with_scratch(lists + conv_floats(m.x) + conv_floats(m.dy) + LINE, [&](float *memory) {  // the last vector may read beyond
    m.runs = plan.in(memory, true), m.scratch = memory + lists;
    if (!arrange_runs<true>(plan, m.runs, c.order.ptr, nullptr, m.threads, ForwardEntries(c, m.x, p.rows, p.cols))) return REFUSED;
    kernels().conv_outer_elements(m);
    return 0;
  });
}

int outer(const Conv &c) {
  const HalfKernels *half = of_elements(c) ? nullptr : half_kernels_for(c);
  OuterPlan p;
  if (!half || !plan_outer_half(p, c, half->most_packed))
    return by_parts(c, [](const Conv &part, int64_t, int64_t) { return outer_part(part); });
  return with_scratch(p.m.panels_at_once * (conv_floats(p.m.x) + conv_floats(p.m.dy)) / 2, [&](float *memory) {
    p.m.scratch = memory;
    half->conv_outer(p.m);
    return 0;
  });
}

int backward(const Conv &for_dx, const Conv &for_dvalues) {
  if (of_elements(for_dx) || half_kernels_for(for_dx)) {  // the two pack differently
    const int failed = multiply(for_dx);
    return failed ? failed : outer(for_dvalues);
  }
  const bool past = writes_past(for_dx);
  return by_parts(for_dvalues, [&](const Conv &part, int64_t first, int64_t last) {
    const Conv dx_part = of_images(for_dx, first, last, part.threads);
    ConvBackward b = {};
    MultiplyPlan dx;
    OuterPlan dvalues;
    if (!plan_backward(b, dx, dvalues, dx_part, part)) {
      const int failed = multiply(dx_part);
      return failed ? failed : outer_part(part);
    }
    b.dx.past = past;
    ConvOuter &m = b.dvalues;
    return with_scratch(m.panels_at_once * (conv_floats(m.x) + conv_floats(m.dy)) + m.threads * ASIDE, [&](float *memory) {
      m.scratch = memory;
      kernels().conv_backward(b);
      return 0;
    });
  });
}

Conv conv_of(const Call &from, const Order &order) {
  Conv c = {from.sizes, from.x.data, from.y.data, from.values, from.bias, order, from.x.cols, from.y.cols,
            int32_t(from.bo), int32_t(from.bi), int32_t(from.transposed), int32_t(from.x.dtype), int32_t(from.threads)};
  for (int axis = 0; axis < 2; axis++) {
    if (c.kernel[axis] == 1) c.dilation[axis] = 1;  // it has no effect
    if (c.out_size[axis] == 1 && c.stride[axis] > 1024) c.stride[axis] = 1;  // no effect either, and it would be as many phases
  }
  return c;
}

}  // namespace

int conv_multiply(const Call &call, const Order &order) {
  return guarded([&] { return multiply(conv_of(call, order)); });
}

int conv_outer(const Call &call, const Order &order) {
  return guarded([&] { return outer(conv_of(call, order)); });
}

int conv_backward(const Call &dx, const Order &by_col, const Call &dvalues, const Order &by_row) {
  return guarded([&] { return backward(conv_of(dx, by_col), conv_of(dvalues, by_row)); });
}
