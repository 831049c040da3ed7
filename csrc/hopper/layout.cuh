// Layouts of the shared tiles that TMA writes and wgmma reads, and the order in which blocks take tiles. Pure arithmetic, the
// same on a GPU and on a CPU.
#pragma once

#include <cstdint>

#include "constants.h"

namespace mcld::hopper {

#ifdef __CUDACC__
#define MCLD_EVERYWHERE __host__ __device__ __forceinline__
#else
#define MCLD_EVERYWHERE inline
#endif

// A panel is a shared tile kPanel elements (128 bytes) wide with any number of rows: one TMA box with 128-byte swizzle. Chunk c
// (16 bytes) of row r lies at 128 r + 16 (c ^ r % 8), so that 8 rows of a column meet 8 different banks. Panels start at
// multiples of 1024 bytes, the period of the swizzle.
constexpr int kPanelRowBytes = 2 * kPanel;
constexpr int kPeriodBytes = 1024;
constexpr int kDepth = 16;  // elements of the contraction in one wgmma

// wgmma's description of a shared operand: address, strides in units of 16 bytes, swizzle of 128 bytes. The leading stride
// is the one between panels of an operand whose rows are the contraction; the others are no wider than a panel, and 1 stands
// there as CuTe's make_gmma_desc sets it.
MCLD_EVERYWHERE uint64_t descriptor(uint32_t address, int leading) {
  constexpr uint64_t kStride = uint64_t(kPeriodBytes >> 4) << 32;  // between groups of 8 panel rows
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | kStride | uint64_t(leading) << 16 | ((address & 0x3ffff) >> 4);
}

// Contraction along the panel's rows: step k of 16 elements begins 32 k bytes into the first row. The hardware swizzles the
// sum of address and offset, so stepping inside the swizzled row is right.
MCLD_EVERYWHERE uint64_t along_rows(uint32_t panel, int step) { return descriptor(panel + step * kDepth * 2, 1); }
// Contraction across the rows of panels that lie panel_bytes apart: step k begins at row 16 k.
MCLD_EVERYWHERE uint64_t across_rows(uint32_t panel, int step, int panel_bytes) {
  return descriptor(panel + step * kDepth * kPanelRowBytes, panel_bytes >> 4);
}

// Row of accumulator half h (0, 1) of a thread of the warpgroup, and column of its pair j.
MCLD_EVERYWHERE int fragment_row(int thread, int h) { return thread / 32 * 16 + thread % 32 / 4 + 8 * h; }
MCLD_EVERYWHERE int fragment_column(int thread, int j) { return 8 * j + 2 * (thread % 4); }

// True if the registers fit: at entry all threads of a block have the same share of 65536, in eights, and the consumers take
// over what the loading warpgroup gives back. With more, setmaxnreg.inc would wait for ever.
constexpr bool registers_fit(int loader, int consumer, int consumers) {
  const int warpgroups = 1 + consumers, entry = 65536 / (128 * warpgroups) / 8 * 8;
  return loader <= entry && entry <= consumer && loader + consumers * consumer <= warpgroups * entry;
}

// The order of tiles: bands of kBand tile rows; in a band down the rows first, so that blocks that run together share their
// candidates while the band's anchors stay in L2.
MCLD_EVERYWHERE void tile_in_bands(int index, int tile_rows, int tile_columns, int& row, int& column) {
  constexpr int kBand = 16;
  const int first = index / (kBand * tile_columns) * kBand;
  const int rows = tile_rows - first < kBand ? tile_rows - first : kBand;
  const int within = index - first * tile_columns;
  row = first + within % rows;
  column = within / rows;
}

// The tiles of split s of `splits`: from split_begin(s) to split_begin(s + 1). None is empty if splits <= tiles.
MCLD_EVERYWHERE int64_t split_begin(int64_t split, int64_t splits, int64_t tiles) { return split * tiles / splits; }

}  // namespace mcld::hopper
