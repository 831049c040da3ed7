// Vector clocks, shadow memory and the compiler's calls, of races.h.
#include "races.h"

#ifdef MCLD_CHECK_RACES

#include <algorithm>
#include <cstdio>
#include <dlfcn.h>
#include <memory>
#include <string>
#include <unordered_map>

#include "emulation.h"

extern "C" const char __start_emulator_state, __stop_emulator_state;

namespace mcld::emulation::races {
namespace {

// Agents of a block of n threads: n threads, the copies of each, the wgmma of its warps, the loads of its mbarriers.
constexpr int kWarp = 32, kMostBarriers = 32;
constexpr int kPageBytes = 1024, kLargestGranule = 4, kReads = 8;

// An access: block, agent and the agent's time. 0 is none.
using Access = uint64_t;
constexpr int kAgentShift = 32, kBlockShift = 44;

// The last write, and the reads since that are not ordered among themselves. Of more than kReads the first are kept: behind
// block barriers any two tell whether a write races, and no barrier of the kernels has more than 8 warps reading for it.
struct Cell {
  Access write, reads[kReads];
  uint32_t write_at, reads_at[kReads];  // places in the code
};
// `granule` bytes share a cell: as many as the smallest element that the launch has touched in the page has.
struct Page {
  int64_t launch = 0;
  int granule = 1;
  Cell cells[kPageBytes];

