// Flash: similarities, exponentials and their product with the candidates in one pass over the candidates. Neither similarities
// nor exponentials are written to memory. K = V, so one shared tile serves both products, and the sums stay in registers. A
// fixed shift needs no rescaling; with the online maximum, sums are rescaled by exact powers of two. Candidates may be split
// over blocks, whose sums combine_splits adds in order.
#pragma once

#include "tile.cuh"

namespace mcld {

// 64 anchors, 16 to each of 4 warps, against tiles of 64 candidates, or 32 where the rows of 512 bytes need the registers.
template <Precision kPrecision, int kRowBytes> struct FlashTile {
  using T = Operand<kPrecision>;
  static constexpr int kRows = kFlashRows, kColumns = kRowBytes == 512 ? 32 : 64, kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kWidth = kRowBytes / int(sizeof(T));
  static constexpr int kAnchorBytes = kRows * kRowBytes, kTileBytes = kColumns * kRowBytes;
  static constexpr int kSharedBytes = kAnchorBytes + 2 * kTileBytes;
  static constexpr int kN = kColumns / 8, kD = kWidth / 8, kDepth = Mma<kPrecision>::kDepth;

  template <bool kOnline> MCLD_DEVICE static void run(const Flash& p, int64_t row_tile, int64_t split) {
    char* anchors = shared_memory();
    char* candidates = anchors + kAnchorBytes;
    const int64_t tiles = (p.m + kColumns - 1) / kColumns;
    const int64_t first = tiles * split / p.splits, last = tiles * (split + 1) / p.splits;
    const int64_t first_row = row_tile * kRows;
    load<kRows>(anchors, static_cast<const T*>(p.anchors), p.pitch, first_row);
    if (first < last) load<kColumns>(candidates, static_cast<const T*>(p.candidates), p.pitch, first * kColumns);
    commit_async();

    float sums[kD][4];  // of E K
    clear(sums);
    float total[2] = {0, 0}, maximum[2] = {-infinity(), -infinity()};
    for (int64_t tile = first; tile < last; ++tile) {
      wait_async<0>();
      sync_block();  // the tile is visible to all threads, and the one that is filled next has no reader
      char* const here = candidates + (tile - first) % 2 * kTileBytes;
      if (tile + 1 < last) {
        load<kColumns>(candidates + (tile + 1 - first) % 2 * kTileBytes, static_cast<const T*>(p.candidates), p.pitch, (tile + 1) * kColumns);
      }
      commit_async();
      float e[kN][4];
      similarities(e, anchors, here);
      mask_and_scale(p, e, first_row, tile * kColumns);
      float shift[2] = {p.shift, p.shift};
      if constexpr (kOnline) raise(e, sums, total, maximum, shift);
      exponentials(p, e, shift, tile * kColumns);
#pragma unroll
      for (int nt = 0; nt < kN; ++nt) {
        total[0] += e[nt][0] + e[nt][1];
        total[1] += e[nt][2] + e[nt][3];
      }
      if (p.product) add_product(sums, e, here);
    }
    wait_async<0>();
    write(p, sums, total, maximum, first_row, split, kOnline);
  }

 private:
  MCLD_DEVICE static int lane() { return thread_index() % kWarp; }
  // The thread's first row within the tile; its other one is 8 below.
  MCLD_DEVICE static int row() { return thread_index() / kWarp * 16 + lane() / 4; }
  MCLD_DEVICE static int offset(int row, int column) { return swizzled<T, kRowBytes, 0>(row, column); }
  // A place by the offset of the lane's own row and column and how far from there: rows in eights, columns in steps that share
  // no bit with the lane's own. One exclusive or then moves along the swizzled row.
  MCLD_DEVICE static const char* place(const char* tile, int lane_offset, int rows, int columns) {
    return tile + rows * kRowBytes + (lane_offset ^ columns * int(sizeof(T)));
  }
  MCLD_DEVICE static uint32_t word(const char* tile, int lane_offset, int rows, int columns) {
    return *reinterpret_cast<const uint32_t*>(place(tile, lane_offset, rows, columns));
  }

  template <int kCount> MCLD_DEVICE static void clear(float (&x)[kCount][4]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[j][i] = 0;
  }

  template <int kCount> MCLD_DEVICE static void load(char* tile, const T* source, int64_t pitch, int64_t first_row) {
    constexpr int kChunks = kRowBytes / 16, kVector = 16 / int(sizeof(T));
    source += first_row * pitch;
#pragma unroll
    for (int i = thread_index(); i < kCount * kChunks; i += kThreads) {
      const int row = i / kChunks, column = i % kChunks * kVector;
      copy_async(tile + offset(row, column), source + row * pitch + column);
    }
  }

  MCLD_DEVICE static void similarities(float (&e)[kN][4], const char* anchors, const char* candidates) {
    constexpr bool kNarrow = sizeof(T) == 2;
    const int first = thread_index() / kWarp * 16, g = lane() / 4, t = lane() % 4;
    const int left = opaque(kNarrow ? offset(first + lane() % 16, lane() / 16 * 8) : offset(first + g, t));
    const int right = opaque(kNarrow ? offset(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2 * 8) : offset(g, t));
    clear(e);
#pragma unroll Mma<kPrecision>::kUnroll
    for (int k = 0; k < kWidth; k += kDepth) {
      uint32_t a[4];
      if constexpr (kNarrow) {
        ldmatrix(a, place(anchors, left, 0, k));
      } else {
        a[0] = word(anchors, left, 0, k), a[1] = word(anchors, left, 8, k);
        a[2] = word(anchors, left, 0, k + 4), a[3] = word(anchors, left, 8, k + 4);
      }
#pragma unroll
      for (int nt = 0; nt < kN; nt += 2) {
        uint32_t b[4];
        if constexpr (kNarrow) {
          ldmatrix(b, place(candidates, right, nt * 8, k));
        } else {
          b[0] = word(candidates, right, nt * 8, k), b[1] = word(candidates, right, nt * 8, k + 4);
          b[2] = word(candidates, right, nt * 8 + 8, k), b[3] = word(candidates, right, nt * 8 + 8, k + 4);
        }
        Mma<kPrecision>::run(e[nt], a, b[0], b[1]);
        Mma<kPrecision>::run(e[nt + 1], a, b[2], b[3]);
      }
    }
  }

  // Exponents, -inf for pairs that are not negatives. Only tiles at an edge, with positives or under a mask test their indices.
  MCLD_DEVICE static void mask_and_scale(const Flash& p, float (&e)[kN][4], int64_t first_row, int64_t first_column) {
#pragma unroll
    for (int nt = 0; nt < kN; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) e[nt][i] *= p.scale_log2;
    const int64_t positive = first_row + p.offset - first_column;  // tile column of tile row 0's positive
    const bool meets = positive > -kRows && positive < kColumns;
    if (!meets && !p.anchor_keys && first_column + kColumns <= p.m) return;
    const int at = meets ? int(positive) : 2 * kColumns;
    const int columns = first_column + kColumns <= p.m ? kColumns : int(p.m - first_column);
    int64_t key[2] = {0, 0};
    if (p.anchor_keys) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t index = first_row + row() + half * 8;
        if (index < p.n) key[half] = p.anchor_keys[index];
      }
    }
#pragma unroll
    for (int nt = 0; nt < kN; ++nt)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = nt * 8 + lane() % 4 * 2 + j;
        const bool inside = column < columns;
        const int64_t other = p.anchor_keys && inside ? p.candidate_keys[first_column + column] : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool equal = p.anchor_keys && key[half] == other;
          if (!inside || equal || column == row() + half * 8 + at) e[nt][half * 2 + j] = -infinity();
        }
      }
  }

  // Raises the running maxima, which are integers, and rescales the sums to them.
  MCLD_DEVICE static void raise(const float (&e)[kN][4], float (&sums)[kD][4], float (&total)[2], float (&maximum)[2],
                                float (&shift)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float best = -infinity();
#pragma unroll
      for (int nt = 0; nt < kN; ++nt) best = fmaxf(best, fmaxf(e[nt][half * 2], e[nt][half * 2 + 1]));
      best = fmaxf(best, shuffle_xor(best, 1));
      best = fmaxf(best, shuffle_xor(best, 2));
      best = fmaxf(maximum[half], ceilf(best));
      const float factor = maximum[half] == best ? 1 : exp2f(maximum[half] - best);
      maximum[half] = best;
      shift[half] = best == -infinity() ? 0 : best;
      total[half] *= factor;
#pragma unroll
      for (int dt = 0; dt < kD; ++dt) {
        sums[dt][half * 2] *= factor;
        sums[dt][half * 2 + 1] *= factor;
      }
    }
  }

  MCLD_DEVICE static void exponentials(const Flash& p, float (&e)[kN][4], const float (&shift)[2], int64_t first_column) {
    if (p.candidate_factor) {
#pragma unroll
      for (int nt = 0; nt < kN; ++nt)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int64_t column = first_column + nt * 8 + lane() % 4 * 2 + j;
          const float factor = column < p.m ? p.candidate_factor[column] : 0;
          float own = p.shift;
          if (p.candidate_shift) own = column < p.m && p.candidate_shift[column] > -infinity() ? p.candidate_shift[column] : 0;
          e[nt][j] = exp2_fast(e[nt][j] - own) * factor;
          e[nt][j + 2] = exp2_fast(e[nt][j + 2] - own) * factor;
        }
      return;
    }
