// Barriers, TMA and wgmma of emulation_sm90.h, and what the launchers ask of a device.
#include <algorithm>
#include <deque>
#include <map>
#include <stdexcept>
#include <vector>

#include "hopper/tensor_map.h"
#include "memory.h"
#include "races.h"

namespace mcld::emulation {
namespace {

struct Load {
  int rank;  // of the block whose shared memory it is for
  uint32_t shared;
  TensorMap map;
  int column, row;
};
struct Barrier {
  int expected = 0, arrived = 0, bytes = 0;
  int generation = 0;  // phases that have ended
  int waiting = 0;
  bool visible = false;  // to the copy engine and to other threads
  std::vector<Load> loads;
  races::Phases phases;
};
struct Queue {
  bool fenced = false;
  std::vector<Wgmma> open;
  std::deque<std::vector<Wgmma>> groups;
};

// The shared window begins at an address that is aligned to 128 bytes and no more, as on a GPU. In a cluster, a block's own
// addresses have its rank above these bits, as the code that nvcc makes for sm_90a shows; instructions take either form.
constexpr uint32_t kWindow = 1024 + 384;
constexpr int kRankShift = 24;
uint32_t without_rank(uint32_t address) { return address & ((1u << kRankShift) - 1); }
constexpr int kBoxColumns = 64, kRowBytes = 128, kThreads = 1024;

std::map<std::pair<int, uint32_t>, Barrier> barriers;  // of the running blocks, by rank and address without it
Queue queues[kThreads];

char* at(int rank, uint32_t address, int bytes) {
  address = without_rank(address);
  if (address < kWindow || address + bytes > kWindow + uint32_t(shared_size)) stop("an address outside shared memory");
  return shared_of(rank) + (address - kWindow);
}
char* at(uint32_t address, int bytes) { return at(rank_of_fiber(), address, bytes); }

// Arrivals and waits are atomic, so for the race check they read; only the initialisation writes.
Barrier& barrier_at(int rank, uint32_t address, const void* pc) {
  if (rank < 0 || rank >= blocks_of_cluster()) stop("a barrier of a block that the cluster does not have");
  if (rank != rank_of_fiber() && block_has_ended(rank)) stop("a barrier of a block that has ended");
  races::read(at(rank, address, 8), 8, pc);
  if (address % 8) stop("a misaligned barrier");
  const auto found = barriers.find({rank, without_rank(address)});
  if (found == barriers.end()) stop("a barrier that was not initialised");
  if (!found->second.visible) stop("a barrier without barrier_init_fence");
  return found->second;
}
Barrier& barrier_at(uint32_t address, const void* pc) { return barrier_at(rank_of_fiber(), address, pc); }

// Swizzle of 128 bytes: bits 4 to 6 of an address are changed by bits 7 to 9.
uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// All that a load reads and writes, for the checks.
void announce(const Load& load, const races::Phases& phases, const void* pc) {
  for (int r = 0; r < load.map.box_rows; ++r) {
    phases.tma_write(at(load.rank, load.shared + r * kRowBytes, kRowBytes), kRowBytes, pc);
    const int64_t row = load.row + r, columns = std::min<int64_t>(load.map.pitch - load.column, kBoxColumns);
    if (row >= load.map.rows || columns <= 0) continue;
    const char* const source = load.map.matrix + (row * load.map.pitch + load.column) * 2;
    memory_check::read(source, int(columns) * 2);
    phases.tma_read(source, int(columns) * 2, pc);
  }
}

void deliver(const Load& load) {
  for (int r = 0; r < load.map.box_rows; ++r) {
    for (int c = 0; c < kBoxColumns; ++c) {
      const int64_t row = load.row + r, column = load.column + c;
      uint16_t value = 0;
      if (row < load.map.rows && column < load.map.pitch) {
        std::memcpy(&value, load.map.matrix + (row * load.map.pitch + column) * 2, 2);
      }
      std::memcpy(at(load.rank, swizzled(load.shared + r * kRowBytes + c * 2), 2), &value, 2);
    }
  }
}

void complete(Barrier& barrier) {
  if (barrier.arrived < barrier.expected || barrier.bytes) return;
  barrier.arrived = 0;
  barrier.phases.complete();
  ++barrier.generation;
}

// The copy engine, at the last moment: bytes arrive when somebody waits for them.
void flush(Barrier& barrier) {
  if (barrier.loads.empty()) return;
  for (const Load& load : barrier.loads) {
    deliver(load);
    barrier.bytes -= load.map.box_rows * kRowBytes;
  }
  barrier.loads.clear();
  complete(barrier);
}

float half_at(uint32_t address, bool half) {
  uint16_t bits;
  std::memcpy(&bits, at(swizzled(address), 2), 2);
  return half ? to_float(fp16{bits}) : to_float(bf16{bits});
}

struct Descriptor {
  uint32_t address, leading, stride;
  explicit Descriptor(uint64_t bits)
      : address((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) stop("a descriptor without the 128-byte swizzle");
    if (bits >> 49 & 7) stop("a descriptor with a base offset");
  }
  // Contraction along rows of 128 bytes: rows in groups of 8, `stride` apart.
  uint32_t along(int row, int k) const {
    if (leading != 1 << 4) stop("a descriptor of an operand no wider than a panel whose leading stride is not 1");
    return address + row / 8 * stride + row % 8 * kRowBytes + k * 2;
  }
  // Contraction across the rows, whose panels of 64 columns lie `leading` apart.
  uint32_t across(int k, int column) const {
    return address + column / 64 * leading + k / 8 * stride + k % 8 * kRowBytes + column % 64 * 2;
  }
};

// What a warp's part of the operation reads, by 16 bytes, which a swizzle leaves together.
void announce(const Wgmma& op, const void* pc) {
  const auto read = [pc](uint32_t address) { races::wgmma_read(at(swizzled(address), 16), 16, pc); };
  const Descriptor b(op.b);
  if (op.a_registers) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < op.columns; column += 8) read(b.across(k, column));
    }
    return;
  }
  const Descriptor a(op.a);
  for (int half = 0; half < 16; half += 8) {
    for (int r = 0; r < 16; ++r) read(a.along(16 * (thread / 32 % 4) + r, half));
    for (int column = 0; column < op.columns; ++column) read(b.along(column, half));
  }
}

