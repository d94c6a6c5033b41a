// The gradient of a convolution's weight as the sum of those of a few parts of the images.
//
// Two threads that add to the same blocks read each what the other has packed, through the caches of both; with a part each
// they share nothing until the end. How many parts there are is for the sizes to say and not for the threads: the sums are
// the same to the bit however many there are. Compiled for the baseline alone.
#pragma once
#include <exception>

#include "conv_plan.h"
#include "threads.h"

namespace {

constexpr int64_t PARTS = 2;

// A further part writes and reads all blocks once more, and dx reads them anew: they must be few beside the images. (With as
// many as are let in here one thread takes 1 % longer, with twice as many 3 %; two threads gain up to 13 %.)
int64_t parts_of(const Conv &c) {
  const int64_t blocks = c.order.slots * c.bo * c.bi;
  const int64_t x = c.images * c.in_size[0] * c.in_size[1] * c.in_channels, dy = c.images * c.out_size[0] * c.out_size[1] * c.out_channels;
  const bool even = c.images % PARTS == 0 || c.images >= 8 * PARTS;
  return even && 4 * PARTS * blocks <= x + dy ? PARTS : 1;
}

// A convolution of some of its images.
Conv of_images(Conv c, int64_t first, int64_t last, int threads) {
  const int64_t item = itemsize(c.dtype);
  c.x = (char *)c.x + first * c.in_size[0] * c.in_size[1] * c.in_channels * item;
  c.y = (char *)c.y + first * c.out_size[0] * c.out_size[1] * c.out_channels * item;
  c.images = last - first, c.threads = threads;
  return c;
}

// What runs out of memory in its lists is told like what finds none for its scratch.
template <class F> int guarded(F run) {
  try {
    return run();
  } catch (const TooLarge &) {
    return TOO_LARGE;
  } catch (const std::exception &) {  // of a vector: no memory, or more than there ever is
    return NO_MEMORY;
  }
}

// Runs run(part, its first image, the image behind its last) for each part, and adds up what they write to their `values`.
// Returns 0, or what library.h says, as `run` does.
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

}  // namespace
