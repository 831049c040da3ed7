// Flash on Hopper for a contraction of at most 256: sums over the negatives of E and of E K, with
// E = exp2(scale_log2 A K^T - shift) in registers only.
//
// Keys and values are the same matrix, so one shared tile of candidates serves both products: along its rows for the
// similarities, across them for E K. With a fixed shift nothing is ever rescaled, and sums over splits of the candidates
// simply add. One warpgroup loads (TMA, a ring of stages), two hold 64 anchors each: their similarities with the next tile
// are under way while the product with the current one is. The exponentials are written beside that product; nvcc 13.0 moves
// three quarters of them behind its end.
#pragma once

#include "layout.cuh"
#include "launchers.h"
#include "ptx.cuh"

namespace mcld::hopper {

struct FlashParameters {
  TensorMap anchors, candidates;  // boxes of kPanel columns by kRows, kColumns rows
  Flash p;
  int64_t tiles;  // of candidates
};

// kPanels: the pitch in panels, 1 to hopper::kFlashPanels.
template <Precision kPrecision, int kPanels> struct FlashBlock {
  static constexpr int kRows = kFlashRows, kColumns = flash_columns(kPanels);
  static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
  static constexpr int kLoaderRegisters = 24, kConsumerRegisters = 240;
  static_assert(registers_fit(kLoaderRegisters, kConsumerRegisters, kConsumers));
  static constexpr int kStages = 4;
  static constexpr int kAPanelBytes = kRows * kPanelRowBytes, kKPanelBytes = kColumns * kPanelRowBytes;
  static constexpr int kABytes = kPanels * kAPanelBytes, kStageBytes = kPanels * kKPanelBytes;
  static constexpr int kSharedBytes = kABytes + kStages * (kStageBytes + 16) + 16 + kPeriodBytes;
  static constexpr int kValues = kColumns / 2;  // similarities a thread holds

  // Shared memory: anchors, stages of candidates, a pair of barriers for each stage, the anchors' barrier.
  struct Ring {
    uint32_t base;
    int stage = 0, phase = 0;

    MCLD_DEVICE uint32_t a(int panel) const { return base + panel * kAPanelBytes; }
    MCLD_DEVICE uint32_t k(int of, int panel) const { return base + kABytes + of * kStageBytes + panel * kKPanelBytes; }
    MCLD_DEVICE uint32_t full(int of) const { return base + kABytes + kStages * kStageBytes + 16 * of; }
    MCLD_DEVICE uint32_t empty(int of) const { return full(of) + 8; }
    MCLD_DEVICE uint32_t anchors() const { return full(kStages); }
    MCLD_DEVICE void advance() {
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
  };

  MCLD_DEVICE static void run(const FlashParameters& p) {
    Ring ring{(shared_address(shared_memory()) + kPeriodBytes - 1) / kPeriodBytes * kPeriodBytes};
    if (thread_index() == 0) {
      barrier_init(ring.anchors(), 1);
      for (int s = 0; s < kStages; ++s) {
        barrier_init(ring.full(s), 1);
        barrier_init(ring.empty(s), 4 * kConsumers);  // one arrival a warp
      }
      barrier_init_fence();
    }
    sync_block();
    const int64_t begin = split_begin(block_index_y(), p.p.splits, p.tiles);
    const int64_t end = split_begin(block_index_y() + 1, p.p.splits, p.tiles);
    const int warpgroup = thread_index() / 128;
    if (warpgroup == 0) {
      fewer_registers<kLoaderRegisters>();
      if (thread_index() == 0) load(p, ring, begin, end);
    } else {
      more_registers<kConsumerRegisters>();
      consume(p.p, ring, warpgroup - 1, begin, end);
    }
  }

 private:
  MCLD_DEVICE static void load(const FlashParameters& p, Ring ring, int64_t begin, int64_t end) {
    barrier_arrive_expecting(ring.anchors(), kABytes);
    for (int panel = 0; panel < kPanels; ++panel) {
      tma_load(ring.a(panel), p.anchors, ring.anchors(), panel * kPanel, block_index() * kRows);
    }
    for (int64_t tile = begin; tile < end; ++tile, ring.advance()) {
      barrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
      barrier_arrive_expecting(ring.full(ring.stage), kStageBytes);
      for (int panel = 0; panel < kPanels; ++panel) {
        tma_load(ring.k(ring.stage, panel), p.candidates, ring.full(ring.stage), panel * kPanel, int(tile * kColumns));
      }
    }
  }

  MCLD_DEVICE static void consume(const Flash& p, Ring ring, int consumer, int64_t begin, int64_t end) {
    const int thread = thread_index() % 128;
    const bool signals = thread % 32 == 0;
    const int64_t first_row = block_index() * int64_t(kRows) + consumer * 64;
    const int64_t row[2] = {first_row + fragment_row(thread, 0), first_row + fragment_row(thread, 1)};
    float values[kValues];              // similarities, then exponentials
    uint32_t packed[kValues / 2];       // the exponentials as the operand of the second product
    float sums[kPanels][32];            // (64, 64) by panel
    float total[2] = {0, 0};

    barrier_wait(ring.anchors(), 0);
    barrier_wait(ring.full(ring.stage), ring.phase);
    wgmma_fence();
    similarities(ring, consumer, values);
    wgmma_commit();
    wgmma_wait<0>();
    pin(values);
    exponentials(p, row, begin, values, total);
    pack_all(values, packed);
    for (int64_t tile = begin + 1; tile < end; ++tile) {
      const int current = ring.stage;
      ring.advance();
      barrier_wait(ring.full(ring.stage), ring.phase);
      wgmma_fence();
      similarities(ring, consumer, values);
      wgmma_commit();
      accumulate(ring, current, packed, sums, tile > begin + 1);
      wgmma_commit();
      wgmma_wait<1>();
      pin(values);
      exponentials(p, row, tile, values, total);
      wgmma_wait<0>();
      for (int panel = 0; panel < kPanels; ++panel) pin(sums[panel]);
      if (signals) barrier_arrive(ring.empty(current));
      pack_all(values, packed);
    }
    wgmma_fence();
    accumulate(ring, ring.stage, packed, sums, end - begin > 1);
    wgmma_commit();
    wgmma_wait<0>();
    for (int panel = 0; panel < kPanels; ++panel) pin(sums[panel]);
    write(p, row, sums, total);
  }

  // values = A K^T: contraction along the rows of the candidates' panels.
  MCLD_DEVICE static void similarities(const Ring& ring, int consumer, float (&values)[kValues]) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const uint32_t a = ring.a(panel) + consumer * 64 * kPanelRowBytes, k = ring.k(ring.stage, panel);
#pragma unroll
      for (int step = 0; step < kPanel / kDepth; ++step) {
        wgmma_shared(PrecisionTag<kPrecision>(), values, along_rows(a, step), along_rows(k, step), panel + step > 0);
      }
    }
  }

