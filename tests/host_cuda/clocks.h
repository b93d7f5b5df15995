// Vector clocks: what each thread has seen of the others.
//
// A clock vector has one entry a thread and one an mbarrier. Each thread has two of them, stored
// one behind the other: V, what it has seen, and P, which of other threads' ordinary writes it
// knows to be visible to the async proxy (wgmma and bulk copies). Both travel along every
// synchronisation; operations that release end with a step of the thread's own clock.

#pragma once

#include <algorithm>

#include "fibers.h"

namespace emu {

using Clocks = std::vector<u32>;  // V, then P

inline std::vector<u32> all_clocks;

inline u32* seen(u32 t) { return &all_clocks[u64{t} * 2 * rt.clock_width]; }
inline u32* fenced(u32 t) { return seen(t) + rt.clock_width; }
inline u32 now(u32 t) { return seen(t)[t]; }
inline void step(u32 t) { ++seen(t)[t]; }

inline void join_into(u32* to, const u32* from, u32 n) {
  for (u32 i = 0; i < n; ++i) to[i] = std::max(to[i], from[i]);
}
// Both vectors of a thread, into a barrier's and back. P is zero until the block's first fence.
inline bool any_fence = false;
inline u32 active_words() { return rt.clock_width * (any_fence ? 2 : 1); }
inline void release_to(Clocks& clocks, u32 t) {
  clocks.resize(2 * rt.clock_width);
  join_into(clocks.data(), seen(t), active_words());
}
inline void acquire_from(const Clocks& clocks, u32 t) {
  if (!clocks.empty()) join_into(seen(t), clocks.data(), active_words());
}

inline void reset_clocks() {
  any_fence = false;
  all_clocks.assign(u64{rt.num_threads} * 2 * rt.clock_width, 0);
  for (u32 t = 0; t < rt.num_threads; ++t) step(t);
}

}  // namespace emu