  void clear(int64_t of_launch) {
    launch = of_launch;
    granule = kLargestGranule;
    std::memset(cells, 0, sizeof(Cell) * (kPageBytes / granule));
  }
  void refine(int bytes) {
    // From the end, since a cell's copies begin at its own place or behind it.
    for (int i = kPageBytes / granule - 1, copies = granule / bytes; i >= 0; --i) {
      std::fill_n(cells + i * copies, copies, Cell(cells[i]));
    }
    granule = bytes;
  }
};
struct Thread {
  Clock clock;
  uint32_t copies, copies_done, wgmmas, wgmmas_done;  // groups
};
struct Range {
  const char *first = nullptr, *last = nullptr;
  bool has(const void* p) const { return p >= first && p < last; }
};

Range stacks, launcher_stack;
Thread threads[1024];
int count, agents, barriers;
int64_t block, launch;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
struct { uintptr_t number; Page* page; } recent[256];
std::vector<Page> of_shared;

void join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

int copies_of(int thread) { return count + thread; }
int wgmmas_of(int thread) { return 2 * count + thread / kWarp; }
Clock& clock() { return threads[fiber].clock; }
Access access(int agent, uint32_t time) { return Access(block) << kBlockShift | Access(agent) << kAgentShift | time; }
int agent_of(Access a) { return int(a >> kAgentShift & 0xfff); }
int64_t block_of(Access a) { return int64_t(a >> kBlockShift); }

const char* module_base() {
  static const char* const base = [] {
    Dl_info info;
    dladdr(reinterpret_cast<const void*>(&begin_launch), &info);
    return static_cast<const char*>(info.dli_fbase);
  }();
  return base;
}

// File and line, with what it is inlined into, innermost first.
std::string place(uint32_t at) {
  Dl_info info;
  dladdr(module_base(), &info);
  char command[4096], line[512];
  std::snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%x 2>/dev/null", info.dli_fname, at - 1);
  std::string found;
  if (FILE* pipe = popen(command, "r")) {
    while (std::fgets(line, sizeof line, pipe)) {
      std::string frame(line);
      frame = frame.substr(0, frame.find_first_of(" \n"));
      if (frame.rfind("emulation", 0) == 0 || frame[0] == '?') continue;
      found += (found.empty() ? "" : " < ") + frame;
    }
    pclose(pipe);
  }
  return found.empty() ? "module + " + std::to_string(at) : found;
}

std::string name(Access a) {
  const int agent = agent_of(a);
  std::string who;
  if (agent < count) {
    who = "thread " + std::to_string(agent);
  } else if (agent < 2 * count) {
    who = "an asynchronous copy of thread " + std::to_string(agent - count);
  } else if (agent < 2 * count + count / kWarp) {
    who = "wgmma of warp " + std::to_string(agent - 2 * count);
  } else {
    who = "a TMA load for mbarrier " + std::to_string(agent - 2 * count - count / kWarp);
  }
  return block_of(a) == block ? who : who + " of another block";
}

struct Place {
  const void* address;
  int bytes;
  uint32_t at;
};

void report(const Place& now, Access by, bool write, Access before, bool before_write, uint32_t before_at) {
  const char* address = static_cast<const char*>(now.address);
  const bool in_shared = address >= first_shared && address < first_shared + all_shared;
  char where[64];
  if (in_shared) {
    std::snprintf(where, sizeof where, "byte %d of shared memory", int(address - first_shared));
  } else {
    std::snprintf(where, sizeof where, "global memory %p", now.address);
  }
  stop("race: " + std::string(write ? "a write" : "a read") + " of " + std::to_string(now.bytes) + " bytes at " + where + " by " +
       name(by) + " (" + place(now.at) + ") is not ordered with " + (before_write ? "the write" : "the read") + " by " +
       name(before) + " (" + place(before_at) + ")");
}

Page& page_at(const char* p, bool in_shared) {
  if (in_shared) {
    Page& page = of_shared[(p - first_shared) / kPageBytes];
    if (page.launch != launch) page.clear(launch);
    return page;
  }
  const uintptr_t number = reinterpret_cast<uintptr_t>(p) / kPageBytes;
  auto& cached = recent[number % 256];
  if (!cached.page || cached.number != number) {
    std::unique_ptr<Page>& page = pages[number];
    if (!page) page.reset(new Page);
    cached = {number, page.get()};
  }
  if (cached.page->launch != launch) cached.page->clear(launch);
  return *cached.page;
}

// One access: `view` is what happened before it, `by` how later ones know it.
void check(const Clock& view, Access by, const void* address, int bytes, bool write, const void* pc) {
  const Place now{address, bytes, uint32_t(static_cast<const char*>(pc) - module_base())};
  const char* p = static_cast<const char*>(address);
  const bool in_shared = p >= first_shared && p < first_shared + all_shared;
  if (!in_shared) check_awaited();
  const auto gone = [&](Access a) { return !a || (in_shared && block_of(a) != block); };  // shared memory is a cluster's
  const auto ordered = [&](Access a) { return block_of(a) == block && view[agent_of(a)] >= uint32_t(a); };
  const uintptr_t first = in_shared ? p - first_shared : reinterpret_cast<uintptr_t>(p);
  // The largest power of two that divides both.
  const int granule = std::min<int>((first | bytes) & -(first | bytes), kLargestGranule);
  Page* page = nullptr;
  for (uintptr_t at = first; at < first + bytes; at += page->granule) {
    if (page == nullptr || at % kPageBytes == 0) {
      page = &page_at(p + (at - first), in_shared);
      if (page->granule > granule) page->refine(granule);
    }
    Cell& cell = page->cells[at % kPageBytes / page->granule];
    if (!gone(cell.write) && !ordered(cell.write)) report(now, by, write, cell.write, true, cell.write_at);
    if (write) {
      for (int i = 0; i < kReads && cell.reads[i]; ++i) {
        if (!gone(cell.reads[i]) && !ordered(cell.reads[i])) report(now, by, write, cell.reads[i], false, cell.reads_at[i]);
        cell.reads[i] = 0;
      }
      cell.write = by;
      cell.write_at = now.at;
      continue;
    }
    // Reads from two blocks: any later write races with one of them.
    if (!in_shared && cell.reads[1] && block_of(cell.reads[0]) != block_of(cell.reads[1])) continue;
    for (int i = 0; i < kReads; ++i) {
      const Access other = cell.reads[i];
      // A read that this one comes after adds nothing: what races with it races with this one.
      if (gone(other) || ordered(other) || other >> kAgentShift == by >> kAgentShift) {
        cell.reads[i] = by;
        cell.reads_at[i] = now.at;
        break;
      }
      // The second block's read takes the second place, where the shortcut above looks for it.
      if (!in_shared && i == 1 && block_of(cell.reads[0]) != block) {
        cell.reads[1] = by;
        cell.reads_at[1] = now.at;
        break;
      }
    }
  }
}

// Before a load or store of a kernel. Launchers are compiled with the kernels, and run on no fiber.
void plain(const void* p, int bytes, bool write, const void* pc) {
  if (!stacks.has(__builtin_frame_address(0)) || stacks.has(p) || launcher_stack.has(p)) return;
  if (Range{&__start_emulator_state, &__stop_emulator_state}.has(p)) return;
  check(clock(), access(fiber, clock()[fiber]), p, bytes, write, pc);
}

}  // namespace

void begin_launch(const void* fibers, int64_t fiber_bytes, const void* launcher) {
  stacks = {static_cast<const char*>(fibers), static_cast<const char*>(fibers) + fiber_bytes};
  launcher_stack = {static_cast<const char*>(launcher), static_cast<const char*>(launcher) + (1 << 20)};
  ++launch;
  block = count = 0;
  of_shared.resize(all_shared / kPageBytes + 1);
  // Addresses of tensors long gone.
  if (pages.size() > 1024) {
    pages.clear();
    for (auto& entry : recent) entry = {};
  }
}

void begin_blocks(int threads_of_blocks) {
  if (++block >> (64 - kBlockShift)) stop("more blocks than the race check can tell apart");
  if (!count) {
    count = threads_of_blocks;
    agents = 2 * count + count / kWarp + kMostBarriers;
    for (int i = 0; i < count; ++i) {
      threads[i] = {std::move(threads[i].clock), 0, 0, 0, 0};
      threads[i].clock.assign(agents, 0);
    }
  }
  // Clocks run on from block to block, which saves clearing them; only mbarriers begin anew.
  for (int i = 0; i < count; ++i) {
    ++threads[i].clock[i];
    std::fill_n(threads[i].clock.end() - kMostBarriers, barriers, 0);
  }
  barriers = 0;
}

void sync(int first, int of) {
  Clock all = threads[first].clock;
  for (int i = first; i < first + of; ++i) join(all, threads[i].clock);
  for (int i = first; i < first + of; ++i) {
    threads[i].clock = all;
    ++threads[i].clock[i];
  }
}

void read(const void* address, int bytes, const void* pc) {
  check(clock(), access(fiber, clock()[fiber]), address, bytes, false, pc);
}

void write(const void* address, int bytes, const void* pc) {
  check(clock(), access(fiber, clock()[fiber]), address, bytes, true, pc);
}

void copy(const void* target, const void* source, int bytes, const void* pc) {
  const Access by = access(copies_of(fiber), threads[fiber].copies + 1);
  check(clock(), by, source, bytes, false, pc);
  check(clock(), by, target, bytes, true, pc);
}
void copy_commit() { ++threads[fiber].copies; }
void copy_wait(int groups) {
  Thread& own = threads[fiber];
  own.clock[copies_of(fiber)] = own.copies_done += groups;
}

void wgmma_read(const void* address, int bytes, const void* pc) {
  check(clock(), access(wgmmas_of(fiber), threads[fiber].wgmmas + 1), address, bytes, false, pc);
}
void wgmma_commit() { ++threads[fiber].wgmmas; }
void wgmma_wait(int groups) {
  Thread& own = threads[fiber];
  own.clock[wgmmas_of(fiber)] = own.wgmmas_done += groups;
}

void Phases::init() {
  if (barriers == kMostBarriers) stop("more mbarriers than the race check can tell apart");
  *this = Phases();
  agent_ = 2 * count + count / kWarp + barriers++;
  arriving_.assign(agents, 0);
  released_.assign(agents, 0);
}
void Phases::arrive() {
  join(arriving_, clock());
  ++clock()[fiber];
}
void Phases::tma_write(const void* target, int bytes, const void* pc) const {
  check(clock(), access(agent_, phase_), target, bytes, true, pc);
}
void Phases::tma_read(const void* source, int bytes, const void* pc) const {
  check(clock(), access(agent_, phase_), source, bytes, false, pc);
}
void Phases::complete() {
  arriving_[agent_] = phase_++;
  released_ = arriving_;
}
void Phases::wait() const { join(clock(), released_); }

}  // namespace mcld::emulation::races

using mcld::emulation::races::plain;

// What -fsanitize=thread calls. Atomics of kernels are missing: what they order would have to be said here.
extern "C" {
#define MCLD_HOOK(bytes)                                                                                       \
  void __tsan_read##bytes(void* p) { plain(p, bytes, false, __builtin_return_address(0)); }                    \
  void __tsan_write##bytes(void* p) { plain(p, bytes, true, __builtin_return_address(0)); }                    \
  void __tsan_unaligned_read##bytes(void* p) { plain(p, bytes, false, __builtin_return_address(0)); }          \
  void __tsan_unaligned_write##bytes(void* p) { plain(p, bytes, true, __builtin_return_address(0)); }
MCLD_HOOK(1)
MCLD_HOOK(2)
MCLD_HOOK(4)
MCLD_HOOK(8)
MCLD_HOOK(16)
#undef MCLD_HOOK
void __tsan_read_range(void* p, long bytes) { plain(p, int(bytes), false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, long bytes) { plain(p, int(bytes), true, __builtin_return_address(0)); }
// Of the guards of static variables, in launchers.
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

#endif