  // sums += E K: the same panels, contraction across their rows.
  MCLD_DEVICE static void accumulate(const Ring& ring, int stage, const uint32_t (&packed)[kValues / 2],
                                     float (&sums)[kPanels][32], bool add) {
#pragma unroll
    for (int step = 0; step < kColumns / kDepth; ++step) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        wgmma_registers(PrecisionTag<kPrecision>(), sums[panel], &packed[4 * step], across_rows(ring.k(stage, panel), step),
                        add || step > 0);
      }
    }
  }

  MCLD_DEVICE static void exponentials(const Flash& p, const int64_t (&row)[2], int64_t tile, float (&values)[kValues],
                                       float (&total)[2]) {
    const int64_t first_column = tile * kColumns;
    const int limit = int(p.m - first_column < kColumns ? p.m - first_column : kColumns);
    int positive[2];  // tile column of the positive, if it is here
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t of = row[h] + p.offset - first_column;
      positive[h] = of >= 0 && of < kColumns ? int(of) : -1;
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int h = i / 2 % 2, column = fragment_column(thread_index() % 128, i / 4) + i % 2;
      const float e = exp2_fast(values[i] * p.scale_log2 - p.shift);
      values[i] = column >= limit || column == positive[h] ? 0.0f : e;
      total[h] += values[i];
    }
  }

  // The accumulators' layout of 16 columns is the operand's: pairs of both rows of the first 8 columns, then of the others.
  MCLD_DEVICE static void pack_all(const float (&values)[kValues], uint32_t (&packed)[kValues / 2]) {
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) packed[i] = pack<Operand<kPrecision>>(values[2 * i], values[2 * i + 1]);
    pin(packed);
  }

  MCLD_DEVICE static void write(const Flash& p, const int64_t (&row)[2], const float (&sums)[kPanels][32], float (&total)[2]) {
    const int thread = thread_index() % 128;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = block_index_y() * p.padded_rows + row[h];
      total[h] += shuffle_xor(total[h], 1);
      total[h] += shuffle_xor(total[h], 2);
      if (row[h] >= p.padded_rows) continue;
      if (thread % 4 == 0) p.row_sums[at] = total[h];
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float* out = p.product + at * p.pitch + panel * kPanel + fragment_column(thread, j);
          *reinterpret_cast<float2*>(out) = float2{sums[panel][4 * j + 2 * h], sums[panel][4 * j + 2 * h + 1]};
        }
    }
  }
};

template <Precision kPrecision, int kPanels>
MCLD_SM90_KERNEL((FlashBlock<kPrecision, kPanels>::kThreads)) hopper_flash_kernel(MCLD_PARAMETERS(FlashParameters) p) {
  FlashBlock<kPrecision, kPanels>::run(p);
}

}  // namespace mcld::hopper
