// The block map: which key blocks each query block computes (arXiv:2502.18137, section 3.2).
//
//   z[i][j]  =  log2(e) * sm_scale * (q_mean[i] . k_mean[j])  +  log2(n[j] / 64)
//
// with n[j] real keys in block j. Per row i the candidates are the key blocks that it can reach and
// whose similarity lies above the threshold; the policy's rule chooses among them by
// softmax(z[i]) (select.cuh). On top come, where they can be reached: every block that is no
// candidate, the first `sink_blocks`, and the blocks around the diagonal (reach.cuh). A row takes
// all it can reach if its own similarity does not lie above the threshold, if no candidate is left,
// or if it reaches more than it has room for. NaN, in a similarity or as a score, and an infinite
// score make a block no candidate: nothing that cannot be compared is ever dropped.
//
// Three kernels, all in one dimension of grid that depends on shapes alone:
//   choose_blocks  (kv head * tiles of rows)  the rule of TopCdf and TopK, 256 threads
//   take_blocks    (tiles of 8 rows)          Dense, or a caller's mask: all of it, 256 threads
//   clear_queue    (1)                        zeroes the work queue's counts, 32 threads
// The first two write the same outputs, among them the queue from which attention takes its rows,
// longest first (queue.cuh), and every element is written but the queue's spare places. Its counts
// must be zero beforehand: any earlier kernel on the stream may zero them (clear_queue_counts),
// which the last kernel does where a call has none. No kernel does so yet, so a map is two launches
// today. It repeats bit for bit; only the order of equals in the queue does not.
//
// Layout: map_params.cuh. A tile's rows read the same keys: query blocks of one head and of those
// that share its keys. Each warp reads key blocks 16 bytes a lane, coalesced, and multiplies them
// with all rows of the tile, which its lanes hold by channels; sums over lanes halve the number of
// values in each step. So a key block's mean is read once per tile, no score ever leaves shared
// memory, and 128 of the 315 instructions behind 32 products of 128 channels are FMAs (sm_90a).
//
// Shared memory: 256 bytes of rows' data, then a panel (row, key block) of 4-byte words: the
// scores, later the weights. Its rows are 4 words off a multiple of 32, so that the lanes that
// store one key for 8 rows meet different banks. A row's 8 / rows warps each hold a range of it.
//
// For compute capability 8.0 and later; compiled and checked for 8.0, 8.6, 8.9, 9.0, 10.0, 12.0.

#include "cusparge/geometry.cuh"
#include "cusparge/map_params.cuh"
#include "cusparge/ptx.cuh"
#include "cusparge/queue.cuh"
#include "cusparge/reach.cuh"
#include "cusparge/rows.cuh"
#include "cusparge/select.cuh"
#include "cusparge/types.cuh"

namespace cusparge {

struct MapConfig {
  int head_dim;  // 64, 128 or 256: room for that many channels
  int rows;      // of a tile: 8, 4, 2 or 1; at most 4 with 256 channels
};

inline constexpr int kMapThreads = 256;  // cusparge._cuda.block_map.THREADS
inline constexpr int kMapWarps = kMapThreads / 32;
inline constexpr int kTakeRows = kMapWarps;  // one warp each

// What lies in front of the panel, for up to kMapWarps rows (cusparge._cuda.block_map.ROW_BYTES).
inline constexpr int kRowBytes = 256;
struct SharedRows {
  u64 slots[2 * kMapWarps];  // of the teams: 2 turns, a slot for each warp
  s32 key_base[kMapWarps];   // the row's first column, among the keys of the head
  s32 reach[kMapWarps];      // how many columns need a score
  u32 count[kMapWarps];
};
static_assert(sizeof(SharedRows) <= kRowBytes);

// Sum each of the values over kLanes neighbouring lanes. In every step a lane keeps one half of its
// values and gives the other away, until one is left; that one is then summed like any. Lane l
// ends up with value l * kValues / kLanes, which neighbours share where there are more lanes.
template <int kValues, int kLanes>
CS_DEV void sum_lanes(float* values, int lane) {
  static_assert(kValues <= kLanes);
  if constexpr (kLanes > 1) {
    constexpr int kStep = kLanes / 2;
    if constexpr (kValues > 1) {
      constexpr int kKept = kValues / 2;
      const bool is_upper = (lane & kStep) != 0;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const float kept = is_upper ? values[i + kKept] : values[i];
        const float given = is_upper ? values[i] : values[i + kKept];
        values[i] = kept + ptx::shfl_xor(given, kStep);
      }
      sum_lanes<kKept, kStep>(values, lane);
    } else {
      values[0] += ptx::shfl_xor(values[0], kStep);
      sum_lanes<1, kStep>(values, lane);
    }
  }
}

