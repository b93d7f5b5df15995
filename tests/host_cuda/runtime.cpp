// The host emulation of CUDA kernels: how it works, and the entry point.
//
// A kernel file is compiled unchanged by g++. `prelude.h` stands in for what the device compiler
// predefines, and the twin `ptx.cuh` for the inline PTX: each instruction becomes a call of this
// runtime. Compiled with -fsanitize=thread, every load and store of the kernel is a call as well;
// no sanitizer is linked, the calls end in memory.h. Nothing here is compiled into the package.
//
// Threads (fibers.h). Each CUDA thread is a fiber with a stack of its own, and runs until it must
// wait. Blocks run one after another. Three schedules differ in who runs next and in when
// asynchronous work is done: "eager" in order and at once, "lazy" in order and as late as possible,
// "random" by a seed, with pauses in every barrier, collective and copy. When nobody can run, a
// copy in flight completes; when there is none, the report is a deadlock, with all who wait.
//
// Order (clocks.h). What is right in one schedule may be wrong in another, so results are not
// trusted: each thread carries a vector clock, every barrier, __syncwarp, mbarrier and wgmma wait
// joins clocks, and an access that is not ordered behind the last write of its bytes, or a write
// not ordered behind their reads, is reported as a race, whatever the schedule did. Shuffles,
// votes, ldmatrix and mma order nothing. A second clock says what is visible to the async proxy,
// through which wgmma and bulk copies see shared memory: fence.proxy.async moves the one into the
// other.
//
// Memory (memory.h). Shared memory has a shadow cell a byte: last writer, when, where, and whether
// it was ever written; and the last read of each warp. Arrays of the caller are copies, with a gap
// of a mebibyte around each and a cell a byte for those that are written; bytes between the
// elements of a strided view count as outside. Blocks are never ordered with each other, so
// whatever they share must be atomic.
//
// Warps and barriers (collectives.h). Lanes deposit their operands, and the last one of the mask
// computes for all. Lanes of one mask that come from different lines are reported.
//
// Copies and mbarriers (async.h). The destination of a copy is off limits from its issue to the
// wait that covers it: the issuing thread's wait_group, or the mbarrier and phase it counted on.
//
// Tensor cores (tensor.h, wgmma.h). Fragment maps, descriptors and swizzles as the PTX ISA manual
// gives them. wgmma runs between issue and wait: registers hold poison meanwhile, and touching
// them, or the tiles in shared memory, is reported; so is a register written behind the fence.
//
// Not modelled: weak ordering of relaxed atomics, clusters, tensor maps, timing, bank conflicts,
// register limits, the order of additions inside the tensor cores (sums here are rounded once, and
// e4m3 sums of hardware are less precise), and blocks that wait for each other. A loop that
// neither touches memory nor calls an instruction does not end; give a test a time limit.

#include "wgmma.h"

namespace emu {

std::string wait_detail(const Thread& t) {
  if (t.wait == Wait::kBarrier) return barrier_detail(static_cast<u32>(t.detail));
  if (t.wait == Wait::kMbarrier) return mbarrier_detail(t.detail);
  return text(" (mask 0x%08x)", static_cast<u32>(t.detail));
}

void reset_block() {
  reset_clocks();
  reset_shared();
  reset_collectives();
  reset_async();
  reset_wgmma();
}

void check_nothing_left() {
  check_copies_done();
  check_wgmma_done();
}

// Runs a kernel. 0: it ended and nothing was found; else emu_report() says what was.
extern "C" int emu_launch(void (*entry)(void**), void** args, const Config* config) {
  rt.config = *config;
  rt.schedule = static_cast<Schedule>(config->schedule);
  rt.num_threads = config->block[0] * config->block[1] * config->block[2];
  rt.num_warps = (rt.num_threads + 31) / 32;
  rt.clock_width = (rt.num_threads + kNumMbarriers + 7) / 8 * 8;
  rt.random_state = config->seed;
  rt.entry = entry, rt.args = args;
  rt.current = nullptr;
  rt.report.clear();
  const u32* grid = config->grid;
  std::vector<u32> order(grid[0] * grid[1] * grid[2]);
  for (u32 i = 0; i < order.size(); ++i) order[i] = i;
  if (rt.schedule == Schedule::kRandom)
    for (u32 i = static_cast<u32>(order.size()); i > 1; --i)
      std::swap(order[i - 1], order[random_below(i)]);
  try {
    map_stacks();
    for (const u32 i : order) {
      rt.block_linear = i;
      rt.block = {i % grid[0], i / grid[0] % grid[1], i / (grid[0] * grid[1])};
      run_block();
    }
  } catch (const Failure&) {
    return 1;
  }
  return 0;
}

extern "C" const char* emu_report() { return rt.report.c_str(); }

}  // namespace emu
