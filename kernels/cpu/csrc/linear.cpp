// Products of the linear layer: plan, allocate scratch memory, call the kernel. Compiled for the baseline.
#include <algorithm>
#include <cstring>

#include "library.h"

namespace {

// Operations that a product is worth: with few tokens its time is that of reading (or writing) the blocks.
int64_t work(int64_t values, int64_t tokens) { return 2 * values * (tokens < 8 ? 8 : tokens); }

// A byte for each block of x (by block column) and of dy (by block row), at the end of the scratch: whether an entry reads it.
int64_t wanted_floats(int64_t cols) { return round_up(cols, 4) / 4; }

const uint8_t *wanted_cols(const Order &order, int64_t cols, uint8_t *wanted) {
  std::memset(wanted, 0, cols);
  for (int64_t e = 0; e < order.ptr[order.rows]; e++) wanted[order.other[e]] = 1;
  return wanted;
}

int64_t wanted_floats(const Outer &m) { return wanted_floats(blocks_of(m.x.cols, m.bi) + m.order.rows); }

void find_wanted(Outer &m, char *memory) {
  const int64_t cols = blocks_of(m.x.cols, m.bi);
  uint8_t *rows = (uint8_t *)memory + cols;
  m.wanted_x = wanted_cols(m.order, cols, (uint8_t *)memory);
  for (int64_t r = 0; r < m.order.rows; r++) rows[r] = m.order.ptr[r] < m.order.ptr[r + 1];
  m.wanted_dy = rows;
}

// Tokens of a panel: a packed panel fills half the L2 cache, and every thread gets one.
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

// Plan the panels of a product; returns the floats of scratch. If one panel holds all tokens, each block row is transposed
// just before its use.
int64_t plan_product(Multiply &m) {
  const int64_t width = blocks_of(m.x.cols, m.in) * m.in, size = int64_t(m.in) * m.out, used = m.order.ptr[m.order.rows];
  m.panel = panel_tokens(m.x.rows, width, MOST_ROWS, 256, m.threads);
  m.group_entries = 0;
  if (!m.transposed && panel_tokens(m.x.rows, width, MOST_ROWS, 256, 1) == m.x.rows) {
    int64_t longest = 0;
    for (int64_t r = 0; r < m.order.rows; r++) longest = std::max<int64_t>(longest, m.order.ptr[r + 1] - m.order.ptr[r]);
    // Threads share the block rows, of which there must be enough, and each has room for the longest.
    if (m.threads == 1 || (m.order.rows >= 4 * m.threads && m.threads * longest <= used)) m.panel = m.x.rows, m.group_entries = longest;
  }
  const bool at_first = !m.transposed && !m.group_entries;
  return (at_first ? round_up(used * size, LINE) : 0) + (m.bias ? round_up(m.order.rows * m.out, LINE) : 0) +
         m.threads * round_up(width * m.panel + ASIDE + m.group_entries * size, LINE);
}

// Plan the panels of an outer product; returns the floats of scratch.
int64_t plan_superpanel(Outer &m) {
  const int64_t tokens = m.x.rows, bytes = 4 * int64_t(m.order.ptr[m.order.rows]) * m.bo * m.bi;
  const int64_t x_width = blocks_of(m.x.cols, m.bi) * m.bi, dy_width = blocks_of(m.dy.cols, m.bo) * m.bo;
  // Each panel reads and writes all blocks of the thread: if these do not fit the cache, panels are long.
  const bool large = bytes > (int64_t(4) << 20);
  m.panel = large ? (tokens < 256 ? tokens : 256) : panel_tokens(tokens, x_width + dy_width, 48, 256, 1);
  // One for each thread: two fill its L2 cache, and all are read after dx was written.
  m.panels_at_once = std::min<int64_t>((tokens + m.panel - 1) / m.panel, m.threads);
  return m.panels_at_once * m.panel * (x_width + dy_width);
}

// The same in bfloat16.
int64_t plan_half(Outer &m) {
  const int64_t width = blocks_of(m.x.cols, m.bi) * m.bi + blocks_of(m.dy.cols, m.bo) * m.bo, tokens = m.x.rows;
  m.panel = round_up(tokens < 256 ? tokens : 256, HALF_TOKENS);
  const int64_t panels = (tokens + m.panel - 1) / m.panel;
  m.panels_at_once = panels_at_once(panels, m.threads);
  return m.panels_at_once * m.panel * width / 2;
}

int64_t lanes_for(int64_t tokens, int64_t most) {
  while (most > 2 * NARROW && round_up(tokens, most) * 4 > tokens * 5) most /= 2;  // else a quarter of them are idle
  return most;
}

// Plan a product at 1x1: see elements.h. Lanes and chunks do not depend on `threads`: they change how a sum is formed.
// `lanes`: those of another product of the same panels, or 0.
ElementPlan plan_elements(const Order &order, int64_t features, int64_t tokens, bool gradient, bool by_col, int threads, int64_t lanes = 0) {
  constexpr int64_t IN_L2 = 128 << 10;  // floats of a panel that may stay whole (twice); entries of a strip
  constexpr int64_t IN_L3 = 256 << 10;  // entries that each panel may read anew
  ElementPlan p = {};
  const double mean = double(order.ptr[order.rows]) / order.rows, density = mean / features;
  int64_t run = 8;  // least mean entries of a run, over which the cost of beginning one is spread
  bool whole = false;
  if (tokens <= NARROW) {
    p.lanes = tokens > 8 ? 16 : tokens > 4 ? 8 : 4;
    p.shift = 9, run = 32;
  } else if (gradient) {  // the most lanes: each entry's are added up once a panel
    p.lanes = lanes_for(tokens, 128);
    p.shift = 6, run = 6;
  } else {
    p.lanes = lanes ? lanes : lanes_for(tokens, 64);
    whole = density < 0.06 && features * p.lanes <= IN_L2 / 2;  // few entries: the L2 cache is fast enough for them
    p.shift = whole ? 16 : density > 0.35 ? 7 : 8;
  }
  while (p.shift < 16 && density * (int64_t(1) << p.shift) < run) p.shift++;
  p.chunks = blocks_of(features, int64_t(1) << p.shift);
  // A panel that does not fit the L2 cache is read once for each strip: long strips, whose part of y (or dy) fills a quarter.
  // With many entries it is the time of these that counts.
  const bool outside_l2 = tokens > NARROW && features * p.lanes >= 2 * IN_L2, long_strips = outside_l2 && density < 0.35;
  p.strip = long_strips ? IN_L2 / p.lanes : p.chunks == 1 ? 64 : 128;
  while (p.strip > LINE && ((!long_strips && mean * p.strip > IN_L2) || p.strip * 2 * threads > order.rows)) p.strip /= 2;
  // Few entries are one piece, and panels are packed just before their use. Of more, a piece fills part of the L2 cache and is
  // read by all panels, as many as 16 MiB hold.
  const int64_t strips = blocks_of(order.rows, p.strip), panels = blocks_of(tokens, p.lanes);
  const bool few = order.ptr[order.rows] <= IN_L3;
  p.strips = few ? strips : int64_t(threads * IN_L2 / (mean * p.strip + 1));
  p.strips = p.strips < 1 ? 1 : p.strips < strips ? p.strips : strips;
  p.alone = few && !gradient && (threads == 1 || panels >= 2 * threads);
  p.ahead = outside_l2 && !gradient && !p.alone;
  const int64_t most = few && gradient ? threads == 1 ? 1 : 4 * threads : panels;
  p.panels = std::min(most, std::max<int64_t>(1, (int64_t(4) << 20) / features / p.lanes));
  if (p.alone) p.panels = threads;
  const auto most_entries = [&](int64_t rows) {
    int64_t most = 0;
    for (int64_t r = 0; r < order.rows; r += rows) most = std::max<int64_t>(most, order.ptr[std::min(r + rows, order.rows)] - order.ptr[r]);
    return most;
  };
  p.entries = most_entries(p.strip * p.strips), p.strip_entries = by_col ? 0 : most_entries(p.strip);
  return p;
}

// Floats of scratch of one product at 1x1.
int64_t floats_of(const ElementPlan &p, int64_t features, int threads) {
  return p.panels * features * p.lanes + arranged_floats(p) + threads * thread_floats(p);
}

// Plan a product in bfloat16 (product_bf16.h); returns the floats of scratch.
int64_t plan_half(Multiply &m) {
  const int64_t width = blocks_of(m.x.cols, m.in) * m.in, size = int64_t(m.in) * m.out, used = m.order.ptr[m.order.rows];
  int64_t most = 2 * half_of_l2() / width;
  most = most < HALF_TOKENS ? HALF_TOKENS : most > 512 ? 512 : most;
  m.shared = m.x.rows > 2 * most;
  const int64_t panels = (m.x.rows + most - 1) / most;
  m.panel = m.shared ? panel_tokens(m.x.rows, width / 2, HALF_TOKENS, most, m.threads) : (m.x.rows + panels - 1) / panels;
  m.panel = round_up(m.panel, HALF_TOKENS);
  m.groups = used * size / (half_of_l2() / 2) + 1;  // a packed group fills a quarter of the L2 cache
  if (!m.shared && m.threads > 1) m.groups = round_up(m.groups, 2 * m.threads);
  if (m.groups > m.order.rows) m.groups = m.order.rows;
  m.group_entries = m.shared ? 0 : used / m.groups + 1 + blocks_of(m.x.cols, m.in);
  if (m.group_entries > used) m.group_entries = used;
  return (m.shared ? used * size / 2 : 0) + (m.bias ? round_up(m.order.rows * m.out, LINE) : 0) +
         m.threads * (HALF_TILE + (width * m.panel + m.group_entries * size) / 2);
}

bool is_written_past(const Matrix &y, int threads) {
  return y.dtype == FLOAT32 && writes_past(y.data, y.row_stride * 4, y.rows * y.row_stride * 4, threads);
}

Multiply multiply_of(const Call &c, const Order &order) {
  Multiply m = {};
  m.x = c.transposed ? c.y : c.x, m.y = c.transposed ? c.x : c.y;
  m.values = c.values, m.bias = c.bias, m.order = order, m.transposed = c.transposed, m.values_dtype = c.values_dtype;
  m.in = c.transposed ? c.bo : c.bi, m.out = c.transposed ? c.bi : c.bo;
  m.threads = threads_for(work(order.ptr[order.rows] * c.bo * c.bi, m.x.rows), c.threads);
  expect_large(m.y.data, m.y.rows * m.y.row_stride * itemsize(m.y.dtype));
  m.past = is_written_past(m.y, m.threads);
  return m;
}

Outer outer_of(const Call &c, const Order &order) {
  Outer m = {};
  m.dy = c.y, m.x = c.x, m.out = c.values, m.order = order, m.bo = c.bo, m.bi = c.bi;
  m.threads = threads_for(work(order.ptr[order.rows] * c.bo * c.bi, m.x.rows), c.threads);
  expect_large(m.out, order.slots * c.bo * c.bi * 4);
  return m;
}

}  // namespace