// A lane's channels of a row of means; zero beyond the row, or without one.
template <class Tile, int kAccess>
CS_DEV void load_means(const float* row, int head_dim, int lane, bool is_row,
                       float (&means)[Tile::kChannels]) {
#pragma unroll
  for (int piece = 0; piece < Tile::kPieces; ++piece) {
    const int channel = Tile::piece_channel(lane, piece);
    const V4 four = load_piece<kAccess>(reinterpret_cast<const u8*>(row + channel),
                                        is_row ? 4 * (head_dim - channel) : 0);
    means[4 * piece] = float_from_bits(four.x);
    means[4 * piece + 1] = float_from_bits(four.y);
    means[4 * piece + 2] = float_from_bits(four.z);
    means[4 * piece + 3] = float_from_bits(four.w);
  }
}

// Products of the tile's rows with key blocks [begin, end) of the head into the panel. A row takes
// those that it needs.
template <MapConfig kConfig, int kAccess>
CS_DEV void multiply_means(const float* q_mean, int num_rows, const float* k_mean, int head_dim,
                           s32 begin, s32 end, const SharedRows& s_rows, u32* s_panel,
                           u32 panel_stride) {
  using Tile = RowTile<Dtype::kFloat32, kConfig.head_dim>;
  constexpr int kRows = kConfig.rows;
  static_assert(kRows * kConfig.head_dim <= 1024, "the rows' channels fit the registers");
  constexpr int kLanes = Tile::kLanes;
  constexpr int kSlots = 32 / kLanes;  // key blocks in one load of the warp
  // Loads in flight, and products that a lane sums at a time: what its registers hold.
  constexpr int kMostValues = kConfig.head_dim == 128 ? 32 : 16;
  constexpr int kMostLoads = 32 / Tile::kChannels;
  constexpr int kLoads = kMostValues / kRows < kMostLoads ? kMostValues / kRows : kMostLoads;
  constexpr int kValues = kRows * kLoads;
  constexpr int kSharers = kLanes / kValues;  // lanes that hold the same one in the end
  static_assert(kSharers * kValues == kLanes);
  constexpr int kKeys = kLoads * kSlots;
  constexpr bool kIsAhead = kAccess == 16;  // element by element takes more registers

  const int warp = static_cast<int>(ptx::thread_x()) / 32;
  const int lane = static_cast<int>(ptx::thread_x()) % 32 % kLanes;
  const int slot = static_cast<int>(ptx::thread_x()) % 32 / kLanes;

  float q[kRows][Tile::kChannels];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    load_means<Tile, kAccess>(q_mean + static_cast<s64>(r) * head_dim, head_dim, lane, r < num_rows,
                              q[r]);
  }
  // Value r + load * kRows is that of row r; this lane's is `lane / kSharers`.
  const int row = lane / kSharers % kRows;
  const s32 base = s_rows.key_base[row] - lane / kSharers / kRows * kSlots - slot;
  const s32 reach = s_rows.reach[row];
  u32* s_scores = s_panel + row * panel_stride;

  float k[kLoads][Tile::kChannels];
  const auto load_keys = [&](s32 first) {
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const s32 key = first + load * kSlots + slot;
      load_means<Tile, kAccess>(k_mean + static_cast<s64>(key) * head_dim, head_dim, lane,
                                key < end, k[load]);
    }
  };
  if (kIsAhead) load_keys(begin + warp * kKeys);
