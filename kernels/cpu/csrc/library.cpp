// The exported functions: choose an instruction set, plan the panels, lend scratch memory. Compiled for the baseline.
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "library.h"
#if defined(WITH_AVX)
#include <cpuid.h>
#endif

const Kernels *live = nullptr;

// The scratch memory: arenas that grow, one a running call, idle ones kept for the next.
struct Arena {
  char *memory = nullptr;
  size_t size = 0;
  bool busy = false;
};

namespace {

const int ABI = 3;  // raised with every change of api.h or of a signature below; library.py asks for it

constexpr int ARENAS = 64;  // calls at the same time that keep their scratch; more allocate and free
Arena arenas[ARENAS];
std::mutex lock;
bool forked = false;  // OpenMP's threads do not survive a fork: a child runs on one

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
    if (!a.busy && (!arena || a.size > arena->size)) arena = &a;  // the largest idle one
  }
  if (!arena) {
    memory = (char *)allocate(bytes);
    return;
  }
  if (arena->size < bytes) {
    std::free(arena->memory);
    arena->size = 0;
    arena->memory = (char *)allocate(bytes);
    if (arena->memory) arena->size = bytes;
  }
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

const Kernels *by_name(const char *name) {
#if defined(WITH_AVX)
  unsigned a, b, c, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);  // older compilers do not know its name
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (!*name || !std::strcmp(name, "avx512"))) return &avx512_kernels;
  if (avx2 && (!*name || !std::strcmp(name, "avx2"))) return &avx2_kernels;
#endif
  return !*name || !std::strcmp(name, "generic") ? &generic_kernels : nullptr;
}

}  // namespace

void expect_large(void *data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t page = 1 << 21;
  if (bytes < 2 * page) return;
  uintptr_t first = ((uintptr_t)data + page - 1) / page * page, last = ((uintptr_t)data + bytes) / page * page;
  if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
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

namespace {

// What a product takes, in operations: with few tokens the time is that of reading (or writing) the blocks.
int64_t work(int64_t values, int64_t tokens) { return 2 * values * (tokens < 8 ? 8 : tokens); }

// Tokens a panel: a packed panel fills half of the L2 cache, and every thread gets one.
int64_t panel_tokens(int64_t tokens, int64_t features, int64_t least, int64_t most, int threads) {
  int64_t panel = half_of_l2() / features;
  panel = panel < least ? least : panel > most ? most : panel;
  int64_t share = (tokens + threads - 1) / threads;
  if (panel > share) panel = share;
  int64_t panels = (tokens + panel - 1) / panel;
  panels = (panels + threads - 1) / threads * threads;
  panel = (tokens + panels - 1) / panels;
  return panel < 1 ? 1 : panel;
}

// The panels of an outer product, and how many are packed at a time. Returns the floats that they take.
int64_t plan_superpanel(Outer &m) {
  const int64_t tokens = m.x.rows, bytes = 4 * int64_t(m.order.ptr[m.order.rows]) * m.bo * m.bi;
  const int64_t x_width = blocks_of(m.x.cols, m.bi) * m.bi, dy_width = blocks_of(m.dy.cols, m.bo) * m.bo;
  // Each panel reads and writes all blocks of the thread once: when they leave the cache, long panels pay for it.
  const bool large = bytes > (int64_t(4) << 20);
  const int64_t wide = x_width > dy_width ? x_width : dy_width;
  m.panel = large ? (tokens < 256 ? tokens : 256) : panel_tokens(tokens, wide, 48, 256, 1);
  const int64_t panels = (tokens + m.panel - 1) / m.panel;
  m.panels_at_once = (int64_t(3) << 20) / ((x_width + dy_width) * m.panel);
  if (m.panels_at_once < m.threads) m.panels_at_once = m.threads;
  if (m.panels_at_once > panels) m.panels_at_once = panels;
  return m.panels_at_once * m.panel * (x_width + dy_width);
}

// 1x1: features of x whose panel fills most of a usual L1 cache; but at least so many entries a row and chunk.
void plan_chunks(const Order &order, int64_t features, int64_t lanes, int64_t entries, int64_t &chunks, int32_t &shift) {
  const int64_t most = order.ptr[order.rows] / (order.rows * entries) + 1;
  shift = 0;
  while ((int64_t(8) << shift) * lanes < (int64_t(32) << 10)) shift++;
  while (blocks_of(features, int64_t(1) << shift) > most) shift++;
  chunks = blocks_of(features, int64_t(1) << shift);
}

int64_t arranged_floats(const Order &order, int64_t chunks) {
  return round_up(chunks * order.rows + 1, LINE) + 4 * round_up(order.slots, LINE);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int sk_abi() { return ABI; }

// Chooses the instruction set by name, the best one for "". Returns 0 when the machine lacks it.
int sk_use(const char *name) {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(before_fork, in_parent, in_child); });
  const Kernels *found = by_name(name);
  if (found) live = found;
  return found != nullptr;
}

const char *sk_name() { return live ? live->name : ""; }

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
    if (!a.busy) std::free(a.memory), a.memory = nullptr, a.size = 0;
}