int linear_multiply(const Call &c, const Order &order) {
  Multiply m = multiply_of(c, order);
  const bool elements = of_elements(c), half = !elements && half_kernels() && m.x.dtype == BFLOAT16;
  const bool few = !elements && !half && !m.transposed && m.x.rows <= FEW_TOKENS;
  int64_t floats;
  if (elements) {
    m.plan = plan_elements(order, m.x.cols, m.x.rows, false, m.transposed, m.threads);
    floats = m.x.rows <= NARROW ? m.x.cols * m.plan.lanes + m.threads * m.plan.strip * (2 * m.plan.lanes + 1)
                                : floats_of(m.plan, m.x.cols, m.threads);
  } else {
    floats = half ? plan_half(m) : few ? blocks_of(m.x.cols, m.in) * m.in * m.x.rows : plan_product(m);
  }
  const int64_t cols = elements ? 0 : blocks_of(m.x.cols, m.in);
  return with_scratch(floats + wanted_floats(cols), [&](float *memory) {
    m.scratch = (char *)memory;
    if (!elements) m.wanted = wanted_cols(order, cols, (uint8_t *)(memory + floats));
    const Kernels &k = kernels();
    (half ? half_kernels()->multiply : elements ? k.multiply_elements : few ? k.multiply_few : k.multiply)(m);
    return 0;
  });
}

