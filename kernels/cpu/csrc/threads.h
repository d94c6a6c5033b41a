// OpenMP's threads, or one where the compiler has no OpenMP.
#pragma once

#if defined(_OPENMP)
extern "C" {  // clang has its <omp.h> in a package of its own
int omp_get_thread_num();
int omp_get_num_threads();
}
#endif

namespace {
#if defined(_OPENMP)
inline long thread_number() { return omp_get_thread_num(); }
inline long thread_count() { return omp_get_num_threads(); }
#else
inline long thread_number() { return 0; }
inline long thread_count() { return 1; }
#endif
}  // namespace