#pragma unroll 1
  for (s32 first = begin + warp * kKeys; first < end; first += kMapWarps * kKeys) {
    if (!kIsAhead) load_keys(first);
    float product[kValues];
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < Tile::kChannels; ++c) sum = ptx::fma(q[r][c], k[load][c], sum);
        product[load * kRows + r] = sum;
      }
    }
    // The next ones are on their way while lanes sum: the registers of these are free.
    if (kIsAhead) load_keys(first + kMapWarps * kKeys);
    sum_lanes<kValues, kLanes>(product, lane);
    const s32 column = first - base;
    if (lane % kSharers == 0 && column >= 0 && column < reach) {
      s_scores[column] = bits_of_float(product[0]);
    }
  }
}

// ---- what is written of a row ------------------------------------------------------------------

// Words and bytes from column `begin` on, a multiple of 32, up to the end of the row: nothing.
CS_DEV void clear_columns(const MapOutputs& out, const MapRows& rows, u32 row, s64 begin, int lane,
                          int lanes) {
  const s64 word_base = static_cast<s64>(row) * rows.words;
#pragma unroll 1
  for (s64 word = begin / 32 + lane; word < rows.words; word += lanes) {
    out.bits[word_base + word] = 0;
  }
  if (out.mask == nullptr) return;
  const s64 byte_base = static_cast<s64>(row) * rows.num_blocks_k;
#pragma unroll 1
  for (s64 column = begin + lane; column < rows.num_blocks_k; column += lanes) {
    out.mask[byte_base + column] = 0;
  }
}

// Where a row's columns are written.
struct RowColumns {
  u32* bits;
  u8* mask;  // null: not wanted
  s64 num_columns;

  CS_DEV RowColumns(const MapOutputs& out, const MapRows& rows, u32 row)
      : bits(out.bits + static_cast<s64>(row) * rows.words),
        mask(out.mask == nullptr ? nullptr : out.mask + static_cast<s64>(row) * rows.num_blocks_k),
        num_columns(rows.num_blocks_k) {}

  // The 32 columns from `begin` on, a bit each. One warp calls.
  CS_DEV void store(s32 begin, u32 word) const {
    const u32 lane = ptx::lane_id();
    if (lane == 0) bits[begin / 32] = word;
    const s64 column = static_cast<s64>(begin) + lane;
    if (mask != nullptr && column < num_columns) mask[column] = static_cast<u8>(word >> lane & 1u);
  }
};

// One thread calls.
CS_DEV void store_numbers(const MapOutputs& out, u32 row, u32 count, u32 first, s32 reach) {
  out.count[row] = count;
  out.first[row] = first;
  out.reachable[row] = static_cast<u32>(reach);
}

// What a warp found in its columns.
struct Found {
  u32 count = 0;
  s32 lowest = kNone;

  CS_DEV void add(s32 begin, u32 word) {
    if (lowest == kNone && word != 0) lowest = begin + __ffs(static_cast<int>(word)) - 1;
    count += static_cast<u32>(__popc(word));
  }
};

// ---- the kernels -------------------------------------------------------------------------------

// The chosen bits of this warp's columns, written as they are found.
template <int kWarps>
CS_DEV Found store_chosen(const RowTask& task, const Cut& cut, bool takes_all, Team<kWarps>& team,
                          const MapParams& params, u32 row) {
  const int lane = static_cast<int>(ptx::lane_id());
  u32 rank = 0;  // of this warp's first tie
  if constexpr (kWarps > 1) {
    u32 ties = 0;
    for (s32 column = task.begin + lane; column < task.end && !takes_all; column += 32) {
      if (static_cast<s32>(task.s_panel[column]) == cut.weight) ++ties;
    }
    rank = static_cast<u32>(team.sum_before(ptx::redux_add(ties)));
  }
  const RowColumns columns(params.out, params.rows, row);
  Found found;
#pragma unroll 1
  for (s32 begin = task.begin; begin < task.end; begin += 32) {
    const s32 column = begin + lane;
    const bool is_seen = column < task.end;
    bool is_chosen = is_seen;
    if (!takes_all) {
      const s32 weight = is_seen ? static_cast<s32>(task.s_panel[column]) : kAlways;
      const bool is_tie = is_seen && weight == cut.weight;
      const u32 ties = ptx::ballot(is_tie);
      const u32 own = rank + static_cast<u32>(__popc(ties & ((1u << lane) - 1)));
      rank += static_cast<u32>(__popc(ties));
      is_chosen = is_seen && (weight == kAlways || weight > cut.weight ||
                              (is_tie && own < cut.ties) || task.is_forced(column));
    }
    const u32 word = ptx::ballot(is_chosen);
    columns.store(begin, word);
    found.add(begin, word);
  }
  return found;
}

