// Shadow memory: who wrote and read each byte last, and what a kernel may not do with it.
//
// The compiler calls __tsan_readN / __tsan_writeN in front of every load and store of the kernel.
// The address decides: the thread's own stack (register arrays), shared memory, a buffer of the
// caller, or the shared object (constants). Anything else is reported before it happens.

#pragma once

#include "clocks.h"

namespace emu {

enum CellFlag : u16 {
  kInit = 1,     // written since the block began
  kPending = 2,  // destination of a copy in flight
  kAsync = 4,    // written through the async proxy
  kAtomic = 8,   // written by an atomic operation
  kBarrier = 16  // part of an mbarrier
};

struct Cell {  // of one byte of shared memory: its last write
  u32 clock;
  u16 who, flags;
  Place place;
  bool operator==(const Cell&) const = default;
};

// Who accesses: its clocks, how it is remembered as a reader, and through which proxy.
struct Accessor {
  const u32 *seen, *fenced;
  u32 warp, mark;  // mark: clock << 5 | lane, or kInFlight | number of a wgmma
  bool async;
};
constexpr u32 kInFlight = 1u << 31;
constexpr u32 kAtomicMark = 1u << 30;  // an atomic operation, which is a read and a write

alignas(1024) inline u8 shared_bytes[kSharedMax];
inline Cell cells[kSharedMax];
inline u32 reader_warps[kSharedMax];  // one bit a warp that has read the byte
// [byte][warp][2]: its last reads by two lanes, so that a writer's own read does not hide another.
inline std::vector<u32> read_marks;

inline u32* marks_of(u32 byte, u32 warp) {
  return &read_marks[(u64{byte} * rt.num_warps + warp) * 2];
}
inline void add_mark(u32 byte, u32 warp, u32 mark) {
  u32* marks = marks_of(byte, warp);
  const bool is_same = ((marks[0] ^ mark) & (kInFlight | kAtomicMark | 31)) == 0;
  if ((reader_warps[byte] >> warp & 1) == 0)
    marks[1] = 0;  // older than the last write
  else if (!is_same)
    marks[1] = marks[0];
  marks[0] = mark;
  reader_warps[byte] |= 1u << warp;
}

inline Accessor accessor(u32 t) {
  const Thread& self = rt.threads[t];
  return {seen(t), fenced(t), self.warp, now(t) << 5 | self.lane, false};
}

inline std::string shared_name(u32 offset, u32 bytes) {
  return text("%u bytes at shared[%u]", bytes, offset);
}

inline void check_shared_range(u64 offset, u32 bytes, const char* verb, Place place) {
  if (offset + bytes <= rt.config.smem_bytes) return;
  fail("out of bounds",
       text("%s %u bytes at shared[%lld] at %s; the launch has %u bytes of shared "
            "memory",
            verb, bytes, static_cast<long long>(offset), at(place), rt.config.smem_bytes));
}

// Is the byte's last write ordered before this access, and visible to its proxy?
inline void check_after_write(const Accessor& me, const Cell& cell, u32 offset, u32 bytes,
                              const char* verb, Place place) {
  if ((cell.flags & kBarrier) != 0)
    fail("misuse of an mbarrier", text("%s ", verb) + shared_name(offset, bytes) +
                                      text(" at %s, which belong to an mbarrier", at(place)));
  if ((cell.flags & kPending) != 0)
    fail("async copy in flight",
         text("%s ", verb) + shared_name(offset, bytes) +
             text(" at %s: the copy issued at %s may still write them", at(place), at(cell.place)));
  if (cell.clock == 0) return;  // never written
  if (me.seen[cell.who] < cell.clock)
    fail("race", text("%s ", verb) + shared_name(offset, bytes) +
                     text(" at %s, which ", at(place)) + writer_name(cell.who) +
                     text(" wrote at %s with nothing to order the two", at(cell.place)));
  if (me.async && (cell.flags & kAsync) == 0 && me.fenced[cell.who] < cell.clock)
    fail("missing fence.proxy.async",
         text("%s ", verb) + shared_name(offset, bytes) +
             text(" at %s through the async proxy, which ", at(place)) + writer_name(cell.who) +
             text(" wrote at %s by an ordinary store", at(cell.place)));
}

// What other warps' marks of byte `i` mean for an access: `kinds` are the marks that conflict.
enum Conflicts : u8 { kReads = 1, kAtomics = 2 };
inline void check_after_marks(const Accessor& me, u32 i, int kinds, u32 offset, u32 bytes,
                              const char* verb, Place place) {
  for (u32 left = reader_warps[i]; left != 0; left &= left - 1) {
    const u32 warp = static_cast<u32>(__builtin_ctz(left));
    for (u32 m = 0; m < 2; ++m) {
      const u32 mark = marks_of(i, warp)[m];
      if ((kinds & kReads) != 0 && (mark & kInFlight) != 0)
        fail("wgmma in flight",
             text("%s ", verb) + shared_name(offset, bytes) +
                 text(" at %s while a wgmma of warp %u may still read them", at(place), warp));
      const bool is_atomic = (mark & kAtomicMark) != 0;
      const u32 other = warp * 32 + (mark & 31), clock = (mark & ~(kAtomicMark | kInFlight)) >> 5;
      if ((kinds & (is_atomic ? kAtomics : kReads)) != 0 && me.seen[other] < clock)
        fail("race", text("%s ", verb) + shared_name(offset, bytes) +
                         text(" at %s, which thread %u has %s with nothing to order the two",
                              at(place), other, is_atomic ? "added to" : "read"));
    }
  }
}

inline void shared_read(const Accessor& me, u32 offset, u32 bytes, const char* verb, Place place) {
  check_shared_range(offset, bytes, verb, place);
  for (u32 i = offset; i < offset + bytes; ++i) {
    const Cell& cell = cells[i];
    if (i == offset || !(cell == cells[i - 1])) {
      check_after_write(me, cell, offset, bytes, verb, place);
      if ((cell.flags & kInit) == 0)
        fail("uninitialised read", text("%s ", verb) + shared_name(offset, bytes) +
                                       text(" at %s: byte %u was never written", at(place), i));
    }
    if ((cell.flags & kAtomic) != 0) check_after_marks(me, i, kAtomics, offset, bytes, verb, place);
    add_mark(i, me.warp, me.mark);
  }
}

// Checks a write; the caller then says with `set_cells` who wrote.
inline void check_shared_write(const Accessor& me, u32 offset, u32 bytes, const char* verb,
                               Place place) {
  check_shared_range(offset, bytes, verb, place);
  for (u32 i = offset; i < offset + bytes; ++i) {
    if (i == offset || !(cells[i] == cells[i - 1]))
      check_after_write(me, cells[i], offset, bytes, verb, place);
    if (reader_warps[i] != 0)
      check_after_marks(me, i, kReads | kAtomics, offset, bytes, verb, place);
    reader_warps[i] = 0;
  }
}

inline void set_cells(u32 offset, u32 bytes, const Cell& cell) {
  std::fill_n(cells + offset, bytes, cell);
}

inline void shared_write(u32 t, u32 offset, u32 bytes, const char* verb, Place place) {
  check_shared_write(accessor(t), offset, bytes, verb, place);
  set_cells(offset, bytes, {now(t), static_cast<u16>(t), kInit, place});
}

inline void reset_shared() {
  const u32 n = rt.config.smem_bytes;
  for (u32 i = 0; i < n; ++i)
    shared_bytes[i] = rt.schedule == Schedule::kRandom ? static_cast<u8>(random_bits()) : 0xff;
  std::fill_n(cells, n, Cell{});
  std::fill_n(reader_warps, n, 0u);
  read_marks.assign(u64{n} * rt.num_warps * 2, 0);
}

// Offset in shared memory of an address as instructions take it.
inline u32 shared_offset(u32 address, u32 bytes, u32 alignment, const char* verb, Place place) {
  check_shared_range(u64{address} - kSharedBase, bytes, verb, place);
  if (address % alignment != 0)
    fail("misaligned access", text("%s shared[%u] at %s; it must be a multiple of %u", verb,
                                   address - kSharedBase, at(place), alignment));
  return address - kSharedBase;
}

// ---- global memory ------------------------------------------------------------------------------
inline const Buffer& buffer_of(const u8* p, u64 bytes, const char* verb, Place place) {
  const Buffer* nearest = nullptr;
  u64 distance = ~u64{0};
  for (u32 i = 0; i < rt.config.num_buffers; ++i) {
    const Buffer& b = rt.config.buffers[i];
    if (p >= b.data && p + bytes <= b.data + b.bytes) return b;
    const u64 d = p < b.data             ? u64(b.data - p)
                  : p < b.data + b.bytes ? 0
                                         : u64(p - b.data) - b.bytes;
    if (d < distance) distance = d, nearest = &b;
  }
  std::string where = text("address %p", static_cast<const void*>(p));
  if (distance < 1u << 30)
    where += text(", byte %lld of argument %u, which has %llu bytes",
                  static_cast<long long>(p - nearest->data), nearest->index,
                  static_cast<unsigned long long>(nearest->bytes));
  fail("out of bounds",
       text("%s %llu bytes at %s: ", verb, static_cast<unsigned long long>(bytes), at(place)) +
           where);
}

inline bool is_race_between(u32 other, u32 other_clock) {
  if (other == 0) return false;
  if ((other - 1) / kMaxThreads != rt.block_linear) return true;  // blocks are never ordered
  return seen(rt.current->id)[(other - 1) % kMaxThreads] < other_clock;
}

inline std::string global_thread_name(u32 who) {
  const u32 block = (who - 1) / kMaxThreads, thread = (who - 1) % kMaxThreads;
  return text("thread %u of ", thread) +
         (block == rt.block_linear ? "this block" : text("block %u", block));
}

enum Access : u32 { kRead = 0, kWrite = 1, kReadOnly = 2, kAtomicAdd = 3 };

inline void global_access(const u8* p, u64 bytes, Access access, Place place) {
  static constexpr const char* kVerbs[] = {"reads", "writes", "reads (.nc)", "adds to"};
  const char* verb = kVerbs[access];
  const Buffer& b = buffer_of(p, bytes, verb, place);
  const bool writes = access == kWrite || access == kAtomicAdd;
  const u64 first = static_cast<u64>(p - b.data);
  const auto where = [&](u64 i) {
    return text("%s byte %llu of argument %u at %s", verb, static_cast<unsigned long long>(i),
                b.index, at(place));
  };
  if (writes && b.mode == kIn) fail("write to an input", where(first));
  const u32 me = rt.block_linear * kMaxThreads + rt.current->id + 1, clock = now(rt.current->id);
  const u32 atomic = access == kAtomicAdd ? kAtomicBit : 0;
  for (u64 i = first; i < first + bytes; ++i) {
    if (b.valid != nullptr && b.valid[i] == 0)
      fail("out of bounds", where(i) + ", which lies between the array's elements");
    if (b.cells == nullptr) continue;
    GlobalCell& cell = b.cells[i];
    if (!writes && b.mode == kOut && cell.writer == 0)
      fail("uninitialised read", where(i) + ": it was never written");
    if (access == kReadOnly && cell.writer != 0)
      fail("stale read", where(i) + ", which " + global_thread_name(cell.writer) +
                             " wrote in this launch: .nc loads are for read-only memory");
    const bool both_atomic = atomic != 0 && (cell.write_clock & kAtomicBit) != 0;
    if (!both_atomic && is_race_between(cell.writer, cell.write_clock & ~kAtomicBit))
      fail("race", where(i) + ", which " + global_thread_name(cell.writer) +
                       " wrote with nothing to order the two");
    for (u32 r = 0; writes && r < 2; ++r)
      if (cell.reader[r] != me && is_race_between(cell.reader[r], cell.read_clock[r]))
        fail("race", where(i) + ", which " + global_thread_name(cell.reader[r]) +
                         " has read with nothing to order the two");
    if (writes) {
      cell.writer = me, cell.write_clock = clock | atomic;
    } else {
      if (cell.reader[0] != me)
        cell.reader[1] = cell.reader[0], cell.read_clock[1] = cell.read_clock[0];
      cell.reader[0] = me, cell.read_clock[0] = clock;
    }
  }
}

// ---- the entry of every load and store ----------------------------------------------------------
void stack_access(u32 offset, u32 bytes, bool is_write, Place place);  // wgmma.h

[[gnu::always_inline]] inline void access(const void* address, u64 bytes, bool is_write,
                                          const void* return_address, u32 alignment) {
  if (rt.current == nullptr) return;  // static initialisation
  const u8* p = bytes_of(address);
  Thread& self = *rt.current;
  const u64 in_stack = static_cast<u64>(p - self.stack);
  const Place place = place_of(return_address);
  if (in_stack < kStackBytes)
    return stack_access(static_cast<u32>(in_stack), static_cast<u32>(bytes), is_write, place);
  if (++rt.accesses > kAccessLimit)
    fail("endless loop", text("made %llu accesses without reaching a barrier; the last one at %s",
                              static_cast<unsigned long long>(kAccessLimit), at(place)));
  if (reinterpret_cast<u64>(p) % alignment != 0)
    fail("misaligned access",
         text("%s %llu bytes at address %p at %s", is_write ? "writes" : "reads",
              static_cast<unsigned long long>(bytes), address, at(place)));
  const u64 in_shared = static_cast<u64>(p - shared_bytes);
  // A little in front of the array and behind it still means the array.
  if (in_shared + (1 << 16) < kSharedMax + (2 << 16)) {
    const u32 offset = static_cast<u32>(in_shared), n = static_cast<u32>(bytes);
    if (is_write) {
      check_shared_range(in_shared, n, "writes", place);
      shared_write(self.id, offset, n, "writes", place);
    } else {
      check_shared_range(in_shared, n, "reads", place);
      shared_read(accessor(self.id), offset, n, "reads", place);
    }
    return;
  }
  const char* c = reinterpret_cast<const char*>(p);
  if (!is_write && c >= __ehdr_start && c + bytes <= _end) return;  // constants
  global_access(p, bytes, is_write ? kWrite : kRead, place);
}

unsigned char* shared_memory() { return shared_bytes; }

unsigned shared_address(const void* p) {
  const u64 offset = static_cast<u64>(bytes_of(p) - shared_bytes);
  if (offset > kSharedMax)
    fail("wrong address space", text("takes the shared address of %p at %s, which is not in shared "
                                     "memory",
                                     p, at(EMU_PLACE)));
  return kSharedBase + static_cast<u32>(offset);
}

inline void check_alignment(const void* p, u32 bytes, Place place) {
  if (reinterpret_cast<u64>(p) % bytes != 0)
    fail("misaligned access", text("accesses %u bytes at address %p at %s", bytes, p, at(place)));
}
void load_global(void* to, const void* from, unsigned bytes) {
  check_alignment(from, bytes, EMU_PLACE);
  global_access(bytes_of(from), bytes, kReadOnly, EMU_PLACE);
  std::memcpy(to, from, bytes);
}
void store_global(void* to, const void* from, unsigned bytes) {
  check_alignment(to, bytes, EMU_PLACE);
  global_access(bytes_of(to), bytes, kWrite, EMU_PLACE);
  std::memcpy(to, from, bytes);
}
void load_shared(void* to, unsigned address, unsigned bytes) {
  const u32 offset = shared_offset(address, bytes, bytes, "reads", EMU_PLACE);
  shared_read(accessor(rt.current->id), offset, bytes, "reads", EMU_PLACE);
  std::memcpy(to, shared_bytes + offset, bytes);
}
unsigned atomic_add_global(unsigned* p, unsigned value) {
  check_alignment(p, 4, EMU_PLACE);
  global_access(bytes_of(p), 4, kAtomicAdd, EMU_PLACE);
  maybe_yield();
  const u32 old = *p;
  *p = old + value;
  return old;
}
unsigned atomic_add_shared(unsigned address, unsigned value) {
  const Place place = EMU_PLACE;
  const u32 t = rt.current->id, offset = shared_offset(address, 4, 4, "adds to", place);
  const Accessor me = accessor(t);
  for (u32 i = offset; i < offset + 4; ++i) {
    check_after_write(me, cells[i], offset, 4, "adds to", place);
    if ((cells[i].flags & kInit) == 0)
      fail("uninitialised read", "adds to " + shared_name(offset, 4) +
                                     text(" at %s, which were never written", at(place)));
    check_after_marks(me, i, kReads, offset, 4, "adds to", place);
    // The cell goes on naming the last ordinary write: atomics do not race with each other.
    cells[i].flags |= kAtomic;
    add_mark(i, me.warp, me.mark | kAtomicMark);
  }
  u32 old;
  std::memcpy(&old, shared_bytes + offset, 4);
  const u32 sum = old + value;
  std::memcpy(shared_bytes + offset, &sum, 4);
  return old;
}

}  // namespace emu

