// Fibers, barriers, asynchronous copies and the meaning of the warp's matrix operations. See emulation.h.
#include "emulation.h"

#include "checks.h"

#include <algorithm>
#include <csetjmp>
#include <cstdlib>
#include <deque>
#include <dlfcn.h>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#include "memory.h"
#include "races.h"

namespace mcld {

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}
int driver_version() { return 0; }

}  // namespace mcld

namespace mcld::emulation {

MCLD_EMULATOR_STATE int thread, fiber, block_x, block_y, grid_x;
MCLD_EMULATOR_STATE char* shared;
MCLD_EMULATOR_STATE int shared_size;
char* first_shared;
int all_shared;

namespace {

constexpr int kWarp = 32, kMaxThreads = 1024, kCanaryBytes = 256;
#ifdef MCLD_CHECK_MEMORY
constexpr int64_t kStackBytes = 256 << 10;  // with space around every array
#else
constexpr int64_t kStackBytes = 64 << 10;
#endif

struct Copy { char* target; const char* source; };

// A context is entered once by swapcontext, which asks the kernel for the signal mask, and from then on by longjmp.
struct Fiber {
  ucontext_t entry;
  jmp_buf here;
  bool entered = false, finished = false;
  const int* waiting = nullptr;  // a generation counter,
  int seen = 0;                  // and its value when the wait began
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Warp {
  Lane lanes[kWarp];
  int arrived = 0, generation = 0;
  void (*combine)(Lane*) = nullptr;
};

Fiber fibers[kMaxThreads];
char* stacks;
Warp warps[kMaxThreads / kWarp];
jmp_buf scheduler;
ucontext_t scheduler_entry;
// Threads that have reached a barrier, and the times that all have.
struct Meeting {
  int arrived = 0, generation = 0;
};
constexpr int kMostBlocks = 8;  // of a cluster
Meeting meetings[kMostBlocks], meeting_of_cluster;
int threads_of_block, cluster_blocks, fiber_count, shared_stride;
std::vector<char> memory;
void (*body)(const void*);
const void* argument;
const char* kernel_name;
std::string failure;
uint32_t order_state = 1;

[[noreturn]] void jump(jmp_buf& to) {
#ifdef MCLD_CHECK_MEMORY
  // AddressSanitizer's longjmp takes a jump to another stack for an unwinding of this one; the C library's own does not.
  using Jump = void (*)(jmp_buf, int);
  static const Jump plain = reinterpret_cast<Jump>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));
  plain(to, 1);
#endif
  _longjmp(to, 1);
}

void leave() {
  if (!_setjmp(fibers[fiber].here)) jump(scheduler);
}

void enter_fiber() {
  for (;;) {
    body(argument);
    Fiber& own = fibers[fiber];
    if (!own.groups.empty() || !own.open.empty()) failure = "a thread ended with asynchronous copies in flight";
    if (wgmma_in_flight()) failure = "a thread ended with wgmma in flight";
    own.finished = true;
    leave();
  }
}

void resume(int index) {
  fiber = index;
  thread = index % threads_of_block;
  const int rank = index / threads_of_block;
  block_x = block_x / cluster_blocks * cluster_blocks + rank;
  shared = shared_of(rank);
  Fiber& next = fibers[index];
  if (_setjmp(scheduler)) return;
  if (next.entered) jump(next.here);
  next.entered = true;
  getcontext(&next.entry);
  next.entry.uc_stack.ss_sp = stacks + index * kStackBytes;
  next.entry.uc_stack.ss_size = kStackBytes;
  next.entry.uc_link = nullptr;
  makecontext(&next.entry, enter_fiber, 0);
  swapcontext(&scheduler_entry, &next.entry);
}

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(std::string(kernel_name) + " (emulated), block (" + std::to_string(block_x) + ", " +
                           std::to_string(block_y) + "): " + what);
}

uint32_t next_random() { return order_state = order_state * 1664525u + 1013904223u; }

bool dependent_launch;
std::vector<bool> awaited;  // by fiber

