// Product 1 on Hopper: E = exp2(scale_log2 A K^T - shift) without the positives, in half precision, and its row sums. The
// similarities are not written.
//
// A persistent block of three warpgroups: one loads (TMA, a ring of stages, running ahead across tiles), two multiply
// (wgmma, 64 rows by 256 columns each) and take the exponentials from their accumulators. The arguments are those of the
// portable kernel (launchers.h), within the limits of `similarity_unsupported`.
#pragma once

#include "layout.cuh"
#include "launchers.h"
#include "ptx.cuh"

namespace mcld::hopper {

struct SimilarityParameters {
  TensorMap anchors, candidates;  // boxes of kPanel columns by kRows, kColumns rows
  Similarity p;
  int64_t tile_rows, tile_columns;
  int slices;
};

template <Precision kPrecision> struct SimilarityBlock {
  using T = Operand<kPrecision>;
  static constexpr int kRows = kSimilarityRows, kColumns = kSimilarityColumns;
  static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
  static constexpr int kLoaderRegisters = 40, kConsumerRegisters = 232;
  static_assert(registers_fit(kLoaderRegisters, kConsumerRegisters, kConsumers));
  static constexpr int kStages = 4;
  static constexpr int kABytes = kRows * kPanelRowBytes, kKBytes = kColumns * kPanelRowBytes;
  static constexpr int kStageBytes = kABytes + kKBytes;
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + kPeriodBytes;

  // Shared memory: stages, then a pair of barriers for each.
  struct Ring {
    uint32_t base;
    int stage = 0, phase = 0;

    MCLD_DEVICE uint32_t a() const { return base + stage * kStageBytes; }
    MCLD_DEVICE uint32_t k() const { return a() + kABytes; }
    MCLD_DEVICE uint32_t full(int of) const { return base + kStages * kStageBytes + 16 * of; }
    MCLD_DEVICE uint32_t empty(int of) const { return full(of) + 8; }
    MCLD_DEVICE void advance() {
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
  };

  MCLD_DEVICE static void run(const SimilarityParameters& p) {
    Ring ring{(shared_address(shared_memory()) + kPeriodBytes - 1) / kPeriodBytes * kPeriodBytes};
    if (thread_index() == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(ring.full(s), 1);
        barrier_init(ring.empty(s), 4 * kConsumers);  // one arrival a warp
      }
      barrier_init_fence();
    }
    sync_block();
    const int warpgroup = thread_index() / 128;
    if (warpgroup == 0) {
      fewer_registers<kLoaderRegisters>();
      if (thread_index() == 0) load(p, ring);
    } else {
      more_registers<kConsumerRegisters>();
      consume(p, ring, warpgroup - 1);
    }
  }

 private:
  MCLD_DEVICE static void load(const SimilarityParameters& p, Ring ring) {
    for (int64_t index = block_index(); index < p.tile_rows * p.tile_columns; index += grid_blocks()) {
      int64_t row, column;
      tile_in_bands(index, p.tile_rows, p.tile_columns, row, column);
      for (int slice = 0; slice < p.slices; ++slice, ring.advance()) {
        barrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
        barrier_arrive_expecting(ring.full(ring.stage), kStageBytes);
        tma_load(ring.a(), p.anchors, ring.full(ring.stage), slice * kPanel, int(row * kRows));
        tma_load(ring.k(), p.candidates, ring.full(ring.stage), slice * kPanel, int(column * kColumns));
      }
    }
  }

  MCLD_DEVICE static void consume(const SimilarityParameters& p, Ring ring, int consumer) {
    float sums[kColumns / 2];
    for (int64_t index = block_index(); index < p.tile_rows * p.tile_columns; index += grid_blocks()) {
      multiply(p.slices, ring, consumer, sums);
      int64_t row, column;
      tile_in_bands(index, p.tile_rows, p.tile_columns, row, column);
      epilogue(p.p, sums, row * kRows + consumer * 64, column);
    }
  }

  // sums = A K^T of the warpgroup's 64 rows. A stage goes back to the loader once the products after it are under way.
  MCLD_DEVICE static void multiply(int slices, Ring& ring, int consumer, float (&sums)[kColumns / 2]) {
    const bool signals = thread_index() % 32 == 0;
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
      wgmma_wait<1>();
      pin(sums);
      if (slice > 0 && signals) barrier_arrive(ring.empty(previous));
      previous = ring.stage;
    }
    wgmma_wait<0>();
    if (signals) barrier_arrive(ring.empty(previous));
    pin(sums);
  }

  MCLD_DEVICE static void epilogue(const Similarity& p, float (&sums)[kColumns / 2], int64_t first_row, int64_t tile_column) {
    const int thread = thread_index() % 128, lane = thread % 4;
    const int64_t first_column = tile_column * kColumns;
    const int columns = int(p.m - first_column < kColumns ? p.m - first_column : kColumns);
    const int stored = int(p.exp_pitch - first_column < kColumns ? p.exp_pitch - first_column : kColumns);
    const int64_t row[2] = {first_row + fragment_row(thread, 0), first_row + fragment_row(thread, 1)};
    float total[2] = {0, 0};
    int positive[2], limit[2];  // tile columns: the positive's, if it is here, and the first that does not count
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t of = row[h] + p.offset - first_column;
      positive[h] = of >= 0 && of < kColumns ? int(of) : -1;
      limit[h] = row[h] < p.rows ? columns : 0;
    }
#pragma unroll
    for (int group = 0; group < kColumns / 8; group += 4) {
      uint32_t packed[2][4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float e[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = fragment_column(thread, group + j) + c;
            const float x = exp2_fast(sums[4 * (group + j) + 2 * h + c] * p.scale_log2 - p.shift);
            e[c] = column >= limit[h] || column == positive[h] ? 0.0f : x;
          }
          total[h] += e[0] + e[1];
          packed[h][j] = pack<T>(e[0], e[1]);
        }
      if (p.exponentials) {
        // A thread's pairs lie in four groups of 8 columns; exchanged, it holds one group whole, 16 bytes of its row.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          transpose_quad(packed[h], lane);
          const int column = 8 * (group + lane);
          if (column < stored) {
            T* out = static_cast<T*>(p.exponentials) + row[h] * p.exp_pitch + first_column + column;
            *reinterpret_cast<uint4*>(out) = uint4{packed[h][0], packed[h][1], packed[h][2], packed[h][3]};
          }
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      total[h] += shuffle_xor(total[h], 1);
      total[h] += shuffle_xor(total[h], 2);
      if (lane == 0) p.row_sums[tile_column * p.padded_rows + row[h]] = total[h];
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

}  // namespace mcld::hopper
