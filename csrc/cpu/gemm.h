// Matrix products of fp32 whose sums do not depend on the number of threads. For low_latency.cpp, as vectors.h.
#pragma once

#include "cpu/vectors.h"

namespace mcld::cpu::MCLD_CPU_ISA {
namespace {

constexpr int64_t kDepthOfSum = 128;  // products added in one go, for the rounding error and for the first cache

#if MCLD_VECTOR_BYTES == 64
constexpr int kTileRows = 6, kTileVectors = 4;  // 24 of 32 registers hold sums
#else
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16
#endif

template <int kRows, int kVectors>
inline void gemm_tile(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_pitch, float* out,
                      int64_t out_pitch, int64_t depth, bool add) {
  Vector sums[kRows][kVectors] = {};
  // What later tiles read of the left operand: 8 rows of the next one, or of rows that lie next to one another those
  // three lines of the cache further on. The prefetchers of the hardware see no short runs that lie far apart.
  const bool by_columns = a_row == 1;
  const float* ahead = by_columns ? a + 48 : a + kTileRows * a_row;
  for (int64_t k = 0; k < depth; ++k, a += a_depth, b += b_pitch) {
    __builtin_prefetch(ahead);
    ahead += by_columns ? a_depth : k % 8 == 7 ? 8 * a_depth - 7 * a_row : a_row;
    Vector right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) sums[i][v] += a[i * a_row] * right[v];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + i * out_pitch + v * kLanes;
      store(to, add ? load(to) + sums[i][v] : sums[i][v]);
    }
  }
}

constexpr int64_t kPanel = kTileVectors * kLanes;
static_assert(Layout::kLargestPanel % kPanel == 0, "the workspace has room for whole panels");

// The rows that no whole tile takes, kRows or fewer.
template <int kRows, int kVectors>
inline void gemm_tail(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_pitch, float* out,
                      int64_t out_pitch, int64_t rows, int64_t depth, bool add) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return gemm_tile<kRows, kVectors>(a, a_row, a_depth, b, b_pitch, out, out_pitch, depth, add);
    gemm_tail<kRows - 1, kVectors>(a, a_row, a_depth, b, b_pitch, out, out_pitch, rows, depth, add);
  }
}

template <int kVectors>
inline void gemm_panel(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_pitch, float* out,
                       int64_t out_pitch, int64_t rows, int64_t depth, bool add) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    gemm_tile<kTileRows, kVectors>(a + i * a_row, a_row, a_depth, b, b_pitch, out + i * out_pitch, out_pitch, depth, add);
  }
  gemm_tail<kTileRows - 1, kVectors>(a + i * a_row, a_row, a_depth, b, b_pitch, out + i * out_pitch, out_pitch, rows - i,
                                     depth, add);
}

// The vectors that no whole panel takes, kVectors or fewer.
template <int kVectors>
inline void gemm_edge(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_pitch, float* out,
                      int64_t out_pitch, int64_t rows, int64_t vectors, int64_t depth, bool add) {
  if constexpr (kVectors > 0) {
    if (vectors == kVectors) return gemm_panel<kVectors>(a, a_row, a_depth, b, b_pitch, out, out_pitch, rows, depth, add);
    gemm_edge<kVectors - 1>(a, a_row, a_depth, b, b_pitch, out, out_pitch, rows, vectors, depth, add);
  }
}

// A matrix (depth, columns) by panels of kPanel columns, `panel` floats apart, whose rows are `pitch` apart. Row-major:
// panel = kPanel. Where a panel is contiguous, it takes no more of the first cache and of its pages than it must.
struct Panels {
  const float* data;
  int64_t pitch, panel;
};

inline Panels row_major(const float* data, int64_t pitch) { return {data, pitch, kPanel}; }

// out (rows, columns) = a b, or with `add` out + a b: element (i, k) of a is a[i a_row + k a_depth]; columns is padded.
void gemm_rows(const float* a, int64_t a_row, int64_t a_depth, Panels b, float* out, int64_t out_pitch, int64_t rows,
               int64_t columns, int64_t depth, bool add = false) {
  for (int64_t k = 0; k == 0 || k < depth; k += kDepthOfSum) {
    const int64_t part = smaller(kDepthOfSum, depth - k);
    const float *left = a + k * a_depth, *right = b.data + k * b.pitch;
    int64_t j = 0;
    for (; j + kPanel <= columns; j += kPanel, right += b.panel) {
      gemm_panel<kTileVectors>(left, a_row, a_depth, right, b.pitch, out + j, out_pitch, rows, part,
                               add || k > 0);
    }
    gemm_edge<kTileVectors - 1>(left, a_row, a_depth, right, b.pitch, out + j, out_pitch, rows, (columns - j) / kLanes, part,
                                add || k > 0);
  }
}

constexpr int64_t kProductsOfElement = 16;  // multiply-adds that take the time of an element of the other steps

void gemm(int threads, const float* a, int64_t a_row, int64_t a_depth, Panels b, float* out, int64_t out_pitch,
          int64_t rows, int64_t columns, int64_t depth) {
  for_slices(threads, rows, kTileRows, rows * columns * depth / kProductsOfElement, [=](int64_t first, int64_t last) {
    if (first >= last) return;
    gemm_rows(a + first * a_row, a_row, a_depth, b, out + first * out_pitch, out_pitch, last - first, columns, depth);
  });
}

}  // namespace
}  // namespace mcld::cpu::MCLD_CPU_ISA