// ---- what -fsanitize=thread and -fsanitize=undefined call ---------------------------------------
extern "C" {
#define EMU_SIZE(n)                                                                          \
  void __tsan_read##n(void* p) { emu::access(p, n, false, __builtin_return_address(0), n); } \
  void __tsan_write##n(void* p) { emu::access(p, n, true, __builtin_return_address(0), n); } \
  void __tsan_unaligned_read##n(void* p) {                                                   \
    emu::access(p, n, false, __builtin_return_address(0), 1);                                \
  }                                                                                          \
  void __tsan_unaligned_write##n(void* p) {                                                  \
    emu::access(p, n, true, __builtin_return_address(0), 1);                                 \
  }
EMU_SIZE(1)
EMU_SIZE(2)
EMU_SIZE(4)
EMU_SIZE(8)
EMU_SIZE(16)
#undef EMU_SIZE
void __tsan_read_range(void* p, unsigned long n) {
  emu::access(p, n, false, __builtin_return_address(0), 1);
}
void __tsan_write_range(void* p, unsigned long n) {
  emu::access(p, n, true, __builtin_return_address(0), 1);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define EMU_UNDEFINED(name, what)                                                             \
  void __ubsan_handle_##name(void*, void*, void*) {                                           \
    emu::fail(what, emu::text("at %s", emu::at(emu::place_of(__builtin_return_address(0))))); \
  }
EMU_UNDEFINED(add_overflow, "signed overflow")
EMU_UNDEFINED(sub_overflow, "signed overflow")
EMU_UNDEFINED(mul_overflow, "signed overflow")
EMU_UNDEFINED(negate_overflow, "signed overflow")
EMU_UNDEFINED(divrem_overflow, "division by zero or overflow")
EMU_UNDEFINED(shift_out_of_bounds, "shift out of range")
EMU_UNDEFINED(out_of_bounds, "index out of range")
#undef EMU_UNDEFINED
}
