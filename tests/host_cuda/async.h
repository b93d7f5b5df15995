// Asynchronous copies and mbarriers.
//
// A copy's destination is pending from its issue until the issuing thread's wait (cp.async) or
// until its bytes have counted on an mbarrier (bulk). When the data move is the schedule's choice:
// at issue (eager), as late as possible (lazy) or at any step (random).

#pragma once

#include "collectives.h"

namespace emu {

// ---- cp.async -----------------------------------------------------------------------------------
inline void move_copy(Copy& copy) {
  if (copy.moved) return;
  copy.moved = true;
  if (copy.src_bytes != 0) std::memcpy(shared_bytes + copy.dst, copy.src, copy.src_bytes);
  std::memset(shared_bytes + copy.dst + copy.src_bytes, 0, 16 - copy.src_bytes);
}

void cp_async(unsigned dst, const void* src, unsigned src_bytes) {
  const Place place = EMU_PLACE;
  maybe_yield();
  Thread& self = *rt.current;
  const u32 offset = shared_offset(dst, 16, 16, "copies (cp.async) to", place);
  if (src_bytes > 16 || reinterpret_cast<u64>(src) % 16 != 0)
    fail("misaligned access",
         text("copies %u bytes from %p at %s; at most 16 bytes from a multiple "
              "of 16 are possible",
              src_bytes, src, at(place)));
  if (src_bytes != 0) global_access(bytes_of(src), src_bytes, kRead, place);
  check_shared_write(accessor(self.id), offset, 16, "copies (cp.async) to", place);
  set_cells(offset, 16, {now(self.id), static_cast<u16>(self.id), kPending, place});
  self.copies.push_back({offset, src_bytes, self.copy_group, bytes_of(src), place, false});
  if (rt.schedule == Schedule::kEager) move_copy(self.copies.back());
}

void cp_async_commit() {
  maybe_yield();
  ++rt.current->copy_group;
}

void cp_async_wait(unsigned groups) {
  maybe_yield();
  Thread& self = *rt.current;
  std::erase_if(self.copies, [&](Copy& copy) {
    if (copy.group + groups >= self.copy_group) return false;  // in flight, or not committed
    move_copy(copy);
    // From here on it is like an ordinary store by this thread.
    set_cells(copy.dst, 16, {now(self.id), static_cast<u16>(self.id), kInit, copy.place});
    return true;
  });
}

// ---- mbarriers ----------------------------------------------------------------------------------
struct Mbarrier {
  u32 offset, count, init_by, init_clock, fence_clock;
  bool fenced;
  Place place;
  s64 pending, bytes;   // arrivals and bytes until the phase is complete
  u32 phase;            // phases completed so far
  u32 filled, awaited;  // phases up to the last one with bytes, and up to the last one waited for
  Clocks gathering, done;
  std::vector<u32> waiting;
};
inline std::vector<Mbarrier> mbarriers;

inline Mbarrier* find_mbarrier(u32 offset) {
  for (Mbarrier& b : mbarriers)
    if (b.offset == offset) return &b;
  return nullptr;
}

inline Mbarrier& used_mbarrier(u32 address, const char* verb, Place place) {
  const u32 offset = shared_offset(address, 8, 8, verb, place);
  Mbarrier* b = find_mbarrier(offset);
  if (b == nullptr)
    fail("misuse of an mbarrier",
         text("%s shared[%u] at %s, which holds no initialised mbarrier", verb, offset, at(place)));
  if (seen(rt.current->id)[b->init_by] < b->init_clock)
    fail("race", text("%s the mbarrier at shared[%u] at %s, which thread %u initialised at %s with "
                      "nothing to order the two",
                      verb, offset, at(place), b->init_by, at(b->place)));
  return *b;
}

void mbar_init(unsigned bar, unsigned count) {
  const Place place = EMU_PLACE;
  const u32 t = rt.current->id, offset = shared_offset(bar, 8, 8, "initialises", place);
  if (find_mbarrier(offset) != nullptr || mbarriers.size() == kNumMbarriers || count == 0)
    fail("misuse of an mbarrier",
         text("initialises the mbarrier at shared[%u] for %u arrivals at %s; each is initialised "
              "once, there are at most %u, and they count at least one arrival",
              offset, count, at(place), kNumMbarriers));
  check_shared_write(accessor(t), offset, 8, "initialises", place);
  set_cells(offset, 8, {now(t), static_cast<u16>(t), kInit | kBarrier, place});
  mbarriers.push_back({offset, count, t, now(t), 0, false, place, count, 0, 0, 0, 0, {}, {}, {}});
}

inline u32 slot_of(const Mbarrier& b) {
  return rt.num_threads + static_cast<u32>(&b - mbarriers.data());
}

inline void complete_phase_if_done(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.count;
  b.gathering.resize(2 * rt.clock_width);
  b.gathering[slot_of(b)] = b.phase;  // whoever waits has seen the copies of this phase
  b.done = std::move(b.gathering);
  b.gathering.clear();  // who waits for this phase has seen no arrival of another
  for (const u32 t : b.waiting) wake(rt.threads[t]);
  b.waiting.clear();
}

void mbar_arrive(unsigned bar, unsigned arrivals, unsigned expected_bytes) {
  const Place place = EMU_PLACE;
  maybe_yield();
  const u32 t = rt.current->id;
  Mbarrier& b = used_mbarrier(bar, "arrives at", place);
  b.bytes += expected_bytes;
  if (arrivals == 0) return;
  if (b.pending == 0)
    fail("misuse of an mbarrier", text("arrives at shared[%u] at %s, whose phase has all of its %u "
                                       "arrivals",
                                       b.offset, at(place), b.count));
  --b.pending;
  release_to(b.gathering, t);
  step(t);
  complete_phase_if_done(b);
}

bool mbar_try_wait(unsigned bar, unsigned parity) {
  const Place place = EMU_PLACE;
  maybe_yield();
  Thread& self = *rt.current;
  if (parity > 1)
    fail("misuse of an mbarrier",
         text("waits for parity %u at %s; it is 0 or 1", parity, at(place)));
  const u32 index = static_cast<u32>(&used_mbarrier(bar, "waits for", place) - mbarriers.data());
  if (rt.schedule == Schedule::kRandom && self.refusals < 3 && random_below(2) == 0) {
    ++self.refusals;  // the instruction may give up early
    wake(self);
    to_scheduler();
    return false;
  }
  self.refusals = 0;
  while ((mbarriers[index].phase & 1) == parity) {
    mbarriers[index].waiting.push_back(self.id);
    wait_for(Wait::kMbarrier, "mbarrier.try_wait", place, u64{index} << 1 | parity);
  }
  Mbarrier& b = mbarriers[index];
  b.awaited = b.phase;
  acquire_from(b.done, self.id);
  return true;
}

inline std::string mbarrier_detail(u64 detail) {
  const Mbarrier& b = mbarriers[detail >> 1];
  return text(
      " (shared[%u] parity %u; %u phases complete, %lld arrivals and %lld bytes "
      "outstanding)",
      b.offset, static_cast<u32>(detail & 1), b.phase, static_cast<long long>(b.pending),
      static_cast<long long>(b.bytes));
}

// ---- fences -------------------------------------------------------------------------------------
void fence_mbarrier_init() {
  maybe_yield();
  const u32 t = rt.current->id;
  for (Mbarrier& b : mbarriers)
    if (b.init_by == t && !b.fenced) b.fenced = true, b.fence_clock = now(t);
  step(t);
}

void fence_proxy_async() {
  maybe_yield();
  const u32 t = rt.current->id;
  any_fence = true;
  join_into(fenced(t), seen(t), rt.clock_width);
  step(t);
}

// ---- bulk copies --------------------------------------------------------------------------------
struct BulkCopy {
  u32 dst, bytes, mbarrier;
  const u8* src;
  Place place;
};
inline std::vector<BulkCopy> bulk_copies;  // in flight, oldest first

inline void complete_bulk_copy(size_t index) {
  const BulkCopy copy = bulk_copies[index];
  bulk_copies.erase(bulk_copies.begin() + static_cast<std::ptrdiff_t>(index));
  Mbarrier& b = mbarriers[copy.mbarrier];
  std::memcpy(shared_bytes + copy.dst, copy.src, copy.bytes);
  set_cells(copy.dst, copy.bytes,
            {b.phase + 1, static_cast<u16>(slot_of(b)), kInit | kAsync, copy.place});
  b.bytes -= copy.bytes;
  b.filled = b.phase + 1;
  complete_phase_if_done(b);
}

void cp_async_bulk(unsigned dst, const void* src, unsigned bytes, unsigned bar) {
  const Place place = EMU_PLACE;
  maybe_yield();
  const u32 t = rt.current->id;
  const char* verb = "copies (cp.async.bulk) to";
  const u32 offset = shared_offset(dst, bytes, 16, verb, place);
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<u64>(src) % 16 != 0)
    fail("misaligned access", text("copies %u bytes from %p at %s; bulk copies move a multiple of "
                                   "16 bytes from a multiple of 16",
                                   bytes, src, at(place)));
  Mbarrier& b = used_mbarrier(bar, "copies with", place);
  const bool visible = b.fenced && seen(t)[b.init_by] >= b.fence_clock;
  if (!visible && fenced(t)[b.init_by] < b.init_clock)
    fail("missing fence.mbarrier_init", text("copies with the mbarrier at shared[%u] at %s, which "
                                             "thread %u initialised at %s",
                                             b.offset, at(place), b.init_by, at(b.place)));
  global_access(bytes_of(src), bytes, kRead, place);
  Accessor me = accessor(t);
  me.async = true;
  check_shared_write(me, offset, bytes, verb, place);
  set_cells(offset, bytes, {b.phase + 1, static_cast<u16>(slot_of(b)), kPending | kAsync, place});
  bulk_copies.push_back(
      {offset, bytes, static_cast<u32>(&b - mbarriers.data()), bytes_of(src), place});
  if (rt.schedule == Schedule::kEager) complete_bulk_copy(bulk_copies.size() - 1);
}