// One warp's part: its 16 rows of the 64. Runs once for all lanes; `in` holds each lane's Wgmma.
void combine_wgmma(Lane* lanes) {
  Wgmma of[32];
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&of[lane], lanes[lane].in, sizeof(Wgmma));
  const Wgmma& op = of[0];
  for (const Wgmma& other : of) {
    if (other.a != op.a || other.b != op.b || other.add != op.add) stop("lanes of a warp issue different wgmma");
  }
  const int warp = thread / 32 % 4;
  const Descriptor b(op.b);
  float bs[16][256];
  for (int k = 0; k < 16; ++k) {
    for (int c = 0; c < op.columns; ++c) bs[k][c] = half_at(op.a_registers ? b.across(k, c) : b.along(c, k), op.half);
  }
  for (int r = 0; r < 16; ++r) {
    float as[16];
    for (int k = 0; k < 16; ++k) {
      if (op.a_registers) {
        const uint32_t word = of[r % 8 * 4 + k % 8 / 2].a_registers[k / 8 * 2 + r / 8];
        const uint16_t bits = uint16_t(word >> 16 * (k % 2));
        as[k] = op.half ? to_float(fp16{bits}) : to_float(bf16{bits});
      } else {
        as[k] = half_at(Descriptor(op.a).along(16 * warp + r, k), op.half);
      }
    }
    for (int c = 0; c < op.columns; ++c) {
      float& d = of[r % 8 * 4 + c % 8 / 2].d[c / 8 * 4 + r / 8 * 2 + c % 2];
      double sum = op.add ? d : 0;
      for (int k = 0; k < 16; ++k) sum += double(as[k]) * bs[k][c];
      d = truncated(sum);
    }
  }
}

}  // namespace

void begin_blocks_sm90() {
  barriers.clear();
  for (Queue& queue : queues) {
    queue.fenced = false;
    queue.open.clear();
    queue.groups.clear();
  }
}

bool loads_in_flight() {
  return std::any_of(barriers.begin(), barriers.end(), [](const auto& entry) { return !entry.second.loads.empty(); });
}

