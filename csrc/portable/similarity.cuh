// Product 1: similarities of a chunk of anchors with all candidates, fused with temperature, shift, positive and label mask,
// exponential, rounding to the operand type and the partial sums by row and by column. Only the exponentials E are written;
// similarities reach memory only where the contraction is split.
//
// The exponent is in base 2: E = exp2(x - shift), x = A_i . K_j log2(e) / temperature. With a fixed shift E needs nothing
// more. With the online maximum a tile's row is shifted by its own maximum rounded up to an integer, so that `rescale`
// multiplies by an exact power of two and E is rounded once.
#pragma once

#include "tile.cuh"

namespace mcld {

template <Precision kPrecision, int kTile> struct SimilarityTile {
  using T = Operand<kPrecision>;
  using Core = Tile<kPrecision, kTile, Major::contraction, Major::contraction>;
  static constexpr int kThreads = Core::kThreads, kBlocks = Core::kBlocks;
  // Shared memory of the epilogue: E, sums and maxima by warp, keys.
  static constexpr int kStagingPitch = kTile * int(sizeof(T)) + 16;
  static constexpr int kSumsAt = kTile * kStagingPitch;
  static constexpr int kMaximaAt = kSumsAt + Core::kWarpsN * kTile * 4;
  static constexpr int kColumnsAt = kMaximaAt + Core::kWarpsN * kTile * 4;
  static constexpr int kKeysAt = kColumnsAt + Core::kWarpsM * kTile * 4;
  static constexpr int kEpilogueBytes = kKeysAt + 2 * kTile * 4;
  static constexpr int kSharedBytes = Core::kSharedBytes > kEpilogueBytes ? Core::kSharedBytes : kEpilogueBytes;

  MCLD_DEVICE static void run(const Similarity& p, int64_t index) {
    char* shared = shared_memory();
    int64_t tile_row, tile_column;
    tile_at(index, p.padded_rows / kTile, p.exp_pitch / kTile, tile_row, tile_column);
    const int64_t first_row = tile_row * kTile, first_column = tile_column * kTile;
    Core core;
    if (p.splits > 1) {
      core.clear();
      for (int split = 0; split < p.splits; ++split) core.add(part_of(p, index, split));
    } else {
      multiply(p, core, first_row, first_column, 0, p.pitch / Core::kSlice);
    }

    load_keys(p, shared, first_row, first_column);
    mask_and_scale(p, shared, core, first_row, first_column);
    float shift[Core::kM][2];
    if (p.row_maxima) {
      row_maxima(shared, core, shift);
    } else {
#pragma unroll
      for (int mt = 0; mt < Core::kM; ++mt) shift[mt][0] = shift[mt][1] = p.shift;
    }
    exponentials(core, shift);
    stage(shared, core);
    partial_sums(p, shared, core);
    sync_block();
    if (p.exponentials) write(p, shared, first_row, first_column);
    write_sums(p, shared, tile_row, tile_column);
  }

  // Split-k: the sums over one part of the contraction, for few tiles of long rows.
  MCLD_DEVICE static void run_part(const Similarity& p, int64_t index, int split) {
    int64_t tile_row, tile_column;
    tile_at(index, p.padded_rows / kTile, p.exp_pitch / kTile, tile_row, tile_column);
    const int64_t slices = p.pitch / Core::kSlice;
    Core core;
    multiply(p, core, tile_row * kTile, tile_column * kTile, slices * split / p.splits, slices * (split + 1) / p.splits);
    core.save(part_of(p, index, split));
  }

 private:
  MCLD_DEVICE static float* part_of(const Similarity& p, int64_t index, int split) {
    return p.split_products + split * p.padded_rows * p.exp_pitch + index * Core::kElements;
  }

  MCLD_DEVICE static void multiply(const Similarity& p, Core& core, int64_t first_row, int64_t first_column, int64_t first,
                                   int64_t last) {
    const int64_t skipped = first * Core::kSlice;
    core.run(shared_memory(), static_cast<const T*>(p.anchors) + first_row * p.pitch + skipped, p.pitch,
             static_cast<const T*>(p.candidates) + first_column * p.pitch + skipped, p.pitch, last - first);
  }

  // Keys fit 32 bits: they are classes, or -1 - row where the label is ignored.
  MCLD_DEVICE static void load_keys(const Similarity& p, char* shared, int64_t first_row, int64_t first_column) {
    if (!p.anchor_keys) return;
    int* keys = reinterpret_cast<int*>(shared + kKeysAt);
    for (int i = thread_index(); i < kTile; i += kThreads) {
      keys[i] = first_row + i < p.rows ? int(p.anchor_keys[first_row + i]) : 0;
      keys[kTile + i] = first_column + i < p.m ? int(p.candidate_keys[first_column + i]) : 0;
    }
    sync_block();
  }

  // Sums to exponents, -inf for pairs that are not negatives.
  MCLD_DEVICE static void mask_and_scale(const Similarity& p, const char* shared, Core& core, int64_t first_row,
                                         int64_t first_column) {
    const int* keys = reinterpret_cast<const int*>(shared + kKeysAt);
    const int rows = clamp(p.rows - first_row), columns = clamp(p.m - first_column);
    const int positive = clamped_offset(first_row + p.offset - first_column);  // tile column of tile row 0's positive
#pragma unroll
    for (int mt = 0; mt < Core::kM; ++mt)
#pragma unroll
      for (int nt = 0; nt < Core::kN; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = Core::row(mt, i), column = Core::column(nt, i);
          bool masked = row >= rows || column >= columns || column == row + positive;
          if (p.anchor_keys) masked = masked || keys[row] == keys[kTile + column];
          core.sums[mt][nt][i] = masked ? -infinity() : core.sums[mt][nt][i] * p.scale_log2;
        }
  }
  // Positives outside the tile all map to one column past it.
  MCLD_DEVICE static int clamped_offset(int64_t offset) { return offset < -kTile || offset > kTile ? kTile : int(offset); }
  MCLD_DEVICE static int clamp(int64_t size) { return size < 0 ? 0 : size > kTile ? kTile : int(size); }

  // The shift of each row: the tile's maximum, rounded up; 0 without a negative, so that exp2(-inf - shift) is 0.
  MCLD_DEVICE static void row_maxima(char* shared, const Core& core, float (&shift)[Core::kM][2]) {
    float* maxima = reinterpret_cast<float*>(shared + kMaximaAt);
    const int lane = thread_index() % kWarp, warp_column = thread_index() / kWarp / Core::kWarpsM;
#pragma unroll
    for (int mt = 0; mt < Core::kM; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float best = -infinity();
#pragma unroll
        for (int nt = 0; nt < Core::kN; ++nt) {
          best = fmaxf(best, fmaxf(core.sums[mt][nt][half * 2], core.sums[mt][nt][half * 2 + 1]));
        }
        best = fmaxf(best, shuffle_xor(best, 1));
        best = fmaxf(best, shuffle_xor(best, 2));
        if (lane % 4 == 0) maxima[warp_column * kTile + Core::row(mt, half * 2)] = best;
      }
    sync_block();
#pragma unroll
    for (int mt = 0; mt < Core::kM; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float best = -infinity();
#pragma unroll
        for (int warp = 0; warp < Core::kWarpsN; ++warp) best = fmaxf(best, maxima[warp * kTile + Core::row(mt, half * 2)]);
        shift[mt][half] = best == -infinity() ? 0 : ceilf(best);
      }
  }

  MCLD_DEVICE static void exponentials(Core& core, const float (&shift)[Core::kM][2]) {
#pragma unroll
    for (int mt = 0; mt < Core::kM; ++mt)
#pragma unroll
      for (int nt = 0; nt < Core::kN; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i) core.sums[mt][nt][i] = exp2_fast(core.sums[mt][nt][i] - shift[mt][i / 2]);
  }

  MCLD_DEVICE static void stage(char* shared, const Core& core) {
#pragma unroll
    for (int mt = 0; mt < Core::kM; ++mt)
#pragma unroll
      for (int nt = 0; nt < Core::kN; ++nt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float low = core.sums[mt][nt][half * 2], high = core.sums[mt][nt][half * 2 + 1];
          char* at = shared + Core::row(mt, half * 2) * kStagingPitch + Core::column(nt, 0) * int(sizeof(T));
          if constexpr (sizeof(T) == 4) {
            *reinterpret_cast<float2*>(at) = make_float2(low, high);
          } else {
            *reinterpret_cast<uint32_t*>(at) = pack<T>(low, high);
          }
        }
  }

  MCLD_DEVICE static void partial_sums(const Similarity& p, char* shared, const Core& core) {
    float* by_row = reinterpret_cast<float*>(shared + kSumsAt);
    float* by_column = reinterpret_cast<float*>(shared + kColumnsAt);
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
#pragma unroll
    for (int mt = 0; mt < Core::kM; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = 0;
#pragma unroll
        for (int nt = 0; nt < Core::kN; ++nt) sum += core.sums[mt][nt][half * 2] + core.sums[mt][nt][half * 2 + 1];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (lane % 4 == 0) by_row[warp / Core::kWarpsM * kTile + Core::row(mt, half * 2)] = sum;
      }
    if (!p.column_sums) return;
#pragma unroll
    for (int nt = 0; nt < Core::kN; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = 0;
#pragma unroll
        for (int mt = 0; mt < Core::kM; ++mt) sum += core.sums[mt][nt][i] + core.sums[mt][nt][i + 2];
#pragma unroll
        for (int mask = 4; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
        if (lane < 4) by_column[warp % Core::kWarpsM * kTile + Core::column(nt, i)] = sum;
      }
  }

  MCLD_DEVICE static void write(const Similarity& p, const char* shared, int64_t first_row, int64_t first_column) {
    constexpr int kVector = 16 / sizeof(T), kChunks = kTile / kVector;
    T* e = static_cast<T*>(p.exponentials) + first_row * p.exp_pitch + first_column;
#pragma unroll 4
    for (int i = thread_index(); i < kTile * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      *reinterpret_cast<uint4*>(e + row * p.exp_pitch + chunk * kVector) =
          *reinterpret_cast<const uint4*>(shared + row * kStagingPitch + chunk * 16);
    }
  }

  MCLD_DEVICE static void write_sums(const Similarity& p, const char* shared, int64_t tile_row, int64_t tile_column) {
    const float* by_row = reinterpret_cast<const float*>(shared + kSumsAt);
    const float* maxima = reinterpret_cast<const float*>(shared + kMaximaAt);
    const float* by_column = reinterpret_cast<const float*>(shared + kColumnsAt);
    for (int i = thread_index(); i < kTile; i += kThreads) {
      const int64_t row_at = tile_column * p.padded_rows + tile_row * kTile + i;
      float sum = 0, best = -infinity();
#pragma unroll
      for (int warp = 0; warp < Core::kWarpsN; ++warp) {
        sum += by_row[warp * kTile + i];
        if (p.row_maxima) best = fmaxf(best, maxima[warp * kTile + i]);
      }
      p.row_sums[row_at] = sum;
      if (p.row_maxima) p.row_maxima[row_at] = ceilf(best);
      if (p.column_sums) {
        float column = 0;
#pragma unroll
        for (int warp = 0; warp < Core::kWarpsM; ++warp) column += by_column[warp * kTile + i];
        p.column_sums[tile_row * p.exp_pitch + tile_column * kTile + i] = column;
      }
    }
  }
};

template <Precision kPrecision, int kTile>
MCLD_KERNEL(SimilarityTile<kPrecision, kTile>::kThreads, SimilarityTile<kPrecision, kTile>::kBlocks)
similarity_kernel(MCLD_PARAMETERS(Similarity) p) {
  SimilarityTile<kPrecision, kTile>::run(p, block_index());
}

// Block y: a part of the contraction.
template <Precision kPrecision, int kTile>
MCLD_KERNEL(SimilarityTile<kPrecision, kTile>::kThreads, SimilarityTile<kPrecision, kTile>::kBlocks)
similarity_part_kernel(MCLD_PARAMETERS(Similarity) p) {
  SimilarityTile<kPrecision, kTile>::run_part(p, block_index(), block_index_y());
}

}  // namespace mcld
