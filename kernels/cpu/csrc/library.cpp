// The exported functions of layers, the choice of the instruction set, and the scratch memory. Compiled for the baseline.
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "library.h"
#if defined(WITH_AVX)
#include <cpuid.h>
#elif defined(WITH_NEON)
#include <sys/auxv.h>
#endif

// The scratch memory: arenas that grow, one for each running call. Idle ones are kept until the thread ends that allocated
// them.
struct Arena {
  char *memory = nullptr;
  size_t size = 0;
  bool busy = false;
  const void *owner = nullptr;

  void release() { std::free(memory), memory = nullptr, size = 0; }
};

namespace {

const int ABI = 14;  // raise it with every change of Call or of an exported signature; library.py compares it

constexpr int ARENAS = 128;  // calls at the same time whose scratch is kept; that of more is allocated and freed
Arena arenas[ARENAS];
std::mutex lock;
bool forked = false;  // OpenMP's threads do not survive a fork: a child runs on one

// One for each thread that has used scratch: frees the arenas of a thread that ends.
struct Leaving {
  ~Leaving() {
    std::lock_guard<std::mutex> guard(lock);
    for (Arena &a : arenas) {
      if (a.owner != this) continue;
      a.owner = nullptr;  // a busy one goes to the thread that uses it next
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
    // The smallest idle arena that is large enough, else the largest one.
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

// A fork waits until no thread is growing or releasing an arena, so that the child gets whole ones.
void before_fork() { lock.lock(); }
void in_parent() { lock.unlock(); }
void in_child() {
  new (&lock) std::mutex;  // the old one is held by a thread of the parent
  for (Arena &a : arenas) a.busy = false;
  forked = true;
}

struct Level {
  const char *name = "";
  const Kernels *kernels = nullptr;
  const HalfKernels *half = nullptr;  // those for bfloat16, if it has any
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

// The level of this name, or the best one for ""; its kernels are null if the machine lacks it. Each level includes the
// ones below.
Level by_name(const char *name) {
  const auto wanted = [&](const char *level) { return !*name || !std::strcmp(name, level); };
#if defined(WITH_AVX)
  const bool f16c = has(1, 0, 2, 29);  // __builtin_cpu_supports of older compilers does not know it
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && has(7, 1, 0, 5);
  if (bf16 && amx_kernels.multiply && wanted("amx") && may_use_amx()) return {"amx", &avx512_kernels, &amx_kernels};
  // Intel's processors multiply float32 about as fast as pairs of bfloat16 (measured), so it is not chosen there.
  if (bf16 && avx512_bf16_kernels.multiply && wanted("avx512_bf16") && (*name || !__builtin_cpu_is("intel")))
    return {"avx512_bf16", &avx512_kernels, &avx512_bf16_kernels};
  if (avx512 && wanted("avx512")) return {"avx512", &avx512_kernels, nullptr};
  if (avx2 && wanted("avx2")) return {"avx2", &avx2_kernels, nullptr};
#elif defined(WITH_NEON)
  constexpr unsigned long has_bf16 = 1 << 14;  // HWCAP2_BF16, which older headers lack
  if (neon_bf16_kernels.multiply && wanted("neon_bf16") && getauxval(AT_HWCAP2) & has_bf16)
    return {"neon_bf16", &generic_kernels, &neon_bf16_kernels};
#endif
  return wanted("generic") ? Level{"generic", &generic_kernels, nullptr} : Level{};
}

}  // namespace

const Kernels &kernels() { return *live.kernels; }
const HalfKernels *half_kernels() { return live.half; }

// A tensor whose storage was resized to nothing has no address.
static bool has_memory(const Matrix &x) { return x.data || !x.rows || !x.cols; }

CheckedOrder::CheckedOrder(const Call &c) : order{c.ptr, c.other, c.slot, c.lists, c.slots, 0, &illegal} {
  constexpr int64_t AHEAD = 16;  // zeros behind the lists: kernels prefetch by them
  const Sizes &s = c.sizes;
  const int64_t groups = of_convolution(c) ? s.groups : 1, taps = of_convolution(c) ? s.kernel[0] * s.kernel[1] : 1;
  const int64_t block_rows = groups * blocks_of(c.y.cols / groups, c.bo), block_cols = taps * blocks_of(c.x.cols / groups, c.bi);
  const int64_t rows = c.transposed ? block_cols : block_rows, others = c.transposed ? block_rows : block_cols;
  const bool elements = of_elements(c);
  order.others = others;
  const int64_t slots = c.slots, list = elements ? 0 : round_up(slots + AHEAD, LINE), starts = round_up(rows + 1, LINE);
  if (!has_memory(c.x) || !has_memory(c.y) || !c.ptr || (slots && (!c.other || !c.slot || !c.values))) {
    failed = NO_STORAGE;
    return;
  }
  if (c.lists != rows || others > INT32_MAX) {
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
  std::memcpy(copy, c.ptr, (rows + 1) * 4);
  uint32_t sign = 0;  // of a number or of a difference
  for (int64_t r = 0; r < rows; r++) sign |= uint32_t(copy[r]) | (uint32_t(copy[r + 1]) - uint32_t(copy[r]));
  if (copy[0] || sign >> 31 || copy[rows] < 0 || copy[rows] > slots) {
    failed = REFUSED;
    return;
  }
  if (elements) return;
  int32_t *other = copy + starts, *slot = other + list;
  const int64_t used = copy[rows];
  std::memcpy(other, c.other, used * 4);
  std::memset(other + used, 0, AHEAD * 4);
  std::memcpy(slot, c.slot, slots * 4);
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

// An output that is larger than the L2 caches leaves them before it is read, and fetching its lines only to overwrite them
// takes longer than the products at high sparsity. Measured in networks, with the layer that reads it next: never slower
// for float32 from the size of the L2 caches on; for bfloat16 sometimes slower.
bool writes_past(const void *data, int64_t step, int64_t bytes, int threads) {
  constexpr int64_t line = 4 * LINE;
  return (uintptr_t)data % line == 0 && step % line == 0 && bytes > threads * 8 * half_of_l2();
}

int threads_for(int64_t flops, int threads) {
  if (forked || flops < (int64_t(1) << 20)) return 1;  // too little work to wake other threads
  return threads < 1 ? 1 : threads;
}

int64_t half_of_l2() {
  static const int64_t floats = [] {
    long bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return int64_t(bytes < (256 << 10) ? 1 << 20 : bytes) / 8;  // 1 MiB if the system does not know
  }();
  return floats;
}

static int with_order(const Call &c, int (*product)(const Call &, const Order &)) {
  const CheckedOrder checked(c);
  if (checked.failed) return checked.failed;
  const int failed = product(c, checked.order);
  return failed ? failed : checked.result();
}

// Plan a batch norm, allocate its scratch and run it; `beside`: floats of each channel beside the sums of chunks.
static int with_norm(const NormCall &c, void (*kernel)(const Norm &), const float *result, int beside) {
  if (!c.x || !c.weight || !c.bias || !c.stats || (c.dx ? !c.dy || (c.residual_grad && !c.y) : !c.y)) return NO_STORAGE;
  Norm m = {c, 0, 0, nullptr};
  m.chunk = half_of_l2() / 4 / c.channels;  // a chunk of all tensors that are read fits the L2 cache
  if (m.chunk < 8) m.chunk = 8;
  m.threads = threads_for(c.pixels * c.channels * 16, (int)c.threads);
  m.past = c.channels % LINE == 0 && writes_past(result, c.channels * 4, c.pixels * c.channels * 4, (int)m.threads);
  return with_scratch((blocks_of(c.pixels, m.chunk) * 2 + beside) * c.channels, [&](float *memory) {
    m.scratch = (char *)memory;
    kernel(m);
    return 0;
  });
}

#pragma GCC visibility push(default)
extern "C" {

int sk_abi() { return ABI; }

// Choose the instruction set by name, the best one for "". Returns 0 if the machine lacks it.
int sk_use(const char *name) {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(before_fork, in_parent, in_child); });
  const Level found = by_name(name);
  std::lock_guard<std::mutex> guard(lock);
  if (found.kernels && (live.kernels != found.kernels || live.half != found.half)) live = found;  // other threads may be in a call
  return found.kernels != nullptr;
}

const char *sk_name() { return live.name; }

// Whether there are kernels for bfloat16 inputs, which also take bfloat16 values.
int sk_bfloat16() { return live.half != nullptr; }

int sk_openmp() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

// Bytes of scratch that are kept for the next calls.
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

// The products. All of them return 0 or an error code of library.h.

int sk_multiply(const Call *c) { return with_order(*c, of_convolution(*c) ? conv_multiply : linear_multiply); }

int sk_outer(const Call *c) { return with_order(*c, of_convolution(*c) ? conv_outer : linear_outer); }

int sk_backward(const Call *dx, const Call *dvalues) {
  const CheckedOrder by_col(*dx), by_row(*dvalues);
  if (by_col.failed || by_row.failed) return by_col.failed ? by_col.failed : by_row.failed;
  const int failed = (of_convolution(*dx) ? conv_backward : linear_backward)(*dx, by_col.order, *dvalues, by_row.order);
  return failed ? failed : by_col.result() ? by_col.result() : by_row.result();
}

int sk_norm_forward(const NormCall *c) { return with_norm(*c, kernels().norm_forward, c->y, 6); }

int sk_norm_backward(const NormCall *c) { return with_norm(*c, kernels().norm_backward, c->dx, 9); }

// Forward, or backward if c->dqkv is given.
int sk_attention(const AttentionCall *c) {
  if (!c->qkv || !c->stats || (c->dqkv ? !c->dy : !c->y)) return NO_STORAGE;
  Attention a = {*c, 0, 0, nullptr};
  const int64_t heads = c->batch * c->heads, numbers = heads * c->tokens * c->features;
  a.threads = threads_for(4 * numbers * c->tokens, (int)c->threads);
  // Few heads with long contexts are cut, by their sizes alone: the gradient of keys and values is summed over the parts.
  const int64_t least = 256, most = c->tokens < 2 * least ? 1 : c->tokens / least, wanted = blocks_of(8, heads);
  a.part = round_up(blocks_of(c->tokens, wanted < most ? wanted : most), 2 * LINE), a.parts = blocks_of(c->tokens, a.part);
  expect_large(c->dqkv ? c->dqkv : c->y, numbers * (c->dqkv ? 12 : 4));
  const int64_t sums = c->dqkv ? (a.parts - 1) * 2 * numbers : 0;
  return with_scratch(a.threads * attention_floats(a) + sums, [&](float *memory) {
    a.scratch = (char *)memory;
    kernels().attention(a);
    return 0;
  });
}

int sk_sketch(const Call *c) {
  if (!has_memory(c->x) || !has_memory(c->y) || !c->u || !c->v) return NO_STORAGE;
  Sketch m = {*c, 0, 0, nullptr};
  Sizes &s = m.call.sizes;
  if (!s.groups) s = {c->x.rows, 1, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
  const int64_t taps = s.kernel[0] * s.kernel[1], tokens = c->y.rows, pairs = c->pairs;
  const int64_t groups = blocks_of(blocks_of(c->y.cols / s.groups, c->bo), GROUP) +
                         blocks_of(taps * blocks_of(c->x.cols / s.groups, c->bi), GROUP);
  m.threads = threads_for(2 * tokens * (c->y.cols + taps * c->x.cols) * round_up(pairs, GROUP_PAIRS), c->threads);
  // A panel for which the projections take 8 MiB, or the fewest tokens that are projected at a time.
  const int64_t wide = s.groups * groups * GROUP * pairs, room = (int64_t(2) << 20) / wide / 32 * 32;
  m.panel = room < 32 ? 32 : room > SKETCH_TOKENS ? SKETCH_TOKENS : room;
  if (m.panel > tokens) m.panel = round_up(tokens, 32);
  return with_scratch(m.panel * wide + m.threads * sketch_floats(pairs), [&](float *memory) {
    m.scratch = (char *)memory;
    live.kernels->sketch(m);
    return 0;
  });
}

}  // extern "C"
#pragma GCC visibility pop
