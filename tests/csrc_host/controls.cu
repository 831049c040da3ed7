// Small kernels that are right when `broken` is false and have one mistake, each its own, when it is true: what proves that the
// emulation and its checks report such a mistake. Called through ctypes by tests/test_csrc_sanitizers.py.
#include <exception>
#include <string>

#include "portable/tile.cuh"
#include "hopper/layout.cuh"
#include "hopper/ptx.cuh"

namespace mcld {

namespace hopper {
TensorMap tensor_map(const void* matrix, Precision, int64_t rows, int64_t pitch, int box_rows);
}

namespace {

constexpr int kThreads = 64, kSharedBytes = 4096;

struct Control {
  float* data;  // (n,)
  int64_t n;
  bool broken;
  TensorMap map;  // of the data as (n / 32, 64) elements of 16 bits, in boxes of 64 rows
};

MCLD_DEVICE float* floats() { return reinterpret_cast<float*>(shared_memory()); }

// --- races

MCLD_KERNEL(kThreads) missing_barrier(MCLD_PARAMETERS(Control) p) {
  const int t = thread_index();
  floats()[t] = float(t);
  if (!p.broken) sync_block();
  p.data[t] = floats()[(t + kWarp) % kThreads];
}

// The lanes of a warp meet in the shuffle, but it is no fence.
MCLD_KERNEL(kThreads) shuffle_as_barrier(MCLD_PARAMETERS(Control) p) {
  const int t = thread_index();
  floats()[t] = float(t);
  if (!p.broken) sync_block();
  const float sum = warp_sum(1);
  p.data[t] = floats()[t ^ 1] * sum;
}

// Overwritten before all have read it.
MCLD_KERNEL(kThreads) missing_second_barrier(MCLD_PARAMETERS(Control) p) {
  const int t = thread_index();
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    floats()[t] = float(i);
    sync_block();
    sum += floats()[kThreads - 1 - t];
    if (!p.broken) sync_block();
  }
  p.data[t] = sum;
}

MCLD_KERNEL(kThreads) two_threads_write(MCLD_PARAMETERS(Control) p) {
  if (p.broken ? thread_index() % kWarp == 0 : thread_index() == 0) p.data[0] = 1;
}

MCLD_KERNEL(kThreads) two_blocks_write(MCLD_PARAMETERS(Control) p) {
  p.data[thread_index() + (p.broken ? 1 : kThreads) * block_index()] = 1;
}

MCLD_KERNEL(kThreads) a_block_reads_what_another_writes(MCLD_PARAMETERS(Control) p) {
  const int at = thread_index() + kThreads * block_index();
  const float before = p.data[p.broken ? 2 * kThreads - 1 - at : at];
  p.data[at] = before + 1;
}

// Neighbouring 16-bit elements are no conflict; the same one is.
MCLD_KERNEL(kThreads) halves_of_a_word(MCLD_PARAMETERS(Control) p) {
  bf16* halves = reinterpret_cast<bf16*>(p.data);
  halves[thread_index() / (p.broken ? 2 : 1)] = from_float<bf16>(1);
}

// A ring of two stages, one ahead: a stage is filled while the slower warp still reads it.
MCLD_KERNEL(kThreads) stage_overwritten(MCLD_PARAMETERS(Control) p) {
  const int t = thread_index();
  copy_async(floats() + 4 * t, p.data + 4 * t);
  commit_async();
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    wait_async<0>();
    if (!p.broken || i == 0) sync_block();
    copy_async(floats() + (i + 1) % 2 * 4 * kThreads + 4 * t, p.data + 4 * t);
    commit_async();
    sum += floats()[i % 2 * 4 * kThreads + 4 * (kThreads - 1 - t)];
  }
  wait_async<0>();
  p.data[4 * kThreads + t] = sum;
}

MCLD_KERNEL(kThreads) copy_not_waited_for(MCLD_PARAMETERS(Control) p) {
  const int t = thread_index();
  copy_async(floats() + 4 * t, p.data + 4 * t);
  commit_async();
  if (!p.broken) wait_async<0>();
  const float sum = floats()[4 * t];
  wait_async<0>();
  p.data[4 * kThreads + t] = sum;
}

