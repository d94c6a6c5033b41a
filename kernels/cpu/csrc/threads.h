// OpenMP's threads, or one where the compiler has no OpenMP.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {
#if defined(_OPENMP)
inline long thread_number() { return omp_get_thread_num(); }
inline long thread_count() { return omp_get_num_threads(); }
#else
inline long thread_number() { return 0; }
inline long thread_count() { return 1; }
#endif

// Few panels are shared: each is cut into groups of block rows.
inline long groups_of(long panels, long threads) {
  return threads > 1 && (panels < 2 * threads || panels % threads) ? 2 * threads : 1;
}
}  // namespace
