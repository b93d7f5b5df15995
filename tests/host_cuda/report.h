// Reports: what is said when a check fails. The first failure ends the launch.

#pragma once

#include <dlfcn.h>

#include "state.h"

namespace emu {

void leave_fiber_for_good();

[[gnu::format(printf, 1, 2)]] inline std::string text(const char* format, ...) {
  char buffer[1024];
  va_list list;
  va_start(list, format);
  std::vsnprintf(buffer, sizeof buffer, format, list);
  va_end(list);
  return buffer;
}

// "pool.cu:123": the innermost frame that is not one of the emulation's own wrappers.
inline const std::string& line_of(Place place) {
  static std::map<Place, std::string> known;
  auto [entry, is_new] = known.try_emplace(place, "an unknown place");
  if (!is_new) return entry->second;
  Dl_info info;
  if (dladdr(__ehdr_start, &info) == 0) return entry->second;
  const std::string command = text("addr2line -i -e '%s' 0x%x 2>&1", info.dli_fname, place);
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return entry->second;
  char line[4096];
  bool found = false;
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    std::string frame(line, std::strcspn(line, " \n"));
    const auto in = [&](const char* file) { return frame.find(file) != std::string::npos; };
    if (found || in("host_cuda/ptx.cuh:") || in("host_cuda/prelude.h:") || in("host_cuda/emu.h:"))
      continue;
    found = true;
    entry->second = frame.substr(frame.rfind('/') + 1);
  }
  pclose(pipe);
  return entry->second;
}
inline const char* at(Place place) { return line_of(place).c_str(); }

inline std::string block_name() {
  return text("block (%u,%u,%u)", rt.block.x, rt.block.y, rt.block.z);
}

// A thread, or behind the threads an mbarrier, as the shadow memory names them.
inline std::string writer_name(u32 who) {
  return who < rt.num_threads ? text("thread %u", who) : text("a bulk copy");
}

// Ends the launch with "<kind>: <thread> <sentence>".
[[noreturn]] inline void fail(const char* kind, const std::string& sentence) {
  rt.report = std::string(kind) + " in " + block_name() + ": ";
  if (rt.current != nullptr) rt.report += text("thread %u ", rt.current->id);
  rt.report += sentence;
  if (rt.current == nullptr) throw Failure{};
  leave_fiber_for_good();
  __builtin_unreachable();
}

}  // namespace emu
