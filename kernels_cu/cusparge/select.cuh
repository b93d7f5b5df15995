// Choosing blocks by their pooled scores: the rules of TopCdf and TopK, without a sort.
//
// A row's candidates are weighed by whole numbers, the best one by 2^20:
//
//   w[j] = floor(2^20 * 2^(z[j] - max z)),     z = scores in log2 units
//
// and taken in the order of weight, the lower index first among equals, until a goal is met. So the
// chosen ones are those above some weight t, and the first few of those that weigh t. With mass(t)
// the sum of all weights >= t (TopCdf), or their number (TopK), the goal decides t by bisection:
//
//   t = the largest one with mass(t) >= goal,      above = mass(t + 1) < goal
//   ties taken, from the left = ceil((goal - above) / unit),    unit = t or 1
//
//   TopCdf, "reach"   goal = ceil(tau * total)        the block that crosses tau is taken
//   TopCdf, "within"  goal = floor(tau * total) + 1   it is not: a tie less, but at least a block
//   TopK              goal = count - forced           forced blocks are no candidates then
//
// Sums of integers have no order: the choice is exact, and that of cusparge.reference wherever the
// weights are. The weights live in shared memory, as a row's *panel*; each lane reads and writes
// the same columns in every pass, so that only sums travel between lanes.

#pragma once

#include "cusparge/geometry.cuh"
#include "cusparge/ptx.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

enum class Rule : u32 { kReach, kWithin, kTopK };  // cusparge._cuda.block_map.RULES

inline constexpr float kNoScore = float_from_bits(0xff800000u);  // -inf
inline constexpr u64 kNever = ~0ull;  // a goal that nothing meets: all candidates are taken
inline constexpr s32 kAlways = -1;    // in place of a weight: chosen, and not weighed
inline constexpr s32 kNone = -1;      // in place of a block

// Steps that try every weight from 0 to kWeightOne: 2^20, 2^19 .. 1.
inline constexpr int kBisections = 21;
static_assert(kWeightOne == 1 << (kBisections - 1));

// A row's panel lies in shared memory, of which no device gives a block of threads more than this:
// the weights of one lane's columns sum up in 32 bits.
inline constexpr u64 kMostShared = 227 * 1024;
static_assert((kMostShared / 4 / 32 + 1) * kWeightOne < (1ull << 32));

// The sum over a warp's lanes.
CS_DEV u64 sum_of_lanes(u32 x) {
  return (static_cast<u64>(ptx::redux_add(x >> 16)) << 16) + ptx::redux_add(x & 0xffffu);
}

// The warps that work on one row, each on a range of columns of its own. In its functions all warps
// of the block take part, each for its row; each passes one value, the same in all lanes.
template <int kWarps>
struct Team {
  u64* s_slots;  // 2 * kWarps, of this row
  int member;    // which of its warps this one is
  u32 turn = 0;

  // The values of all warps, in their order.
  CS_DEV void exchange(u64 mine, u64 (&all)[kWarps]) {
    if constexpr (kWarps == 1) {
      all[0] = mine;
    } else {
      // Two sets of slots in turn: whoever writes to one again has passed the barrier between, so
      // that all have read it.
      u64* slots = s_slots + turn * kWarps;
      turn ^= 1;
      if (ptx::lane_id() == 0) slots[member] = mine;
      ptx::sync_block();  // all values are stored before any is read
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) all[warp] = slots[warp];
    }
  }
  CS_DEV u64 sum(u64 mine) {
    u64 all[kWarps];
    exchange(mine, all);
    u64 total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += all[warp];
    return total;
  }
  CS_DEV u64 largest(u64 mine) {
    u64 all[kWarps];
    exchange(mine, all);
    u64 best = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) best = all[warp] > best ? all[warp] : best;
    return best;
  }
  // The sum of the warps before this one.
  CS_DEV u64 sum_before(u64 mine) {
    u64 all[kWarps];
    exchange(mine, all);
    u64 total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += warp < member ? all[warp] : 0;
    return total;
  }
};

// A score and its block as a number that is larger for a better one: a higher score, or an equal
// one further left. 0 for none.
CS_DEV u64 rank_of(float score, s32 block) {
  if (score == kNoScore) return 0;
  const u32 bits = bits_of_float(score == 0.0f ? 0.0f : score);  // -0 equals 0
  const u32 ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(ordered) << 32 | ~static_cast<u32>(block);
}
CS_DEV float score_of(u64 rank) {
  const u32 ordered = static_cast<u32>(rank >> 32);
  return float_from_bits((ordered >> 31) != 0 ? ordered & 0x7fffffffu : ~ordered);
}
CS_DEV s32 block_of(u64 rank) {
  return rank == 0 ? kNone : static_cast<s32>(~static_cast<u32>(rank));
}
CS_DEV u64 best_of_lanes(u64 rank) {
  const u32 high = static_cast<u32>(rank >> 32);
  const u32 best = ptx::redux_max(high);
  const u32 low = ptx::redux_max(high == best ? static_cast<u32>(rank) : 0u);
  return static_cast<u64>(best) << 32 | low;
}

// One row as the rules see it. Columns are key blocks of its sequence.
struct RowTask {
  s32 reach;       // columns in sight: 0 .. reach - 1
  s32 sink;        // columns below this are forced,
  s32 band_first;  // and so are those in this range
  s32 band_last;
  s32 tail;         // the column that holds fewer than 64 keys, kNone without one
  float tail_bias;  // log2 of its share of 64
  float sim_threshold;
  double share;
  Rule rule;
  const float* similarity;  // of the columns
  u32* s_panel;             // a word for each column: its score, then its weight
  s32 begin;                // this warp's columns, a multiple of 32,
  s32 end;                  // up to here; begin = end without any

