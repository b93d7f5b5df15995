// The state of a launch, shared by all parts of the runtime. One launch at a time.

#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "emu.h"

namespace emu {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s64 = std::int64_t;
using Place = u32;  // offset of an instruction in the kernel's shared object

constexpr u32 kMaxThreads = 1024;
constexpr u32 kNumBarriers = 16;
constexpr u32 kNumMbarriers = 48;
constexpr u32 kSharedBase = 1024;   // so that a forgotten conversion is no valid address
constexpr u32 kSharedMax = 232448;  // 227 KiB, the most that any architecture has
constexpr u32 kStackBytes = 128 << 10;
constexpr u32 kStackPoison = 32 << 10;
constexpr u64 kAccessLimit = 25'000'000;

enum class Schedule : u32 { kEager, kLazy, kRandom };

// ---- what Python hands over ---------------------------------------------------------------------
enum Mode : u32 { kIn, kInOut, kOut };

// Who touched a byte of global memory last: (block * 1024 + thread + 1, its clock). The two last
// threads that read it are kept, so that a writer's own read does not hide the one before.
struct GlobalCell {
  u32 writer, write_clock, reader[2], read_clock[2];
};
constexpr u32 kAtomicBit = 1u << 31;  // of write_clock

struct Buffer {
  u8* data;  // the first byte that may be touched
  u64 bytes;
  u8* valid;          // 1 for each byte of the array, 0 for gaps between its rows; or null: all
  GlobalCell* cells;  // one a byte, unless mode is kIn
  u32 mode, index;
};

struct Config {
  u32 grid[3], block[3];
  u32 smem_bytes, schedule;
  u64 seed;
  u32 registers;  // a thread, at launch, as setmaxnreg counts them; 0: unknown
  u32 num_buffers;
  const Buffer* buffers;
};

// ---- threads ------------------------------------------------------------------------------------
enum class Wait : u8 { kNone, kCollective, kBarrier, kMbarrier, kFinished };

struct Copy {  // a cp.async
  u32 dst, src_bytes, group;
  const u8* src;
  Place place;
  bool moved;
};

struct Thread {
  void* stack_pointer = nullptr;
  u8* stack = nullptr;
  Dim3 index{};
  u32 id = 0, warp = 0, lane = 0;
  Wait wait = Wait::kNone;
  const char* what = "";  // of the wait: the instruction, its place and what it waits for
  Place place = 0;
  u64 detail = 0;
  bool vote = false;  // result of bar.red.or
  u32 refusals = 0;   // of mbarrier.try_wait, in the random schedule
  std::vector<Copy> copies;
  u32 copy_group = 0;
};

struct Runtime {
  Config config{};
  Schedule schedule{};
  u32 num_threads = 0, num_warps = 0, clock_width = 0;
  u32 block_linear = 0;
  Dim3 block{};
  void (*entry)(void**) = nullptr;
  void** args = nullptr;
  Thread threads[kMaxThreads];
  Thread* current = nullptr;  // null while the scheduler runs
  void* scheduler = nullptr;
  std::deque<u32> runnable;
  u32 num_finished = 0;
  u64 accesses = 0;  // since the last scheduling point
  u64 random_state = 0;
  std::string report;
};
inline Runtime rt;

// Thrown on the scheduler's stack only: nothing unwinds a fiber.
struct Failure {};

inline u64 random_bits() {  // splitmix64
  u64 z = rt.random_state += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}
inline u32 random_below(u32 n) { return static_cast<u32>(random_bits() % n); }

extern "C" char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));

inline Place place_of(const void* return_address) {
  return static_cast<Place>(static_cast<const char*>(return_address) - 1 - __ehdr_start);
}
// Of the kernel's instruction that called the function of emu.h in which this stands.
#define EMU_PLACE place_of(__builtin_return_address(0))

inline const u8* bytes_of(const void* p) { return static_cast<const u8*>(p); }

}  // namespace emu