#pragma unroll
    for (int nt = 0; nt < kN; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) e[nt][i] = exp2_fast(e[nt][i] - shift[i / 2]);
  }

  // sums += E K. The accumulators of E are, lane by lane, the left fragments of this product. For tf32 the contraction runs in
  // another order: a lane holds columns 2 t and 2 t + 1 where the fragment has t and t + 4, so K's rows are taken likewise.
  MCLD_DEVICE static void add_product(float (&sums)[kD][4], const float (&e)[kN][4], const char* candidates) {
    if constexpr (sizeof(T) == 2) {
      const int right = opaque(offset(lane() % 16, lane() / 16 * 8));
#pragma unroll
      for (int nt = 0; nt < kN; nt += 2) {
        const uint32_t a[4] = {pack<T>(e[nt][0], e[nt][1]), pack<T>(e[nt][2], e[nt][3]), pack<T>(e[nt + 1][0], e[nt + 1][1]),
                               pack<T>(e[nt + 1][2], e[nt + 1][3])};
#pragma unroll
        for (int dt = 0; dt < kD; dt += 2) {
          uint32_t b[4];
          ldmatrix_transposed(b, place(candidates, right, nt * 8, dt * 8));
          Mma<kPrecision>::run(sums[dt], a, b[0], b[1]);
          Mma<kPrecision>::run(sums[dt + 1], a, b[2], b[3]);
        }
      }
    } else {
      const int even = opaque(offset(lane() % 4 * 2, lane() / 4)), odd = opaque(offset(lane() % 4 * 2 + 1, lane() / 4));
      // Of accurate sums, 32 candidates are summed from zero, for 32 columns of the product at a time: registers for more are
      // not there.
      constexpr bool kFromZero = Mma<kPrecision>::kSumsBySteps;
      constexpr int kSteps = kFromZero ? 4 : kN, kColumnsOfSlice = kFromZero ? 4 : kD;
#pragma unroll
      for (int first = 0; first < kN; first += kSteps)
#pragma unroll
        for (int first_dt = 0; first_dt < kD; first_dt += kColumnsOfSlice) {
          float slice[kColumnsOfSlice][4];
          if constexpr (kFromZero) clear(slice);
#pragma unroll
          for (int nt = first; nt < first + kSteps; ++nt) {
            const uint32_t a[4] = {as_bits(e[nt][0]), as_bits(e[nt][2]), as_bits(e[nt][1]), as_bits(e[nt][3])};
#pragma unroll
            for (int j = 0; j < kColumnsOfSlice; ++j) {
              const int dt = first_dt + j;
              const uint32_t b0 = word(candidates, even, nt * 8, dt * 8), b1 = word(candidates, odd, nt * 8, dt * 8);
              Mma<kPrecision>::accumulate(kFromZero ? slice[j] : sums[dt], a, b0, b1);
            }
          }
          if constexpr (kFromZero) {
#pragma unroll
            for (int j = 0; j < kColumnsOfSlice; ++j)
#pragma unroll
              for (int i = 0; i < 4; ++i) sums[first_dt + j][i] += slice[j][i];
          }
        }
    }
  }

  MCLD_DEVICE static void write(const Flash& p, const float (&sums)[kD][4], float (&total)[2], const float (&maximum)[2],
                                int64_t first_row, int64_t split, bool online) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += shuffle_xor(total[half], 1);
      total[half] += shuffle_xor(total[half], 2);
      const int64_t at = split * p.padded_rows + first_row + row() + half * 8;
      if (lane() % 4 == 0) {
        p.row_sums[at] = total[half];
        if (online) p.row_maxima[at] = maximum[half];
      }
      if (!p.product) continue;
      float* out = p.product + at * p.pitch + lane() % 4 * 2;
#pragma unroll
      for (int dt = 0; dt < kD; ++dt) {
        *reinterpret_cast<float2*>(out + dt * 8) = make_float2(sums[dt][half * 2], sums[dt][half * 2 + 1]);
      }
    }
  }
};

template <Precision kPrecision, int kRowBytes, bool kOnline>
MCLD_KERNEL(FlashTile<kPrecision, kRowBytes>::kThreads, 2) flash_kernel(MCLD_PARAMETERS(Flash) p) {
  FlashTile<kPrecision, kRowBytes>::template run<kOnline>(p, block_index(), block_index_y());
}

}  // namespace mcld
