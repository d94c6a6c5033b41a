// How the gradient of a convolution's weight is cut up, alone or beside dx. Compiled for the baseline alone.
#pragma once
#include <numeric>

#include "conv_plan.h"

namespace {

// The gradient of the weight, and what its addresses point into.
struct OuterPlan {
  ConvOuter m = {};
  Axis rows, cols, dy_rows, dy_cols;
  Lists l, of_dy;

  OuterPlan() = default;
  OuterPlan(const OuterPlan &) = delete;
};

// What does not depend on the panels.
void begin_outer(OuterPlan &p, const Conv &c, bool by_tap) {
  check_sizes(c);
  p.rows = forward_axis(c, 0, false), p.cols = forward_axis(c, 1, by_tap);
  p.dy_rows.base = p.dy_cols.base = {0};
  ConvOuter &m = p.m;
  const int64_t rows_out = c.out_size[0], width_out = c.out_size[1], size = int64_t(c.bo) * c.bi;
  m.threads = threads_of(c);
  m.x = packing_of(c.x, c, c.in_size, c.in_channels, c.bi);
  m.dy = packing_of(c.y, c, c.out_size, c.out_channels, c.bo);
  m.out = c.values, m.order = c.order, m.images = c.images, m.rows = rows_out, m.cols = width_out, m.reach = p.rows.reach;
  m.row_blocks = blocks_of(c.out_channels / c.groups, c.bo), m.col_blocks = blocks_of(c.in_channels / c.groups, c.bi);
  expect_large(m.out, c.order.slots * size * 4);
}

// Rows are added some 128 pixels at a time; several images only where each is shorter than that. Then the order of the
// sums is that of the pixels, whatever the panel.
int64_t width_of_x(const OuterPlan &p) { return p.m.cols + p.cols.reach; }
int64_t few_rows(const OuterPlan &p) { return std::max<int64_t>(128 / width_of_x(p), 1); }
void add_at_once(OuterPlan &p, int64_t strip) {
  p.m.few_images = std::max<int64_t>(few_rows(p) / p.m.rows, 1);
  const int64_t pieces = blocks_of(strip, few_rows(p));
  p.m.short_strip = p.m.few_images > 1 ? p.m.rows : blocks_of(strip, pieces);
}

// Floats of a packed row of x, in all of its views.
int64_t row_floats_of_x(const OuterPlan &p) {
  const int64_t views = p.rows.base.size() * p.cols.base.size();
  return product_of({conv_blocks(p.m.x), p.m.x.side, width_of_x(p), views});
}

// Blocks of dy that an entry reads.
void want_rows(OuterPlan &p, const Order &order) {
  p.of_dy.want(p.m.dy);
  for (int64_t r = 0; r < order.rows; r++) p.of_dy.wanted[r] = order.ptr[r] < order.ptr[r + 1];
}

void plan_outer(OuterPlan &p, const Conv &c) {
  const bool elements = c.bo == 1 && c.bi == 1;
  begin_outer(p, c, elements);
  ConvOuter &m = p.m;
  const int64_t row_floats = row_floats_of_x(p) + conv_blocks(m.dy) * c.bo * m.cols, used = c.order.ptr[c.order.rows];
  const int64_t most = elements ? INT32_MAX : std::max<int64_t>(few_rows(p) / m.rows, 1);
  const Panel panel = plan_panel(c.images, m.rows, p.rows.reach, row_floats, elements ? half_of_l2() : used * c.bo * c.bi, 1, most);
  add_at_once(p, panel.strip);
  m.strip = panel.strip, m.images_at_once = panel.images;
  lay_out(m.x, p.rows, p.cols, panel, width_of_x(p), elements);
  lay_out(m.dy, p.dy_rows, p.dy_cols, panel, m.cols, elements);
  const int64_t panels = blocks_of(c.images, panel.images) * blocks_of(m.rows, panel.strip);
  m.panels_at_once = elements ? 1 : panels_at_once(panels, m.threads);
  if (elements) p.l.want_all(m.x);
  else forward_offsets(p.l, c, m.x, p.rows, p.cols);
  want_rows(p, c.order);
  m.offset = p.l.offset.data();
}

// In bfloat16: see conv_outer_bf16.h. False where too much of a panel would be filling.
bool plan_outer_half(OuterPlan &p, const Conv &c, int most_packed) {
  begin_outer(p, c, true);
  ConvOuter &m = p.m;
  const int64_t row_floats = (row_floats_of_x(p) + conv_blocks(m.dy) * c.bo * m.cols) / 2;
  const int64_t unit = HALF_TOKENS / std::gcd(HALF_TOKENS, m.cols);
  Panel panel = plan_panel(c.images, m.rows, p.rows.reach, row_floats, c.order.ptr[c.order.rows] * c.bo * c.bi, 1, INT32_MAX);
  if (panel.images > unit) panel.images -= panel.images % unit;
  else if (panel.strip == m.rows && unit * (m.rows + p.rows.reach) * row_floats <= half_of_l2()) panel.images = std::min(unit, c.images);
  const int64_t pixels = panel.images * m.cols, pitch = round_up(pixels, HALF_TOKENS);
  if (2 * pitch > most_packed * pixels) return false;
  m.strip = panel.strip, m.images_at_once = panel.images;
  lay_out(m.x, p.rows, p.cols, panel, m.cols, true);
  lay_out(m.dy, p.dy_rows, p.dy_cols, panel, m.cols, true);
  for (Packing *packing : {&m.x, &m.dy}) {
    packing->view_pitch = packing->view_pitch / pixels * pitch, packing->plane = packing->plane / pixels * pitch;
    packing->row_pitch = pitch;
  }
  m.x.pieces = c.bi / 16;
  const int64_t panels = blocks_of(c.images, panel.images) * blocks_of(m.rows, panel.strip);
  m.panels_at_once = panels_at_once(panels, m.threads);
  forward_offsets(p.l, c, m.x, p.rows, p.cols);
  want_rows(p, c.order);
  m.offset = p.l.offset.data();
  return true;
}

// Both gradients on the panels of dx. False where these do not hold all that dvalues reads of dy.
bool plan_backward(ConvBackward &b, MultiplyPlan &dx, OuterPlan &dvalues, const Conv &for_dx, const Conv &for_dvalues) {
  begin_outer(dvalues, for_dvalues, false);
  plan_multiply(dx, for_dx, row_floats_of_x(dvalues), false);
  Convolve &v = dx.v;
  ConvOuter &m = dvalues.m;
  b.dy_base = dx.rows.base[0];
  const int64_t strips = (v.last_row - v.first_row + v.strip - 1) / v.strip;
  const int64_t first_strip = std::min(v.first_row + v.strip, strips == 1 ? m.rows : v.last_row), beyond = m.rows - v.last_row;
  // The first strip has rows of dy from 0 on, the last one those up to the end.
  if (dx.rows.base.size() != 1 || v.first_row + b.dy_base > 0 || b.dy_base > 0 || v.reach + b.dy_base < 0 || first_strip <= 0 ||
      v.last_row + v.reach + b.dy_base < m.rows)
    return false;
  int64_t view = 0, views = dx.cols.base.size();
  while (view < views && (dx.cols.base[view] > 0 || v.x.cols + dx.cols.base[view] < m.cols)) view++;
  if (view == views) return false;
  b.dy_at = view * v.x.view_pitch - dx.cols.base[view];
  const Panel panel = {v.strip + std::max<int64_t>(v.first_row, 0) + std::max<int64_t>(beyond, 0), v.images_at_once};
  add_at_once(dvalues, panel.strip);
  lay_out(m.x, dvalues.rows, dvalues.cols, panel, width_of_x(dvalues), false);
  forward_offsets(dvalues.l, for_dvalues, m.x, dvalues.rows, dvalues.cols);
  m.offset = dvalues.l.offset.data();
  const int64_t blocks = conv_blocks(v.x);
  for (int64_t r = 0; r < m.order.rows; r++)
    if (m.order.ptr[r] < m.order.ptr[r + 1]) dx.l.wanted[view * blocks + r] = 1;
  m.dy = v.x;
  v.threads = m.threads;
  m.panels_at_once = panels_at_once(blocks_of(v.images, v.images_at_once) * strips, m.threads);
  b.dx = v, b.dvalues = m;
  return true;
}

}  // namespace