bool wgmma_in_flight() { return !queues[fiber].groups.empty() || !queues[fiber].open.empty(); }

uint32_t shared_offset(const void* pointer) {
  return (uint32_t(rank_of_fiber()) << kRankShift) + kWindow + uint32_t(static_cast<const char*>(pointer) - shared);
}

void barrier_init(uint32_t address, int arrivals) {
  races::write(at(address, 8), 8, __builtin_return_address(0));
  Barrier& barrier = barriers[{rank_of_fiber(), without_rank(address)}] = Barrier();
  barrier.expected = arrivals;
  barrier.phases.init();
}

void barrier_init_fence() {
  for (auto& [place, barrier] : barriers) barrier.visible |= place.first == rank_of_fiber();
}

static void arrive(Barrier& barrier, int bytes) {
  if (barrier.arrived == barrier.expected) stop("more arrivals than the barrier expects");
  ++barrier.arrived;
  barrier.bytes += bytes;
  barrier.phases.arrive();
  complete(barrier);
}

void barrier_arrive(uint32_t address, int bytes) { arrive(barrier_at(address, __builtin_return_address(0)), bytes); }

void barrier_arrive_at(uint32_t address, int rank) {
  arrive(barrier_at(rank, address, __builtin_return_address(0)), 0);
}

void barrier_wait(uint32_t address, int parity) {
  Barrier& barrier = barrier_at(address, __builtin_return_address(0));
  flush(barrier);
  ++barrier.waiting;
  while ((barrier.generation & 1) == parity) wait_for(barrier.generation);
  --barrier.waiting;
  barrier.phases.wait();
}

void tma_load(uint32_t address, const TensorMap& map, uint32_t barrier, int column, int row, int blocks) {
  if (address % 1024) stop("a TMA box that does not begin at a period of the swizzle");
  if (map.box_rows > 256) stop("a TMA box of more than 256 rows");
  if (blocks <= 0 || blocks >> blocks_of_cluster()) stop("a TMA load for blocks that the cluster does not have");
  for (int rank = 0; blocks >> rank; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    Barrier& target = barrier_at(rank, barrier, __builtin_return_address(0));
    const Load load{rank, address, map, column, row};
    announce(load, target.phases, __builtin_return_address(0));
    std::memset(at(rank, address, map.box_rows * kRowBytes), 0xFF, map.box_rows * kRowBytes);
    target.loads.push_back(load);
    if (target.waiting) flush(target);
  }
}

void wgmma_fence() { queues[fiber].fenced = true; }

void wgmma_issue(const Wgmma& op) {
  if (!queues[fiber].fenced) stop("a wgmma without wgmma_fence since the last wait");
  if (thread % 32 == 0) announce(op, __builtin_return_address(0));
  queues[fiber].open.push_back(op);
}

void wgmma_commit() {
  queues[fiber].groups.push_back(std::move(queues[fiber].open));
  queues[fiber].open.clear();
  races::wgmma_commit();
}

void wgmma_wait(int pending) {
  Queue& queue = queues[fiber];
  if (!queue.open.empty()) stop("a wait for wgmma that were not committed");
  while (int(queue.groups.size()) > pending) {
    for (const Wgmma& op : queue.groups.front()) collective(&op, sizeof op, nullptr, 0, combine_wgmma);
    queue.groups.pop_front();
    races::wgmma_wait(1);
  }
  queue.fenced = false;  // whoever waits may now touch the registers
}

}  // namespace mcld::emulation

namespace mcld::hopper {

// With what cuTensorMapEncodeTiled refuses.
TensorMap tensor_map(const void* matrix, Precision, int64_t rows, int64_t pitch, int box_rows) {
  const bool addressed = matrix && reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && pitch * 2 % 16 == 0;
  const bool sized = rows >= 1 && rows <= int64_t(1) << 32 && pitch >= 1 && pitch * 2 < int64_t(1) << 40;
  if (!addressed || !sized || box_rows < 1 || box_rows > 256) throw std::runtime_error("no tensor map is of such a matrix");
  return {static_cast<const char*>(matrix), rows, pitch, box_rows};
}

// Fewer than tiles, so that a block takes several.
int multiprocessors() { return 2; }

}  // namespace mcld::hopper
