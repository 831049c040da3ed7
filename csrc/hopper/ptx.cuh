// Hopper's instructions, one function each: mbarriers, TMA loads, wgmma, the register budget of a warpgroup. The kernels of
// this folder use these and portable/platform.cuh only; tests/csrc_host/emulation_sm90.h defines the same names on a CPU.
//
// Shared-memory addresses are 32-bit offsets in the shared window, as the instructions take them.
#pragma once

#include "portable/numerics.cuh"

#ifdef MCLD_HOST_EMULATION
#include "emulation_sm90.h"
#else

#include <cuda.h>  // types only; the module does not link the driver's library

namespace mcld {

using TensorMap = CUtensorMap;

// One block a multiprocessor: with that, the registers at entry are known and may be handed from warpgroup to warpgroup.
#define MCLD_SM90_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
// Clusters of so many blocks, neighbours in the grid, which run at once and reach each other's shared memory.
#define MCLD_SM90_CLUSTER_KERNEL(threads, blocks) __global__ void __cluster_dims__(blocks, 1, 1) __launch_bounds__(threads, 1)

MCLD_DEVICE uint32_t shuffle_xor_bits(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
MCLD_DEVICE int grid_blocks() { return gridDim.x; }

// A barrier of all threads of a cluster.
MCLD_DEVICE void sync_cluster() { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); }

// --- mbarriers: 8 bytes of shared memory; a phase ends when all arrivals and all announced bytes are in.

MCLD_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine; a block barrier follows.
MCLD_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
MCLD_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
MCLD_DEVICE void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns once the phase of this parity has ended. On a fresh barrier that is at once for parity 1.
MCLD_DEVICE void barrier_wait(uint32_t barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// Arrives at the barrier at this place in block `rank` of the cluster, which may be the thread's own. It says that reads are
// done, and makes no write visible to the other block: with .release.cluster ptxas puts a fence of the whole GPU (MEMBAR.ALL.GPU)
// before each arrival. CUTLASS's ClusterBarrier arrives in the same way.
MCLD_DEVICE void barrier_arrive_at(uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// --- TMA: the map's box with its first element at (column, row) goes to shared memory; outside of the matrix it is zeros.

MCLD_DEVICE void tma_load(uint32_t shared, const TensorMap& map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// The same box to this place of the shared memory of each block whose bit is set; each block's barrier at `barrier` counts its
// bytes.
MCLD_DEVICE void tma_load_multicast(uint32_t shared, const TensorMap& map, uint32_t barrier, int column, int row, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(column), "r"(row), "h"(uint16_t(blocks))
      : "memory");
}

// --- wgmma: the 128 threads of a warpgroup issue together; results are there after wgmma_wait.

template <int kRegisters> MCLD_DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <int kRegisters> MCLD_DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }

// Before the first wgmma that reads or adds to registers written by other instructions.
MCLD_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MCLD_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> MCLD_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }
// The compiler sees no link between wgmma_fence or wgmma_wait and the registers they are for; this keeps their uses on the
// right side.
template <int kCount> MCLD_DEVICE void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kCount> MCLD_DEVICE void pin(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

#define MCLD_F8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MCLD_F32(d, i) MCLD_F8(d, i), MCLD_F8(d, i + 8), MCLD_F8(d, i + 16), MCLD_F8(d, i + 24)
#define MCLD_D32(d) MCLD_F32(d, 0)
#define MCLD_D52(d) MCLD_F32(d, 0), MCLD_F8(d, 32), MCLD_F8(d, 40), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define MCLD_D64(d) MCLD_F32(d, 0), MCLD_F32(d, 32)
#define MCLD_D96(d) MCLD_D64(d), MCLD_F32(d, 64)
#define MCLD_D128(d) MCLD_D64(d), MCLD_F32(d, 64), MCLD_F32(d, 96)
#define MCLD_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MCLD_R52 \
  MCLD_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51"
#define MCLD_R64 MCLD_R52 ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MCLD_R96 \
  MCLD_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MCLD_R128 \
  MCLD_R96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d (64, 2 kCount) = A B^T, plus d if `add`. A (64, 16) and B (2 kCount, 16) lie in shared memory, contraction along their
// rows. Thread t holds d[4 j + 2 h + c] at row 16 (t / 32) + t % 32 / 4 + 8 h, column 8 j + 2 (t % 4) + c.
#define MCLD_WGMMA_SHARED(precision, type, count, columns, registers, outputs, a_at, b_at, add_at)                     \
  MCLD_DEVICE void wgmma_shared(PrecisionTag<precision>, float(&d)[count], uint64_t a, uint64_t b, bool add) {         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_at ", 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type                                  \
                 " {" registers "}, " a_at ", " b_at ", p, 1, 1, 0, 0;\n}\n"                                           \
                 : outputs(d)                                                                                           \
                 : "l"(a), "l"(b), "r"(int(add)));                                                                     \
  }
// d (64, 2 kCount) = A B, plus d if `add`. A (64, 16) is in registers, as a[i] of d's own layout: i = 2 (column half) + h. B
// (16, 2 kCount) lies in panels of shared memory with the contraction across its rows.
#define MCLD_WGMMA_REGISTERS(precision, type, count, columns, registers, outputs, a_at, b_at, add_at)                  \
  MCLD_DEVICE void wgmma_registers(PrecisionTag<precision>, float(&d)[count], const uint32_t* a, uint64_t b,           \
                                   bool add) {                                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_at ", 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type                                  \
                 " {" registers "}, {" a_at "}, " b_at ", p, 1, 1, 1;\n}\n"                                            \
                 : outputs(d)                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                                 \
  }
#define MCLD_WGMMA(precision, type)                                                                                    \
  MCLD_WGMMA_SHARED(precision, type, 32, "64", MCLD_R32, MCLD_D32, "%32", "%33", "%34")                                \
  MCLD_WGMMA_SHARED(precision, type, 64, "128", MCLD_R64, MCLD_D64, "%64", "%65", "%66")                               \
  MCLD_WGMMA_SHARED(precision, type, 128, "256", MCLD_R128, MCLD_D128, "%128", "%129", "%130")                         \
  MCLD_WGMMA_REGISTERS(precision, type, 32, "64", MCLD_R32, MCLD_D32, "%32, %33, %34, %35", "%36", "%37")              \
  MCLD_WGMMA_REGISTERS(precision, type, 52, "104", MCLD_R52, MCLD_D52, "%52, %53, %54, %55", "%56", "%57")             \
  MCLD_WGMMA_REGISTERS(precision, type, 64, "128", MCLD_R64, MCLD_D64, "%64, %65, %66, %67", "%68", "%69")             \
  MCLD_WGMMA_REGISTERS(precision, type, 96, "192", MCLD_R96, MCLD_D96, "%96, %97, %98, %99", "%100", "%101")           \
  MCLD_WGMMA_REGISTERS(precision, type, 128, "256", MCLD_R128, MCLD_D128, "%128, %129, %130, %131", "%132", "%133")
MCLD_WGMMA(Precision::bf16, "bf16")
MCLD_WGMMA(Precision::fp16, "f16")

// launch for a kernel in clusters: the compiled kernel knows their size, of which the grid is a multiple.
template <class Parameters>
void launch_clusters(int, void (*kernel)(Parameters), const char* name, dim3 grid, int threads, int shared_bytes,
                     cudaStream_t stream, const Parameters& parameters) {
  launch(kernel, name, grid, threads, shared_bytes, stream, parameters);
}

}  // namespace mcld

#endif
