// The host emulation of csrc/portable/platform.cuh: a block's threads are fibers on one CPU thread, run in an order that
// changes from turn to turn, so that a missing barrier is likelier to show. Blocks run one after another, those of a cluster
// together.
//
// Stricter than a GPU where that finds mistakes: shared memory begins as NaN; an asynchronous copy fills its target with NaN
// when it is issued and delivers only when it is waited for; ldmatrix and copies check alignment and bounds; a barrier that
// not all threads reach, or a warp operation that not all lanes reach, is an error. Every load and store is checked for races
// (races.h), or for bounds (memory.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include <cuda_runtime_api.h>

#define MCLD_DEVICE inline
#define MCLD_HOST_DEVICE inline
#define MCLD_KERNEL(...) inline void
#define MCLD_PARAMETERS(type) const type

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace mcld {

template <class T> T bits_of(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
inline float as_float(uint32_t bits) { return bits_of<float>(&bits); }
inline uint32_t as_bits(float x) { return bits_of<uint32_t>(&x); }

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) { return float(bits_of<_Float16>(&x)); }
template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline fp16 from_float<fp16>(float x) {
  const _Float16 rounded = _Float16(x);
  return {bits_of<uint16_t>(&rounded)};
}
template <class T> inline uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
// To nearest, ties away from zero; NaN and infinity stay.
inline uint32_t round_tf32(float x) {
  const uint32_t bits = as_bits(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}

namespace emulation {

// What the running fiber sees.
extern int thread, block_x, block_y, grid_x;
extern char* shared;  // of its block
extern int shared_size;

// The shared memories of the cluster's blocks, one after another.
extern char* first_shared;
extern int all_shared;
// The number of the running fiber: its thread, counted through the blocks of the cluster.
extern int fiber;
// The block of the running fiber in its cluster, and the shared memory of any.
int rank_of_fiber();
char* shared_of(int rank);
bool block_has_ended(int rank);
int blocks_of_cluster();

// Of emulation_sm90.h: forgets barriers and wgmma; whether loads of the blocks, or wgmma of the running thread, were not waited for.
void begin_blocks_sm90();
bool loads_in_flight();
bool wgmma_in_flight();

// Of a launch that may begin before the one before has ended: the running thread may touch global memory from now on.
void await_launch_before();
// Stops at an access to global memory before that.
void check_awaited();

// Runs other fibers until `counter` has changed.
void wait_for(const int& counter);
// Ends the launch with an error.
void stop(const std::string& what);

void sync_block();
void sync_cluster();
// Deposits `bytes` at `in`; when all lanes of the warp have, `combine` runs once; then lane results are copied to `out`.
struct Lane { alignas(16) char in[64]; alignas(16) char out[16]; };
void collective(const void* in, int in_bytes, void* out, int out_bytes, void (*combine)(Lane*));
void load_matrix(uint32_t (&r)[4], const void* row, void (*combine)(Lane*));
void copy_async(void* shared_target, const void* global);
void commit_async();
void wait_async(int pending);
// Checks the address of a vector access, and counts those of each size for the tests.
void check_vector(const void* p, int bytes);
extern int64_t vector_accesses[17];

void combine_shuffle(Lane*);
void combine_shuffle_from(Lane*);
void combine_match(Lane*);
void combine_ballot(Lane*);
void combine_ldmatrix(Lane*);
void combine_ldmatrix_transposed(Lane*);
void combine_mma_bf16(Lane*);
void combine_mma_fp16(Lane*);
void combine_mma_tf32(Lane*);

// A sum of tensor cores as they round it: products and additions of one instruction are exact here, and the accumulator is
// truncated once an instruction. (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ
// Computer Science 7:e330, 2021, found exact products and truncated sums on V100, T4 and A100. Alignment within an
// instruction may lose a few more bits there.)
inline float truncated(double sum) {
  const float nearest = float(sum);
  return std::fabs(double(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct MmaIn { float d[4]; uint32_t a[4]; uint32_t b[2]; };
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, void (*combine)(Lane*)) {
  const MmaIn in{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  collective(&in, sizeof in, d, sizeof d, combine);
}

using Launcher = int(const void* kernel, unsigned grid_x, unsigned grid_y, int threads, int shared_bytes, const void* parameters,
                     int64_t bytes);
// Hands a launch to the function that `set_launcher` was given; false where it does not take it.
bool launch_elsewhere(const void* kernel, dim3 grid, int threads, int shared_bytes, const void* parameters, int64_t bytes);
void run(dim3 grid, int threads, int shared_bytes, const char* name, void (*body)(const void*), const void* argument,
         bool dependent = false, int cluster = 1);

}  // namespace emulation

inline int thread_index() { return emulation::thread; }
inline int block_index() { return emulation::block_x; }
inline int block_index_y() { return emulation::block_y; }
inline char* shared_memory() { return emulation::shared; }
inline int opaque(int x) { return x; }
inline void sync_block() { emulation::sync_block(); }

template <class V> V read_vector(const void* p) {
  emulation::check_vector(p, alignof(V));
  return bits_of<V>(p);
}
template <class V> void write_vector(void* p, const V& v) {
  emulation::check_vector(p, alignof(V));
  std::memcpy(p, &v, sizeof v);
}

// As inexact as ex2.approx.ftz may be: off by 2^-22, up or down by a bit of the argument; subnormal results are 0.
inline float exp2_fast(float x) {
  const double exact = std::exp2(double(x));
  if (exact < 0x1p-126) return 0;
  return float(exact * (1 + (as_bits(x) * 0x9e3779b9u >> 31 ? 0x1p-22 : -0x1p-22)));
}

inline uint32_t ballot(bool value) {
  uint32_t out;
  emulation::collective(&value, sizeof value, &out, sizeof out, emulation::combine_ballot);
  return out;
}
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
inline int leading_zeros(uint32_t bits) { return bits ? __builtin_clz(bits) : 32; }
inline uint32_t match_lanes(int value) {
  uint32_t out;
  emulation::collective(&value, sizeof value, &out, sizeof out, emulation::combine_match);
  return out;
}
inline int shuffle_from(int value, int lane) {
  struct { int value, lane; } in{value, lane};
  int out;
  emulation::collective(&in, sizeof in, &out, sizeof out, emulation::combine_shuffle_from);
  return out;
}
inline float shuffle_xor(float value, int mask) {
  struct { float value; int mask; } in{value, mask};
  float out;
  emulation::collective(&in, sizeof in, &out, sizeof out, emulation::combine_shuffle);
  return out;
}

// CUB's order: in a warp neighbours first, then the warps' sums one after another.
inline float warp_sum(float x) {
  for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
template <int kThreads> struct BlockSum {
  // As large as CUB's, for launches that go to the compiled kernel.
  struct Storage { float warps[kThreads / 32]; char rest[kThreads / 32 + 4]; };
  static float run(float x, Storage& storage) {
    x = warp_sum(x);
    if (thread_index() % 32 == 0) storage.warps[thread_index() / 32] = x;
    sync_block();
    if (thread_index() == 0) {
      for (int i = 1; i < kThreads / 32; ++i) x += storage.warps[i];
    }
    return x;
  }
};

inline void copy_async(void* shared, const void* global) { emulation::copy_async(shared, global); }
inline void commit_async() { emulation::commit_async(); }
template <int kPending> void wait_async() { emulation::wait_async(kPending); }
inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  emulation::load_matrix(r, row, emulation::combine_ldmatrix);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  emulation::load_matrix(r, row, emulation::combine_ldmatrix_transposed);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma(d, a, b0, b1, emulation::combine_mma_bf16);
}
inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma(d, a, b0, b1, emulation::combine_mma_fp16);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma(d, a, b0, b1, emulation::combine_mma_tf32);
}

inline void await_launch_before() { emulation::await_launch_before(); }
inline void let_launch_after_begin() {}

namespace emulation {
template <class Parameters>
void start(bool dependent, int cluster, void (*kernel)(Parameters), const char* name, dim3 grid, int threads, int shared_bytes,
           const Parameters& parameters) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (launch_elsewhere(address, grid, threads, shared_bytes, &parameters, sizeof parameters)) return;
  struct Call { void (*kernel)(Parameters); const Parameters* parameters; } call{kernel, &parameters};
  run(grid, threads, shared_bytes, name, [](const void* argument) {
    const Call& call = *static_cast<const Call*>(argument);
    call.kernel(*call.parameters);
  }, &call, dependent, cluster);
}
}  // namespace emulation

// dependent: threads must call await_launch_before, and before that touch no global memory (builds that check races).
template <class Parameters>
void launch_dependent(bool dependent, void (*kernel)(Parameters), const char* name, dim3 grid, int threads, int shared_bytes,
                      cudaStream_t, const Parameters& parameters) {
  emulation::start(dependent, 1, kernel, name, grid, threads, shared_bytes, parameters);
}
template <class Parameters>
void launch(void (*kernel)(Parameters), const char* name, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            const Parameters& parameters) {
  launch_dependent(false, kernel, name, grid, threads, shared_bytes, stream, parameters);
}

}  // namespace mcld
