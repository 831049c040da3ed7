// The choice of an instruction set, and threads for the CPU kernels.
#include <dlfcn.h>

#include <atomic>

#include "cpu/clkd.h"
#include "cpu/contrast.h"
#include "cpu/low_latency.h"
#include "cpu/mlkd.h"
#include "cpu/rows.h"
#include "cpu/softmax_kl.h"
#include "cpu/teacher_anchors.h"

namespace mcld::cpu {
namespace {

struct Isa {
  const char* name;
  void (*low_latency)(const LowLatency&, int);
  void (*normalize)(const Normalize&);
  void (*grad_epilogue)(const GradEpilogue&);
  void (*softmax_kl)(const SoftmaxKl&);
  void (*clkd)(const Clkd&);
  void (*contrast)(const Contrast&);
  void (*mlkd)(const Mlkd&, int);
  void (*teacher_anchors)(const TeacherAnchors&);
};

#define MCLD_ISA(name)                                                                                             \
  {#name, name::low_latency, name::normalize, name::grad_epilogue, name::softmax_kl, name::clkd, name::contrast, \
   name::mlkd, name::teacher_anchors}
constexpr Isa kIsas[] = {
    MCLD_ISA(baseline),
#if MCLD_CPU_X86
    MCLD_ISA(avx2),
    MCLD_ISA(avx512),
#endif
};
#undef MCLD_ISA

// OpenMP's entry point as GCC and Clang call it. torch has loaded one runtime: its threads serve here as well, where a
// runtime of this module's own would compete with them for the cores. Without one, everything runs on the caller.
using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMP openmp() {
  static const OpenMP entry = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
}

struct Tasks {
  void (*task)(void*, int64_t);
  void* data;
  int64_t blocks;
  std::atomic<int64_t> next{0};
};

void work(void* argument) {
  Tasks& tasks = *static_cast<Tasks*>(argument);
  for (int64_t block; (block = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.blocks;) {
    tasks.task(tasks.data, block);
  }
}

}  // namespace

int num_isas() {
#if MCLD_CPU_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 3 : 2;
#else
  return 1;
#endif
}

const char* isa_name(int isa) { return kIsas[isa].name; }

void low_latency(const LowLatency& call, int steps, int isa) { kIsas[isa].low_latency(call, steps); }

void normalize(const Normalize& call, int isa) { kIsas[isa].normalize(call); }

void grad_epilogue(const GradEpilogue& call, int isa) { kIsas[isa].grad_epilogue(call); }

int64_t softmax_kl_size(int64_t n, int64_t num_classes, int threads) {
  const int64_t rows_of_block = softmax_kl_rows(num_classes), blocks = (n + rows_of_block - 1) / rows_of_block;
  return Layout::pad(2 * blocks) + (threads < blocks ? threads : blocks) * 3 * Layout::pad(num_classes);
}

void softmax_kl(const SoftmaxKl& call, int isa) { kIsas[isa].softmax_kl(call); }

void clkd(const Clkd& call, int isa) { kIsas[isa].clkd(call); }

void contrast(const Contrast& call, int isa) { kIsas[isa].contrast(call); }

void mlkd(const Mlkd& call, int steps, int isa) { kIsas[isa].mlkd(call, steps); }

void teacher_anchors(const TeacherAnchors& call, int isa) { kIsas[isa].teacher_anchors(call); }

void parallel(int threads, int64_t blocks, void (*task)(void*, int64_t), void* data) {
  Tasks tasks{task, data, blocks};
  if (threads > 1 && blocks > 1 && openmp() != nullptr) {
    openmp()(work, &tasks, unsigned(blocks < threads ? blocks : threads), 0);
  } else {
    work(&tasks);
  }
}

}  // namespace mcld::cpu