// Each thread waits for its own copies; those of others need a barrier besides.
MCLD_KERNEL(kThreads) copies_of_others(MCLD_PARAMETERS(Control) p) {
  const int t = thread_index();
  copy_async(floats() + 4 * t, p.data + 4 * t);
  commit_async();
  wait_async<0>();
  if (!p.broken) sync_block();
  p.data[4 * kThreads + t] = floats()[4 * (kThreads - 1 - t)];
}

// The copy may read its source until it is waited for.
MCLD_KERNEL(kThreads) source_overwritten(MCLD_PARAMETERS(Control) p) {
  const int t = thread_index();
  copy_async(floats() + 4 * t, p.data + 4 * t);
  commit_async();
  if (!p.broken) wait_async<0>();
  p.data[4 * t] = 0;
  wait_async<0>();
}

MCLD_KERNEL(kThreads) ldmatrix_before_barrier(MCLD_PARAMETERS(Control) p) {
  const int t = thread_index();
  reinterpret_cast<uint4*>(floats())[t] = uint4{1, 2, 3, 4};
  if (!p.broken) sync_block();
  uint32_t r[4];
  ldmatrix(r, floats() + 4 * (kThreads - 1 - t));
  p.data[t] = float(r[0]);
}

// One warpgroup: thread 0 loads two boxes into one stage, one after the other, and all multiply each.
struct Stage64 {
  static constexpr int kThreads = 128, kBytes = 64 * 128, kSharedBytes = kBytes + 16 + 1024;
  uint32_t base = (shared_address(shared_memory()) + 1023) / 1024 * 1024;
  uint32_t full() const { return base + kBytes; }
  uint32_t empty() const { return base + kBytes + 8; }

  void init() const {
    if (thread_index() == 0) {
      barrier_init(full(), 1);
      barrier_init(empty(), 4);
      barrier_init_fence();
    }
  }
  void load(const Control& p, int row) const {
    barrier_arrive_expecting(full(), kBytes);
    tma_load(base, p.map, full(), 0, row);
  }
  void multiply(float (&d)[32], bool add) const {
    wgmma_fence();
    wgmma_shared(PrecisionTag<Precision::bf16>(), d, hopper::along_rows(base, 0), hopper::along_rows(base, 0), add);
    wgmma_commit();
  }
  void release() const {
    if (thread_index() % kWarp == 0) barrier_arrive(empty());
  }
};
enum class Slip { none, init, full, empty, wait };

template <Slip kSlip> MCLD_DEVICE void stage64(const Control& p) {
  const Slip slip = p.broken ? kSlip : Slip::none;
  const Stage64 stage;
  float d[32];
  stage.init();
  if (slip != Slip::init) sync_block();
  for (int i = 0; i < 2; ++i) {
    if (thread_index() == 0) {
      if (slip != Slip::empty) barrier_wait(stage.empty(), i ^ 1);
      stage.load(p, 64 * i);
    }
    if (slip != Slip::full) barrier_wait(stage.full(), i);
    stage.multiply(d, i > 0);
    if (slip != Slip::wait) wgmma_wait<0>();
    stage.release();
    wgmma_wait<0>();
  }
}
MCLD_SM90_KERNEL(128) barrier_used_before_its_initialisation(MCLD_PARAMETERS(Control) p) { stage64<Slip::init>(p); }
MCLD_SM90_KERNEL(128) load_not_waited_for(MCLD_PARAMETERS(Control) p) { stage64<Slip::full>(p); }
MCLD_SM90_KERNEL(128) stage_loaded_before_it_is_free(MCLD_PARAMETERS(Control) p) { stage64<Slip::empty>(p); }
MCLD_SM90_KERNEL(128) stage_freed_before_wgmma_is_done(MCLD_PARAMETERS(Control) p) { stage64<Slip::wait>(p); }

// A cluster of two: thread 0 of each block loads a box into a stage of both, twice, and all multiply both boxes.
struct SharedStage {
  static constexpr int kBytes = 2 * Stage64::kBytes, kSharedBytes = kBytes + 16 + 1024;
  uint32_t base = (shared_address(shared_memory()) + 1023) / 1024 * 1024;
  uint32_t full() const { return base + kBytes; }
  uint32_t empty() const { return base + kBytes + 8; }
};
enum class Mistake { none, init, empty, only_own, end };