// The blocks of one cluster, most often one.
void run_blocks() {
  awaited.assign(fiber_count, !dependent_launch);
  for (int i = 0; i < fiber_count; ++i) {
    fibers[i].finished = false;
    fibers[i].waiting = nullptr;
  }
  for (int w = 0; w < fiber_count / kWarp; ++w) warps[w].arrived = 0;
  for (Meeting& meeting : meetings) meeting.arrived = 0;
  meeting_of_cluster.arrived = 0;
  begin_blocks_sm90();
  races::begin_blocks(fiber_count);
  for (int running = fiber_count; running > 0;) {
    bool progress = false;
    const uint32_t random = next_random() >> 8;
    const int first = random % fiber_count, step = random & 0x8000 ? 1 : fiber_count - 1;
    for (int i = 0, index = first; i < fiber_count; ++i, index = (index + step) % fiber_count) {
      Fiber& next = fibers[index];
      if (next.finished || (next.waiting && *next.waiting == next.seen)) continue;
      next.waiting = nullptr;
      progress = true;
      resume(index);
      if (!failure.empty()) fail(failure);
      running -= next.finished;
    }
    if (!progress) fail("deadlock: a barrier or warp operation that not all threads reached");
  }
  if (loads_in_flight()) fail("a block ended with loads in flight");
  // A launch that ends before the one before has ended would let the one after begin too early.
  if (std::find(awaited.begin(), awaited.end(), false) != awaited.end()) fail("a thread of a dependent launch that did not await the one before");
#ifndef MCLD_CHECK_MEMORY  // there nobody may touch it
  for (int rank = 0; rank < cluster_blocks; ++rank) {
    for (int i = 0; i < kCanaryBytes; ++i) {
      if (shared_of(rank)[shared_size + i] != char(0xA5)) fail("a write past the end of shared memory");
    }
  }
#endif
}

void check_shared(const void* pointer, int alignment) {
  const char* p = static_cast<const char*>(pointer);
  if (p < shared || p + 16 > shared + shared_size) stop("an address outside shared memory");
  if ((p - shared) % alignment) stop("a misaligned address in shared memory");
}

void meet(Meeting& meeting, int first, int count) {
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    races::sync(first, count);
    ++meeting.generation;
  } else {
    wait_for(meeting.generation);
  }
}

}  // namespace

int rank_of_fiber() { return fiber / threads_of_block; }
char* shared_of(int rank) { return first_shared + rank * shared_stride; }
int blocks_of_cluster() { return cluster_blocks; }
bool block_has_ended(int rank) {
  const Fiber* const first = fibers + rank * threads_of_block;
  return std::all_of(first, first + threads_of_block, [](const Fiber& of) { return of.finished; });
}

void wait_for(const int& counter) {
  Fiber& own = fibers[fiber];
  own.waiting = &counter;
  own.seen = counter;
  leave();
}

// Exceptions cannot cross fibers: a fiber that finds an error records it and never continues.
void stop(const std::string& what) {
  failure = what + " (thread " + std::to_string(thread) + ")";
  for (;;) leave();
}

void sync_block() {
  const int rank = rank_of_fiber();
  meet(meetings[rank], rank * threads_of_block, threads_of_block);
}

void sync_cluster() { meet(meeting_of_cluster, 0, fiber_count); }

void collective(const void* in, int in_bytes, void* out, int out_bytes, void (*combine)(Lane*)) {
  Warp& warp = warps[fiber / kWarp];
  Lane& lane = warp.lanes[thread % kWarp];
  if (warp.arrived && warp.combine != combine) stop("lanes of a warp meet in different operations");
  warp.combine = combine;
  std::memcpy(lane.in, in, in_bytes);
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    combine(warp.lanes);
    ++warp.generation;
  } else {
    wait_for(warp.generation);
  }
  std::memcpy(out, lane.out, out_bytes);
}

void copy_async(void* target, const void* global) {
  check_shared(target, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16) stop("a misaligned address in global memory");
  memory_check::read(global, 16);
  races::copy(target, global, 16, __builtin_return_address(0));
  std::memset(target, 0xFF, 16);
  fibers[fiber].open.push_back({static_cast<char*>(target), static_cast<const char*>(global)});
}

int64_t vector_accesses[17];

void check_vector(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) stop("a misaligned access of " + std::to_string(bytes) + " bytes");
  ++vector_accesses[bytes];
}

void commit_async() {
  Fiber& own = fibers[fiber];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
  races::copy_commit();
}

