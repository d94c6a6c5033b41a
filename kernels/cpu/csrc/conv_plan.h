// The plan of a convolution: what each tap reads, how much is packed at a time. Compiled for the baseline.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "conv.h"
#include "library.h"

namespace {

typedef std::vector<int64_t> Numbers;

// Thrown where the sizes of a convolution are too large for its plan.
struct TooLarge {};

// The product of some sizes.
int64_t product_of(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(product, size, &product)) throw TooLarge();
  return product;
}

// Paddings, strides and dilations may be anything. After this check sums and products of any two fit into 64 bits.
void check_sizes(const Conv &c) {
  constexpr int64_t MOST_PHASES = int64_t(1) << 20;
  for (int axis = 0; axis < 2; axis++)
    for (const int64_t size : {c.in_size[axis], c.out_size[axis], c.kernel[axis], c.stride[axis], c.dilation[axis], std::abs(c.padding[axis])})
      if (size > INT32_MAX) throw TooLarge();
  if (c.transposed && c.stride[0] * c.stride[1] > MOST_PHASES) throw TooLarge();
}

int64_t floor_of(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
int64_t ceil_of(int64_t a, int64_t b) { return -floor_of(-a, b); }

// One axis of a convolution. Outputs m of `first` to `last`; tap i reads element m + shift[i] of view[i], and element m of
// view v is number step * m + base[v] of the tensor.
struct Axis {
  Numbers base, view, shift;
  int64_t step = 1, first = 0, last = 0, reach = 0;
  std::vector<int64_t> phase, from, to;  // of each tap; the outputs of each phase

  int64_t outputs() const { return last - first; }
  void tap(int64_t its_base, int64_t its_shift) {
    const int64_t v = std::find(base.begin(), base.end(), its_base) - base.begin();
    if (v == (int64_t)base.size()) base.push_back(its_base);
    view.push_back(v), shift.push_back(its_shift), reach = std::max(reach, its_shift);
  }
};

// Output m reads element m * stride + i * dilation - padding: a view for each phase of the stride, or for each tap.
Axis forward_axis(const Conv &c, int axis, bool by_tap) {
  Axis a;
  const int64_t stride = c.stride[axis];
  a.step = stride, a.last = c.out_size[axis];
  for (int64_t i = 0; i < c.kernel[axis]; i++) {
    const int64_t at = i * c.dilation[axis];
    a.phase.push_back(0);
    if (by_tap) a.tap(at - c.padding[axis], 0);
    else a.tap(at % stride - c.padding[axis], at / stride);
  }
  a.from = {0}, a.to = {a.last};
  return a;
}

// Element m * stride + phase - padding of x was read by output m - i * dilation / stride through tap i of that phase.
Axis backward_axis(const Conv &c, int axis, bool by_tap) {
  Axis a;
  const int64_t stride = c.stride[axis], farthest = (c.kernel[axis] - 1) * c.dilation[axis] / stride;
  for (int64_t i = 0; i < c.kernel[axis]; i++) {
    const int64_t at = i * c.dilation[axis];
    a.phase.push_back(at % stride);
    if (by_tap) a.tap(-(at / stride), 0);
    else a.tap(-farthest, farthest - at / stride);
  }
  a.first = INT64_MAX, a.last = INT64_MIN;
  for (int64_t p = 0; p < stride; p++) {
    a.from.push_back(ceil_of(c.padding[axis] - p, stride));
    a.to.push_back(floor_of(c.padding[axis] + c.in_size[axis] - 1 - p, stride) + 1);
    if (a.from[p] < a.to[p]) a.first = std::min(a.first, a.from[p]), a.last = std::max(a.last, a.to[p]);
  }
  return a;
}

constexpr int64_t SHORT_ROW = 12;  // outputs: images with shorter rows are in turn

// What is packed at a time: rows of outputs, and images.
struct Panel {
  int64_t band, images;
};

// A panel with as many floats as the blocks have pays for reading them; then it, the next one and the outputs fit the L2
// cache together.
Panel plan_panel(int64_t images, int64_t rows, int64_t reach, int64_t row_floats, int64_t weights, int threads, int64_t most_images) {
  const int64_t room = half_of_l2(), image = product_of({rows + reach, row_floats}), enough = std::clamp(2 * weights, room / 4, room);
  Panel p = {rows, 1};
  if (image > room + room / 4) {
    p.band = std::max(room / row_floats - reach, std::min<int64_t>(rows, reach + 1));
    p.band = std::min(p.band, rows);
    p.band = blocks_of(rows, blocks_of(rows, p.band));
    return p;
  }
  p.images = std::min(std::max<int64_t>(enough / image, 1), std::min((images + threads - 1) / threads, most_images));
  const int64_t panels = round_up(blocks_of(images, p.images), threads);
  p.images = std::max<int64_t>(blocks_of(images, panels), 1);
  return p;
}

// Throws TooLarge if a panel has more than 2^30 numbers: entries name its pixels by int32.
void lay_out(Packing &p, const Axis &rows, const Axis &cols, const Panel &panel, int64_t width, bool in_turn) {
  p.row_step = rows.step, p.col_step = cols.step;
  p.row_views = rows.base.size(), p.col_views = cols.base.size();
  p.row_base = rows.base.data(), p.col_base = cols.base.data();
  p.cols = width;
  const int64_t high = panel.band + rows.reach;
  p.row_pitch = in_turn ? panel.images * width : width;
  p.image_pitch = in_turn ? width : high * width;
  p.view_pitch = product_of({high, panel.images, width});
  p.plane = product_of({p.row_views, p.col_views, p.view_pitch});
  if (product_of({conv_blocks(p), p.side, p.plane}) > int64_t(1) << 30) throw TooLarge();
}

int threads_of(const Conv &c) {
  const int64_t products = c.order.ptr[c.order.rows] * c.bo * c.bi * c.images * c.out_size[0] * c.out_size[1];
  return threads_for(2 * products, c.threads);
}

// Bytes of y, or of dx.
int64_t bytes_written(const Conv &c) {
  const int64_t *size = c.transposed ? c.in_size : c.out_size;
  return c.images * size[0] * size[1] * (c.transposed ? c.in_channels : c.out_channels) * itemsize(c.dtype);
}
bool writes_past(const Conv &c) {
  const int64_t channels = (c.transposed ? c.in_channels : c.out_channels) / c.groups;
  return c.dtype == FLOAT32 && ::writes_past(c.transposed ? c.x : c.y, channels * 4, bytes_written(c), threads_of(c));
}

Packing packing_of(const void *data, const Conv &c, const int64_t *size, int64_t channels, int64_t side) {
  Packing p = {};
  p.data = data, p.height = size[0], p.width = size[1], p.channels = channels, p.groups = c.groups, p.side = side;
  p.dtype = c.dtype, p.slices = 1;
  return p;
}

// Where a tap reads: a view, and the pixel at which it begins in a panel.
struct Tap {
  int64_t view, pixel;
};

Tap tap_of(const Packing &p, const Axis &rows, const Axis &cols, int64_t i, int64_t j) {
  const int64_t view = rows.view[i] * p.col_views + cols.view[j];
  return {view, view * p.view_pitch + rows.shift[i] * p.row_pitch + cols.shift[j]};
}

// The lists of a call: where the block of each entry begins in a panel.
struct Lists {
  std::vector<int32_t> offset, slot, ptr;
  std::vector<Subgrid> subgrids;
  std::vector<uint8_t> wanted;  // of Packing

  void want(Packing &p) {
    wanted.resize(p.row_views * p.col_views * conv_blocks(p));
    p.wanted = wanted.data();
  }
  void want_all(Packing &p) {
    want(p);
    std::fill(wanted.begin(), wanted.end(), 1);
  }
};

// Let the views begin at the first output's column.
void from_first(Axis &a) {
  for (int64_t &base : a.base) base += a.first * a.step;
}

void forward_offsets(Lists &l, const Conv &c, Packing &p, const Axis &rows, const Axis &cols) {
  const int64_t col_blocks = blocks_of(c.in_channels / c.groups, c.bi), row_blocks = blocks_of(c.out_channels / c.groups, c.bo);
  l.offset.resize(c.order.ptr[c.order.rows]);
  l.want(p);
  const int64_t blocks = conv_blocks(p);
  std::vector<Tap> taps;
  for (int64_t i = 0; i < c.kernel[0]; i++)
    for (int64_t j = 0; j < c.kernel[1]; j++) taps.push_back(tap_of(p, rows, cols, i, j));
  for (int64_t r = 0; r < c.order.rows; r++) {
    for (int64_t e = c.order.ptr[r]; e < c.order.ptr[r + 1]; e++) {
      const int64_t col = c.order.other[e];
      const Tap tap = taps[col / col_blocks];
      const int64_t block = r / row_blocks * col_blocks + col % col_blocks;
      l.offset[e] = int32_t(tap.pixel + block * p.slices * p.plane);
      l.wanted[tap.view * blocks + block] = 1;
    }
  }
}

// The entries of each phase, group and block of channels: those of all taps of the phase, one after the other.
void backward_lists(Lists &l, const Conv &c, Packing &p, const Axis &rows, const Axis &cols) {
  const int64_t col_blocks = blocks_of(c.in_channels / c.groups, c.bi), row_blocks = blocks_of(c.out_channels / c.groups, c.bo);
  const int64_t lists = c.groups * col_blocks, phases = rows.from.size() * cols.from.size();
  l.ptr.reserve(phases * (lists + 1));
  l.want(p);
  const int64_t blocks = conv_blocks(p);
  Numbers next(c.order.ptr, c.order.ptr + c.order.rows);  // rows ascend in a column: groups follow each other
  for (int64_t q = 0; q < phases; q++) {
    const int64_t qy = q / (int64_t)cols.from.size(), qx = q % (int64_t)cols.from.size();
    for (int64_t g = 0; g < c.groups; g++) {
      for (int64_t b = 0; b < col_blocks; b++) {
        l.ptr.push_back(l.offset.size());
        for (int64_t i = 0; i < c.kernel[0]; i++) {
          for (int64_t j = 0; j < c.kernel[1]; j++) {
            if (rows.phase[i] != qy || cols.phase[j] != qx) continue;
            const int64_t column = (i * c.kernel[1] + j) * col_blocks + b;
            const Tap tap = tap_of(p, rows, cols, i, j);
            int64_t &e = next[column];
            for (; e < c.order.ptr[column + 1] && c.order.other[e] < (g + 1) * row_blocks; e++) {
              const int64_t row = c.order.other[e];
              l.offset.push_back(int32_t(tap.pixel + row * p.slices * p.plane));
              l.slot.push_back(c.order.slot[e]);
              l.wanted[tap.view * blocks + row] = 1;
            }
          }
        }
      }
    }
    l.ptr.push_back(l.offset.size());
  }
}

// A product and the memory that it points to.
struct MultiplyPlan {
  Convolve v = {};
  Axis rows, cols;
  Lists l;
  std::vector<float> bias;

  MultiplyPlan() = default;
  MultiplyPlan(const MultiplyPlan &) = delete;
};

// `beside`: floats that are packed with each row of a panel for another product. `half`: for HalfKernels.
void plan_multiply(MultiplyPlan &p, const Conv &c, int64_t beside, bool half) {
  check_sizes(c);
  const bool back = c.transposed, elements = c.bo == 1 && c.bi == 1;
  const int64_t used = c.order.ptr[c.order.rows], size = int64_t(c.bo) * c.bi;
  const auto axis = back ? backward_axis : forward_axis;
  p.rows = axis(c, 0, false), p.cols = axis(c, 1, false);
  const bool in_turn = p.cols.outputs() < SHORT_ROW || c.kernel[1] == 1;
  if (in_turn) p.cols = axis(c, 1, true);
  const Axis &rows = p.rows, &cols = p.cols;

  Convolve &v = p.v;
  v.threads = threads_of(c);
  v.x = packing_of(back ? c.y : c.x, c, back ? c.out_size : c.in_size, back ? c.out_channels : c.in_channels, back ? c.bo : c.bi);
  if (half && v.x.side > 32) v.x.slices = v.x.side / 32;
  const int64_t *result = back ? c.in_size : c.out_size;
  v.y = back ? c.x : c.y, v.images = c.images, v.height = result[0], v.width = result[1];
  v.channels = back ? c.in_channels : c.out_channels, v.in = back ? c.bo : c.bi, v.out = back ? c.bi : c.bo;
  v.group_blocks = blocks_of(v.channels / c.groups, v.out);
  v.row_step = back ? c.stride[0] : 1, v.col_step = back ? c.stride[1] : 1;
  v.first_row = rows.first, v.last_row = rows.last, v.first_col = cols.first;

  const int64_t width = cols.outputs() + cols.reach;
  const int64_t views = rows.base.size() * cols.base.size();
  const int64_t row_floats = product_of({conv_blocks(v.x), v.x.side, width, views}) / (half ? 2 : 1) + beside;
  const Panel panel = plan_panel(c.images, rows.outputs(), rows.reach, row_floats, used * size, v.threads,
                                 elements && !in_turn ? 1 : INT32_MAX);
  v.band = panel.band, v.images_at_once = panel.images, v.reach = rows.reach, v.in_turn = in_turn;
  v.transposed = back, v.dtype = c.dtype, v.values = c.values, v.used = used;
  from_first(p.cols);
  lay_out(v.x, rows, cols, panel, width, in_turn);

  if (elements) p.l.want_all(v.x);  // their lists are in conv_runs.h
  else if (back) backward_lists(p.l, c, v.x, rows, cols);
  else forward_offsets(p.l, c, v.x, rows, cols);
  const int64_t all_blocks = c.groups * v.group_blocks;
  for (size_t qy = 0; qy < rows.from.size(); qy++) {
    for (size_t qx = 0; qx < cols.from.size(); qx++) {
      const int32_t *ptr = elements ? nullptr : back ? p.l.ptr.data() + (qy * cols.from.size() + qx) * (all_blocks + 1) : c.order.ptr;
      p.l.subgrids.push_back({rows.from[qy], rows.to[qy], cols.from[qx], cols.to[qx], back ? int64_t(qy) - c.padding[0] : 0,
                              back ? int64_t(qx) - c.padding[1] : 0, ptr});
    }
  }
  v.subgrids = p.l.subgrids.size(), v.subgrid = p.l.subgrids.data();
  v.offset = p.l.offset.data(), v.slot = back ? p.l.slot.data() : c.order.slot;
  if (c.bias) {
    const int64_t group_out = c.out_channels / c.groups;
    p.bias.resize(all_blocks * c.bo);
    for (int64_t o = 0; o < c.out_channels; o++)
      p.bias[o / group_out * v.group_blocks * c.bo + o % group_out] = c.bias[o];
    v.bias = p.bias.data();
  }
  expect_large(v.y, bytes_written(c));
  v.past = writes_past(c);
  if (elements) v.slack = round_up(cols.reach + 8 * LINE, LINE);
}

}  // namespace
