// The mainloop of one tile, on tensor cores: operands stream through a ring of shared-memory stages by asynchronous copies,
// accumulators stay in registers. Product 1, product 2 and its transpose differ in the memory order of their operands.
//
// Shared tiles are rows of 16-byte chunks, chunk c of row r stored at c ^ f(r): every fragment load then touches all banks.
#pragma once

#include "vectors.cuh"

namespace mcld {

// The memory order of an operand's tile: rows along the contraction, or along the result's rows or columns.
enum class Major { contraction, result };

constexpr int kStages = 3;
constexpr int kSliceBytes = 128;  // of the contraction, a stage

// The tensor-core product of one warp's fragments: rows 16 mt, columns 8 nt.
template <Precision kPrecision> struct Mma {
  static constexpr int kDepth = sizeof(Operand<kPrecision>) == 2 ? 16 : 8;

  MCLD_DEVICE static void run(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kPrecision == Precision::bf16) {
      mma_bf16(d, a, b0, b1);
    } else if constexpr (kPrecision == Precision::fp16) {
      mma_fp16(d, a, b0, b1);
    } else if constexpr (kPrecision == Precision::tf32) {
      const uint32_t rounded[4] = {round_tf32(as_float(a[0])), round_tf32(as_float(a[1])), round_tf32(as_float(a[2])),
                                   round_tf32(as_float(a[3]))};
      mma_tf32(d, rounded, round_tf32(as_float(b0)), round_tf32(as_float(b1)));
    } else {
      // x = high + low with 11 bits each; low * low is below fp32's last bit.
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) split(a[i], high[i], low[i]);
      uint32_t high0, low0, high1, low1;
      split(b0, high0, low0);
      split(b1, high1, low1);
      // Tensor cores truncate the accumulator at each instruction (Fasi et al., PeerJ Computer Science 7:e330, 2021), a bias
      // that grows with the contraction. So the products of a step are summed from zero, the small ones first, and the steps
      // by fp32 additions, which round to nearest (after Ootomo and Yokota, IJHPCA 36(4), 2022).
      float step[4] = {0, 0, 0, 0};
      mma_tf32(step, low, high0, high1);
      mma_tf32(step, high, low0, low1);
      mma_tf32(step, high, high0, high1);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] += step[i];
    }
  }

  MCLD_DEVICE static void split(uint32_t x, uint32_t& high, uint32_t& low) {
    high = round_tf32(as_float(x));
    low = round_tf32(as_float(x) - as_float(high));
  }
};

// Byte offset of element (row, column) of a swizzled shared tile whose rows have kPitch bytes.
template <class T, int kPitch, int kShift> MCLD_DEVICE int swizzled(int row, int column) {
  constexpr int kVector = 16 / sizeof(T);
  return row * kPitch + (((column / kVector) ^ ((row << kShift) & 7)) << 4) + (column % kVector) * int(sizeof(T));
}