  CS_DEV bool is_forced(s32 column) const {
    return column < sink || (band_first <= column && column <= band_last);
  }
};

// What the columns of this warp say about the choice, gathered from its lanes.
struct Candidates {
  u64 best;         // rank of the best candidate
  u64 best_forced;  // of the best among the forced ones
  u32 forced;       // how many columns are forced
};

// Turn products into scores, or kNoScore in columns that are no candidates: fix blocks, and what
// float32 did not hold. Such columns are computed, never estimated.
CS_DEV Candidates score_candidates(const RowTask& task, float scale_log2) {
  float best = kNoScore;
  float best_forced = kNoScore;
  s32 best_column = kNone;
  s32 best_forced_column = kNone;
  u32 forced = 0;
  for (s32 column = task.begin + static_cast<s32>(ptx::lane_id()); column < task.end;
       column += 32) {
    const float bias = column == task.tail ? task.tail_bias : 0.0f;
    float score = ptx::fma(float_from_bits(task.s_panel[column]), scale_log2, bias);
    // The comparison is false for NaN.
    const bool is_alike = task.similarity[column] > task.sim_threshold;
    if (!is_alike || !is_finite(score)) score = kNoScore;
    task.s_panel[column] = bits_of_float(score);
    if (score > best) {
      best = score;
      best_column = column;
    }
    if (task.is_forced(column)) {
      ++forced;
      if (score > best_forced) {
        best_forced = score;
        best_forced_column = column;
      }
    }
  }
  return Candidates{best_of_lanes(rank_of(best, best_column)),
                    best_of_lanes(rank_of(best_forced, best_forced_column)),
                    ptx::redux_add(forced)};
}

// Turn scores into weights; return the sum of this warp's.
CS_DEV u64 weigh(const RowTask& task, float top) {
  u32 sum = 0;
  for (s32 column = task.begin + static_cast<s32>(ptx::lane_id()); column < task.end;
       column += 32) {
    const float score = float_from_bits(task.s_panel[column]);
    s32 weight = kAlways;
    const bool is_counted = task.rule != Rule::kTopK || !task.is_forced(column);
    if (score != kNoScore && is_counted) {
      const float below = score - top;
      weight = static_cast<s32>(ptx::ex2_approx(below) * static_cast<float>(kWeightOne));
      // Only the best weighs 2^20, whatever the exponential rounds to.
      if (below < 0.0f && weight >= kWeightOne) weight = kWeightOne - 1;
      sum += static_cast<u32>(weight);
    }
    task.s_panel[column] = static_cast<u32>(weight);
  }
  return sum_of_lanes(sum);
}

// This warp's part of mass(least).
CS_DEV u64 mass_from(const RowTask& task, s32 least) {
  u32 mass = 0;
  for (s32 column = task.begin + static_cast<s32>(ptx::lane_id()); column < task.end;
       column += 32) {
    const s32 weight = static_cast<s32>(task.s_panel[column]);
    if (weight >= least) mass += task.rule == Rule::kTopK ? 1u : static_cast<u32>(weight);
  }
  return sum_of_lanes(mass);
}

// Products are rounded one by one: the compiler may not fuse them with the difference.
CS_DEV u64 top_k_count(double keep, s32 reachable) {
  const double wanted =
      ptx::mul_rn(keep, static_cast<double>(reachable)) - ptx::mul_rn(1e-6, reachable);
  const s64 floor = static_cast<s64>(wanted);  // above -1: rounding towards zero is to 0 there
  const s64 count = floor + (static_cast<double>(floor) < wanted ? 1 : 0);
  return static_cast<u64>(count < 1 ? 1 : count < reachable ? count : reachable);
}

// What has to be met, see above. `total` is the sum of all weights.
CS_DEV u64 goal_of(const RowTask& task, u64 total, u64 forced) {
  if (task.rule == Rule::kTopK) {
    const u64 count = top_k_count(task.share, task.reach);
    return count > forced ? count - forced : 0;
  }
  if (task.share >= 1.0) return kNever;
  const double bar = ptx::mul_rn(task.share, static_cast<double>(total));
  const u64 floor = static_cast<u64>(bar);
  if (task.rule == Rule::kWithin) return floor + 1;
  const u64 goal = floor + (static_cast<double>(floor) < bar ? 1 : 0);
  return goal > 0 ? goal : 1;
}

// Which candidates are taken: those above a weight, and the first of those that have it.
struct Cut {
  s32 weight;  // kAlways: all are above it
  u64 ties;
};

// The bisection. All warps of the block call, each for its row; a row without candidates has a
// panel of kAlways, or no columns.
template <int kWarps>
CS_DEV Cut find_cut(const RowTask& task, Team<kWarps>& team, u64 goal) {
  s32 weight = kAlways;
  u64 above = 0;
#pragma unroll 1
  for (s32 step = kWeightOne; step > 0; step /= 2) {
    const s32 tried = weight + step;
    const u64 mass = team.sum(mass_from(task, tried));
    if (mass >= goal) {
      weight = tried;
    } else {
      above =
          mass;  // in the end, that of weight + 1: the last step fell short there, or an earlier
    }
  }
  const u64 unit = task.rule == Rule::kTopK ? 1 : static_cast<u64>(weight);
  // A goal of 0 takes nothing, and one that nothing meets all: no weight is then that of a tie.
  if (goal == 0 || weight == kAlways) return Cut{weight, 0};
  u64 ties = (goal - above - 1) / unit;
  if (task.rule != Rule::kWithin || (above == 0 && ties == 0)) ++ties;
  return Cut{weight, ties};
}

}  // namespace cusparge
