// The race check of the emulated kernels: what compute-sanitizer's racecheck looks for in shared memory, and in global memory
// too. In builds with MCLD_CHECK_RACES; in others every function here does nothing.
//
// The kernels are compiled with -fsanitize=thread, but the calls that the compiler then puts before each load and store end in
// races.cpp, not in ThreadSanitizer's library: its happens-before analysis by vector clocks, with the order that CUDA gives.
//
// Accesses are made by agents: a thread; its asynchronous copies; the wgmma of its warp; the copy engine on behalf of an
// mbarrier. Two accesses to an address, one of them a write, are a race unless one happens before the other, by way of:
//  - the order of a thread's own statements;
//  - a barrier of a block or a cluster, from all before it to all after it;
//  - the issue of a copy or wgmma, and its completion, as seen by a thread that waited for it. In between it may touch memory
//    at any moment, so its accesses count as made at once;
//  - an mbarrier, from arrivals and loads of a phase to whoever waited for the phase;
//  - the end of a launch. Blocks of a launch are not ordered at all, but for those of a cluster by its barriers.
// Shuffles, ldmatrix and mma order nothing: lanes of a warp execute them together, but they are no fences for memory.
#pragma once

#include <cstdint>

#ifdef MCLD_CHECK_RACES

#include <vector>

// Variables of the emulator that kernels read through its inline functions. They are no memory of a GPU's.
#define MCLD_EMULATOR_STATE __attribute__((section("emulator_state")))

namespace mcld::emulation::races {

using Clock = std::vector<uint32_t>;  // by agent

// Memory that is a thread's own: the fibers' stacks, and the launcher's, which holds the kernel's parameters.
void begin_launch(const void* stacks, int64_t stack_bytes, const void* launcher);
void begin_blocks(int threads);  // of a cluster, most often one block
// A barrier of so many threads: the last has arrived.
void sync(int first, int count);

// By the running thread, at `pc`.
void read(const void* address, int bytes, const void* pc);
void write(const void* address, int bytes, const void* pc);
void copy(const void* target, const void* source, int bytes, const void* pc);
void copy_commit();
void copy_wait(int groups);
void wgmma_read(const void* address, int bytes, const void* pc);
void wgmma_commit();
void wgmma_wait(int groups);

class Phases {  // of an mbarrier
 public:
  void init();
  void arrive();
  void tma_write(const void* target, int bytes, const void* pc) const;
  void tma_read(const void* source, int bytes, const void* pc) const;
  void complete();
  void wait() const;

 private:
  int agent_ = -1;
  uint32_t phase_ = 1;
  Clock arriving_, released_;
};

}  // namespace mcld::emulation::races

#else

#define MCLD_EMULATOR_STATE

namespace mcld::emulation::races {

inline void begin_launch(const void*, int64_t, const void*) {}
inline void begin_blocks(int) {}
inline void sync(int, int) {}
inline void read(const void*, int, const void*) {}
inline void write(const void*, int, const void*) {}
inline void copy(const void*, const void*, int, const void*) {}
inline void copy_commit() {}
inline void copy_wait(int) {}
inline void wgmma_read(const void*, int, const void*) {}
inline void wgmma_commit() {}
inline void wgmma_wait(int) {}

struct Phases {
  void init() {}
  void arrive() {}
  void tma_write(const void*, int, const void*) const {}
  void tma_read(const void*, int, const void*) const {}
  void complete() {}
  void wait() const {}
};

}  // namespace mcld::emulation::races

#endif
