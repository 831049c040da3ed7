// Flash on Hopper for a contraction of at most 256: sums over the negatives of E and of E K, with
// E = exp2(scale_log2 A K^T - shift) in registers only.
//
// Keys and values are the same matrix, so one shared tile of candidates serves both products: along its rows for the
// similarities, across them for E K. With a fixed shift nothing is ever rescaled, and sums over splits of the candidates
// simply add. One warpgroup loads (TMA, a ring of stages), two hold 64 anchors each: their similarities with the next tile
// and the product with the current one are issued together, and the exponentials of the next are taken while that product
// runs, into a second buffer: no product is waited for before the one after it is under way.
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

// kWidth: the columns of the operands that may not be zeros, a multiple of 8; the pitch is the next multiple of a panel.
template <Precision kPrecision, int kWidth> struct FlashBlock {
  static constexpr int kPanels = (kWidth + kPanel - 1) / kPanel;
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
    const int64_t first_row = block_index() * int64_t(kRows) + consumer * 64;
    float values[kValues];                                // similarities
    uint32_t even[kValues / 2], odd[kValues / 2];         // exponentials as the operand of the second product, by turns
    float sums[kWidth / 2] = {};
    float total[2] = {0, 0};
    pin(sums);  // zeros before the first wgmma_fence, not between it and the wgmma

    barrier_wait(ring.anchors(), 0);
    barrier_wait(ring.full(ring.stage), ring.phase);
    wgmma_fence();
    similarities(ring, consumer, values);
    wgmma_commit();
    wgmma_wait<0>();
    pin(values);
    exponentials(p, first_row, begin, values, even, total);
    int64_t tile = begin + 1;
    for (; tile + 1 < end; tile += 2) {
      step(p, ring, consumer, first_row, tile, tile > begin + 1, values, even, odd, sums, total);
      step(p, ring, consumer, first_row, tile + 1, true, values, odd, even, sums, total);
    }
    if (tile < end) {
      step(p, ring, consumer, first_row, tile, tile > begin + 1, values, even, odd, sums, total);
      last(ring, odd, sums);
    } else {
      last(ring, even, sums);
    }
    write(p, first_row, sums, total);
  }

  // The similarities with `tile`, beside the product with the tile before it, and then, while that product runs, the
  // exponentials of the new similarities. The product before is waited for by the way: its stage goes back to the loader,
  // and its operand is overwritten.
  MCLD_DEVICE static void step(const Flash& p, Ring& ring, int consumer, int64_t first_row, int64_t tile, bool releases,
                               float (&values)[kValues], const uint32_t (&current)[kValues / 2], uint32_t (&next)[kValues / 2],
                               float (&sums)[kWidth / 2], float (&total)[2]) {
    const int of_current = ring.stage;
    ring.advance();
    barrier_wait(ring.full(ring.stage), ring.phase);
    wgmma_fence();
    similarities(ring, consumer, values);
    wgmma_commit();
    accumulate(ring, of_current, current, sums);
    wgmma_commit();
    wgmma_wait<1>();
    pin(values);
    if (releases && thread_index() % 32 == 0) barrier_arrive(ring.empty((of_current + kStages - 1) % kStages));
    exponentials(p, first_row, tile, values, next, total);
  }

  MCLD_DEVICE static void last(const Ring& ring, const uint32_t (&packed)[kValues / 2], float (&sums)[kWidth / 2]) {
    wgmma_fence();
    accumulate(ring, ring.stage, packed, sums);
    wgmma_commit();
    wgmma_wait<0>();
    pin(sums);
  }

  // values = A K^T: contraction along the rows of the candidates' panels.
  MCLD_DEVICE static void similarities(const Ring& ring, int consumer, float (&values)[kValues]) {
    constexpr int kSteps = kPanel / kDepth;  // of a panel
#pragma unroll
    for (int step = 0; step < (kWidth + kDepth - 1) / kDepth; ++step) {
      const uint32_t a = ring.a(step / kSteps) + consumer * 64 * kPanelRowBytes, k = ring.k(ring.stage, step / kSteps);
      wgmma_shared(PrecisionTag<kPrecision>(), values, along_rows(a, step % kSteps), along_rows(k, step % kSteps), step > 0);
    }
  }

  // sums += E K: the same panels, contraction across their rows.
  MCLD_DEVICE static void accumulate(const Ring& ring, int stage, const uint32_t (&packed)[kValues / 2], float (&sums)[kWidth / 2]) {
#pragma unroll
    for (int step = 0; step < kColumns / kDepth; ++step) {
      wgmma_registers(PrecisionTag<kPrecision>(), sums, &packed[4 * step], across_rows(ring.k(stage, 0), step, kKPanelBytes), true);
    }
  }

  // E of a tile, packed as the operand of the second product: the accumulators' layout of 16 columns is the operand's, pairs
  // of both rows of the first 8 columns, then of the others.
  MCLD_DEVICE static void exponentials(const Flash& p, int64_t first_row, int64_t tile, float (&values)[kValues],
                                       uint32_t (&packed)[kValues / 2], float (&total)[2]) {
    mask(p, first_row, tile, values);
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      const float low = exp2_fast(values[2 * i] * p.scale_log2 - p.shift);
      const float high = exp2_fast(values[2 * i + 1] * p.scale_log2 - p.shift);
      total[i % 2] += low;
      total[i % 2] += high;
      packed[i] = pack<Operand<kPrecision>>(low, high);
    }
    pin(packed);
  }

  // -inf for pairs that are not negatives. Most tiles have none; that is one for all threads of a warpgroup.
  MCLD_DEVICE static void mask(const Flash& p, int64_t first_row, int64_t tile, float (&values)[kValues]) {
    const int64_t first_column = tile * kColumns;
    const int64_t positive = first_row + p.offset - first_column;  // tile column of the first row's positive
    const bool meets = positive > -64 && positive < kColumns;
    if (!meets && first_column + kColumns <= p.m) return;
    const int at = meets ? int(positive) : kColumns;
    const int limit = int(p.m - first_column < kColumns ? p.m - first_column : kColumns);
    const int thread = thread_index() % 128;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int column = fragment_column(thread, i / 4) + i % 2;
      if (column >= limit || column == fragment_row(thread, i / 2 % 2) + at) values[i] = -infinity();
    }
  }

  MCLD_DEVICE static void write(const Flash& p, int64_t first_row, const float (&sums)[kWidth / 2], float (&total)[2]) {
    const int thread = thread_index() % 128;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first_row + fragment_row(thread, h), at = block_index_y() * p.padded_rows + row;
      total[h] += shuffle_xor(total[h], 1);
      total[h] += shuffle_xor(total[h], 2);
      if (row >= p.padded_rows) continue;
      if (thread % 4 == 0) p.row_sums[at] = total[h];
#pragma unroll
      for (int j = 0; j < kPanels * kPanel / 8; ++j) {
        float* out = p.product + at * p.pitch + fragment_column(thread, j);
        const bool computed = 8 * j < kWidth;
        *reinterpret_cast<float2*>(out) =
            computed ? float2{sums[4 * j + 2 * h], sums[4 * j + 2 * h + 1]} : float2{0, 0};
      }
    }
  }
};

template <Precision kPrecision, int kWidth>
MCLD_SM90_KERNEL((FlashBlock<kPrecision, kWidth>::kThreads)) hopper_flash_kernel(MCLD_PARAMETERS(FlashParameters) p) {
  FlashBlock<kPrecision, kWidth>::run(p);
}

}  // namespace mcld::hopper
