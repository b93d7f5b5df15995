// Fibers and the scheduler: one fiber a CUDA thread, run until it must wait.

#pragma once

#include <sys/mman.h>
// EMU_UCONTEXT asks for the portable switch where the quick one would do.
#if !defined(__x86_64__)
#define EMU_UCONTEXT
#endif
#if defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif

#include "report.h"

namespace emu {

void run_kernel_in_fiber();
void reset_block();           // the other parts' state
bool complete_oldest_copy();  // a bulk copy in flight, if there is one
void complete_random_work();
void check_nothing_left();
std::string wait_detail(const Thread& thread);

#if !defined(EMU_UCONTEXT)
// Saves the callee-saved registers and the stack pointer, and continues another stack.
extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.local emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");
inline void make_fiber(Thread& t) {
  void** top = reinterpret_cast<void**>(t.stack + kStackBytes) - 8;
  std::memset(top, 0, 8 * sizeof(void*));
  top[6] = reinterpret_cast<void*>(&run_kernel_in_fiber);  // behind the six registers
  t.stack_pointer = top;  // after `ret` it is 16n + 8, as after a call
}
#else
inline ucontext_t contexts[kMaxThreads + 1];
inline void emu_switch(void** save, void* to) {
  ucontext_t* from = rt.current == nullptr ? &contexts[kMaxThreads] : &contexts[rt.current->id];
  *save = from;
  swapcontext(from, static_cast<ucontext_t*>(to));
}
inline void make_fiber(Thread& t) {
  ucontext_t& context = contexts[t.id];
  getcontext(&context);
  context.uc_stack = {t.stack, 0, kStackBytes};
  context.uc_link = nullptr;
  makecontext(&context, &run_kernel_in_fiber, 0);
  t.stack_pointer = &context;
}
#endif

inline void to_scheduler() {
  Thread& self = *rt.current;
#if !defined(EMU_UCONTEXT)
  rt.current = nullptr;
#endif
  emu_switch(&self.stack_pointer, rt.scheduler);
}
void leave_fiber_for_good() { to_scheduler(); }

inline void wake(Thread& t) {
  t.wait = Wait::kNone;
  rt.runnable.push_back(t.id);
}

// Waits until another thread, or a copy that completes, wakes this one.
inline void wait_for(Wait wait, const char* what, Place place, u64 detail) {
  Thread& t = *rt.current;
  t.wait = wait, t.what = what, t.place = place, t.detail = detail;
  to_scheduler();
}

// A point at which the random schedule may run other threads first.
inline void maybe_yield() {
  rt.accesses = 0;
  if (rt.schedule != Schedule::kRandom || random_below(4) != 0) return;
  wake(*rt.current);
  to_scheduler();
}

void run_kernel_in_fiber() {
  rt.entry(rt.args);
  rt.current->wait = Wait::kFinished;
  ++rt.num_finished;
  to_scheduler();
}

// Which threads wait for what, in groups of those that wait alike.
inline std::string deadlock_report() {
  std::string report = "deadlock in " + block_name() + ":";
  std::vector<std::pair<std::string, std::vector<u32>>> groups;
  for (u32 i = 0; i < rt.num_threads; ++i) {
    const Thread& t = rt.threads[i];
    std::string state = "finished";
    if (t.wait != Wait::kFinished)
      state = text("wait in %s at %s", t.what, at(t.place)) + wait_detail(t);
    if (groups.empty() || groups.back().first != state) {
      size_t known = 0;
      while (known < groups.size() && groups[known].first != state) ++known;
      if (known == groups.size())
        groups.emplace_back(state, std::vector<u32>{});
      else if (known + 1 != groups.size())
        std::swap(groups[known], groups.back());
    }
    groups.back().second.push_back(i);
  }
  for (const auto& [state, threads] : groups) {
    report += "\n  threads ";
    for (size_t i = 0, end; i < threads.size(); i = end + 1) {
      for (end = i; end + 1 < threads.size() && threads[end + 1] == threads[end] + 1;) ++end;
      report += text(i == 0 ? "%u" : ",%u", threads[i]);
      if (end != i) report += text("-%u", threads[end]);
    }
    report += " " + state;
  }
  return report;
}

inline void switch_to(u32 id) {
  Thread& t = rt.threads[id];
  rt.accesses = 0;
#if !defined(EMU_UCONTEXT)
  rt.current = &t;
  emu_switch(&rt.scheduler, t.stack_pointer);
#else
  rt.scheduler = &contexts[kMaxThreads];
  rt.current = &t;
  swapcontext(&contexts[kMaxThreads], static_cast<ucontext_t*>(t.stack_pointer));
#endif
  rt.current = nullptr;
  if (!rt.report.empty()) throw Failure{};
}

// Runs one block to its end, or throws.
inline void run_block() {
  rt.runnable.clear();
  rt.num_finished = 0;
  const Dim3 n{rt.config.block[0], rt.config.block[1], rt.config.block[2]};
  for (u32 i = 0; i < rt.num_threads; ++i) {
    Thread& t = rt.threads[i];
    u8* const stack = t.stack;
    t = Thread{};
    t.stack = stack;
    t.id = i, t.warp = i / 32, t.lane = i % 32;
    t.index = {i % n.x, i / n.x % n.y, i / (n.x * n.y)};
    make_fiber(t);
    rt.runnable.push_back(i);
  }
  reset_block();
  for (;;) {
    if (rt.runnable.empty()) {
      if (complete_oldest_copy()) continue;
      if (rt.num_finished == rt.num_threads) break;
      rt.report = deadlock_report();
      throw Failure{};
    }
    if (rt.schedule == Schedule::kRandom) {
      if (random_below(8) == 0) complete_random_work();
      std::swap(rt.runnable.front(), rt.runnable[random_below(u32(rt.runnable.size()))]);
    }
    const u32 next = rt.runnable.front();
    rt.runnable.pop_front();
    switch_to(next);
  }
  check_nothing_left();
}

inline void map_stacks() {
  if (rt.threads[0].stack == nullptr) {
    void* memory = mmap(nullptr, u64{kMaxThreads} * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("out of memory", "while mapping the fibers' stacks");
    for (u32 i = 0; i < kMaxThreads; ++i)
      rt.threads[i].stack = static_cast<u8*>(memory) + u64{i} * kStackBytes;
  }
  // Fresh pages are zero, which would make accumulators that nobody initialised look right.
  for (u32 i = 0; i < rt.num_threads; ++i)
    std::memset(rt.threads[i].stack + kStackBytes - kStackPoison, 0xa5, kStackPoison);
}

Dim3 thread_idx() { return rt.current->index; }
Dim3 block_idx() { return rt.block; }
Dim3 block_dim() { return {rt.config.block[0], rt.config.block[1], rt.config.block[2]}; }
Dim3 grid_dim() { return {rt.config.grid[0], rt.config.grid[1], rt.config.grid[2]}; }

}  // namespace emu
