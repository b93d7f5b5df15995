// Collectives of a warp, and the barriers of the block.

#pragma once

#include "memory.h"

namespace emu {

// ---- warps: each lane deposits its operands, the last one of the mask computes for all
// -----------
struct Slot {
  const char* kind = nullptr;
  u32 mask = 0;
  Place place = 0;
  void* operands = nullptr;
};
struct Warp {
  Slot slots[32];
  u32 waiting = 0;  // lanes whose slot counts
};
inline Warp warps[kMaxThreads / 32];

// `compute(operands)` gets an array of 32 pointers, null for lanes outside the mask. It runs once,
// on the stack of the lane that came last.
template <class Compute>
inline void collective(const char* kind, u32 mask, void* operands, Place place, Compute compute) {
  maybe_yield();
  Thread& self = *rt.current;
  Warp& warp = warps[self.warp];
  if ((mask >> self.lane & 1) == 0)
    fail("divergent collective", text("calls %s at %s with mask 0x%08x, which lacks its own lane "
                                      "%u",
                                      kind, at(place), mask, self.lane));
  const u32 lanes = std::min(32u, rt.num_threads - self.warp * 32);
  if (lanes < 32 && mask >> lanes != 0)
    fail("divergent collective", text("calls %s at %s with mask 0x%08x; its warp has %u lanes",
                                      kind, at(place), mask, lanes));
  for (u32 left = warp.waiting & mask; left != 0; left &= left - 1) {
    const u32 lane = static_cast<u32>(__builtin_ctz(left));
    const Slot& other = warp.slots[lane];
    // Only lanes that wait for each other must agree: others may still have a smaller group first.
    if ((other.mask >> self.lane & 1) == 0) continue;
    if (other.mask != mask || std::strcmp(other.kind, kind) != 0 ||
        (other.place != place && line_of(other.place) != line_of(place)))
      fail("divergent collective", text("calls %s (mask 0x%08x) at %s while thread %u waits in %s "
                                        "(mask 0x%08x) at %s",
                                        kind, mask, at(place), self.warp * 32 + lane, other.kind,
                                        other.mask, at(other.place)));
  }
  warp.slots[self.lane] = {kind, mask, place, operands};
  warp.waiting |= 1u << self.lane;
  if ((warp.waiting & mask) != mask) return wait_for(Wait::kCollective, kind, place, mask);
  void* all[32] = {};
  for (u32 left = mask; left != 0; left &= left - 1) {
    const u32 lane = static_cast<u32>(__builtin_ctz(left));
    if (warp.slots[lane].mask != mask) return wait_for(Wait::kCollective, kind, place, mask);
    all[lane] = warp.slots[lane].operands;
  }
  compute(all);
  warp.waiting &= ~mask;
  for (u32 left = mask & ~(1u << self.lane); left != 0; left &= left - 1)
    wake(rt.threads[self.warp * 32 + static_cast<u32>(__builtin_ctz(left))]);
}

inline u32 first_thread_of_warp() { return rt.current->warp * 32; }

unsigned shuffle(Shuffle form, unsigned value, unsigned arg, unsigned mask) {
  struct Operands {
    u32 value, arg, result;
  } mine{value, arg, 0};
  const Place place = EMU_PLACE;
  collective("shfl.sync", mask, &mine, place, [&](void** all) {
    for (u32 lane = 0; lane < 32; ++lane) {
      if (all[lane] == nullptr) continue;
      Operands& o = *static_cast<Operands*>(all[lane]);
      u32 from = lane;
      if (form == kXor) from = lane ^ (o.arg & 31);
      if (form == kIdx) from = o.arg & 31;
      if (form == kDown && lane + o.arg < 32) from = lane + o.arg;
      if (form == kUp && o.arg <= lane) from = lane - o.arg;
      if (all[from] == nullptr)
        fail("divergent collective", text("completes a shfl.sync at %s in which lane %u reads lane "
                                          "%u, which is not in mask 0x%08x",
                                          at(place), lane, from, mask));
      o.result = static_cast<Operands*>(all[from])->value;
    }
  });
  return mine.result;
}

// Combines one word of each lane and gives all of them the result.
template <class Combine>
inline u32 combine(const char* kind, u32 value, u32 mask, Place place, u32 start, Combine step) {
  u32 word = value;
  collective(kind, mask, &word, place, [&](void** all) {
    u32 result = start;
    for (u32 lane = 0; lane < 32; ++lane)
      if (all[lane] != nullptr) result = step(result, *static_cast<u32*>(all[lane]), lane);
    for (u32 lane = 0; lane < 32; ++lane)
      if (all[lane] != nullptr) *static_cast<u32*>(all[lane]) = result;
  });
  return word;
}

unsigned vote(Vote form, bool predicate, unsigned mask) {
  const u32 votes = combine("vote.sync", predicate, mask, EMU_PLACE, 0,
                            [](u32 sum, u32 p, u32 lane) { return sum | p << lane; });
  if (form == kAny) return votes != 0;
  return form == kAll ? votes == mask : votes;
}

unsigned redux(Redux form, unsigned value, unsigned mask) {
  const Place place = EMU_PLACE;
  switch (form) {
    case kAdd:
      return combine("redux.sync", value, mask, place, 0, [](u32 a, u32 b, u32) { return a + b; });
    case kMin:
      return combine("redux.sync", value, mask, place, ~0u,
                     [](u32 a, u32 b, u32) { return std::min(a, b); });
    case kMax:
      return combine("redux.sync", value, mask, place, 0,
                     [](u32 a, u32 b, u32) { return std::max(a, b); });
    case kMaxSigned:
      return combine("redux.sync", value, mask, place, 1u << 31, [](u32 a, u32 b, u32) {
        return static_cast<u32>(std::max(static_cast<int>(a), static_cast<int>(b)));
      });
    case kOr:
      break;
  }
  return combine("redux.sync", value, mask, place, 0, [](u32 a, u32 b, u32) { return a | b; });
}

// All lanes of the mask get what any of them has seen.
inline void join_lanes(void* const* all, u32 first) {
  Clocks joined;
  for (u32 lane = 0; lane < 32; ++lane)
    if (all[lane] != nullptr) release_to(joined, first + lane);
  for (u32 lane = 0; lane < 32; ++lane)
    if (all[lane] != nullptr) acquire_from(joined, first + lane), step(first + lane);
}

void sync_warp(unsigned mask) {
  u32 present = 1;
  const u32 first = first_thread_of_warp();
  collective("bar.warp.sync", mask, &present, EMU_PLACE,
             [&](void** all) { join_lanes(all, first); });
}

// ---- barriers of the block ----------------------------------------------------------------------
struct Barrier {
  u32 threads = 0, arrived = 0;
  bool predicate = false;
  std::vector<u32> waiting;
  Clocks clocks;
};
inline Barrier barriers[kNumBarriers];

inline void arrive(u32 id, u32 threads, bool predicate, bool waits, const char* kind, Place place) {
  maybe_yield();
  Thread& self = *rt.current;
  if (threads == 0) threads = rt.num_threads;
  Barrier& b = barriers[id];
  if (b.arrived != 0 && b.threads != threads)
    fail("barrier misuse", text("calls %s %u at %s for %u threads; others of this generation "
                                "called it for %u",
                                kind, id, at(place), threads, b.threads));
  b.threads = threads;
  b.predicate |= predicate;
  release_to(b.clocks, self.id);
  if (waits)
    b.waiting.push_back(self.id);
  else
    step(self.id);
  if (++b.arrived < threads) {
    if (waits) wait_for(Wait::kBarrier, kind, place, id);
    return;
  }
  for (const u32 t : b.waiting) {
    acquire_from(b.clocks, t), step(t);
    rt.threads[t].vote = b.predicate;
    if (t != self.id) wake(rt.threads[t]);
  }
  b = Barrier{};
}

void bar_sync(unsigned id, unsigned threads) {
  arrive(id, threads, false, true, "bar.sync", EMU_PLACE);
}
void bar_arrive(unsigned id, unsigned threads) {
  arrive(id, threads, false, false, "bar.arrive", EMU_PLACE);
}
bool bar_red_or(unsigned id, unsigned threads, bool predicate) {
  arrive(id, threads, predicate, true, "bar.red.or", EMU_PLACE);
  return rt.current->vote;
}

inline std::string barrier_detail(u32 id) {
  return text(" (barrier %u: %u of %u threads arrived)", id, barriers[id].arrived,
              barriers[id].threads);
}

inline void reset_collectives() {
  for (Warp& w : warps) w = Warp{};
  for (Barrier& b : barriers) b = Barrier{};
}

}  // namespace emu
