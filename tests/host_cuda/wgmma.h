// wgmma, its fence, groups and waits, and setmaxnreg.
//
// Each warp of a warpgroup issues its 16 rows on its own and may run ahead of the others, as on
// hardware; a list per warpgroup makes sure that all four issue the same. From issue to wait the
// shared memory it reads must not be written, its accumulators not be touched and its A registers
// not be written. Accumulators live in `Accumulator` meanwhile, and the registers hold poison
// except in the eager schedule.

#pragma once

#include <memory>

#include "tensor.h"

namespace emu {

struct Range {  // of a thread's stack
  u32 begin, end;
  bool is_accumulator;
  Place place;
};
struct Accumulator {
  u8* registers[32];
  u32 count, users;         // registers a lane; operations in flight
  std::vector<u32> values;  // [lane][register]
};
struct Wgmma {
  Mma form;
  u32 id, group;
  bool done, from_registers;
  u64 desc_a, desc_b;
  u32 scale_d;
  std::vector<u32> a;       // [lane][4]
  std::vector<u32> chunks;  // offsets of the 16-byte pieces it reads, A before B
  std::shared_ptr<Accumulator> accumulator;
  const u8* a_registers[32];
  Place place;
};
struct WarpState {
  std::deque<Wgmma> queue;  // in flight, oldest first
  std::vector<std::shared_ptr<Accumulator>> accumulators;
  u32 groups = 0, issued = 0;  // commits; entries of the warpgroup's list
  bool fenced = false;         // since the last wait
};
struct WarpgroupState {
  std::vector<std::pair<u64, Place>> list;  // what its warps must do alike
  u32 registers = 0;
};
inline WarpState warp_states[kMaxThreads / 32];
inline WarpgroupState warpgroups[kMaxThreads / 128];
inline u32 next_wgmma = 0;

// Which fence each word of a stack was last written behind. Fences count on through all blocks, so
// that stamps of older blocks never look new.
inline u32* stamps = nullptr;
inline u32 fence_counts[kMaxThreads];
inline std::vector<Range> in_flight[kMaxThreads];

inline u32* stamps_of(const Thread& t) { return stamps + u64{t.id} * (kStackBytes / 4); }

inline void check_in_flight(const Thread& t, u32 offset, u32 bytes, bool is_write, Place place) {
  for (const Range& r : in_flight[t.id])
    if (offset < r.end && r.begin < offset + bytes && (is_write || r.is_accumulator))
      fail("wgmma in flight",
           text("%s a register of thread %u at %s that the wgmma issued at %s %s",
                is_write ? "writes" : "reads", t.id, at(place), at(r.place),
                r.is_accumulator ? "still accumulates into" : "still reads"));
}

// Stacks are register arrays here, as far as the runtime gets to see them.
void stack_access(u32 offset, u32 bytes, bool is_write, Place place) {
  const Thread& t = *rt.current;
  if (!in_flight[t.id].empty()) check_in_flight(t, offset, bytes, is_write, place);
  if (is_write && stamps != nullptr)
    for (u32 word = offset / 4; word * 4 < offset + bytes; ++word)
      stamps_of(t)[word] = fence_counts[t.id];
}

void registers_written(Thread& t, const void* p, u32 bytes, Place place) {
  const u64 offset = static_cast<u64>(bytes_of(p) - t.stack);
  if (offset >= kStackBytes) return;
  Thread* const caller = rt.current;
  rt.current = &t;
  stack_access(static_cast<u32>(offset), bytes, true, place);
  rt.current = caller;
}

// ---- the warpgroup's list -----------------------------------------------------------------------
inline void same_for_warpgroup(const char* what, u64 value, Place place) {
  const u32 warp = rt.current->warp, group = warp / 4;
  if (rt.num_threads < (group + 1) * 128)
    fail("warpgroup misuse",
         text("calls %s at %s, but its warpgroup has less than 128 threads", what, at(place)));
  u64 hash = value * 0x9e3779b97f4a7c15ull;
  for (const char* c = what; *c != 0; ++c) hash = (hash ^ static_cast<u8>(*c)) * 0x100000001b3ull;
  auto& list = warpgroups[group].list;
  const u32 index = warp_states[warp].issued++;
  if (index == list.size()) {
    list.emplace_back(hash, place);
  } else if (list[index].first != hash) {
    fail("warpgroup misuse", text("calls %s at %s where another warp of its warpgroup called "
                                  "something else, or with other operands, at %s",
                                  what, at(place), at(list[index].second)));
  }
}

// ---- what a wgmma reads -------------------------------------------------------------------------
// Offset in shared memory of the 16 bytes `half` (0 or 1) of row `row`, for 32 bytes along k.
inline u32 chunk_offset(u64 descriptor, u32 row, u32 half, Place place) {
  const u32 address = static_cast<u32>(descriptor & 0x3fff) << 4;
  const u32 lbo = static_cast<u32>(descriptor >> 16 & 0x3fff) << 4;
  const u32 sbo = static_cast<u32>(descriptor >> 32 & 0x3fff) << 4;
  const u32 mode = static_cast<u32>(descriptor >> 62);
  u32 a = address + row / 8 * sbo;
  if (mode == 0) {
    a += half * lbo + row % 8 * 16;
  } else {
    const u32 width = 256u >> mode;  // 128, 64 or 32 bytes a row
    if (address % (8 * width) >= width)
      fail("misaligned access", text("issues a wgmma at %s on shared address %u; a tile with "
                                     "%u-byte swizzle starts at a multiple of %u",
                                     at(place), address, width, 8 * width));
    a += row % 8 * width + half * 16;
    a ^= (a >> 7 & (width / 16 - 1)) << 4;
  }
  return shared_offset(a, 16, 16, "reads (wgmma)", place);
}

inline void check_descriptor(u64 descriptor, Place place) {
  if ((descriptor >> 49 & 7) != 0)
    fail("wgmma descriptor", text("issues a wgmma at %s with base offset %u; the emulation knows "
                                  "tiles aligned to 8 rows, whose base offset is 0",
                                  at(place), static_cast<u32>(descriptor >> 49 & 7)));
}

inline void compute(Wgmma& op) {
  if (op.done) return;
  op.done = true;
  Accumulator& acc = *op.accumulator;
  const u32 columns = acc.count * 2;
  const double* const values = values_of_bytes(op.form);
  const auto byte = [&](u32 chunk, u32 j) { return values[shared_bytes[chunk + j]]; };
  std::vector<double> a(16 * 32), b(32 * columns), sums(16 * columns);  // a[row][k], b[k][column]
  if (op.from_registers) {
    for (u32 lane = 0; lane < 32; ++lane)
      for (u32 i = 0; i < 16; ++i) {
        const u32 r = i / 4, k = lane % 4 * 4 + r / 2 * 16 + i % 4;
        a[(lane / 4 + r % 2 * 8) * 32 + k] = element(op.form, op.a[lane * 4 + r], i % 4);
      }
  } else {
    for (u32 i = 0; i < 16 * 32; ++i) a[i] = byte(op.chunks[i / 16], i % 16);
  }
  const u32* chunks = op.chunks.data() + (op.from_registers ? 0 : 32);
  for (u32 i = 0; i < columns * 32; ++i)
    b[i % 32 * columns + i / 32] = byte(chunks[i / 16], i % 16);
  for (u32 row = 0; row < 16; ++row)
    for (u32 k = 0; k < 32; ++k) {
      double* __restrict sum = &sums[row * columns];
      const double factor = a[row * 32 + k], *b_row = &b[k * columns];
      for (u32 column = 0; column < columns; ++column) sum[column] += factor * b_row[column];
    }
  for (u32 lane = 0; lane < 32; ++lane)
    for (u32 i = 0; i < acc.count; ++i) {
      const u32 row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + lane % 4 * 2 + i % 2;
      u32& d = acc.values[lane * acc.count + i];
      d = accumulated(op.form, op.scale_d != 0 ? d : 0, sums[row * columns + column]);
    }
}

inline void write_back(const Accumulator& acc) {
  for (u32 lane = 0; lane < 32; ++lane)
    std::memcpy(acc.registers[lane], &acc.values[lane * acc.count], acc.count * 4);
}

// ---- issue --------------------------------------------------------------------------------------
struct WgmmaOperands {
  void* d;
  const u32* a;
  u64 desc_a, desc_b;
  u32 scale_d;
};

// Every register of the operation must have been written behind a fence, or not since.
inline void check_registers(const Thread& t, const void* p, u32 words, bool is_accumulator,
                            Place place) {
  const u32 offset = static_cast<u32>(bytes_of(p) - t.stack);
  for (u32 i = 0; i < words; ++i)
    if (stamps_of(t)[offset / 4 + i] == fence_counts[t.id])
      fail("missing wgmma.fence",
           text("issues a wgmma at %s: register %u of its %s in thread %u was "
                "written since the last wgmma.fence",
                at(place), i, is_accumulator ? "accumulators" : "operand A", t.id));
}

inline void issue(Mma form, u32 registers, void** all, Place place) {
  const auto& first = *static_cast<const WgmmaOperands*>(all[0]);
  WarpState& warp = warp_states[rt.current->warp];
  for (u32 lane = 1; lane < 32; ++lane) {
    const auto& o = *static_cast<const WgmmaOperands*>(all[lane]);
    if (o.desc_a != first.desc_a || o.desc_b != first.desc_b || o.scale_d != first.scale_d)
      fail("warpgroup misuse", text("issues a wgmma at %s whose descriptors or scale_d differ "
                                    "between lanes 0 and %u",
                                    at(place), lane));
  }
  const bool from_registers = first.a != nullptr;
  same_for_warpgroup("wgmma.mma_async",
                     first.desc_a * 3 + first.desc_b * 5 + first.scale_d * 7 + registers * 11 +
                         form * 13 + from_registers,
                     place);
  if (!warp.fenced)
    fail("missing wgmma.fence", text("issues a wgmma at %s with no wgmma.fence since the last "
                                     "wgmma.wait_group",
                                     at(place)));
  Wgmma op{form,         next_wgmma++, warp.groups,   false, from_registers,
           first.desc_a, first.desc_b, first.scale_d, {},    {},
           nullptr,      {},           place};
  check_descriptor(op.desc_b, place);
  if (!from_registers) check_descriptor(op.desc_a, place);

  // Shared memory: all lanes must know that it is ready, and visible to the async proxy.
  std::vector<u32> clocks(seen(rt.current->id), seen(rt.current->id) + 2 * rt.clock_width);
  for (u32 lane = 0; lane < 32; ++lane)
    for (u32 i = 0; i < clocks.size(); ++i)
      clocks[i] = std::min(clocks[i], seen(lane_thread(lane).id)[i]);
  const Accessor me{clocks.data(), clocks.data() + rt.clock_width, rt.current->warp,
                    kInFlight | op.id, true};
  const u32 first_row = rt.current->warp % 4 * 16;
  for (u32 i = 0; !from_registers && i < 32; ++i)
    op.chunks.push_back(chunk_offset(op.desc_a, first_row + i / 2, i % 2, place));
  for (u32 i = 0; i < registers * 4; ++i)
    op.chunks.push_back(chunk_offset(op.desc_b, i / 2, i % 2, place));
  for (const u32 chunk : op.chunks) shared_read(me, chunk, 16, "reads (wgmma)", place);

  // Registers.
  for (const auto& known : warp.accumulators)
    if (known->registers[0] == first.d) op.accumulator = known;
  const bool is_new = op.accumulator == nullptr;
  if (is_new) {
    op.accumulator = std::make_shared<Accumulator>();
    op.accumulator->count = registers;
    warp.accumulators.push_back(op.accumulator);
  }
  Accumulator& acc = *op.accumulator;
  if (acc.count != registers)
    fail("wgmma in flight", text("issues a wgmma at %s into accumulators that one of another shape "
                                 "still uses",
                                 at(place)));
  ++acc.users;
  for (u32 lane = 0; lane < 32; ++lane) {
    const Thread& t = lane_thread(lane);
    const auto& o = *static_cast<const WgmmaOperands*>(all[lane]);
    const u32 begin = static_cast<u32>(bytes_of(o.d) - t.stack);
    if (is_new) {
      check_in_flight(t, begin, registers * 4, true, place);
      check_registers(t, o.d, registers, true, place);
      acc.registers[lane] = static_cast<u8*>(o.d);
      const u32* values = static_cast<const u32*>(o.d);
      acc.values.insert(acc.values.end(), values, values + registers);
      if (rt.schedule != Schedule::kEager) std::memset(o.d, 0x7f, registers * 4);
      in_flight[t.id].push_back({begin, begin + registers * 4, true, place});
    }
    if (from_registers) {
      const u32 from = static_cast<u32>(bytes_of(o.a) - t.stack);
      check_in_flight(t, from, 16, false, place);
      check_registers(t, o.a, 4, false, place);
      op.a.insert(op.a.end(), o.a, o.a + 4);
      op.a_registers[lane] = bytes_of(o.a);
      in_flight[t.id].push_back({from, from + 16, false, place});
    }
  }
  warp.queue.push_back(std::move(op));
  if (rt.schedule == Schedule::kEager) {
    compute(warp.queue.back());
    write_back(acc);
  }
}

void wgmma(Mma form, void* d, int registers, const unsigned* a, unsigned long long desc_a,
           unsigned long long desc_b, unsigned scale_d) {
  WgmmaOperands mine{d, a, desc_a, desc_b, scale_d};
  const Place place = EMU_PLACE;
  collective("wgmma.mma_async", ~0u, &mine, place,
             [&](void** all) { issue(form, static_cast<u32>(registers), all, place); });
}

// ---- fence, groups, wait ------------------------------------------------------------------------
void wgmma_fence() {
  const Place place = EMU_PLACE;
  u32 present = 1;
  collective("wgmma.fence", ~0u, &present, place, [&](void**) {
    if (stamps == nullptr) {
      void* memory = mmap(nullptr, u64{kMaxThreads} * kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) fail("out of memory", "while mapping the registers' stamps");
      stamps = static_cast<u32*>(memory);
    }
    same_for_warpgroup("wgmma.fence", 0, place);
    warp_states[rt.current->warp].fenced = true;
    for (u32 lane = 0; lane < 32; ++lane) ++fence_counts[lane_thread(lane).id];
  });
}

void wgmma_commit() {
  const Place place = EMU_PLACE;
  u32 present = 1;
  collective("wgmma.commit_group", ~0u, &present, place, [&](void**) {
    same_for_warpgroup("wgmma.commit_group", 0, place);
    ++warp_states[rt.current->warp].groups;
  });
}

inline void forget_range(u32 thread, u32 begin) {
  auto& ranges = in_flight[thread];
  for (size_t i = 0; i < ranges.size(); ++i)
    if (ranges[i].begin == begin) {
      ranges.erase(ranges.begin() + static_cast<std::ptrdiff_t>(i));
      return;
    }
}

inline void retire(WarpState& warp, u32 first_thread) {
  Wgmma& op = warp.queue.front();
  compute(op);
  const u32 warp_index = first_thread / 32;
  // Its reads have happened: lane 0 stands for the warp, whose lanes are joined behind the wait.
  for (const u32 chunk : op.chunks)
    for (u32 i = chunk; i < chunk + 16; ++i) {
      for (u32 m = 0; m < 2; ++m) {
        u32& mark = marks_of(i, warp_index)[m];
        if (mark == (kInFlight | op.id)) mark = now(first_thread) << 5;
      }
    }
  Accumulator& acc = *op.accumulator;
  const bool is_last = --acc.users == 0;
  if (is_last) write_back(acc);
  for (u32 lane = 0; lane < 32; ++lane) {
    const Thread& t = rt.threads[first_thread + lane];
    if (is_last) forget_range(t.id, static_cast<u32>(acc.registers[lane] - t.stack));
    if (op.from_registers) forget_range(t.id, static_cast<u32>(op.a_registers[lane] - t.stack));
  }
  if (is_last) std::erase(warp.accumulators, op.accumulator);
  warp.queue.pop_front();
}

void wgmma_wait(unsigned groups) {
  const Place place = EMU_PLACE;
  u32 present = 1;
  const u32 first = first_thread_of_warp();
  collective("wgmma.wait_group", ~0u, &present, place, [&](void** all) {
    same_for_warpgroup("wgmma.wait_group", groups, place);
    WarpState& warp = warp_states[rt.current->warp];
    while (!warp.queue.empty() && warp.queue.front().group + groups < warp.groups)
      retire(warp, first);
    warp.fenced = false;
    join_lanes(all, first);
  });
}

void setmaxnreg(bool increase, unsigned registers) {
  const Place place = EMU_PLACE;
  u32 present = 1;
  collective("setmaxnreg", ~0u, &present, place, [&](void**) {
    WarpgroupState& group = warpgroups[rt.current->warp / 4];
    const size_t before = group.list.size();
    same_for_warpgroup("setmaxnreg", registers * 2 + increase, place);
    if (group.list.size() == before || rt.config.registers == 0) return;  // said by another warp
    if (increase ? registers < group.registers : registers > group.registers)
      fail("setmaxnreg", text("at %s goes from %u to %u registers, which is the other direction",
                              at(place), group.registers, registers));
    group.registers = registers;
  });
}

// ---- the end of a block -------------------------------------------------------------------------
inline void check_wgmma_done() {
  u32 total = 0;
  for (u32 w = 0; w < rt.num_warps; ++w) {
    const WarpState& warp = warp_states[w];
    if (!warp.queue.empty())
      fail("wgmma in flight", text("warp %u ends without waiting for the wgmma issued at %s", w,
                                   at(warp.queue.front().place)));
    const auto& list = warpgroups[w / 4].list;
    if (warp.issued != list.size())
      fail("warpgroup misuse", text("warp %u ends after %u warpgroup instructions; another warp of "
                                    "its warpgroup went on at %s",
                                    w, warp.issued, at(list[warp.issued].second)));
    total += warpgroups[w / 4].registers * 32;
  }
  if (total > rt.config.registers * rt.num_threads)
    fail("setmaxnreg", text("asks for %u registers in all; the block was launched with %u", total,
                            rt.config.registers * rt.num_threads));
}

inline void reset_wgmma() {
  for (WarpState& w : warp_states) w = WarpState{};
  for (WarpgroupState& g : warpgroups) g = WarpgroupState{}, g.registers = rt.config.registers;
  for (u32 t = 0; t < kMaxThreads; ++t) in_flight[t].clear(), ++fence_counts[t];
}

void complete_random_work() {
  complete_random_copy();
  WarpState& warp = warp_states[random_below(rt.num_warps)];
  for (Wgmma& op : warp.queue)
    if (!op.done) return compute(op);
}

}  // namespace emu