int linear_outer(const Call &c, const Order &order) {
  Outer m = outer_of(c, order);
  const bool elements = of_elements(c), half = !elements && half_kernels() && m.x.dtype == BFLOAT16 && m.dy.dtype == BFLOAT16;
  int64_t floats;
  if (elements) {
    m.plan = plan_elements(order, m.x.cols, m.x.rows, true, false, m.threads);
    floats = m.x.rows <= NARROW ? (m.x.cols + m.dy.cols) * m.plan.lanes
                                : floats_of(m.plan, m.x.cols, m.threads);
  } else {
    floats = half ? plan_half(m) : plan_superpanel(m);
  }
  return with_scratch(floats + (elements ? 0 : wanted_floats(m)), [&](float *memory) {
    m.scratch = (char *)memory;
    if (!elements) find_wanted(m, (char *)(memory + floats));
    (half ? half_kernels()->outer : elements ? kernels().outer_elements : kernels().outer)(m);
    return 0;
  });
}

// Both gradients at 1x1 from panels of dy that are packed once; -1 where each by itself is faster: with many entries, for which
// packing matters little, and where panels of both leave the L2 cache.
static int elements_backward(Backward &b) {
  Multiply &m = b.dx;
  Outer &d = b.dvalues;
  constexpr int64_t MOST_ENTRIES = 128 << 10;
  if (d.x.rows <= NARROW) return -1;
  d.plan = plan_elements(d.order, d.x.cols, d.x.rows, true, false, d.threads);
  m.plan = plan_elements(m.order, m.x.cols, m.x.rows, false, true, d.threads, d.plan.lanes);
  m.plan.panels = d.plan.panels;
  if (d.dy.cols <= d.x.cols || d.order.ptr[d.order.rows] > MOST_ENTRIES || (d.x.cols + d.dy.cols) * d.plan.lanes > 2 * half_of_l2()) return -1;
  const int64_t floats = floats_of(m.plan, m.x.cols, d.threads) + floats_of(d.plan, d.x.cols, d.threads);
  return with_scratch(floats, [&](float *memory) {
    d.scratch = (char *)memory;
    kernels().backward_elements(b);
    return 0;
  });
}

int linear_backward(const Call &dx, const Order &by_col, const Call &dvalues, const Order &by_row) {
  const bool elements = of_elements(dx), half = !elements && half_kernels() && dx.y.dtype == BFLOAT16;
  Backward b = {multiply_of(dx, by_col), outer_of(dvalues, by_row)};
  Outer &d = b.dvalues;
  b.dx.threads = d.threads = threads_for(2 * work(by_row.ptr[by_row.rows] * d.bo * d.bi, d.x.rows), dvalues.threads);
  b.dx.past = is_written_past(b.dx.y, d.threads);
  int failed = elements ? elements_backward(b) : -1;
  if (failed >= 0) return failed;
  if (elements || half) {  // the two pack dy differently
    failed = linear_multiply(dx, by_col);
    return failed ? failed : linear_outer(dvalues, by_row);
  }
  const int64_t floats = plan_superpanel(d) + d.threads * ASIDE;
  return with_scratch(floats + wanted_floats(d), [&](float *memory) {
    d.scratch = (char *)memory;
    find_wanted(d, (char *)(memory + floats));
    kernels().backward(b);
    return 0;
  });
}
