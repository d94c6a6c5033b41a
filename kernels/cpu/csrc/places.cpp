// Lists of places for updates of the topology: sorting, selecting, looking up. Compiled for the baseline. A place is a block's
// (row, col), its key row * cols + col. The functions return the numbers of kernels/eager/places.py; time and scratch are
// linear in the lists. A list is read more than once, and a number is checked each time: another thread may write into it.
#include <cstring>

#include "library.h"

namespace {

int bits_of(int64_t bound) {
  int bits = 1;
  while (bits < 62 && int64_t(1) << bits < bound) bits++;
  return bits;
}

// Turn counts into the positions at which each value begins.
void starts_from(int32_t *counts, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; i++) {
    const int32_t count = counts[i];
    counts[i] = sum;
    sum += count;
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Write both orders of an index by counting, free slots last. `row_col` and `col_row` may be null. `ascending`: the slots are
// in the order of the row lists already, free ones last. Refuses places outside the grid.
int sk_orders(const int32_t *row, const int32_t *col, int64_t slots, int64_t rows, int64_t cols, int64_t ascending, int32_t *row_ptr,
              int32_t *row_slot, int32_t *row_col, int32_t *col_ptr, int32_t *col_slot, int32_t *col_row) {
  Scratch scratch((rows + cols + slots + 1) * 4);
  if (!scratch.memory) return NO_MEMORY;
  int32_t *by_row = (int32_t *)scratch.memory, *by_col = by_row + rows, *some = by_col + cols;
  std::memset(by_row, 0, (rows + cols) * 4);
  int32_t used = 0;
  for (int64_t z = 0; z < slots; z++) {
    const int32_t r = row[z], c = col[z];
    if (r < 0) continue;
    if (!inside(r, rows) || !inside(c, cols)) return REFUSED;
    by_row[r]++, by_col[c]++, used++;
  }
  starts_from(by_row, rows);
  starts_from(by_col, cols);
  std::memcpy(row_ptr, by_row, rows * 4);
  std::memcpy(col_ptr, by_col, cols * 4);
  row_ptr[rows] = col_ptr[cols] = used;
  if (ascending) {
    for (int64_t z = 0; z < slots; z++) row_slot[z] = int32_t(z);
  } else {  // by column, then by row, which keeps the columns of a row in order
    int32_t last = used;
    for (int64_t z = 0; z < slots; z++) {
      const int32_t r = row[z], c = col[z];
      if (r < 0 && last < slots) row_slot[last++] = int32_t(z);
      else if (r < 0 || !inside(c, cols) || !inside(by_col[c], used)) return REFUSED;
      else some[by_col[c]++] = int32_t(z);
    }
    if (last != slots) return REFUSED;
    for (int32_t e = 0; e < used; e++) {
      const int32_t r = row[some[e]];
      if (!inside(r, rows) || !inside(by_row[r], used)) return REFUSED;
      row_slot[by_row[r]++] = some[e];
    }
    std::memcpy(by_col, col_ptr, cols * 4);
  }
  if (ascending) {
    for (int32_t z = 0; z < used; z++) {
      const int32_t c = col[z];
      if (!inside(c, cols) || !inside(by_col[c], used)) return REFUSED;
      col_slot[by_col[c]++] = z;
    }
  } else {
    for (int32_t e = 0; e < used; e++) {
      const int32_t slot = row_slot[e], c = inside(slot, slots) ? col[slot] : -1;
      if (!inside(c, cols) || !inside(by_col[c], used)) return REFUSED;
      col_slot[by_col[c]++] = slot;
    }
  }
  std::memcpy(col_slot + used, row_slot + used, (slots - used) * 4);
  const auto at = [&](const int32_t *list, int32_t slot) { return inside(slot, slots) ? list[slot] : 0; };
  if (row_col)
    for (int64_t e = 0; e < slots; e++) row_col[e] = e < used ? at(col, row_slot[e]) : 0;
  if (col_row)
    for (int64_t e = 0; e < slots; e++) col_row[e] = e < used ? at(row, col_slot[e]) : 0;
  return 0;
}

// Write one order of an index for the kept slots alone: their entries first, then all others. `other` may be null.
int sk_masked(const int32_t *ptr, const int32_t *other, const int32_t *slot, int64_t lists, int64_t slots, const uint8_t *keep,
              int32_t *into_ptr, int32_t *into_other, int32_t *into_slot) {
  Scratch scratch((2 * slots + 1) * 4);
  if (!scratch.memory) return NO_MEMORY;
  int32_t *left_slot = (int32_t *)scratch.memory, *left_other = left_slot + slots;
  int32_t kept = 0, left = 0;
  int64_t e = 0;
  into_ptr[0] = 0;
  for (int64_t l = 0; l <= lists; l++) {
    const int64_t end = l < lists ? ptr[l + 1] : slots;  // free slots are behind the lists
    if (end < e || end > slots) return REFUSED;
    for (; e < end; e++) {  // an entry is written to both ends: a branch would be mispredicted as often as not
      const int32_t s = slot[e];
      if (!inside(s, slots)) return REFUSED;
      const int32_t take = l < lists && keep[s];
      into_slot[kept] = left_slot[left] = s;
      if (other) into_other[kept] = left_other[left] = other[e];
      kept += take, left += 1 - take;
    }
    if (l < lists) into_ptr[l + 1] = kept;
  }
  std::memcpy(into_slot + kept, left_slot, left * 4);
  if (other) std::memcpy(into_other + kept, left_other, left * 4);
  return 0;
}

// Refuses places if one is outside the grid, half free, or there twice.
int sk_check(const int32_t *row, const int32_t *col, int64_t slots, int64_t rows, int64_t cols) {
  Scratch scratch((rows + 1 + cols + slots) * 4);
  if (!scratch.memory) return NO_MEMORY;
  int32_t *next = (int32_t *)scratch.memory, *seen = next + rows + 1, *some = seen + cols;
  std::memset(next, 0, (rows + 1) * 4);
  std::memset(seen, 255, cols * 4);
  for (int64_t z = 0; z < slots; z++) {
    const int32_t r = row[z], c = col[z];
    if (r == -1 && c == -1) continue;
    if (!inside(r, rows) || !inside(c, cols)) return REFUSED;
    next[r]++;
  }
  starts_from(next, rows + 1);
  const int32_t used = next[rows];
  for (int64_t z = 0; z < slots; z++) {
    const int32_t r = row[z], c = col[z];
    if (r < 0) continue;
    if (!inside(r, rows) || !inside(c, cols) || next[r] >= used) return REFUSED;
    some[next[r]++] = c;
  }
  int32_t e = 0;
  for (int32_t r = 0; r < rows; r++) {
    for (; e < next[r]; e++) {
      if (!inside(some[e], cols) || seen[some[e]] == r) return REFUSED;
      seen[some[e]] = r;
    }
  }
  return 0;
}

// Write the distinct keys, ascending, without those in the ascending list `present`; their number goes to `found`. Keys are
// from 0 to below `bound`. They are sorted into parts of that range; within a part a key is a bit.
int sk_distinct(const int32_t *keys, int64_t count, const int32_t *present, int64_t length, int64_t bound, int32_t *into, int64_t *found) {
  const int half = (bits_of(bound) + 1) / 2;
  const int64_t parts = (bound >> half) + 1, words = ((int64_t(1) << half) + 63) / 64;
  Scratch scratch(words * 8 + (parts + count) * 4);
  if (!scratch.memory) return NO_MEMORY;
  uint64_t *bits = (uint64_t *)scratch.memory;
  int32_t *next = (int32_t *)(bits + words), *some = next + parts;
  std::memset(bits, 0, words * 8);
  std::memset(next, 0, parts * 4);
  for (int64_t i = 0; i < count; i++) {
    const int32_t key = keys[i];
    if (!inside(key, bound)) return REFUSED;
    next[key >> half]++;
  }
  starts_from(next, parts);
  const int32_t lower = (int32_t(1) << half) - 1;
  for (int64_t i = 0; i < count; i++) {
    const int32_t key = keys[i];
    if (!inside(key, bound) || next[key >> half] >= count) return REFUSED;
    some[next[key >> half]++] = key & lower;
  }
  int64_t taken = 0, n = 0;
  for (int64_t part = 0, k = 0; part < parts; part++) {
    for (; k < next[part]; k++) bits[(some[k] & lower) >> 6] |= uint64_t(1) << (some[k] & 63);
    for (; taken < length && present[taken] >> half == part; taken++) {
      const int32_t key = present[taken] & lower;
      bits[key >> 6] &= ~(uint64_t(1) << (key & 63));
    }
    for (int64_t w = 0; w < words; w++) {
      for (; bits[w]; bits[w] &= bits[w] - 1) into[n++] = int32_t(part << half | w << 6 | __builtin_ctzll(bits[w]));
    }
  }
  *found = n;
  return 0;
}

// Remove the numbers at some ascending positions and close the gaps.
int sk_leave_out(int32_t *numbers, int64_t count, const int64_t *positions, int64_t out) {
  int64_t position = out ? positions[0] : count;
  if (position < 0) return REFUSED;
  for (int64_t o = 0; o < out; o++) {
    const int64_t first = position + 1, last = o + 1 < out ? positions[o + 1] : count;
    if (last < first || last > count) return REFUSED;
    std::memmove(numbers + first - o - 1, numbers + first, (last - first) * 4);
    position = last;
  }
  return 0;
}

// Write the ascending positions of the `wanted` lowest (or highest) numbers, the first among equal ones. `bits` are floats of 0
// or more, as they lie in memory. Infinite numbers are never taken. The number found is written behind the positions.
int sk_select(const int32_t *bits, int64_t count, int64_t highest, int64_t wanted, int64_t *positions) {
  constexpr int32_t INFINITE = 0x7F800000;
  constexpr int DIGITS[] = {11, 10, 10};  // of 31 bits, from above
  const auto key = [&](int64_t i) {
    const int32_t b = bits[i];
    return highest ? (b < 0 ? -1 : INT32_MAX - b) : b < INFINITE ? b : -1;
  };
  int64_t *found = positions + wanted;
  int32_t edge = 0;       // upper bits of the last number that is taken
  int64_t left = wanted;  // numbers still to find among those that agree with it
  Scratch scratch((count + 1) * 4);
  if (!scratch.memory) return NO_MEMORY;
  int32_t *some = (int32_t *)scratch.memory;  // keys that agree with it
  int64_t those = 0;
  for (int64_t i = 0; i < count; i++) {
    some[those] = key(i);
    those += some[those] >= 0;
  }
  if (those < left) wanted = left = those;
  for (int d = 0, shift = 31; d < 3; d++) {
    shift -= DIGITS[d];
    const int32_t mask = (1 << DIGITS[d]) - 1;
    int32_t counts[4][2048] = {};  // four, or a number would wait for the count of the one before
    for (int64_t i = 0; i < those; i++) counts[i & 3][(some[i] >> shift) & mask]++;
    if (!left) return *found = 0;
    int32_t digit = 0;
    for (int32_t n; left > (n = counts[0][digit] + counts[1][digit] + counts[2][digit] + counts[3][digit]); digit++) left -= n;
    edge = edge << DIGITS[d] | digit;
    int64_t n = 0;
    for (int64_t i = 0; i < those; i++) {
      const int32_t k = some[i];
      some[n] = k;
      n += ((k >> shift) & mask) == digit;
    }
    those = n;
  }
  int64_t n = 0;
  for (int64_t i = 0; i < count && n < wanted; i++) {
    const int32_t k = key(i);
    const bool equal = k == edge && left > 0;
    left -= equal;
    positions[n] = i;
    n += equal || (k >= 0 && k < edge);
  }
  *found = n;
  return 0;
}

// Write the position of each key in an ascending list of distinct numbers from 0 to below `bound`, or -1.
int sk_find(const int32_t *list, int64_t length, int64_t bound, const int32_t *keys, int64_t count, int32_t *positions) {
  int shift = 0;
  while ((bound >> shift) > length) shift++;  // about a number or two for each value of the upper bits
  const int64_t values = (bound >> shift) + 1;
  Scratch scratch((values + 1) * 4);
  if (!scratch.memory) return NO_MEMORY;
  int32_t *first = (int32_t *)scratch.memory;
  std::memset(first, 0, (values + 1) * 4);
  for (int64_t i = 0; i < length; i++) {
    const int32_t number = list[i];
    if (!inside(number, bound)) return REFUSED;
    first[number >> shift]++;
  }
  starts_from(first, values + 1);
  for (int64_t i = 0; i < count; i++) {
    const int32_t key = keys[i];
    positions[i] = -1;
    if (!inside(key, bound)) continue;
    const int64_t value = key >> shift;
    for (int32_t e = first[value]; e < first[value + 1] && list[e] <= key; e++)
      if (list[e] == key) positions[i] = e;
  }
  return 0;
}

// Mark the first occurrence of each key that is not in the ascending list `present`; all from 0 to below `bound`. Goes through
// one part of that range after the other, each small enough for the cache.
int sk_first(const int32_t *keys, int64_t count, const int32_t *present, int64_t length, int64_t bound, uint8_t *keep) {
  const int half = (bits_of(bound) + 1) / 2;
  const int64_t width = int64_t(1) << half, parts = (bound >> half) + 1;
  Scratch scratch((parts + width + 2 * count) * 4);
  if (!scratch.memory) return NO_MEMORY;
  int32_t *next = (int32_t *)scratch.memory, *seen = next + parts, *lower = seen + width, *from = lower + count;
  std::memset(next, 0, parts * 4);
  std::memset(seen, 255, width * 4);
  for (int64_t i = 0; i < count; i++) {
    const int32_t key = keys[i];
    if (!inside(key, bound)) return REFUSED;
    next[key >> half]++;
  }
  starts_from(next, parts);
  for (int64_t i = 0; i < count; i++) {
    const int32_t key = keys[i];
    if (!inside(key, bound) || next[key >> half] >= count) return REFUSED;
    const int32_t at = next[key >> half]++;
    lower[at] = key & int32_t(width - 1), from[at] = int32_t(i);
  }
  int64_t taken = 0;
  for (int32_t part = 0, e = 0; part < parts; part++) {
    for (; taken < length && present[taken] >> half == part; taken++) seen[present[taken] & (width - 1)] = part;
    for (; e < next[part]; e++) {
      if (!inside(from[e], count)) return REFUSED;
      keep[from[e]] = seen[lower[e] & (width - 1)] != part;
      seen[lower[e] & (width - 1)] = part;
    }
  }
  return 0;
}

// Write the places of keys, -1 for a negative key. Successive keys of one row are divided once.
int sk_places(const int32_t *keys, int64_t count, int64_t cols, int32_t *row, int32_t *col) {
  int32_t r = 0;
  int64_t first = 0;
  for (int64_t i = 0; i < count; i++) {
    const int32_t key = keys[i];
    if (key < 0) {
      row[i] = col[i] = -1;
      continue;
    }
    if (key < first || key >= first + cols) r = key / int32_t(cols), first = r * cols;
    row[i] = r, col[i] = int32_t(key - first);
  }
  return 0;
}

// Write for each query the first of the ascending edges above it, as torch.searchsorted(right=True). Queries are from 0 to below
// the last edge; a search begins at the first edge of a part of that range.
int sk_search(const double *edges, int64_t count, const double *queries, int64_t asked, int32_t *found) {
  if (!count) return REFUSED;
  const int64_t parts = 2 * count;
  const double scale = parts / edges[count - 1];
  Scratch scratch((parts + 1) * 4);
  if (!scratch.memory) return NO_MEMORY;
  int32_t *first = (int32_t *)scratch.memory;
  for (int64_t part = 0, e = 0; part <= parts; part++) {
    while (e < count && edges[e] * scale < part) e++;
    first[part] = int32_t(e);
  }
  for (int64_t i = 0; i < asked; i++) {
    const double at = queries[i] * scale;
    int64_t e = first[at > 0 ? at < parts ? int64_t(at) : parts : 0];
    while (e < count && edges[e] <= queries[i]) e++;
    while (e > 0 && edges[e - 1] > queries[i]) e--;
    found[i] = int32_t(e);
  }
  return 0;
}

}  // extern "C"
#pragma GCC visibility pop
