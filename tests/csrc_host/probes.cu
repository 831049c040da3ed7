// One matrix instruction or copy a launch, on registers and shared memory exactly as the caller lays them out.
// tests/test_layouts.py compares what comes back with the layouts that the PTX ISA documents. The same source runs in the
// host emulation and, compiled by nvcc, on a GPU: where the two differ, the emulation is wrong about the hardware.
//
// Functions of C, called through ctypes: 0, or 1 with the reason in probe_error().
#include <exception>
#include <string>

#include "portable/numerics.cuh"
#if MCLD_HAS_HOPPER
#include "hopper/layout.cuh"
#include "hopper/tensor_map.h"
#endif

namespace mcld {
namespace {

#ifdef MCLD_HOST_EMULATION
void wait_for_device() {}
#else
void wait_for_device() { check(cudaDeviceSynchronize(), "a probe", __FILE__, __LINE__); }
#endif

struct MmaProbe {
  const uint32_t *a, *b;  // (32, 4), (32, 2) registers by lane
  float* d;               // (32, 4), read and written
};

template <Precision kPrecision> MCLD_KERNEL(32) mma_probe(MCLD_PARAMETERS(MmaProbe) p) {
  const int lane = thread_index();
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = p.a[4 * lane + i], d[i] = p.d[4 * lane + i];
  const uint32_t b0 = p.b[2 * lane], b1 = p.b[2 * lane + 1];
  if constexpr (kPrecision == Precision::bf16) {
    mma_bf16(d, a, b0, b1);
  } else if constexpr (kPrecision == Precision::fp16) {
    mma_fp16(d, a, b0, b1);
  } else {
    mma_tf32(d, a, b0, b1);
  }
  for (int i = 0; i < 4; ++i) p.d[4 * lane + i] = d[i];
}

struct LdmatrixProbe {
  const uint16_t* shared;  // (256,) what shared memory holds
  const int* offset;       // (32,) byte offset of each lane's row
  uint32_t* out;           // (32, 4) registers by lane
};

template <bool kTransposed> MCLD_KERNEL(32) ldmatrix_probe(MCLD_PARAMETERS(LdmatrixProbe) p) {
  char* shared = shared_memory();
  const int lane = thread_index();
  for (int i = lane; i < 256; i += 32) reinterpret_cast<uint16_t*>(shared)[i] = p.shared[i];
  sync_block();
  uint32_t r[4];
  if constexpr (kTransposed) {
    ldmatrix_transposed(r, shared + p.offset[lane]);
  } else {
    ldmatrix(r, shared + p.offset[lane]);
  }
  for (int i = 0; i < 4; ++i) p.out[4 * lane + i] = r[i];
}

#if MCLD_HAS_HOPPER

// wgmma and TMA reach shared memory through another proxy than a thread's own loads and stores.
#ifdef MCLD_HOST_EMULATION
MCLD_DEVICE void async_proxy_fence() {}
#else
MCLD_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

constexpr int kPanelRows = 256, kPanelBytes = kPanelRows * hopper::kPanelRowBytes;
constexpr int kAcrossRows = kPanelRows / 4;  // of each of 4 panels in the same place, for a contraction across rows

struct TmaProbe {
  TensorMap map;
  uint16_t* out;  // (box rows, 64) shared memory as it lies
  int box_rows, column, row;
};

// Also the phases of a barrier: the same box twice, through one barrier.
MCLD_KERNEL(128) tma_probe(MCLD_PARAMETERS(TmaProbe) p) {
  const uint32_t start = shared_address(shared_memory());
  const uint32_t box = (start + hopper::kPeriodBytes - 1) / hopper::kPeriodBytes * hopper::kPeriodBytes;
  const uint32_t barrier = box + kPanelBytes;
  const uint16_t* seen = reinterpret_cast<const uint16_t*>(shared_memory() + (box - start));
  if (thread_index() == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  sync_block();
  for (int phase = 0; phase < 2; ++phase) {
    if (thread_index() == 0) {
      barrier_arrive_expecting(barrier, p.box_rows * hopper::kPanelRowBytes);
      tma_load(box, p.map, barrier, p.column, p.row);
    }
    barrier_wait(barrier, phase);
    for (int i = thread_index(); i < p.box_rows * hopper::kPanel; i += 128) p.out[i] = seen[i];
    async_proxy_fence();
    sync_block();
  }
}

struct WgmmaProbe {
  const uint16_t *a, *b;        // (64, 64), (256, 64) panels as they lie in shared memory
  const uint32_t* a_registers;  // (128, 4) by thread, or null
  float* d;                     // (128, columns / 2), read and written
  int step;
  bool add;
};

// kCount: results of a thread. With registers for A, B's contraction runs across its rows, and B lies in panels of kAcrossRows.
template <Precision kPrecision, int kCount, bool kRegisters> MCLD_KERNEL(128) wgmma_probe(MCLD_PARAMETERS(WgmmaProbe) p) {
  const uint32_t start = shared_address(shared_memory());
  const uint32_t b = (start + hopper::kPeriodBytes - 1) / hopper::kPeriodBytes * hopper::kPeriodBytes;
  uint16_t* to_b = reinterpret_cast<uint16_t*>(shared_memory() + (b - start));
  uint16_t* to_a = to_b + kPanelBytes / 2;
  const int thread = thread_index();
  for (int i = thread; i < kPanelBytes / 2; i += 128) to_b[i] = p.b[i];
  for (int i = thread; i < 64 * hopper::kPanel; i += 128) to_a[i] = p.a[i];
  async_proxy_fence();
  sync_block();
  float d[kCount];
  for (int i = 0; i < kCount; ++i) d[i] = p.d[thread * kCount + i];
  uint32_t a[4] = {};
  if constexpr (kRegisters) {
    for (int i = 0; i < 4; ++i) a[i] = p.a_registers[4 * thread + i];
  }
  wgmma_fence();
  if constexpr (kRegisters) {
    wgmma_registers(PrecisionTag<kPrecision>(), d, a, hopper::across_rows(b, p.step, kAcrossRows * hopper::kPanelRowBytes), p.add);
  } else {
    const uint64_t of_a = hopper::along_rows(b + kPanelBytes, p.step), of_b = hopper::along_rows(b, p.step);
    wgmma_shared(PrecisionTag<kPrecision>(), d, of_a, of_b, p.add);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(d);
  for (int i = 0; i < kCount; ++i) p.d[thread * kCount + i] = d[i];
}

template <Precision kPrecision> void start_wgmma(const WgmmaProbe& p, int columns) {
  constexpr int kBytes = kPanelBytes + 64 * hopper::kPanelRowBytes + hopper::kPeriodBytes;
  const auto start = [&](auto kernel) { launch(kernel, "launch of hopper probe", dim3(1), 128, kBytes, nullptr, p); };
  if (p.a_registers) {
    switch (columns) {
      case 64: return start(wgmma_probe<kPrecision, 32, true>);
      case 104: return start(wgmma_probe<kPrecision, 52, true>);
      case 128: return start(wgmma_probe<kPrecision, 64, true>);
      case 192: return start(wgmma_probe<kPrecision, 96, true>);
      default: return start(wgmma_probe<kPrecision, 128, true>);
    }
  }
  switch (columns) {
    case 64: return start(wgmma_probe<kPrecision, 32, false>);
    case 128: return start(wgmma_probe<kPrecision, 64, false>);
    default: return start(wgmma_probe<kPrecision, 128, false>);
  }
}

#endif

std::string error;

template <class Call> int guarded(const Call& call) {
  try {
    call();
    wait_for_device();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return 1;
  }
}

}  // namespace
}  // namespace mcld

#define MCLD_PROBE extern "C" __attribute__((visibility("default")))
using namespace mcld;

MCLD_PROBE const char* probe_error() { return error.c_str(); }

MCLD_PROBE int probe_mma(int precision, const uint32_t* a, const uint32_t* b, float* d) {
  return guarded([&] {
    with_precision(Precision(precision), [&](auto tag) {
      launch(mma_probe<decltype(tag)::value>, "launch of mma probe", dim3(1), 32, 0, nullptr, MmaProbe{a, b, d});
    });
  });
}

MCLD_PROBE int probe_ldmatrix(int transposed, const uint16_t* shared, const int* offset, uint32_t* out) {
  return guarded([&] {
    const LdmatrixProbe p{shared, offset, out};
    launch(transposed ? ldmatrix_probe<true> : ldmatrix_probe<false>, "launch of ldmatrix probe", dim3(1), 32, 512, nullptr, p);
  });
}

#if MCLD_HAS_HOPPER

MCLD_PROBE uint64_t probe_descriptor(int along_rows, uint32_t address, int step, int panel_bytes) {
  return along_rows ? hopper::along_rows(address, step) : hopper::across_rows(address, step, panel_bytes);
}

// The box of `box_rows` rows at (row, column) of a matrix (rows, pitch).
MCLD_PROBE int probe_tma(int precision, const uint16_t* matrix, int64_t rows, int64_t pitch, int box_rows, int column, int row,
                         uint16_t* out) {
  return guarded([&] {
    const TmaProbe p{hopper::tensor_map(matrix, Precision(precision), rows, pitch, box_rows), out, box_rows, column, row};
    launch(tma_probe, "launch of hopper probe", dim3(1), 128, kPanelBytes + 8 + hopper::kPeriodBytes, nullptr, p);
  });
}

MCLD_PROBE int probe_wgmma(int precision, int columns, const uint16_t* a, const uint32_t* a_registers, const uint16_t* b,
                           float* d, int step, int add) {
  return guarded([&] {
    const WgmmaProbe p{a, b, a_registers, d, step, add != 0};
    if (Precision(precision) == Precision::bf16) {
      start_wgmma<Precision::bf16>(p, columns);
    } else {
      start_wgmma<Precision::fp16>(p, columns);
    }
  });
}

#endif