// All return 0, or 1 when there is no memory for the scratch.
int sk_multiply(Multiply *m) {
  const bool elements = m->in == 1 && m->out == 1, few = !elements && !m->transposed && m->x.rows <= FEW_TOKENS;
  const int64_t used = m->order.ptr[m->order.rows], size = int64_t(m->in) * m->out;
  m->threads = threads_for(work(used * size, m->x.rows), m->threads);
  expect_large(m->y.data, m->y.rows * m->y.row_stride * itemsize(m->y.dtype));
  int64_t floats;
  if (elements) {
    plan_chunks(m->order, m->x.cols, MULTIPLY_LANES, 4, m->chunks, m->shift);
    floats = arranged_floats(m->order, m->chunks) + m->threads * (m->x.cols + round_up(m->order.rows, LINE)) * MULTIPLY_LANES;
  } else if (few) {
    floats = blocks_of(m->x.cols, m->in) * m->in * m->x.rows;
  } else {
    const int64_t width = blocks_of(m->x.cols, m->in) * m->in;
    m->panel = panel_tokens(m->x.rows, width, MOST_ROWS, 256, m->threads);
    floats = (m->transposed ? 0 : round_up(used * size, LINE)) + (m->bias ? round_up(m->order.rows * m->out, LINE) : 0) +
             m->threads * round_up(width * m->panel + ASIDE, LINE);
  }
  Scratch scratch(floats * 4);
  if (!scratch.memory) return 1;
  m->scratch = scratch.memory;
  (elements ? live->multiply_elements : few ? live->multiply_few : live->multiply)(*m);
  return 0;
}

int sk_outer(Outer *m) {
  const bool elements = m->bo == 1 && m->bi == 1;
  const int64_t size = int64_t(m->bo) * m->bi;
  m->threads = threads_for(work(m->order.ptr[m->order.rows] * size, m->x.rows), m->threads);
  expect_large(m->out, m->order.slots * size * 4);
  int64_t floats;
  if (elements) {
    plan_chunks(m->order, m->x.cols, OUTER_LANES, 2, m->chunks, m->shift);
    floats = arranged_floats(m->order, m->chunks) + (m->x.cols + m->dy.cols) * OUTER_LANES;
  } else floats = plan_superpanel(*m);
  Scratch scratch(floats * 4);
  if (!scratch.memory) return 1;
  m->scratch = scratch.memory;
  (elements ? live->outer_elements : live->outer)(*m);
  return 0;
}

int sk_sketch(Sketch *m) {
  const int64_t wide = (sketch_groups(m->dy, m->bo) + sketch_groups(m->x, m->bi)) * GROUP * m->pairs, tokens = m->x.rows;
  m->threads = threads_for(2 * tokens * (m->dy.cols + m->x.cols) * round_up(m->pairs, GROUP_PAIRS), m->threads);
  // A panel for which the projections take 8 MiB, or the fewest tokens that are projected at a time.
  m->panel = (int64_t(2) << 20) / wide / 32 * 32;
  m->panel = m->panel < 32 ? 32 : m->panel > SKETCH_TOKENS ? SKETCH_TOKENS : m->panel;
  if (m->panel > tokens) m->panel = round_up(tokens, 32);
  Scratch scratch((m->panel * wide + m->threads * sketch_floats(m->pairs)) * 4);
  if (!scratch.memory) return 1;
  m->scratch = scratch.memory;
  live->sketch(*m);
  return 0;
}

int sk_backward(Backward *b) {
  Multiply &m = b->dx;
  Outer &d = b->dvalues;
  if (d.bo == 1 && d.bi == 1) return sk_multiply(&m) || sk_outer(&d);  // they pack differently
  const int64_t size = int64_t(d.bo) * d.bi;
  d.threads = threads_for(2 * work(d.order.ptr[d.order.rows] * size, d.x.rows), d.threads);
  expect_large(m.y.data, m.y.rows * m.y.row_stride * itemsize(m.y.dtype));
  expect_large(d.out, d.order.slots * size * 4);
  Scratch scratch((plan_superpanel(d) + d.threads * ASIDE) * 4);
  if (!scratch.memory) return 1;
  d.scratch = scratch.memory;
  live->backward(*b);
  return 0;
}

}  // extern "C"
#pragma GCC visibility pop