// One operand's stage: kSize rows (or columns) of the result by a slice of the contraction.
template <Precision kPrecision, int kSize, Major kMajor, int kThreads> struct Stage {
  using T = Operand<kPrecision>;
  static constexpr int kSlice = kSliceBytes / sizeof(T);
  static constexpr bool kAlong = kMajor == Major::contraction;
  static constexpr int kRows = kAlong ? kSize : kSlice;
  static constexpr int kPitch = kAlong ? kSliceBytes : kSize * int(sizeof(T));
  static constexpr int kBytes = kSize * kSliceBytes;
  // A fragment of 32-bit elements reads 4 rows by 8 columns where the contraction runs down the rows: f must then move by 2.
  static constexpr int kShift = !kAlong && sizeof(T) == 4 ? 1 : 0;

  // Begins the copy of slice `slice`; source points at the tile's first row or column.
  MCLD_DEVICE static void fill(char* stage, const T* source, int64_t pitch, int64_t slice) {
    constexpr int kChunks = kPitch / 16, kVector = 16 / sizeof(T);
    source += slice * kSlice * (kAlong ? 1 : pitch);
#pragma unroll
    for (int i = thread_index(); i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      copy_async(stage + swizzled<T, kPitch, kShift>(row, chunk * kVector), source + row * pitch + chunk * kVector);
    }
  }

  MCLD_DEVICE static uint32_t word(const char* stage, int index, int k) {
    const int offset = swizzled<T, kPitch, kShift>(kAlong ? index : k, kAlong ? k : index);
    return *reinterpret_cast<const uint32_t*>(stage + offset);
  }

  // The left operand's fragment: rows `first`.. + 16, contraction k.. + depth.
  MCLD_DEVICE static void left(uint32_t (&a)[4], const char* stage, int first, int k) {
    const int lane = thread_index() % kWarp;
    if constexpr (sizeof(T) == 4) {
      const int g = lane / 4, t = lane % 4;
      a[0] = word(stage, first + g, k + t);
      a[1] = word(stage, first + g + 8, k + t);
      a[2] = word(stage, first + g, k + t + 4);
      a[3] = word(stage, first + g + 8, k + t + 4);
    } else if constexpr (kAlong) {
      ldmatrix(a, stage + swizzled<T, kPitch, kShift>(first + lane % 16, k + lane / 16 * 8));
    } else {
      ldmatrix_transposed(a, stage + swizzled<T, kPitch, kShift>(k + lane % 8 + lane / 16 * 8, first + lane / 8 % 2 * 8));
    }
  }

  // The right operand's fragments for two tiles of 8 columns: b[0], b[1] and b[2], b[3].
  MCLD_DEVICE static void right(uint32_t (&b)[4], const char* stage, int first, int k) {
    const int lane = thread_index() % kWarp;
    if constexpr (sizeof(T) == 4) {
      const int g = lane / 4, t = lane % 4;
      b[0] = word(stage, first + g, k + t);
      b[1] = word(stage, first + g, k + t + 4);
      b[2] = word(stage, first + g + 8, k + t);
      b[3] = word(stage, first + g + 8, k + t + 4);
    } else if constexpr (kAlong) {
      ldmatrix(b, stage + swizzled<T, kPitch, kShift>(first + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
    } else {
      ldmatrix_transposed(b, stage + swizzled<T, kPitch, kShift>(k + lane % 16, first + lane / 16 * 8));
    }
  }
};

// A tile of kTile x kTile results: 128 with 2 x 4 warps of 64 x 32, or 64 with 2 x 2 warps of 32 x 32.
template <Precision kPrecision, int kTile, Major kLeft, Major kRight> struct Tile {
  using T = Operand<kPrecision>;
  static constexpr int kWarpsM = 2, kWarpsN = kTile / 32;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kWarpRows = kTile / kWarpsM, kWarpColumns = kTile / kWarpsN;
  static constexpr int kM = kWarpRows / 16, kN = kWarpColumns / 8;  // fragments of a warp
  using Left = Stage<kPrecision, kTile, kLeft, kThreads>;
  using Right = Stage<kPrecision, kTile, kRight, kThreads>;
  static constexpr int kStageBytes = Left::kBytes + Right::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kSlice = Left::kSlice;
  // Blocks to a multiprocessor: two keep the tensor cores busy through an epilogue. 32-bit operands need the registers.
  static constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;

  float sums[kM][kN][4];

  // Row and column within the tile of sums[mt][nt][i].
  MCLD_DEVICE static int row(int mt, int i) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    return warp % kWarpsM * kWarpRows + mt * 16 + lane / 4 + i / 2 * 8;
  }
  MCLD_DEVICE static int column(int nt, int i) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    return warp / kWarpsM * kWarpColumns + nt * 8 + lane % 4 * 2 + i % 2;
  }

  // The thread's sums, to and from a workspace of kTile x kTile floats a tile, in the order of the registers.
  static constexpr int64_t kElements = int64_t(kTile) * kTile;
  MCLD_DEVICE void save(float* workspace) const {
#pragma unroll
    for (int mt = 0; mt < kM; ++mt)
#pragma unroll
      for (int nt = 0; nt < kN; ++nt) store(workspace + ((mt * kN + nt) * kThreads + thread_index()) * 4, sums[mt][nt]);
  }
  MCLD_DEVICE void add(const float* workspace) {
#pragma unroll
    for (int mt = 0; mt < kM; ++mt)
#pragma unroll
      for (int nt = 0; nt < kN; ++nt) {
        float part[4];
        load(part, workspace + ((mt * kN + nt) * kThreads + thread_index()) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[mt][nt][i] += part[i];
      }
  }
  MCLD_DEVICE void clear() {
#pragma unroll
    for (int mt = 0; mt < kM; ++mt)
#pragma unroll
      for (int nt = 0; nt < kN; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[mt][nt][i] = 0;
  }

  // Multiplies `slices` slices. Ends with shared memory free for other use.
  MCLD_DEVICE void run(char* shared, const T* a, int64_t pitch_a, const T* b, int64_t pitch_b, int64_t slices) {
    clear();
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < slices) fill(shared + stage * kStageBytes, a, pitch_a, b, pitch_b, stage);
      commit_async();
    }
    int reading = 0, writing = kStages - 1;
    for (int64_t slice = 0; slice < slices; ++slice) {
      wait_async<kStages - 2>();
      sync_block();  // the slice is visible to all threads, and the stage that is filled next has no reader
      if (slice + kStages - 1 < slices) fill(shared + writing * kStageBytes, a, pitch_a, b, pitch_b, slice + kStages - 1);
      commit_async();
      multiply(shared + reading * kStageBytes);
      reading = reading + 1 == kStages ? 0 : reading + 1;
      writing = writing + 1 == kStages ? 0 : writing + 1;
    }
    wait_async<0>();
    sync_block();
  }

 private:
  MCLD_DEVICE static void fill(char* stage, const T* a, int64_t pitch_a, const T* b, int64_t pitch_b, int64_t slice) {
    Left::fill(stage, a, pitch_a, slice);
    Right::fill(stage + Left::kBytes, b, pitch_b, slice);
  }

  MCLD_DEVICE void multiply(const char* stage) {
    const int warp = thread_index() / kWarp;
    const int first_row = warp % kWarpsM * kWarpRows, first_column = warp / kWarpsM * kWarpColumns;
#pragma unroll
    for (int k = 0; k < kSlice; k += Mma<kPrecision>::kDepth) {
      uint32_t a[kM][4], b[kN / 2][4];
#pragma unroll
      for (int mt = 0; mt < kM; ++mt) Left::left(a[mt], stage, first_row + mt * 16, k);
#pragma unroll
      for (int pair = 0; pair < kN / 2; ++pair) Right::right(b[pair], stage + Left::kBytes, first_column + pair * 16, k);
#pragma unroll
      for (int mt = 0; mt < kM; ++mt)
#pragma unroll
        for (int nt = 0; nt < kN; ++nt) {
          Mma<kPrecision>::run(sums[mt][nt], a[mt], b[nt / 2][nt % 2 * 2], b[nt / 2][nt % 2 * 2 + 1]);
        }
    }
  }
};

// Tile `index` of rows x columns tiles, in bands of 8 rows of tiles, so that tiles in flight together share their operands in L2.
MCLD_DEVICE void tile_at(int64_t index, int64_t rows, int64_t columns, int64_t& row, int64_t& column) {
  constexpr int kBand = 8;
  const int64_t band = index / (kBand * columns), within = index % (kBand * columns);
  const int64_t height = rows - band * kBand < kBand ? rows - band * kBand : kBand;
  row = band * kBand + within % height;
  column = within / height;
}

}  // namespace mcld