void wait_async(int pending) {
  Fiber& own = fibers[fiber];
  const int done = int(own.groups.size()) - pending;
  for (int i = 0; i < done; ++i) {
    for (const Copy& copy : own.groups[i]) std::memcpy(copy.target, copy.source, 16);
  }
  if (done <= 0) return;
  own.groups.erase(own.groups.begin(), own.groups.begin() + done);
  races::copy_wait(done);
}

void load_matrix(uint32_t (&r)[4], const void* row, void (*combine)(Lane*)) {
  check_shared(row, 16);
  races::read(row, 16, __builtin_return_address(0));
  collective(&row, sizeof row, r, sizeof r, combine);
}

void combine_shuffle(Lane* lanes) {
  for (int i = 0; i < kWarp; ++i) {
    const int mask = bits_of<int>(lanes[i].in + 4);
    std::memcpy(lanes[i].out, lanes[i ^ mask].in, 4);
  }
}

void combine_shuffle_from(Lane* lanes) {
  for (int i = 0; i < kWarp; ++i) std::memcpy(lanes[i].out, lanes[bits_of<int>(lanes[i].in + 4) % kWarp].in, 4);
}

void combine_match(Lane* lanes) {
  for (int i = 0; i < kWarp; ++i) {
    uint32_t bits = 0;
    for (int j = 0; j < kWarp; ++j) bits |= uint32_t(bits_of<int>(lanes[i].in) == bits_of<int>(lanes[j].in)) << j;
    std::memcpy(lanes[i].out, &bits, 4);
  }
}

void combine_ballot(Lane* lanes) {
  uint32_t bits = 0;
  for (int i = 0; i < kWarp; ++i) bits |= uint32_t(bits_of<bool>(lanes[i].in)) << i;
  for (int i = 0; i < kWarp; ++i) std::memcpy(lanes[i].out, &bits, 4);
}

void combine_ldmatrix(Lane* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int i = 0; i < kWarp; ++i) {
      const char* row = bits_of<const char*>(lanes[matrix * 8 + i / 4].in);
      std::memcpy(lanes[i].out + matrix * 4, row + i % 4 * 4, 4);
    }
  }
}

void combine_ldmatrix_transposed(Lane* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int i = 0; i < kWarp; ++i) {
      for (int half = 0; half < 2; ++half) {
        const char* row = bits_of<const char*>(lanes[matrix * 8 + i % 4 * 2 + half].in);
        std::memcpy(lanes[i].out + matrix * 4 + half * 2, row + i / 4 * 2, 2);
      }
    }
  }
}

