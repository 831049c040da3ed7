// Product 1 on Hopper: E = exp2(scale_log2 A K^T - shift) without the positives, in half precision, and its row sums. The
// similarities are not written.
//
// A persistent block of three warpgroups: one loads (TMA, a ring of stages, running ahead across tiles), two multiply
// (wgmma, 64 rows by 256 columns each) and take the exponentials from their accumulators. The arguments are those of the
// portable kernel (launchers.h), within the limits of `similarity_unsupported`.
//
// Or a cluster of two blocks takes two tiles with the same candidates, one below the other: each block loads its anchors and
// half of the candidates, which goes to both (multicast). A stage is free once the warps of both blocks have released it.
#pragma once

#include "layout.cuh"
#include "launchers.h"
#include "ptx.cuh"

namespace mcld::hopper {

struct SimilarityParameters {
  TensorMap anchors, candidates;  // boxes of kPanel columns by kRows, kBoxRows rows
  Similarity p;
  int tile_rows, tile_columns, slices;
  int cluster_rows;  // rows of clusters: tile_rows over kCluster, rounded up
  int skew;  // slices that the second multiplying warpgroup begins behind the first
};

template <Precision kPrecision, int kCluster = 1> struct SimilarityBlock {
  using T = Operand<kPrecision>;
  static constexpr int kRows = kSimilarityRows, kColumns = kSimilarityColumns;
  static constexpr int kBoxRows = kColumns / kCluster;  // candidates that a block of the cluster loads
  static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
  static constexpr int kLoaderRegisters = 40, kConsumerRegisters = 232;
  static_assert(registers_fit(kLoaderRegisters, kConsumerRegisters, kConsumers));
  static constexpr int kStages = 4;
  static constexpr int kABytes = kRows * kPanelRowBytes, kKBytes = kColumns * kPanelRowBytes;
  static constexpr int kStageBytes = kABytes + kKBytes;
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + 16 + kPeriodBytes;

  // Shared memory: stages, then a pair of barriers for each, then the barrier on which the second warpgroup begins.
  struct Ring {
    uint32_t base;
    int stage = 0, phase = 0;

    MCLD_DEVICE uint32_t a() const { return base + stage * kStageBytes; }
    MCLD_DEVICE uint32_t k() const { return a() + kABytes; }
    MCLD_DEVICE uint32_t full(int of) const { return base + kStages * kStageBytes + 16 * of; }
    MCLD_DEVICE uint32_t empty(int of) const { return full(of) + 8; }
    MCLD_DEVICE uint32_t second() const { return full(kStages); }
    MCLD_DEVICE void advance() {
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
  };

  MCLD_DEVICE static void run(const SimilarityParameters& p) {
    Ring ring{(shared_address(shared_memory()) + kPeriodBytes - 1) / kPeriodBytes * kPeriodBytes};
    if (thread_index() == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(ring.full(s), 1);
        barrier_init(ring.empty(s), 4 * kConsumers * kCluster);  // one arrival a warp
      }
      barrier_init(ring.second(), 4);
      barrier_init_fence();
    }
    sync_blocks();
    const int warpgroup = thread_index() / 128;
    if (warpgroup == 0) {
      fewer_registers<kLoaderRegisters>();
      if (thread_index() == 0) load(p, ring);
    } else {
      more_registers<kConsumerRegisters>();
      consume(p, ring, warpgroup - 1);
    }
    // The other block arrives at this one's barriers until it has released its last stage.
    if (kCluster > 1) sync_cluster();
  }

 private:
  MCLD_DEVICE static void sync_blocks() {
    if (kCluster > 1) {
      sync_cluster();
    } else {
      sync_block();
    }
  }

  // The tiles that a cluster takes, by index, and of these the running block's.
  MCLD_DEVICE static int first_tile() { return block_index() / kCluster; }
  MCLD_DEVICE static int next_tile(int index) { return index + grid_blocks() / kCluster; }
  MCLD_DEVICE static int tiles(const SimilarityParameters& p) { return p.cluster_rows * p.tile_columns; }
  MCLD_DEVICE static int rank() { return block_index() % kCluster; }
  MCLD_DEVICE static void place(const SimilarityParameters& p, int index, int& row, int& column) {
    tile_in_bands(index, p.cluster_rows, p.tile_columns, row, column);
    row = row * kCluster + rank();
  }

  MCLD_DEVICE static void load(const SimilarityParameters& p, Ring ring) {
    for (int index = first_tile(); index < tiles(p); index = next_tile(index)) {
      int row, column;
      place(p, index, row, column);
      for (int slice = 0; slice < p.slices; ++slice, ring.advance()) {
        const uint32_t full = ring.full(ring.stage);
        barrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
        // The other block's half may come before this: the phase ends with the arrival here, whatever has come.
        barrier_arrive_expecting(full, kStageBytes);
        tma_load(ring.a(), p.anchors, full, slice * kPanel, row * kRows);
        if (kCluster > 1) {
          const int begin = rank() * kBoxRows;
          tma_load_multicast(ring.k() + begin * kPanelRowBytes, p.candidates, full, slice * kPanel, column * kColumns + begin,
                             (1 << kCluster) - 1);
        } else {
          tma_load(ring.k(), p.candidates, full, slice * kPanel, column * kColumns);
        }
      }
    }
  }

  MCLD_DEVICE static void consume(const SimilarityParameters& p, Ring ring, int consumer) {
    float sums[kColumns / 2];
    if (p.skew > 0 && consumer == 1) barrier_wait(ring.second(), 0);
    bool first = p.skew > 0 && consumer == 0;  // that lets the second warpgroup begin
    for (int index = first_tile(); index < tiles(p); index = next_tile(index)) {
      int row, column;
      place(p, index, row, column);
      multiply(p.slices, ring, consumer, sums, first ? p.skew : 0);
      first = false;
      if (kCluster > 1 && row >= p.tile_rows) continue;  // below the last row of tiles
      epilogue(p.p, sums, row * int64_t(kRows) + consumer * 64, column);
    }
  }

  // sums = A K^T of the warpgroup's 64 rows. A stage goes back to the loader once the products after it are under way. With
  // a skew, the second warpgroup begins once so many slices are under way.
  MCLD_DEVICE static void multiply(int slices, Ring& ring, int consumer, float (&sums)[kColumns / 2], int skew) {
    const int lane = thread_index() % 32;
    int previous = 0;
    for (int slice = 0; slice < slices; ++slice, ring.advance()) {
      barrier_wait(ring.full(ring.stage), ring.phase);
      pin(sums);
      wgmma_fence();
      const uint32_t a = ring.a() + consumer * 64 * kPanelRowBytes;
#pragma unroll
      for (int step = 0; step < kPanel / kDepth; ++step) {
        wgmma_shared(PrecisionTag<kPrecision>(), sums, along_rows(a, step), along_rows(ring.k(), step), slice + step > 0);
      }
      wgmma_commit();
      if (slice + 1 == skew && lane == 0) barrier_arrive(ring.second());
      wgmma_wait<1>();
      pin(sums);
      if (slice > 0) release(ring.empty(previous), lane);
      previous = ring.stage;
    }
    wgmma_wait<0>();
    release(ring.empty(previous), lane);
    pin(sums);
  }

  // A warp's arrival at a stage's barrier, in each block that loads into the stage.
  MCLD_DEVICE static void release(uint32_t empty, int lane) {
    if (lane >= kCluster) return;
    if (kCluster > 1) {
      barrier_arrive_at(empty, lane);
    } else {
      barrier_arrive(empty);
    }
  }

  // Of the warpgroup's rows, of which row 0 is the chunk's first_row.
  MCLD_DEVICE static void epilogue(const Similarity& p, float (&sums)[kColumns / 2], int64_t first_row, int64_t tile_column) {
    const int thread = thread_index() % 128, lane = thread % 4;
    const int64_t first_column = tile_column * kColumns;
    mask(p, sums, first_row, first_column);
    // E ends with a tile or in the middle of one.
    const bool stored[2] = {p.exponentials != nullptr, p.exponentials && p.exp_pitch - first_column > kColumns / 2};
    const int64_t row = first_row + fragment_row(thread, 0);
    T* const out = static_cast<T*>(p.exponentials) + row * p.exp_pitch + first_column + 8 * lane;
    float total[2] = {0, 0};
#pragma unroll
    for (int group = 0; group < kColumns / 8; group += 4) {
      uint32_t packed[2][4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float* const x = sums + 4 * (group + j) + 2 * h;
          const float low = exp2_fast(x[0] * p.scale_log2 - p.shift), high = exp2_fast(x[1] * p.scale_log2 - p.shift);
          total[h] += low + high;
          packed[h][j] = pack<T>(low, high);
        }
      if (!stored[group / (kColumns / 16)]) continue;
      // A thread's pairs lie in four groups of 8 columns; exchanged, it holds one group whole, 16 bytes of its row.
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        transpose_quad(packed[h], lane);
        write_vector(out + 8 * h * p.exp_pitch + 8 * group, uint4{packed[h][0], packed[h][1], packed[h][2], packed[h][3]});
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] += shuffle_xor(total[h], 1);
      total[h] += shuffle_xor(total[h], 2);
      if (lane == 0) p.row_sums[tile_column * p.padded_rows + row + 8 * h] = total[h];
    }
  }

