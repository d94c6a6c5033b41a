// Clang's OpenMP on GNU's runtime. PyTorch brings libgomp; what clang compiles calls libomp, whose threads would be a
// second team on the same cores. The calls that clang makes for this library are few: they are answered here, by libgomp.
// Their signatures are those of LLVM's kmp.h, which clang cannot change. GCC compiles this file to nothing.
//
// Regions nest (conv_parts.h), and a thread's number is that in its region: also where that has one thread. So none has an
// `if` clause, for which clang calls the body itself, within the region around it.
#if defined(__clang__) && defined(_OPENMP) && defined(__linux__)
#include <cstdarg>
#include <cstdint>
#include <cstdlib>
#include <utility>

extern "C" {

// libgomp's, as GCC calls it.
void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags);
void GOMP_barrier();
bool GOMP_loop_dynamic_start(long first, long end, long step, long chunk, long *from, long *to);
bool GOMP_loop_dynamic_next(long *from, long *to);
void GOMP_loop_end_nowait();
int omp_get_thread_num();
int omp_get_num_threads();

}  // extern "C"

static_assert(sizeof(long) == sizeof(int64_t), "libgomp counts a loop in long");

namespace {

typedef void (*Region)(int32_t *, int32_t *, ...);  // the body of a parallel region, outlined by clang

constexpr size_t MOST = 48;  // variables that a region uses, each handed over by its address

struct Call {
  Region region;
  int count;
  void *variables[MOST];
};

template <size_t> using Variable = void *;

template <size_t... N> void call_with(const Call &c, std::index_sequence<N...>) {
  int32_t number = omp_get_thread_num(), zero = 0;
  ((void (*)(int32_t *, int32_t *, Variable<N>...))c.region)(&number, &zero, c.variables[N]...);
}

template <size_t COUNT> void call(const Call &c) { call_with(c, std::make_index_sequence<COUNT>()); }

template <size_t... COUNT> void call_any(const Call &c, std::index_sequence<COUNT...>) {
  static constexpr void (*by_count[])(const Call &) = {call<COUNT>...};
  by_count[c.count](c);
}

void run(void *data) { call_any(*(const Call *)data, std::make_index_sequence<MOST + 1>()); }

// A loop that threads take pieces of, between its announcement and the first piece.
struct Loop {
  int64_t first, last, step, chunk;
  bool begun;
};

// schedule(static): one piece for each thread. The bounds are inclusive; a thread without a piece gets an empty one.
void my_piece(int64_t *first, int64_t *last, int64_t *stride, int64_t step) {
  const int64_t all = *last < *first ? 0 : (*last - *first) / step + 1;
  const int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
  *stride = all * step;
  *last = *first + (all * (me + 1) / threads - 1) * step;
  *first += all * me / threads * step;
}

thread_local unsigned asked = 0;  // threads of the next region
thread_local Loop loop;

}  // namespace

extern "C" {

int32_t __kmpc_global_thread_num(void *) { return omp_get_thread_num(); }

void __kmpc_push_num_threads(void *, int32_t, int32_t threads) { asked = threads; }

void __kmpc_fork_call(void *, int32_t count, Region region, ...) {
  Call c = {region, count, {}};
  if (size_t(count) > MOST) std::abort();  // a matter of the source alone: every test of that kernel ends here
  va_list variables;
  va_start(variables, region);
  for (int i = 0; i < count; i++) c.variables[i] = va_arg(variables, void *);
  va_end(variables);
  const unsigned threads = asked;
  asked = 0;
  GOMP_parallel(run, &c, threads, 0);
}

void __kmpc_barrier(void *, int32_t) { GOMP_barrier(); }

void __kmpc_for_static_init_8(void *, int32_t, int32_t, int32_t *, int64_t *first, int64_t *last, int64_t *stride, int64_t step,
                              int64_t) {
  my_piece(first, last, stride, step);
}
void __kmpc_for_static_init_8u(void *, int32_t, int32_t, int32_t *, uint64_t *first, uint64_t *last, int64_t *stride, int64_t step,
                               int64_t) {
  my_piece((int64_t *)first, (int64_t *)last, stride, step);  // no loop here is so long that the sign mattered
}
void __kmpc_for_static_fini(void *, int32_t) {}

// schedule(dynamic): pieces until there are no more.
void __kmpc_dispatch_init_8(void *, int32_t, int32_t, int64_t first, int64_t last, int64_t step, int64_t chunk) {
  loop = {first, last, step, chunk, false};
}
int __kmpc_dispatch_next_8(void *, int32_t, int32_t *, int64_t *first, int64_t *last, int64_t *stride) {
  long from, to;
  const bool more = loop.begun ? GOMP_loop_dynamic_next(&from, &to)
                               : GOMP_loop_dynamic_start(loop.first, loop.last + 1, loop.step, loop.chunk, &from, &to);
  loop.begun = true;
  if (!more) {
    GOMP_loop_end_nowait();
    return 0;
  }
  *first = from, *last = to - 1, *stride = loop.step;
  return 1;
}
void __kmpc_dispatch_deinit(void *, int32_t) {}

}  // extern "C"
#endif
