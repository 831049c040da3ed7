// The differences between a compile for a GPU and the host emulation of tests/csrc_host: thread and block indices, barriers,
// shuffles, asynchronous copies, ldmatrix, mma, the 16-bit types and the launch. The kernels use these, sums.cuh and plain C++
// only. tests/csrc_host/emulation.h defines the same names on a CPU.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef MCLD_HOST_EMULATION
#include "emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "checks.h"

#define MCLD_DEVICE __device__ __forceinline__
#define MCLD_HOST_DEVICE __host__ __device__ __forceinline__
// Threads of a block and, optionally, the blocks that a multiprocessor is to hold.
#define MCLD_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define MCLD_PARAMETERS(type) const __grid_constant__ type

namespace mcld {

using bf16 = __nv_bfloat16;
using fp16 = __half;

MCLD_DEVICE int thread_index() { return threadIdx.x; }
MCLD_DEVICE int block_index() { return blockIdx.x; }
MCLD_DEVICE int block_index_y() { return blockIdx.y; }

// The block's dynamic shared memory, aligned to 128 bytes.
MCLD_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char dynamic_shared[];
  return dynamic_shared;
}

// The same value, opaque to the compiler: computations on it stay where they are used instead of being hoisted out of a loop
// into registers.
MCLD_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

MCLD_DEVICE void sync_block() { __syncthreads(); }
// The lanes of the warp for which it is true, a bit each.
MCLD_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
MCLD_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
MCLD_DEVICE int leading_zeros(uint32_t bits) { return __clz(int(bits)); }
// The lanes of the warp with the same value, a bit each.
MCLD_DEVICE uint32_t match_lanes(int value) { return __match_any_sync(0xffffffffu, value); }
MCLD_DEVICE int shuffle_from(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
MCLD_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

MCLD_DEVICE float to_float(float x) { return x; }
MCLD_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
MCLD_DEVICE float to_float(fp16 x) { return __half2float(x); }
template <class T> MCLD_DEVICE T from_float(float x);
template <> MCLD_DEVICE float from_float<float>(float x) { return x; }
template <> MCLD_DEVICE bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> MCLD_DEVICE fp16 from_float<fp16>(float x) { return __float2half_rn(x); }

// A vector in global memory, by accesses of alignof(V) bytes, of which the address must be a multiple; the emulation checks that.
template <class V> MCLD_DEVICE V read_vector(const void* p) { return *static_cast<const V*>(p); }
// As PTX for 8 and 16 bytes: nvcc splits some of the assignments into stores of 4 bytes.
template <class V> MCLD_DEVICE void write_vector(void* p, const V& v) {
  const size_t address = __cvta_generic_to_global(p);
  if constexpr (alignof(V) == 16) {
    uint4 words[sizeof(V) / 16];
    memcpy(words, &v, sizeof(V));
#pragma unroll
    for (int i = 0; i < int(sizeof(V) / 16); ++i) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address + 16 * i), "r"(words[i].x), "r"(words[i].y),
                   "r"(words[i].z), "r"(words[i].w)
                   : "memory");
    }
  } else if constexpr (alignof(V) == 8) {
    uint2 words;
    memcpy(&words, &v, sizeof(V));
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words.x), "r"(words.y) : "memory");
  } else {
    *static_cast<V*>(p) = v;
  }
}

// Two values rounded and packed into a register, the first in the low half.
template <class T> MCLD_DEVICE uint32_t pack(float low, float high);
template <> MCLD_DEVICE uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <> MCLD_DEVICE uint32_t pack<fp16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// fp32 bits rounded to tf32, to nearest; the tensor cores alone would truncate.
MCLD_DEVICE uint32_t round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
MCLD_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
MCLD_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// 2 to the power x, relative error 2^-22; exp2(-inf) is 0, as is what is no normal number.
MCLD_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MCLD_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// 16 bytes from global to shared memory, both aligned to 16; there once wait_async has counted the group.
MCLD_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
MCLD_DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> MCLD_DEVICE void wait_async() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
MCLD_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
MCLD_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b: 16 x 8 in fp32, contraction 16 for 16-bit operands and 8 for tf32.
MCLD_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MCLD_DEVICE void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MCLD_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Of a dependent launch: waits until the launch before is complete, then lets the launch after begin. It stands before the
// first access to global memory, in every thread; elsewhere it does nothing.
MCLD_DEVICE void await_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Lets a dependent launch after this one begin, as far as `await_launch_before`.
MCLD_DEVICE void let_launch_after_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches kernel(parameters) on `stream` of the current device and checks every call on the way.
template <class Parameters>
void launch(void (*kernel)(Parameters), const char* name, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            const Parameters& parameters) {
  if (grid.x == 0 || grid.y == 0) return;
  if (shared_bytes > 48 * 1024) {
    allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes, name);
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(parameters);
  check(cudaGetLastError(), name, __FILE__, __LINE__);
}

// The same. If `dependent`, and the kernel's code can wait for it (compute capability 9.0), it may begin before the launch
// before has ended: the kernel calls `await_launch_before`.
template <class Parameters>
void launch_dependent(bool dependent, void (*kernel)(Parameters), const char* name, dim3 grid, int threads, int shared_bytes,
                      cudaStream_t stream, const Parameters& parameters) {
  if (!dependent || !can_await_launches(reinterpret_cast<const void*>(kernel), name)) {
    return launch(kernel, name, grid, threads, shared_bytes, stream, parameters);
  }
  if (grid.x == 0 || grid.y == 0) return;
  if (shared_bytes > 48 * 1024) allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes, name);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream, config.attrs = &attribute, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, parameters), name, __FILE__, __LINE__);
}

}  // namespace mcld

#endif