bool complete_oldest_copy() {
  if (bulk_copies.empty() || rt.num_finished == rt.num_threads) return false;
  complete_bulk_copy(0);
  return true;
}

inline void complete_random_copy() {
  if (!bulk_copies.empty()) complete_bulk_copy(random_below(u32(bulk_copies.size())));
  Thread& t = rt.threads[random_below(rt.num_threads)];
  if (!t.copies.empty()) move_copy(t.copies[random_below(u32(t.copies.size()))]);
}

// ---- the end of a block -------------------------------------------------------------------------
inline void check_copies_done() {
  for (u32 i = 0; i < rt.num_threads; ++i)
    if (!rt.threads[i].copies.empty())
      fail("async copy in flight", text("thread %u ends without waiting for the cp.async issued at "
                                        "%s",
                                        i, at(rt.threads[i].copies[0].place)));
  if (!bulk_copies.empty())
    fail("async copy in flight", text("all threads have ended, and the bulk copy issued at %s has "
                                      "not",
                                      at(bulk_copies[0].place)));
  for (const Mbarrier& b : mbarriers) {
    if (b.bytes != 0)
      fail("misuse of an mbarrier", text("the one at shared[%u] (initialised at %s) ends with %lld "
                                         "bytes outstanding",
                                         b.offset, at(b.place), static_cast<long long>(b.bytes)));
    if (b.filled > b.awaited)
      fail("async copy in flight", text("no thread has waited for the last bulk copy that counted "
                                        "on the mbarrier at shared[%u] (initialised at %s)",
                                        b.offset, at(b.place)));
  }
}

inline void reset_async() {
  mbarriers.clear();
  mbarriers.reserve(kNumMbarriers);
  bulk_copies.clear();
}

}  // namespace emu