template <MapConfig kConfig>
CS_KERNEL void __launch_bounds__(kMapThreads, 2) choose_blocks(const MapParams params) {
  constexpr int kRows = kConfig.rows;
  constexpr int kRowWarps = kMapWarps / kRows;
  static_assert(kRows * kRowWarps == kMapWarps);
  CS_SMEM(smem);
  SharedRows& s_rows = *reinterpret_cast<SharedRows*>(smem);
  u32* s_panel = reinterpret_cast<u32*>(smem + kRowBytes);

  const int thread = static_cast<int>(ptx::thread_x());
  const int warp = thread / 32;
  const int lane = thread % 32;
  const u32 group = ptx::block_x() / params.tiles_per_group;
  const u32 first_of_tile = ptx::block_x() % params.tiles_per_group * kRows;
  const u32 rest = params.rows_per_group - first_of_tile;
  const int num_rows = rest < kRows ? static_cast<int>(rest) : kRows;
  const u32 tile_row = group * params.rows_per_group + first_of_tile;
  const int head_dim = static_cast<int>(params.head_dim);

  // Each row has kRowWarps warps. In a tile that is not full, the last ones have no row, but pass
  // the same barriers.
  const int slot = warp / kRowWarps;
  const bool is_row = slot < num_rows;
  const u32 row = tile_row + static_cast<u32>(is_row ? slot : 0);
  const RowPlace place = place_of_row(params.sequences, params.rows, row);
  const s32 reach = place.reach(0, kBlockQ);
  const u32 head_idx = row / params.rows.blocks_per_head % params.rows.num_heads_q;
  const HeadRule rule = params.rules != nullptr ? params.rules[head_idx]
                                                : params.table[params.num_rules > 1 ? head_idx : 0];
  // The comparison is false for NaN.
  const bool takes_all = !(params.q_similarity[row] > rule.sim_threshold) ||
                         reach > static_cast<s32>(params.panel_blocks);
  if (thread % (32 * kRowWarps) == 0) {
    s_rows.key_base[slot] = place.key_base;
    s_rows.reach[slot] = is_row && !takes_all ? reach : 0;
    s_rows.count[slot] = 0;
  }
  ptx::sync_block();  // all rows are described before any product is stored for one

  const s64 key_row = static_cast<s64>(group / params.groups_per_head) * params.rows.num_blocks_k;
  s32 begin = 0x7fffffff;
  s32 end = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const s32 base = s_rows.key_base[r];
    if (s_rows.reach[r] == 0) continue;
    begin = base < begin ? base : begin;
    end = base + s_rows.reach[r] > end ? base + s_rows.reach[r] : end;
  }
  if (begin < end) {
    const float* q_mean = params.q_mean + static_cast<s64>(tile_row) * head_dim;
    const float* k_mean = params.k_mean + key_row * head_dim;
    // Whole pieces lie at multiples of 16 bytes: then they are read in one.
    const u64 address = reinterpret_cast<u64>(q_mean) | reinterpret_cast<u64>(k_mean);
    if ((address | static_cast<u64>(4 * head_dim)) % 16 == 0) {
      multiply_means<kConfig, 16>(q_mean, num_rows, k_mean, head_dim, begin, end, s_rows, s_panel,
                                  params.panel_stride);
    } else {
      multiply_means<kConfig, 4>(q_mean, num_rows, k_mean, head_dim, begin, end, s_rows, s_panel,
                                 params.panel_stride);
    }
  }
  ptx::sync_block();  // all products are stored before they become scores

  // From here on each warp has a range of its row's columns.
  const s32 words = (reach + 31) / 32;
  const s32 share = (words + kRowWarps - 1) / kRowWarps;
  const int member = warp % kRowWarps;
  const s32 range_begin = 32 * share * member < reach ? 32 * share * member : reach;
  const s32 range_end = 32 * share * (member + 1) < reach ? 32 * share * (member + 1) : reach;
  Team<kRowWarps> team{s_rows.slots + 2 * kRowWarps * slot, member};
  RowTask task;
  task.reach = reach;
  task.rule = static_cast<Rule>(params.rule);
  task.share = rule.share;
  task.sim_threshold = rule.sim_threshold;
  const s64 last_column = params.rows.num_blocks_k;
  const Band band =
      forced_band(place.block, place.seqlen_q, place.is_causal, place.offset, params.local_blocks);
  task.sink = static_cast<s32>(clamped(params.sink_blocks, 0, last_column));
  task.band_first = static_cast<s32>(clamped(band.first, 0, last_column));
  task.band_last = static_cast<s32>(clamped(band.last, -1, last_column));
  const int in_tail = static_cast<int>(place.valid_k % kBlockK);
  task.tail = in_tail == 0 ? kNone : static_cast<s32>(place.valid_k / kBlockK);
  task.tail_bias = ptx::lg2_approx(static_cast<float>(in_tail) * (1.0f / kBlockK));
  task.similarity = params.k_similarity + key_row + place.key_base;
  task.s_panel = s_panel + slot * params.panel_stride;
  task.begin = is_row && !takes_all ? range_begin : 0;
  task.end = is_row && !takes_all ? range_end : 0;

  const Candidates found = score_candidates(task, params.scale_log2);
  const u64 best = team.largest(found.best);
  const u64 best_forced = team.largest(found.best_forced);
  const u64 forced = team.sum(found.forced);
  const u64 total = team.sum(weigh(task, best == 0 ? 0.0f : score_of(best)));
  const u64 goal = goal_of(task, total, forced);
  const Cut cut = find_cut(task, team, goal);

  if (is_row) {
    task.begin = range_begin;
    task.end = range_end;
  }
  const Found chosen = store_chosen(task, cut, takes_all, team, params, row);
  const u64 count = team.sum(chosen.count);
  // The lowest block as the rank of equal scores: the largest one is its.
  const s32 lowest = block_of(team.largest(chosen.count == 0 ? 0 : rank_of(0.0f, chosen.lowest)));
  if (is_row) {
    clear_columns(params.out, params.rows, row, 32ll * words, 32 * member + lane, 32 * kRowWarps);
    if (member == 0 && lane == 0) {
      s32 first = lowest;
      if (!takes_all) {
        // The best candidate is chosen, except where forced blocks use up what TopK takes.
        const bool is_chosen = goal > 0 || task.is_forced(block_of(best));
        const u64 rank = is_chosen ? best : best_forced;
        if (rank != 0) first = block_of(rank);
      }
      const u32 bits = static_cast<u32>(count);
      store_numbers(params.out, row, bits, first == kNone ? 0 : static_cast<u32>(first), reach);
      s_rows.count[slot] = bits;
    }
  }
  if (params.out.items == nullptr) return;
  ptx::sync_block();  // all counts are stored before the first warp sorts the rows
  if (warp == 0) {
    push_rows<kRows>(params.out.class_counts, params.out.items, params.rows.num_rows,
                     tile_row + static_cast<u32>(lane), lane < kRows ? s_rows.count[lane] : 0,
                     lane < num_rows);
  }
}

