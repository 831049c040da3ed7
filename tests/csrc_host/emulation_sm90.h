// The host emulation of csrc/hopper/ptx.cuh, on the fibers of emulation.h.
//
// As late as a GPU may be: a TMA load fills its target with NaN when it is issued and delivers when a thread waits for its
// barrier; a wgmma reads its shared operands, its registers and its sum only when its group is waited for, so that a
// stage released or a register overwritten too early shows. Swizzles act on address bits, as in the hardware, and a
// descriptor is read field by field, so tile and descriptor are checked against each other. What a GPU would leave undefined
// is an error: a barrier used before its fence, a wgmma without one since the last wait, lanes whose descriptors differ, a
// block that ends with loads or wgmma in flight, an arrival or a load at a block of the cluster that has ended.
#pragma once

#include <cmath>

namespace mcld {

// Of the size and alignment of the driver's (CUDA 13), so that parameters lie where compiled code expects them.
struct alignas(128) TensorMap {
  const char* matrix = nullptr;  // 16-bit elements, (rows, pitch)
  int64_t rows = 0, pitch = 0;
  int box_rows = 0;
  char rest[100] = {};
};
static_assert(sizeof(TensorMap) == 128);

#define MCLD_SM90_KERNEL(threads) inline void
#define MCLD_SM90_CLUSTER_KERNEL(threads, blocks) inline void

namespace emulation {
void barrier_init(uint32_t barrier, int arrivals);
void barrier_init_fence();
void barrier_arrive(uint32_t barrier, int bytes);
void barrier_arrive_at(uint32_t barrier, int rank);
void barrier_wait(uint32_t barrier, int parity);
void tma_load(uint32_t shared, const TensorMap& map, uint32_t barrier, int column, int row, int blocks);

struct Wgmma {
  float* d;
  int columns;
  const uint32_t* a_registers;  // or null, then `a` describes the operand
  uint64_t a, b;
  bool add, half;  // half: fp16, else bf16
};
void wgmma_fence();
void wgmma_issue(const Wgmma&);
void wgmma_commit();
void wgmma_wait(int pending);
uint32_t shared_offset(const void* pointer);
}  // namespace emulation

inline uint32_t shared_address(const void* pointer) { return emulation::shared_offset(pointer); }
inline uint32_t shuffle_xor_bits(uint32_t value, int mask) { return as_bits(shuffle_xor(as_float(value), mask)); }
inline int grid_blocks() { return emulation::grid_x; }

inline void barrier_init(uint32_t barrier, int arrivals) { emulation::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() { emulation::barrier_init_fence(); }
inline void barrier_arrive(uint32_t barrier) { emulation::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expecting(uint32_t barrier, int bytes) { emulation::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, int parity) { emulation::barrier_wait(barrier, parity); }
inline void tma_load(uint32_t shared, const TensorMap& map, uint32_t barrier, int column, int row) {
  emulation::tma_load(shared, map, barrier, column, row, 1 << emulation::rank_of_fiber());
}

inline void sync_cluster() { emulation::sync_cluster(); }
inline void barrier_arrive_at(uint32_t barrier, int rank) { emulation::barrier_arrive_at(barrier, rank); }
inline void tma_load_multicast(uint32_t shared, const TensorMap& map, uint32_t barrier, int column, int row, int blocks) {
  emulation::tma_load(shared, map, barrier, column, row, blocks);
}
template <class Parameters>
void launch_clusters(int cluster, void (*kernel)(Parameters), const char* name, dim3 grid, int threads, int shared_bytes,
                     cudaStream_t, const Parameters& parameters) {
  emulation::start(false, cluster, kernel, name, grid, threads, shared_bytes, parameters);
}

template <int kRegisters> void fewer_registers() {}
template <int kRegisters> void more_registers() {}
inline void wgmma_fence() { emulation::wgmma_fence(); }
inline void wgmma_commit() { emulation::wgmma_commit(); }
template <int kPending> void wgmma_wait() { emulation::wgmma_wait(kPending); }
template <class T, int kCount> void pin(T (&)[kCount]) {}

template <Precision kPrecision, int kCount>
void wgmma_shared(PrecisionTag<kPrecision>, float (&d)[kCount], uint64_t a, uint64_t b, bool add) {
  emulation::wgmma_issue({d, 2 * kCount, nullptr, a, b, add, kPrecision == Precision::fp16});
}
template <Precision kPrecision, int kCount>
void wgmma_registers(PrecisionTag<kPrecision>, float (&d)[kCount], const uint32_t* a, uint64_t b, bool add) {
  emulation::wgmma_issue({d, 2 * kCount, a, 0, b, add, kPrecision == Precision::fp16});
}

}  // namespace mcld
