// The last step: g = s G - u P + z (P - M), its pass through the normalisation, the sum over the terms and the cast, in one
// kernel that reads the product once more from cache. For a gradient whose columns are contiguous (the category term) the dot
// products come from a kernel of their own and the write goes through shared memory. g is never written.
#pragma once

#include "numerics.cuh"
#include "sums.cuh"

namespace mcld {

constexpr int kFinishThreads = 256;
constexpr int kFinishWarps = kFinishThreads / kWarp;
constexpr int kFinishTile = 32;

// A row's pointers and factors; columns of g from it.
template <class T> struct FinishRow {
  const float *product, *mean;
  const T *unit, *partner;
  float s, pull, z;  // pull: of P

  MCLD_DEVICE FinishRow(const Finish& p, int64_t row) : FinishRow(p, row, p.s[row], p.u[row], p.z ? p.z[row] : 0) {}
  MCLD_DEVICE FinishRow(const Finish& p, int64_t row, float s, float u, float z) : s(s), pull(z - u), z(z) {
    const int64_t other = row + p.shift;
    const bool paired = other >= 0 && other < p.partner_rows;
    product = p.product + row * p.product_pitch;
    unit = static_cast<const T*>(p.unit) + row * p.pitch;
    partner = paired ? static_cast<const T*>(p.partner) + other * p.pitch : nullptr;
    // A row without a class has no mean, and z = 0.
    mean = p.z && p.means && p.rank[row] >= 0 ? p.means + p.rank[row] * p.pitch : nullptr;
  }
  MCLD_DEVICE float at(int64_t column) const {
    float g = s * product[column];
    if (partner) g += pull * to_float(partner[column]);
    if (mean) g -= z * mean[column];
    return g;
  }
};

// g . x / x . x: the operand's rounding leaves |x| off 1, and what lies along x must go all the same.
template <class T> MCLD_DEVICE float finish_dot(const FinishRow<T>& row, int64_t d) {
  float dot = 0, square = 0;
#pragma unroll 4
  for (int64_t j = thread_index() % kWarp; j < d; j += kWarp) {
    const float x = to_float(row.unit[j]);
    dot += row.at(j) * x;
    square += x * x;
  }
  dot = warp_sum(dot);
  square = warp_sum(square);
  return square == 0 ? 0 : dot / square;
}

template <class Out> MCLD_DEVICE void finish_write(const Finish& p, int64_t row, int64_t column, float value) {
  Out* at = static_cast<Out*>(p.out) + row * p.row_stride + column * p.column_stride;
  *at = from_float<Out>(p.add ? to_float(*at) + value : value);
}

// One warp a row.
template <class T, class Out> MCLD_KERNEL(kFinishThreads) finish_rows_kernel(MCLD_PARAMETERS(Finish) p) {
  const int64_t index = int64_t(block_index()) * kFinishWarps + thread_index() / kWarp;
  if (index >= p.rows) return;
  const FinishRow<T> row(p, index);
  const float dot = finish_dot(row, p.d), inverse = p.inverse[index];
#pragma unroll 4
  for (int64_t j = thread_index() % kWarp; j < p.d; j += kWarp) {
    finish_write<Out>(p, index, j, (row.at(j) - dot * to_float(row.unit[j])) * inverse);
  }
}

template <class T> MCLD_KERNEL(kFinishThreads) finish_dots_kernel(MCLD_PARAMETERS(Finish) p) {
  const int64_t index = int64_t(block_index()) * kFinishWarps + thread_index() / kWarp;
  if (index >= p.rows) return;
  const float dot = finish_dot(FinishRow<T>(p, index), p.d);
  if (thread_index() % kWarp == 0) p.dots[index] = dot;
}

// Block x: 32 columns of the product; block y: 32 rows.
template <class T, class Out> MCLD_KERNEL(kFinishThreads) finish_transposed_kernel(MCLD_PARAMETERS(Finish) p) {
  float* tile = reinterpret_cast<float*>(shared_memory());  // (32, 33)
  const int64_t first_row = int64_t(block_index_y()) * kFinishTile, first_column = int64_t(block_index()) * kFinishTile;
  const int across = thread_index() % kFinishTile, down = thread_index() / kFinishTile;
  for (int i = down; i < kFinishTile; i += kFinishWarps) {
    const int64_t index = first_row + i, j = first_column + across;
    if (index >= p.rows || j >= p.d) continue;
    const FinishRow<T> row(p, index);
    tile[i * (kFinishTile + 1) + across] = (row.at(j) - p.dots[index] * to_float(row.unit[j])) * p.inverse[index];
  }
  sync_block();
  for (int j = down; j < kFinishTile; j += kFinishWarps) {
    if (first_row + across >= p.rows || first_column + j >= p.d) continue;
    finish_write<Out>(p, first_row + across, first_column + j, tile[across * (kFinishTile + 1) + j]);
  }
}

}  // namespace mcld
