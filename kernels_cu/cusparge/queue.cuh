// The work queue of attention: every row of the map once, those with most blocks first.
//
// Rows are sorted into classes by their number of blocks, two classes to the octave, and a class
// has room for all rows:
//
//   items   class 0   | row row row .. ------ unwritten ------ |     the most blocks
//           class 1   | row .. ------------------------------- |
//           ...
//           class 31  | row row .. --------------------------- |     no block at all
//   class_counts[c]     how many rows class c holds
//
// So a row finds its place with one addition to its class's count, and no block of threads waits
// for another. The reader counts through the classes: ticket t, for t below the number of rows, is
// row t of the concatenated classes. Rows without blocks are in it, since their zeros have to be
// written. The order inside a class is that of arrival: it differs between runs, and no result
// depends on it.
//
// class_counts and the reader's ticket counter must be zero before the rows are pushed, which takes
// an earlier kernel on the stream: its first warp may call `clear_queue_counts` on the way.

#pragma once

#include "cusparge/ptx.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

inline constexpr u32 kClasses = 32;  // cusparge._cuda.block_map.CLASSES

// Which class a row of that many blocks is in; more blocks never give a higher class.
CS_HOST_DEV constexpr u32 class_of(u32 count) {
  if (count == 0) return kClasses - 1;
  // Exponent and highest mantissa bit of a float: 1 -> 0, 2 -> 2, 3 -> 3, 4 -> 4, 6 -> 5, 8 -> 6 ..
  const u32 half_octave = (bits_of_float(static_cast<float>(count)) >> 22) - 2 * 127;
  const u32 last = kClasses - 2;
  return last - (half_octave < last ? half_octave : last);
}

// One warp calls.
CS_DEV void clear_queue_counts(u32* class_counts, u32* ticket) {
  static_assert(kClasses == 32, "a lane for each class");
  class_counts[ptx::lane_id()] = 0;
  if (ptx::lane_id() == 0) *ticket = 0;
}

// Put the rows first, first + 1, ... of the lanes 0 to kRows - 1 into the queue, one addition for
// each class among them. One warp calls; `is_row` is false in lanes without a row.
template <int kRows>
CS_DEV void push_rows(u32* class_counts, u32* items, u32 num_rows, u32 row, u32 count,
                      bool is_row) {
  static_assert(kRows <= 32);
  const u32 lane = ptx::lane_id();
  const u32 own = is_row ? class_of(count) : kClasses;
  u32 rank = 0;   // rows of the same class in lanes before this one
  u32 total = 0;  // in all lanes
  u32 leader = lane;
#pragma unroll
  for (u32 other = 0; other < kRows; ++other) {
    const bool is_same = ptx::shfl_idx(own, other) == own;
    if (is_same && other < lane) ++rank;
    if (is_same && other < leader) leader = other;
    if (is_same) ++total;
  }
  u32 place = 0;
  if (is_row && leader == lane) place = ptx::atomic_add_global(class_counts + own, total);
  place = ptx::shfl_idx(place, leader) + rank;
  if (is_row) items[static_cast<u64>(own) * num_rows + place] = row;
}

// Reads the queue, behind the launch that filled it.
struct WorkQueue {
  const u32* items;
  u32 num_rows;
  u32 end;  // rows in this lane's class and those before it

  // Whole warps call, here and below.
  CS_DEV WorkQueue(const u32* class_counts, const u32* rows_by_class, u32 total_rows)
      : items(rows_by_class), num_rows(total_rows) {
    const u32 lane = ptx::lane_id();
    end = class_counts[lane];
#pragma unroll
    for (u32 step = 1; step < kClasses; step *= 2) {
      const u32 before = ptx::shfl_up(end, step);
      if (lane >= step) end += before;
    }
  }

  // The row of a ticket, the same in all lanes; the ticket is below the number of rows.
  CS_DEV u32 row(u32 ticket) const {
    // `end` rises with the lanes: as many classes lie wholly before the ticket as lanes say so.
    const u32 own = static_cast<u32>(__popc(ptx::ballot(end <= ticket)));
    const u32 before = ptx::shfl_idx(end, own == 0 ? 0 : own - 1);
    const u32 place = ticket - (own == 0 ? 0 : before);
    return items[static_cast<u64>(own) * num_rows + place];
  }
};

}  // namespace cusparge