  // -inf for pairs that are not negatives. Most tiles have none; that is one for all threads of a warpgroup.
  MCLD_DEVICE static void mask(const Similarity& p, float (&sums)[kColumns / 2], int64_t first_row, int64_t first_column) {
    const int64_t positive = first_row + p.offset - first_column;  // tile column of the first row's positive
    const bool meets = positive > -64 && positive < kColumns;
    if (!meets && first_row + 64 <= p.rows && first_column + kColumns <= p.m) return;
    const int at = meets ? int(positive) : kColumns;
    const int columns = int(p.m - first_column < kColumns ? p.m - first_column : kColumns);
    const int thread = thread_index() % 128;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = fragment_row(thread, i / 2 % 2), column = fragment_column(thread, i / 4) + i % 2;
      if (first_row + row >= p.rows || column >= columns || column == row + at) sums[i] = -infinity();
    }
  }

  // Word i of lane t becomes word t of lane i, among the four lanes of a quad.
  MCLD_DEVICE static void transpose_quad(uint32_t (&word)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = lane & bit;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        const uint32_t received = shuffle_xor_bits(upper ? word[i] : word[i + bit], bit);
        if (upper) {
          word[i] = received;
        } else {
          word[i + bit] = received;
        }
      }
    }
  }
};

template <Precision kPrecision>
MCLD_SM90_KERNEL(SimilarityBlock<kPrecision>::kThreads) hopper_similarity_kernel(MCLD_PARAMETERS(SimilarityParameters) p) {
  SimilarityBlock<kPrecision>::run(p);
}

constexpr int kSimilarityCluster = 2;
template <Precision kPrecision>
MCLD_SM90_CLUSTER_KERNEL((SimilarityBlock<kPrecision, kSimilarityCluster>::kThreads), kSimilarityCluster)
hopper_similarity_cluster_kernel(MCLD_PARAMETERS(SimilarityParameters) p) {
  SimilarityBlock<kPrecision, kSimilarityCluster>::run(p);
}

}  // namespace mcld::hopper