template <Mistake kMistake> MCLD_DEVICE void shared_stage(const Control& p) {
  const Mistake mistake = p.broken ? kMistake : Mistake::none;
  const SharedStage stage;
  const int rank = block_index(), lane = thread_index() % kWarp;
  float d[32];
  if (mistake == Mistake::init && rank == 1) sync_block();  // the other block is ahead
  if (thread_index() == 0) {
    barrier_init(stage.full(), 1);
    barrier_init(stage.empty(), mistake == Mistake::only_own ? 4 : 8);
    barrier_init_fence();
  }
  if (mistake == Mistake::init) {
    sync_block();
  } else {
    sync_cluster();
  }
  for (int i = 0; i < 2; ++i) {
    if (thread_index() == 0) {
      if (mistake != Mistake::empty) barrier_wait(stage.empty(), i ^ 1);
      barrier_arrive_expecting(stage.full(), SharedStage::kBytes);
      tma_load_multicast(stage.base + rank * Stage64::kBytes, p.map, stage.full(), 0, 64 * i, 3);
    }
    barrier_wait(stage.full(), i);
    wgmma_fence();
    for (int box = 0; box < 2; ++box) {
      const uint64_t at = hopper::along_rows(stage.base + box * Stage64::kBytes, 0);
      wgmma_shared(PrecisionTag<Precision::bf16>(), d, at, at, i + box > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (mistake == Mistake::end && i == 1 && rank == 1) {
      for (int turn = 0; turn < 8; ++turn) sync_block();  // the other block ends first
    }
    if (lane < 2 && (mistake != Mistake::only_own || lane == rank)) barrier_arrive_at(stage.empty(), lane);
  }
  if (mistake != Mistake::end) sync_cluster();
}
MCLD_SM90_CLUSTER_KERNEL(128, 2) cluster_used_before_its_initialisation(MCLD_PARAMETERS(Control) p) { shared_stage<Mistake::init>(p); }
MCLD_SM90_CLUSTER_KERNEL(128, 2) stage_of_a_cluster_never_waited_for(MCLD_PARAMETERS(Control) p) { shared_stage<Mistake::empty>(p); }
MCLD_SM90_CLUSTER_KERNEL(128, 2) stage_freed_by_one_block_alone(MCLD_PARAMETERS(Control) p) { shared_stage<Mistake::only_own>(p); }
MCLD_SM90_CLUSTER_KERNEL(128, 2) arrival_at_a_block_that_has_ended(MCLD_PARAMETERS(Control) p) { shared_stage<Mistake::end>(p); }

// --- synchronisation

MCLD_KERNEL(kThreads) barrier_not_all_reach(MCLD_PARAMETERS(Control) p) {
  if (!p.broken || thread_index() < kWarp) sync_block();
}

MCLD_KERNEL(kThreads) lanes_missing_from_a_shuffle(MCLD_PARAMETERS(Control) p) {
  if (!p.broken || thread_index() % 2) p.data[thread_index()] = warp_sum(1);
}

MCLD_KERNEL(kThreads) lanes_in_different_operations(MCLD_PARAMETERS(Control) p) {
  uint32_t r[4] = {};
  float* const row = floats() + thread_index() * 4;
  if (p.broken && thread_index() % 2) {
    ldmatrix_transposed(r, row);
  } else {
    ldmatrix(r, row);
  }
}

MCLD_KERNEL(kThreads) copies_in_flight_at_the_end(MCLD_PARAMETERS(Control) p) {
  copy_async(floats() + 4 * thread_index(), p.data + 4 * thread_index());
  commit_async();
  if (!p.broken) wait_async<0>();
}

MCLD_SM90_KERNEL(128) wgmma_in_flight_at_the_end(MCLD_PARAMETERS(Control) p) {
  const Stage64 stage;
  float d[32];
  stage.multiply(d, false);
  if (!p.broken) wgmma_wait<0>();
}

MCLD_SM90_KERNEL(128) mbarrier_never_completed(MCLD_PARAMETERS(Control) p) {
  const Stage64 stage;
  stage.init();
  sync_block();
  if (!p.broken || thread_index() != 0) stage.release();
  barrier_wait(stage.empty(), 0);
}

MCLD_SM90_KERNEL(128) more_arrivals_than_expected(MCLD_PARAMETERS(Control) p) {
  const Stage64 stage;
  stage.init();
  sync_block();
  if (thread_index() == 0) {
    for (int i = 0; i < (p.broken ? 2 : 1); ++i) barrier_arrive_expecting(stage.full(), 16);
  }
}

// --- memory

MCLD_KERNEL(kThreads) read_past_the_end(MCLD_PARAMETERS(Control) p) {
  if (thread_index() == 0) p.data[0] = p.data[p.n - (p.broken ? 0 : 1)];
}
MCLD_KERNEL(kThreads) write_past_the_end(MCLD_PARAMETERS(Control) p) {
  if (thread_index() == 0) p.data[p.n - (p.broken ? 0 : 1)] = 1;
}
MCLD_KERNEL(kThreads) read_before_the_beginning(MCLD_PARAMETERS(Control) p) {
  if (thread_index() == 0) p.data[1] = p.data[p.broken ? -1 : 0];
}
MCLD_KERNEL(kThreads) copy_past_the_end(MCLD_PARAMETERS(Control) p) {
  if (thread_index() == 0) copy_async(floats(), p.data + p.n - (p.broken ? 0 : 4));
  commit_async();
  wait_async<0>();
}
MCLD_SM90_KERNEL(128) load_past_the_end(MCLD_PARAMETERS(Control) p) {
  const Stage64 stage;
  stage.init();
  sync_block();
  TensorMap map = p.map;
  if (p.broken) map.rows += 1;
  if (thread_index() == 0) {
    barrier_arrive_expecting(stage.full(), Stage64::kBytes);
    tma_load(stage.base, map, stage.full(), 0, int(p.map.rows) - 63);
  }
  barrier_wait(stage.full(), 0);
}
MCLD_KERNEL(kThreads) misaligned_vector(MCLD_PARAMETERS(Control) p) {
  const float4 x = *reinterpret_cast<const float4*>(p.data + (p.broken ? 1 : 0));
  if (thread_index() == 0) p.data[8] = x.x;
}
MCLD_KERNEL(kThreads) shared_read_past_the_end(MCLD_PARAMETERS(Control) p) {
  if (thread_index() == 0) p.data[0] = floats()[kSharedBytes / 4 - (p.broken ? 0 : 1)];
}
MCLD_KERNEL(kThreads) shared_write_past_the_end(MCLD_PARAMETERS(Control) p) {
  if (thread_index() == 0) floats()[kSharedBytes / 4 - (p.broken ? 0 : 1)] = 1;
}
MCLD_KERNEL(kThreads) index_past_an_array(MCLD_PARAMETERS(Control) p) {
  float x[4] = {1, 2, 3, 4};
  for (int i = 0; i < opaque(p.broken ? 5 : 4); ++i) x[i] += p.data[1];
  if (thread_index() == 0) p.data[0] = x[opaque(2)];
}
MCLD_KERNEL(kThreads) overflow_of_an_index(MCLD_PARAMETERS(Control) p) {
  const int rows = opaque(p.broken ? 65536 : 16384);
  if (thread_index() == 0) p.data[0] = float(rows * 65536);
}
MCLD_KERNEL(kThreads) shift_of_all_bits(MCLD_PARAMETERS(Control) p) {
  if (thread_index() == 0) p.data[0] = float(1u << opaque(p.broken ? 32 : 31));
}

// --- dependent launches

MCLD_KERNEL(kThreads) memory_touched_before_the_launch_before_ended(MCLD_PARAMETERS(Control) p) {
  if (!p.broken) await_launch_before();
  p.data[thread_index()] += 1;
  if (p.broken) await_launch_before();
}
MCLD_KERNEL(kThreads) launch_before_not_awaited(MCLD_PARAMETERS(Control) p) {
  if (!p.broken || thread_index() != 5) await_launch_before();
}

struct Entry {
  const char* name;
  void (*kernel)(Control);
  int blocks, threads, shared_bytes;
  bool dependent = false;
  int cluster = 1;
};
#define MCLD_ENTRY(kernel) {#kernel, kernel, 1, kThreads, kSharedBytes}
#define MCLD_ENTRY_OF_TWO_BLOCKS(kernel) {#kernel, kernel, 2, kThreads, kSharedBytes}
#define MCLD_ENTRY_DEPENDENT(kernel) {#kernel, kernel, 1, kThreads, kSharedBytes, true}
#define MCLD_ENTRY90(kernel) {#kernel, kernel, 1, 128, Stage64::kSharedBytes}
#define MCLD_ENTRY_CLUSTER(kernel) {#kernel, kernel, 2, 128, SharedStage::kSharedBytes, false, 2}
const Entry kEntries[] = {
    MCLD_ENTRY(missing_barrier), MCLD_ENTRY(shuffle_as_barrier), MCLD_ENTRY(missing_second_barrier),
    MCLD_ENTRY(two_threads_write), MCLD_ENTRY_OF_TWO_BLOCKS(two_blocks_write), MCLD_ENTRY_OF_TWO_BLOCKS(a_block_reads_what_another_writes),
    MCLD_ENTRY(halves_of_a_word), MCLD_ENTRY(stage_overwritten), MCLD_ENTRY(copy_not_waited_for),
    MCLD_ENTRY(copies_of_others), MCLD_ENTRY(source_overwritten), MCLD_ENTRY(ldmatrix_before_barrier),
    MCLD_ENTRY90(barrier_used_before_its_initialisation), MCLD_ENTRY90(load_not_waited_for),
    MCLD_ENTRY90(stage_loaded_before_it_is_free), MCLD_ENTRY90(stage_freed_before_wgmma_is_done),
    MCLD_ENTRY_CLUSTER(cluster_used_before_its_initialisation), MCLD_ENTRY_CLUSTER(stage_of_a_cluster_never_waited_for),
    MCLD_ENTRY_CLUSTER(stage_freed_by_one_block_alone), MCLD_ENTRY_CLUSTER(arrival_at_a_block_that_has_ended),
    MCLD_ENTRY(barrier_not_all_reach), MCLD_ENTRY(lanes_missing_from_a_shuffle),
    MCLD_ENTRY(lanes_in_different_operations), MCLD_ENTRY(copies_in_flight_at_the_end),
    MCLD_ENTRY90(wgmma_in_flight_at_the_end), MCLD_ENTRY90(mbarrier_never_completed), MCLD_ENTRY90(more_arrivals_than_expected),
    MCLD_ENTRY(read_past_the_end), MCLD_ENTRY(write_past_the_end), MCLD_ENTRY(read_before_the_beginning),
    MCLD_ENTRY(copy_past_the_end), MCLD_ENTRY90(load_past_the_end), MCLD_ENTRY(misaligned_vector),
    MCLD_ENTRY(shared_read_past_the_end), MCLD_ENTRY(shared_write_past_the_end), MCLD_ENTRY(index_past_an_array),
    MCLD_ENTRY(overflow_of_an_index), MCLD_ENTRY(shift_of_all_bits),
    MCLD_ENTRY_DEPENDENT(memory_touched_before_the_launch_before_ended), MCLD_ENTRY_DEPENDENT(launch_before_not_awaited),
};

std::string failure;

}  // namespace

// Runs a kernel over data (n,), n at least 4096. Returns null, or what the emulation reports.
extern "C" __attribute__((visibility("default"))) const char* run_control(const char* name, bool broken, float* data, int64_t n) {
  for (const Entry& entry : kEntries) {
    if (entry.name != std::string(name)) continue;
    try {
      const Control p{data, n, broken, hopper::tensor_map(data, Precision::bf16, n / 32, 64, 64)};
      const char* const called = entry.threads == kThreads ? "control" : "control of hopper";
      emulation::start(entry.dependent, entry.cluster, entry.kernel, called, dim3(entry.blocks), entry.threads, entry.shared_bytes, p);
      return nullptr;
    } catch (const std::exception& error) {
      return (failure = error.what()).c_str();
    }
  }
  return "no such kernel";
}

}  // namespace mcld
