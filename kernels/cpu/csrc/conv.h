// A convolution as its planner (conv.cpp) gives it to the kernels.
//
// A panel holds some images, or a band of rows of one, packed as [block of channels][view][pixel][channel]: float32
// with zeros around it (bfloat16 for HalfKernels, blocks of 64 and 128 channels cut into 32). A view is the tensor with
// every step-th row and column. The pixels that a tap reads for a span of outputs then follow each other: an
// entry of the index is one offset into the panel, whatever the stride, the dilation and the padding, and the micro-
// kernels are those of the linear layer. There are two layouts:
//
//   by rows   a span is a row of outputs. One copy: a view for each phase of the stride, shifted by the tap.
//   in turn   for short rows. A view for each column of the kernel holds the very columns that it reads, and the
//             images of a panel lie row by row in turn: all outputs of a panel are one span.
#pragma once
#include "api.h"

// A Call of a convolution, in the planner's terms.
struct Conv : Sizes {
  void *x, *y;           // the gradients of dy and x are here too
  float *values;         // (Z, bo, bi), contiguous
  const float *bias;     // (Cout) or null
  Order order;           // by block column for dx, else by block row
  int64_t in_channels, out_channels;
  int32_t bo, bi, transposed, dtype, threads;
};

// How a tensor (N, H, W, C), channels last, is packed. Pitches are in pixels.
struct Packing {
  const void *data;
  int64_t height, width, channels, groups, side;
  int64_t row_step, col_step, row_views, col_views;
  const uint8_t *wanted;               // by view and block: whether an entry reads it; what none reads is not packed
  const int64_t *row_base, *col_base;  // view v has rows row_step * m + row_base[v]; columns likewise, m from 0 on
  int64_t cols;                        // packed columns of a view
  int64_t slices;                      // into which the channels of a block are cut, each a block here; 1 but in bfloat16
  int64_t row_pitch, image_pitch, view_pitch, plane;
  int32_t dtype;
};

inline int64_t conv_blocks(const Packing &p) { return p.groups * blocks_of(p.channels / p.groups, p.side); }
inline int64_t conv_floats(const Packing &p) { return round_up(conv_blocks(p) * p.plane * p.side, LINE); }

// In bfloat16, for each thread: a panel, with what the last tile reads beyond it, and the sums of a tile.
inline int64_t half_panel_floats(const Packing &p) { return round_up(conv_blocks(p) * p.plane * p.side / 2, LINE) + HALF_TILE; }
inline int64_t half_thread_floats(const Packing &p) { return half_panel_floats(p) + HALF_TILE; }

// 1x1: the entries in the order in which the kernels of conv_elements.h read them: (strip of STRIP rows, chunk of channels,
// row). Those of a row in a chunk are a run; run k goes from start[k] to start[k + 1].
constexpr int64_t STRIP = 32;
struct NotedEntry {
  int32_t cell, offset;  // the (chunk, row) of its strip; the pixel in the panel
  union {
    int32_t slot;
    float number;
  };
};
struct ElementRuns {
  int64_t chunks;
  int32_t *start, *offset, *slot;
  float *number;      // the weight; in the gradient what it is so far
  NotedEntry *noted;  // by thread, while they are arranged: the entries of a strip
};

// Outputs (y, x) of y0 <= y < y1, x0 <= x < x1, which are the pixels (y * row_step + row_base, ...) of the result.
struct Subgrid {
  int64_t y0, y1, x0, x1, row_base, col_base;
  const int32_t *ptr;  // of its lists, by block of channels of the result; at 1x1 the first of its runs
};

// How a product goes through the images. A panel: some images, or a band of rows of one.
struct Cut {
  int64_t images, first_row, last_row;  // of outputs, in all subgrids
  int64_t band, images_at_once, reach;  // of a panel: rows, images, rows of the packed tensor beyond those
};

// y = x * W + bias, or dx = dy * W': one subgrid, or one for each phase of the stride.
struct Convolve : Cut {
  Packing x;
  void *y;
  int64_t height, width, channels;          // of y
  int64_t group_blocks;                     // its blocks of channels in a group
  int64_t row_step, col_step;               // between the pixels of a subgrid
  int64_t first_col;                        // of all subgrids
  int64_t subgrids;
  const Subgrid *subgrid;
  const int32_t *offset, *slot;  // by entry: the pixel in the panel; the slot in values
  ElementRuns runs;              // 1x1, in place of the two
  const float *values;           // (Z, bo, bi)
  const float *bias;             // by block of channels, filled up, or null
  int64_t used;                  // entries
  int32_t in, out;               // sides of a block: the one that is summed over, the one along y
  int32_t transposed;            // dx: values are read as they are stored
  int32_t in_turn, dtype, threads;
  int32_t past;                  // y is written past the caches: see writes_past() of library.cpp
  int64_t slack;                 // 1x1: floats behind a panel that are read and not used
  float *scratch;
};

// The stored blocks of the weight's gradient.
struct ConvOuter : Cut {  // in rows of dy
  Packing x, dy;
  float *out;     // (Z, bo, bi)
  Order order;    // `other` is the block column c
  const int32_t *offset;
  ElementRuns runs;            // 1x1, in its place
  int64_t cols, panels_at_once;
  int64_t few_rows, few_images;    // of outputs, that are added at a time
  int64_t col_blocks, row_blocks;  // of a tap; of a group
  int32_t threads;
  float *scratch;
};

// Both gradients, from one dy: `dvalues` reads it as `dx` packs it. Its bands are those of dx, the first and the last one
// with the rows of dy beyond.
struct ConvBackward {
  Convolve dx;
  ConvOuter dvalues;
  int64_t dy_at;    // the pixel of a panel that is column 0 of dy, in the first row that is packed
  int64_t dy_base;  // row m of dx's packing is row m + dy_base of dy
};
