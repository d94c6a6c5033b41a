// The exported functions: choose an instruction set, lend scratch memory, dispatch. Compiled for the baseline.
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "library.h"
#include "plan.h"
#if defined(WITH_AVX)
#include <cpuid.h>
#endif

// The scratch memory: arenas that grow, one a running call, idle ones kept for the next until the thread ends that asked
// the system for them.
struct Arena {
  char *memory = nullptr;
  size_t size = 0;
  bool busy = false;
  const void *owner = nullptr;

  void release() { std::free(memory), memory = nullptr, size = 0; }
};

namespace {

const int ABI = 9;  // raised with every change of api.h or of a signature below or in places.cpp; library.py asks for it

constexpr int ARENAS = 128;  // pieces of scratch in use at the same time that are kept; more are allocated and freed
Arena arenas[ARENAS];
std::mutex lock;
bool forked = false;  // OpenMP's threads do not survive a fork: a child runs on one

// One a thread that has used scratch: gives back what the thread leaves behind.
struct Leaving {
  ~Leaving() {
    std::lock_guard<std::mutex> guard(lock);
    for (Arena &a : arenas) {
      if (a.owner != this) continue;
      a.owner = nullptr;  // of a busy one the thread that uses it next
      if (!a.busy) a.release();
    }
  }
};
thread_local Leaving leaving;

void *allocate(size_t bytes) {
  constexpr size_t page = size_t(1) << 21;
  bytes = (bytes + page - 1) / page * page;
  void *memory = std::aligned_alloc(page, bytes);
#if defined(MADV_HUGEPAGE)
  if (memory) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace

Scratch::Scratch(size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  for (Arena &a : arenas) {
    // The smallest idle one that is large enough, else the largest.
    const bool fits = a.size >= bytes, better = !arena || (arena->size >= bytes ? fits && a.size < arena->size : a.size > arena->size);
    if (!a.busy && better) arena = &a;
  }
  if (!arena) {
    memory = (char *)allocate(bytes);
    return;
  }
  if (arena->size < bytes) {
    arena->release();
    arena->memory = (char *)allocate(bytes);
    if (arena->memory) arena->size = bytes, arena->owner = &leaving;
  }
  if (!arena->owner) arena->owner = &leaving;
  memory = arena->memory;
  arena->busy = memory != nullptr;
}

Scratch::~Scratch() {
  std::lock_guard<std::mutex> guard(lock);
  if (arena) arena->busy = false;
  else std::free(memory);
}

namespace {

// A fork waits until no thread is in the middle of growing or releasing an arena: the child gets whole ones.
void before_fork() { lock.lock(); }
void in_parent() { lock.unlock(); }
void in_child() {
  new (&lock) std::mutex;  // held since before_fork, by the thread of the parent
  for (Arena &a : arenas) a.busy = false;
  forked = true;
}

struct Level {
  const char *name = "";
  const Kernels *kernels = nullptr;
  const HalfKernels *half = nullptr;  // for bfloat16, if it has its own
};
Level live;

#if defined(WITH_AVX)
bool has(unsigned leaf, unsigned subleaf, int number, int bit) {
  unsigned r[4];
  return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[number] >> bit & 1);
}

// Whether the processor has AMX for bfloat16, and the system lets this process use it.
bool may_use_amx() {
#if defined(__linux__)
  if (!has(7, 0, 3, 22) || !has(7, 0, 3, 24) || !has(1, 0, 2, 27)) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, once a process
  return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// The level of this name, the best one for "". Each includes those below; without kernels when the machine lacks it.
Level by_name(const char *name) {
  const auto wanted = [&](const char *level) { return !*name || !std::strcmp(name, level); };
#if defined(WITH_AVX)
  const bool f16c = has(1, 0, 2, 29);  // older compilers do not know its name
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && has(7, 1, 0, 5);
  if (bf16 && amx_kernels.multiply && wanted("amx") && may_use_amx()) return {"amx", &avx512_kernels, &amx_kernels};
  // Intel's processors multiply float32 about as fast as pairs of bfloat16 (measured): there it must be asked for.
  if (bf16 && avx512_bf16_kernels.multiply && wanted("avx512_bf16") && (*name || !__builtin_cpu_is("intel")))
    return {"avx512_bf16", &avx512_kernels, &avx512_bf16_kernels};
  if (avx512 && wanted("avx512")) return {"avx512", &avx512_kernels, nullptr};
  if (avx2 && wanted("avx2")) return {"avx2", &avx2_kernels, nullptr};
#endif
  return wanted("generic") ? Level{"generic", &generic_kernels, nullptr} : Level{};
}

}  // namespace

const Kernels &kernels() { return *live.kernels; }
const HalfKernels *half_kernels() { return live.half; }

CheckedOrder::CheckedOrder(const Order &from, int64_t rows, int64_t others, bool elements) : order(from) {
  constexpr int64_t AHEAD = 16;  // zeros behind the lists, which may be read
  order.others = others, order.illegal = &illegal;
  const int64_t slots = from.slots, list = elements ? 0 : round_up(slots + AHEAD, LINE), starts = round_up(rows + 1, LINE);
  if (!from.ptr || (slots && (!from.other || !from.slot))) {
    failed = NO_STORAGE;
    return;
  }
  if (from.rows != rows || others > INT32_MAX) {
    failed = REFUSED;
    return;
  }
  int32_t *copy = near;
  if (starts + 2 * list > NEAR) {
    far.emplace((starts + 2 * list) * 4);
    if (!far->memory) {
      failed = NO_MEMORY;
      return;
    }
    copy = (int32_t *)far->memory;
  }
  order.ptr = copy;
  std::memcpy(copy, from.ptr, (rows + 1) * 4);
  uint32_t sign = 0;  // of a number or of a difference
  for (int64_t r = 0; r < rows; r++) sign |= uint32_t(copy[r]) | (uint32_t(copy[r + 1]) - uint32_t(copy[r]));
  if (copy[0] || sign >> 31 || copy[rows] < 0 || copy[rows] > slots) {
    failed = REFUSED;
    return;
  }
  if (elements) return;
  int32_t *other = copy + starts, *slot = other + list;
  const int64_t used = copy[rows];
  std::memcpy(other, from.other, used * 4);
  std::memset(other + used, 0, AHEAD * 4);
  std::memcpy(slot, from.slot, slots * 4);
  std::memset(slot + slots, 0, AHEAD * 4);
  order.other = other, order.slot = slot;
  if (!kernels().all_inside(other, used, others) || !kernels().all_inside(slot, slots, slots)) failed = REFUSED;
}

void expect_large(void *data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t page = 1 << 21;
  if (bytes < 2 * page) return;
  uintptr_t first = ((uintptr_t)data + page - 1) / page * page, last = ((uintptr_t)data + bytes) / page * page;
  if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
}

// Whether a float32 output is to be written past the caches. What leaves the L2 caches before it is read gains nothing by
// passing through them, and to fetch its lines only to overwrite them takes longer than the products at high sparsity.
// Measured in networks, with what reads it next: never slower from the size of the L2 caches on. (bfloat16: slower at times.)
bool writes_past(const void *data, int64_t step, int64_t bytes, int threads) {
  constexpr int64_t line = 4 * LINE;
  return (uintptr_t)data % line == 0 && step % line == 0 && bytes > threads * 8 * half_of_l2();
}

// Storage that was resized to nothing has no address.
static bool has_memory(const Matrix &x) { return x.data || !x.rows || !x.cols; }

static bool writes_past(const Matrix &y, int threads) {
  return y.dtype == FLOAT32 && writes_past(y.data, y.row_stride * 4, y.rows * y.row_stride * 4, threads);
}

int threads_for(int64_t flops, int threads) {
  if (forked || flops < (int64_t(1) << 20)) return 1;  // too little to wake anyone up for
  return threads < 1 ? 1 : threads;
}

int64_t half_of_l2() {
  static const int64_t floats = [] {
    long bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return int64_t(bytes < (256 << 10) ? 1 << 20 : bytes) / 8;  // unknown or odd: 1 MiB
  }();
  return floats;
}

#pragma GCC visibility push(default)
extern "C" {

int sk_abi() { return ABI; }

// Chooses the instruction set by name, the best one for "". Returns 0 when the machine lacks it.
int sk_use(const char *name) {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(before_fork, in_parent, in_child); });
  const Level found = by_name(name);
  std::lock_guard<std::mutex> guard(lock);
  if (found.kernels && (live.kernels != found.kernels || live.half != found.half)) live = found;  // others may be in a call
  return found.kernels != nullptr;
}

const char *sk_name() { return live.name; }

// Whether bfloat16 inputs meet kernels of their own, which take bfloat16 values.
int sk_bfloat16() { return live.half != nullptr; }

int sk_openmp() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

// Bytes of scratch that are held for the next calls.
int64_t sk_scratch_bytes() {
  std::lock_guard<std::mutex> guard(lock);
  int64_t total = 0;
  for (const Arena &a : arenas) total += (int64_t)a.size;
  return total;
}

void sk_release_scratch() {
  std::lock_guard<std::mutex> guard(lock);
  for (Arena &a : arenas)
    if (!a.busy) a.release();
}

// All return 0, or what library.h says.
int sk_multiply(Multiply *m) {
  if (!has_memory(m->x) || (m->order.slots && !m->values)) return NO_STORAGE;
  const bool elements = m->in == 1 && m->out == 1, half = !elements && live.half && m->x.dtype == BFLOAT16;
  const bool few = !elements && !half && !m->transposed && m->x.rows <= FEW_TOKENS;
  const CheckedOrder checked(m->order, blocks_of(m->y.cols, m->out), blocks_of(m->x.cols, m->in), elements);
  if (checked.failed) return checked.failed;
  m->order = checked.order;
  const int64_t used = m->order.ptr[m->order.rows], size = int64_t(m->in) * m->out;
  m->threads = threads_for(work(used * size, m->x.rows), m->threads);
  expect_large(m->y.data, m->y.rows * m->y.row_stride * itemsize(m->y.dtype));
  int64_t floats;
  if (elements) {
    m->plan = plan_elements(m->order, m->x.cols, m->x.rows, false, m->threads);
    floats = m->x.rows <= NARROW ? m->x.cols * m->plan.lanes + m->threads * m->plan.strip * (2 * m->plan.lanes + 1)
                                 : m->plan.tokens * m->x.cols + m->threads * thread_floats(m->plan, false);
  } else if (half) {
    floats = plan_half(*m);
  } else if (few) {
    floats = blocks_of(m->x.cols, m->in) * m->in * m->x.rows;
  } else {
    floats = plan_product(*m);
  }
  const int64_t cols = elements ? 0 : blocks_of(m->x.cols, m->in);
  Scratch scratch((floats + wanted_floats(cols)) * 4);
  if (!scratch.memory) return NO_MEMORY;
  m->scratch = scratch.memory;
  if (!elements) m->wanted = wanted_cols(m->order, cols, (uint8_t *)(scratch.memory + floats * 4));
  m->past = writes_past(m->y, m->threads);
  const Kernels &k = *live.kernels;
  (half ? live.half->multiply : elements ? k.multiply_elements : few ? k.multiply_few : k.multiply)(*m);
  return checked.result();
}

int sk_outer(Outer *m) {
  const bool elements = m->bo == 1 && m->bi == 1;
  const bool half = !elements && live.half && m->x.dtype == BFLOAT16 && m->dy.dtype == BFLOAT16;
  if (!has_memory(m->x) || !has_memory(m->dy)) return NO_STORAGE;
  const CheckedOrder checked(m->order, blocks_of(m->dy.cols, m->bo), blocks_of(m->x.cols, m->bi), elements);
  if (checked.failed) return checked.failed;
  m->order = checked.order;
  const int64_t size = int64_t(m->bo) * m->bi;
  m->threads = threads_for(work(m->order.ptr[m->order.rows] * size, m->x.rows), m->threads);
  expect_large(m->out, m->order.slots * size * 4);
  int64_t floats;
  if (elements) {
    m->plan = plan_elements(m->order, m->x.cols, m->x.rows, true, m->threads);
    floats = m->x.rows <= NARROW ? (m->x.cols + m->dy.cols) * m->plan.lanes
                                 : m->plan.tokens * m->x.cols + m->threads * thread_floats(m->plan, true);
  } else {
    floats = half ? plan_half(*m) : plan_superpanel(*m);
  }
  Scratch scratch((floats + (elements ? 0 : wanted_floats(*m))) * 4);
  if (!scratch.memory) return NO_MEMORY;
  m->scratch = scratch.memory;
  if (!elements) find_wanted(*m, scratch.memory + floats * 4);
  (half ? live.half->outer : elements ? live.kernels->outer_elements : live.kernels->outer)(*m);
  return checked.result();
}

int sk_sketch(Sketch *m) {
  if (!has_memory(m->x) || !has_memory(m->dy) || !m->u || !m->v) return NO_STORAGE;
  const int64_t groups = blocks_of(blocks_of(m->dy.cols, m->bo), GROUP) + blocks_of(blocks_of(m->x.cols, m->bi), GROUP);
  m->threads = threads_for(2 * m->x.rows * (m->dy.cols + m->x.cols) * round_up(m->pairs, GROUP_PAIRS), m->threads);
  m->plan = sketch_plan(groups, m->pairs, m->x.rows, m->threads);
  Scratch scratch(m->plan.floats * 4);
  if (!scratch.memory) return NO_MEMORY;
  m->scratch = scratch.memory;
  live.kernels->sketch(*m);
  return 0;
}

int sk_backward(Backward *b) {
  Multiply &m = b->dx;
  Outer &d = b->dvalues;
  if ((d.bo == 1 && d.bi == 1) || (live.half && d.dy.dtype == BFLOAT16)) {
    const int failed = sk_multiply(&m);  // they pack differently
    return failed ? failed : sk_outer(&d);
  }
  if (!has_memory(d.x) || !has_memory(d.dy) || !m.values) return NO_STORAGE;
  const int64_t rows = blocks_of(d.dy.cols, d.bo), cols = blocks_of(d.x.cols, d.bi);
  const CheckedOrder for_dx(m.order, cols, rows, false), for_dvalues(d.order, rows, cols, false);
  if (for_dx.failed || for_dvalues.failed) return for_dx.failed ? for_dx.failed : for_dvalues.failed;
  m.order = for_dx.order, d.order = for_dvalues.order;
  const int64_t size = int64_t(d.bo) * d.bi;
  d.threads = threads_for(2 * work(d.order.ptr[d.order.rows] * size, d.x.rows), d.threads);
  expect_large(m.y.data, m.y.rows * m.y.row_stride * itemsize(m.y.dtype));
  expect_large(d.out, d.order.slots * size * 4);
  const int64_t floats = plan_superpanel(d) + d.threads * ASIDE;
  Scratch scratch((floats + wanted_floats(d)) * 4);
  if (!scratch.memory) return NO_MEMORY;
  d.scratch = scratch.memory;
  find_wanted(d, scratch.memory + floats * 4);
  m.past = writes_past(m.y, d.threads);
  live.kernels->backward(*b);
  return 0;
}

}  // extern "C"
#pragma GCC visibility pop
