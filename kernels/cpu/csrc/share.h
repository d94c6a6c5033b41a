// The entries of an outer product that a thread owns, and what it clears of them at the end; float32 and bfloat16.
#pragma once
#include <cstring>
#include "api.h"
#include "threads.h"
#include "vector.h"

namespace {

// Whether all numbers are from 0 to below `bound`.
bool all_inside(const int32_t *numbers, int64_t count, int64_t bound) {
  const uint32_t top = uint32_t(bound - 1);
  uint32_t sign = 0;  // of a difference or of the number itself
  for (int64_t i = 0; i < count; i++) sign |= uint32_t(numbers[i]) | (top - uint32_t(numbers[i]));
  return !(sign >> 31);
}

// The entries of one thread.
struct Share {
  int64_t first, last, row;  // the block row of the first
};

INLINE Share my_share(const Order &order) {
  const int64_t used = order.ptr[order.rows], me = thread_number(), all_of_us = thread_count();
  Share mine = {used * me / all_of_us, used * (me + 1) / all_of_us, 0};
  while (mine.row < order.rows && order.ptr[mine.row + 1] <= mine.first) mine.row++;
  return mine;
}

// Called by all threads at the end: phantom elements, in which a NaN may have met the filling, and free slots.
INLINE void clear_rest(const Outer &m, const Share &mine) {
  const int64_t size = int64_t(m.bo) * m.bi, used = m.order.ptr[m.order.rows];
  const int64_t rows_left = m.dy.cols % m.bo, cols_left = m.x.cols % m.bi, last_col = m.x.cols / m.bi;
  int64_t row = mine.row;
  for (int64_t e = mine.first; e < mine.last; e++) {
    while (m.order.ptr[row + 1] <= e) row++;
    float *out = m.out + m.order.slot[e] * size;
    if (rows_left && row == m.order.rows - 1) std::memset(out + rows_left * m.bi, 0, (m.bo - rows_left) * m.bi * 4);
    if (cols_left && m.order.other[e] == last_col)
      for (int64_t o = 0; o < m.bo; o++) std::memset(out + o * m.bi + cols_left, 0, (m.bi - cols_left) * 4);
  }
#pragma omp for schedule(static)
  for (int64_t e = used; e < m.order.slots; e++) std::memset(m.out + m.order.slot[e] * size, 0, size * 4);
}

}  // namespace