// Bits of the 32 columns from `begin` on that the caller's mask keeps in one of its rows.
CS_DEV u32 given_columns(const TakeParams& params, const u8* mask_row, s32 begin, s32 reach) {
  const s64 column = static_cast<s64>(begin) + ptx::lane_id();
  bool is_kept = column < reach;
  if (is_kept && mask_row != nullptr) {
    const u8* item = mask_row + (column >> params.column_shift) * params.stride_column;
    is_kept = false;
    for (u32 byte = 0; byte < params.item_bytes; ++byte) is_kept = is_kept || item[byte] != 0;
  }
  return ptx::ballot(is_kept);
}

// kMaskRows: 128, or 64 for a caller's mask of that many rows, whose halves of a block differ. No
// pair of tokens that it leaves out is added: the map is the union of the halves, and attention
// asks `halves` which rows a block is for.
template <int kMaskRows>
CS_KERNEL void __launch_bounds__(kMapThreads, 4) take_blocks(const TakeParams params) {
  static_assert(kMaskRows == kBlockQ || kMaskRows == kBlockQ / 2);
  constexpr int kHalves = kBlockQ / kMaskRows;
  CS_SMEM(smem);
  SharedRows& s_rows = *reinterpret_cast<SharedRows*>(smem);
  const int warp = static_cast<int>(ptx::thread_x()) / 32;
  const int lane = static_cast<int>(ptx::lane_id());
  const u32 tile_row = ptx::block_x() * kTakeRows;
  const u32 rest = params.rows.num_rows - tile_row;
  const int num_rows = rest < kTakeRows ? static_cast<int>(rest) : kTakeRows;

  if (warp < num_rows) {
    const u32 row = tile_row + static_cast<u32>(warp);
    const RowPlace place = place_of_row(params.sequences, params.rows, row);
    const s32 reach = place.reach(0, kBlockQ);
    const u8* mask_rows[kHalves];
    s32 reaches[kHalves];
    const u32 block = row % params.rows.blocks_per_head;
    const u32 head = row / params.rows.blocks_per_head;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      reaches[half] = place.reach(half * kMaskRows, kMaskRows);
      mask_rows[half] = nullptr;
      if (params.given != nullptr) {
        mask_rows[half] = params.given + head / params.rows.num_heads_q * params.stride_batch +
                          head % params.rows.num_heads_q * params.stride_head +
                          (static_cast<s64>(block) * kHalves + half) * params.stride_row;
      }
    }
    const RowColumns columns(params.out, params.rows, row);
    Found found;
    u32* halves = nullptr;
    if (kHalves == 2) halves = params.halves + static_cast<s64>(row) * 2 * params.rows.words;
    const s32 end = (reach + 31) / 32 * 32;
#pragma unroll 1
    for (s32 begin = 0; begin < end; begin += 32) {
      u32 word = 0;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const u32 part = given_columns(params, mask_rows[half], begin, reaches[half]);
        if (kHalves == 2 && lane == 0) halves[half * params.rows.words + begin / 32] = part;
        word |= part;
      }
      columns.store(begin, word);
      found.add(begin, word);
    }
    clear_columns(params.out, params.rows, row, end, lane, 32);
    if (kHalves == 2) {
#pragma unroll 1
      for (s64 word = end / 32 + lane; word < params.rows.words; word += 32) {
        halves[word] = 0;
        halves[params.rows.words + word] = 0;
      }
    }
    if (lane == 0) {
      const s32 first = found.lowest == kNone ? 0 : found.lowest;
      store_numbers(params.out, row, found.count, static_cast<u32>(first), reach);
      s_rows.count[warp] = found.count;
    }
  }
  if (params.out.items == nullptr) return;
  ptx::sync_block();  // all counts are stored before the first warp sorts the rows
  if (warp == 0) {
    push_rows<kTakeRows>(params.out.class_counts, params.out.items, params.rows.num_rows,
                         tile_row + static_cast<u32>(lane),
                         lane < num_rows ? s_rows.count[lane] : 0, lane < num_rows);
  }
}

template <int kThreadCount>
CS_KERNEL void __launch_bounds__(kThreadCount) clear_queue(const ClearParams params) {
  static_assert(kThreadCount == 32, "one warp");
  clear_queue_counts(params.class_counts, params.ticket);
}

}  // namespace cusparge
