// The plan of a convolution's weight gradient, alone or beside dx. Compiled for the baseline.
#pragma once
#include <numeric>

#include "conv_plan.h"

namespace {

// The gradient of the weight and the memory that it points to.
struct OuterPlan {
  ConvOuter m = {};
  Axis rows, cols, dy_rows, dy_cols;
  Lists l, of_dy;

  OuterPlan() = default;
  OuterPlan(const OuterPlan &) = delete;
};

// The part that does not depend on the panels.
void begin_outer(OuterPlan &p, const Conv &c, bool by_tap) {
  check_sizes(c);
  p.rows = forward_axis(c, 0, false), p.cols = forward_axis(c, 1, by_tap);
  p.dy_rows.base = p.dy_cols.base = {0};
  ConvOuter &m = p.m;
  const int64_t rows_out = c.out_size[0], width_out = c.out_size[1], size = int64_t(c.bo) * c.bi;
  m.threads = threads_of(c);
  m.x = packing_of(c.x, c, c.in_size, c.in_channels, c.bi);
  m.dy = packing_of(c.y, c, c.out_size, c.out_channels, c.bo);
  m.out = c.values, m.order = c.order, m.images = c.images, m.last_row = rows_out, m.cols = width_out, m.reach = p.rows.reach;
  m.row_blocks = blocks_of(c.out_channels / c.groups, c.bo), m.col_blocks = blocks_of(c.in_channels / c.groups, c.bi);
  expect_large(m.out, c.order.slots * size * 4);
}

int64_t width_of_x(const OuterPlan &p) { return p.m.cols + p.cols.reach; }

// About 128 pixels are added at a time: some rows, or several images if these are shorter. So sums run in the order of the
// pixels, whatever the panel.
int64_t most_rows(const OuterPlan &p) { return std::max<int64_t>(128 / width_of_x(p), 1); }
void add_at_once(OuterPlan &p, int64_t band) {
  p.m.few_images = std::max<int64_t>(most_rows(p) / p.m.last_row, 1);
  p.m.few_rows = p.m.few_images > 1 ? p.m.last_row : blocks_of(band, blocks_of(band, most_rows(p)));
}

// Floats of a packed row of x, in all its views.
int64_t row_floats_of_x(const OuterPlan &p) {
  const int64_t views = p.rows.base.size() * p.cols.base.size();
  return product_of({conv_blocks(p.m.x), p.m.x.side, width_of_x(p), views});
}

// Mark the blocks of dy that an entry reads.
void want_rows(OuterPlan &p, const Order &order) {
  p.of_dy.want(p.m.dy);
  for (int64_t r = 0; r < order.rows; r++) p.of_dy.wanted[r] = order.ptr[r] < order.ptr[r + 1];
}

// The part that depends on the panels.
void end_outer(OuterPlan &p, const Conv &c, const Panel &panel, int64_t width, bool in_turn) {
  ConvOuter &m = p.m;
  m.band = panel.band, m.images_at_once = panel.images;
  m.panels_at_once = panels_at_once(blocks_of(c.images, panel.images) * blocks_of(m.last_row, panel.band), m.threads);
  lay_out(m.x, p.rows, p.cols, panel, width, in_turn);
  lay_out(m.dy, p.dy_rows, p.dy_cols, panel, m.cols, in_turn);
  want_rows(p, c.order);
}

void plan_outer(OuterPlan &p, const Conv &c) {
  const bool elements = c.bo == 1 && c.bi == 1;
  begin_outer(p, c, elements);
  ConvOuter &m = p.m;
  const int64_t row_floats = row_floats_of_x(p) + conv_blocks(m.dy) * c.bo * m.cols, used = c.order.ptr[c.order.rows];
  const int64_t most = elements ? INT32_MAX : std::max<int64_t>(most_rows(p) / m.last_row, 1);
  const Panel panel = plan_panel(c.images, m.last_row, m.reach, row_floats, elements ? half_of_l2() : used * c.bo * c.bi, 1, most);
  add_at_once(p, panel.band);
  end_outer(p, c, panel, width_of_x(p), elements);
  if (elements) p.l.want_all(m.x), m.panels_at_once = 1;
  else forward_offsets(p.l, c, m.x, p.rows, p.cols);
  m.offset = p.l.offset.data();
}

// In bfloat16: see outer_bf16.h. Returns false if too much of a panel would be filling.
bool plan_outer_half(OuterPlan &p, const Conv &c, int most_packed) {
  begin_outer(p, c, true);
  ConvOuter &m = p.m;
  const int64_t row_floats = (row_floats_of_x(p) + conv_blocks(m.dy) * c.bo * m.cols) / 2;
  const int64_t unit = HALF_TOKENS / std::gcd(HALF_TOKENS, m.cols);
  Panel panel = plan_panel(c.images, m.last_row, m.reach, row_floats, c.order.ptr[c.order.rows] * c.bo * c.bi, 1, INT32_MAX);
  if (panel.images > unit) panel.images -= panel.images % unit;
  else if (5 * panel.images * m.cols < 4 * round_up(panel.images * m.cols, HALF_TOKENS)) {  // else a quarter or more would be filling
    const int64_t rows = 3 * half_of_l2() / (2 * unit * row_floats) - m.reach;  // of so many images, in three quarters of the L2 cache
    if (rows > m.reach) panel = {blocks_of(m.last_row, blocks_of(m.last_row, std::min(rows, m.last_row))), std::min(unit, c.images)};
  }
  const int64_t pixels = panel.images * m.cols, pitch = round_up(pixels, HALF_TOKENS);
  if (2 * pitch > most_packed * pixels) return false;
  end_outer(p, c, panel, m.cols, true);
  for (Packing *packing : {&m.x, &m.dy}) {
    packing->view_pitch = packing->view_pitch / pixels * pitch, packing->plane = packing->plane / pixels * pitch;
    packing->row_pitch = pitch;
  }
  m.x.slices = c.bi / 16;
  forward_offsets(p.l, c, m.x, p.rows, p.cols);
  m.offset = p.l.offset.data();
  return true;
}

// Both gradients on the panels of dx. Returns false if these lack something of dy that dvalues reads.
bool plan_backward(ConvBackward &b, MultiplyPlan &dx, OuterPlan &dvalues, const Conv &for_dx, const Conv &for_dvalues) {
  begin_outer(dvalues, for_dvalues, false);
  plan_multiply(dx, for_dx, row_floats_of_x(dvalues), false);
  Convolve &v = dx.v;
  ConvOuter &m = dvalues.m;
  b.dy_base = dx.rows.base[0];
  const int64_t bands = blocks_of(v.last_row - v.first_row, v.band);
  const int64_t first_band = std::min(v.first_row + v.band, bands == 1 ? m.last_row : v.last_row), beyond = m.last_row - v.last_row;
  // The first band has rows of dy from 0 on, the last one those up to the end.
  if (dx.rows.base.size() != 1 || v.first_row + b.dy_base > 0 || b.dy_base > 0 || v.reach + b.dy_base < 0 || first_band <= 0 ||
      v.last_row + v.reach + b.dy_base < m.last_row)
    return false;
  int64_t view = 0, views = dx.cols.base.size();
  while (view < views && (dx.cols.base[view] > 0 || v.x.cols + dx.cols.base[view] < m.cols)) view++;
  if (view == views) return false;
  b.dy_at = view * v.x.view_pitch - dx.cols.base[view];
  const Panel panel = {v.band + std::max<int64_t>(v.first_row, 0) + std::max<int64_t>(beyond, 0), v.images_at_once};
  add_at_once(dvalues, panel.band);
  lay_out(m.x, dvalues.rows, dvalues.cols, panel, width_of_x(dvalues), false);
  forward_offsets(dvalues.l, for_dvalues, m.x, dvalues.rows, dvalues.cols);
  m.offset = dvalues.l.offset.data();
  const int64_t blocks = conv_blocks(v.x);
  for (int64_t r = 0; r < m.order.rows; r++)
    if (m.order.ptr[r] < m.order.ptr[r + 1]) dx.l.wanted[view * blocks + r] = 1;
  m.dy = v.x;
  v.threads = m.threads;
  m.panels_at_once = panels_at_once(blocks_of(v.images, v.images_at_once) * bands, m.threads);
  b.dx = v, b.dvalues = m;
  return true;
}

}  // namespace