namespace {

// d (16, 8) += a (16, kDepth) b (kDepth, 8).
template <int kDepth, class Decode> void multiply(Lane* lanes, const Decode& decode) {
  constexpr int kEach = kDepth / 8;  // values to a register: 2 of 16 bits, or 1 of 32
  float a[16][kDepth], b[8][kDepth], d[16][8];
  for (int i = 0; i < kWarp; ++i) {
    const MmaIn& in = *reinterpret_cast<const MmaIn*>(lanes[i].in);
    const int g = i / 4, t = i % 4;
    for (int r = 0; r < 4; ++r) {
      for (int e = 0; e < kEach; ++e) a[g + r % 2 * 8][t * kEach + r / 2 * kDepth / 2 + e] = decode(in.a[r], e);
      d[g + r / 2 * 8][t * 2 + r % 2] = in.d[r];
    }
    for (int r = 0; r < 2; ++r) {
      for (int e = 0; e < kEach; ++e) b[g][t * kEach + r * kDepth / 2 + e] = decode(in.b[r], e);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = d[row][column];
      for (int k = 0; k < kDepth; ++k) sum += double(a[row][k]) * b[column][k];
      d[row][column] = truncated(sum);
    }
  }
  for (int i = 0; i < kWarp; ++i) {
    float out[4];
    for (int r = 0; r < 4; ++r) out[r] = d[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
    std::memcpy(lanes[i].out, out, sizeof out);
  }
}

}  // namespace

void combine_mma_bf16(Lane* lanes) {
  multiply<16>(lanes, [](uint32_t word, int e) { return to_float(bf16{uint16_t(word >> 16 * e)}); });
}
void combine_mma_fp16(Lane* lanes) {
  multiply<16>(lanes, [](uint32_t word, int e) { return to_float(fp16{uint16_t(word >> 16 * e)}); });
}
void combine_mma_tf32(Lane* lanes) {
  // The tensor core reads 19 bits: what was not rounded before is truncated.
  multiply<8>(lanes, [](uint32_t word, int) { return as_float(word & ~0x1fffu); });
}

void await_launch_before() { awaited[fiber] = true; }

void check_awaited() {
  if (!awaited[fiber]) stop("global memory touched before await_launch_before");
}

namespace {
// Launches that end here, for measurements of the host's side.
bool stubbed = false;
Launcher* launcher = nullptr;
std::vector<const char*> stubbed_launches;  // their names
}  // namespace

bool launch_elsewhere(const void* kernel, dim3 grid, int threads, int shared_bytes, const void* parameters, int64_t bytes) {
  return launcher && launcher(kernel, grid.x, grid.y, threads, shared_bytes, parameters, bytes);
}

void run(dim3 grid, int threads, int shared_bytes, const char* name, void (*kernel)(const void*), const void* parameters,
         bool dependent, int cluster) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  kernel_name = name;
  if (threads % kWarp || threads > kMaxThreads) fail("a block must be whole warps, at most 1024 threads");
  if (cluster > kMostBlocks || threads * cluster > kMaxThreads) fail("a cluster larger than is emulated");
  if (grid.x % cluster) fail("a grid that is not whole clusters");
  const bool sm90 = std::string(name).find("hopper") != std::string::npos;
  if (shared_bytes > (sm90 ? 227 : 99) << 10) fail("more shared memory than the GPUs it is for have: " + std::to_string(shared_bytes));
  if (grid.x > unsigned(INT32_MAX)) fail("grid.x past 2^31 - 1");
  if (grid.y > 65535) fail("grid.y past 65535");
  if (stubbed) {
    stubbed_launches.push_back(name);
    return;
  }
  body = kernel;
  argument = parameters;
  dependent_launch = dependent;
  threads_of_block = threads;
  cluster_blocks = cluster;
  fiber_count = threads * cluster;
  grid_x = int(grid.x);
  shared_size = shared_bytes;
  failure.clear();
  if (!stacks) {
    void* const made = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) fail("no memory for the fibers' stacks");
    stacks = static_cast<char*>(made);
  }
  shared_stride = (shared_bytes + kCanaryBytes + 127) / 128 * 128;
  all_shared = shared_stride * cluster;
  memory.resize(all_shared + 128);
  first_shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 127) / 128 * 128);
  races::begin_launch(stacks, kMaxThreads * kStackBytes, __builtin_frame_address(0));
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += unsigned(cluster)) {
      block_x = int(x);
      block_y = int(y);
      std::deque<memory_check::Forbidden> past_the_end;
      for (int rank = 0; rank < cluster; ++rank) {
        char* const of_block = shared_of(rank);
        std::memset(of_block, 0xFF, shared_bytes);
        std::memset(of_block + shared_bytes, 0xA5, kCanaryBytes);
        past_the_end.emplace_back(of_block + shared_bytes, kCanaryBytes);
      }
      try {
        run_blocks();
      } catch (...) {
        // The fibers are in the middle of a kernel: their stacks are left, not unwound.
        for (Fiber& of : fibers) {
          of.entered = false;
          of.groups.clear();
          of.open.clear();
        }
        throw;
      }
    }
  }
}

}  // namespace mcld::emulation

// From now on launches are given to this function, and to the emulation where it returns 0 or is null.
extern "C" __attribute__((visibility("default"))) void set_launcher(mcld::emulation::Launcher* function) {
  mcld::emulation::launcher = function;
}

// Launches nothing from now on if `on`; returns the launches that were left out so far.
extern "C" __attribute__((visibility("default"))) int64_t stub_launches(int on) {
  mcld::emulation::stubbed = on != 0;
  return int64_t(mcld::emulation::stubbed_launches.size());
}

// The name of the launch that was left out after `before` others.
extern "C" __attribute__((visibility("default"))) const char* stubbed_launch(int64_t before) {
  return mcld::emulation::stubbed_launches.at(size_t(before));
}

// The vector accesses of so many bytes, 8 or 16, that the kernels have made.
extern "C" __attribute__((visibility("default"))) int64_t vector_accesses(int bytes) {
  return mcld::emulation::vector_accesses[bytes];
}
