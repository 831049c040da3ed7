// The last step: g = s G - u P + z (P - M), its pass through the normalisation, the sum over the terms and the cast, in one
// kernel, which holds a row of up to 1024 elements in registers and reads a longer one once more from cache. For a gradient
// whose columns are contiguous (the category term) the dot products come from a kernel of their own and the write goes through
// shared memory. g is never written.
#pragma once

#include "rows.cuh"

namespace mcld {

constexpr int kFinishThreads = 256;
constexpr int kFinishWarps = kFinishThreads / kWarp;
constexpr int kFinishTile = 32;

// A row's pointers and factors; columns of g from it.
template <class T> struct FinishRow {
  const float *product, *mean;
  const T *unit, *partner;
  const float* back = nullptr;  // a second product, with the factor 1
  float s, pull, z;             // pull: of P

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
    if (back) g += back[column];
    if (partner) g += pull * to_float(partner[column]);
    if (mean) g -= z * mean[column];
    return g;
  }
  template <int kWidth> MCLD_DEVICE void load_g(float (&g)[kWidth], int64_t column) const {
    float x[kWidth];
    load(g, product + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) g[i] *= s;
    if (back) {
      load(x, back + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g[i] += x[i];
    }
    if (partner) {
      load(x, partner + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g[i] += pull * x[i];
    }
    if (mean) {
      load(x, mean + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g[i] -= z * x[i];
    }
  }
};

// g . x / x . x: the operand's rounding leaves |x| off 1, and what lies along x must go all the same.
MCLD_DEVICE float finish_quotient(float dot, float square) { return square == 0 ? 0 : dot / square; }

// The same of a row in memory, by kWidth elements a lane: product and operands are zero past d.
template <int kWidth, class T> MCLD_DEVICE float finish_dot(const FinishRow<T>& row, int64_t d) {
  float dot = 0, square = 0;
#pragma unroll 4
  for (int64_t j = thread_index() % kWarp * kWidth; j < d; j += kWarp * kWidth) {
    float g[kWidth], x[kWidth];
    row.load_g(g, j);
    load(x, row.unit + j);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) dot += g[i] * x[i], square += x[i] * x[i];
  }
  dot = warp_sum(dot);
  return finish_quotient(dot, warp_sum(square));
}

// One warp a row. kWidth elements a lane at once, which neighbour in the gradient; d is a multiple of it.
template <class T, class Out, int kWidth> MCLD_DEVICE void finish_short_row(const Finish& p, int64_t index) {
  const FinishRow<T> row(p, index);
  const int d = int(p.d);
  ShortRow<kWidth> g, x, other;
  g.read(row.product, d);
  x.read(row.unit, d);
  g.multiply(row.s, d);
  if (row.partner) {
    other.read(row.partner, d);
    g.add(row.pull, other);
  }
  if (row.mean) {
    other.read(row.mean, d);
    g.add(-row.z, other);
  }
  const float dot = g.dot(x);
  g.add(-finish_quotient(dot, x.dot(x)), x);
  g.multiply(p.inverse[index], d);
  Out* out = static_cast<Out*>(p.out) + index * p.row_stride;
  if (p.add) {
    other.read(out, d);
    g.add(1, other);
  }
  g.write(out, d);
}

// The same for a row of any length, which is read twice, and by single elements for one of any stride.
template <class T, class Out, int kWidth> MCLD_DEVICE void finish_long_row(const Finish& p, int64_t index) {
  const FinishRow<T> row(p, index);
  const float dot = finish_dot<kWidth>(row, p.d), inverse = p.inverse[index];
#pragma unroll 4
  for (int64_t j = thread_index() % kWarp * kWidth; j < p.d; j += kWarp * kWidth) {
    float g[kWidth], x[kWidth];
    row.load_g(g, j);
    load(x, row.unit + j);
    Out* at = static_cast<Out*>(p.out) + index * p.row_stride + j * (kWidth == 1 ? p.column_stride : 1);
    float value[kWidth] = {};
    if (p.add) load(value, at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] += (g[i] - dot * x[i]) * inverse;
    store(at, value);
  }
}

template <class T, class Out, int kWidth> MCLD_KERNEL(kFinishThreads, 2) finish_rows_kernel(MCLD_PARAMETERS(Finish) p) {
  const int64_t index = int64_t(block_index()) * kFinishWarps + thread_index() / kWarp;
  if (index >= p.rows) return;
  if constexpr (kWidth == 1) {
    finish_long_row<T, Out, 1>(p, index);
  } else if (p.d <= kShortRow) {
    finish_short_row<T, Out, kWidth>(p, index);
  } else {
    finish_long_row<T, Out, kWidth>(p, index);
  }
}

template <class T, int kWidth> MCLD_KERNEL(kFinishThreads) finish_dots_kernel(MCLD_PARAMETERS(Finish) p) {
  const int64_t index = int64_t(block_index()) * kFinishWarps + thread_index() / kWarp;
  if (index >= p.rows) return;
  const float dot = finish_dot<kWidth>(FinishRow<T>(p, index), p.d);
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
    Out* at = static_cast<Out*>(p.out) + (first_row + across) * p.row_stride + (first_column + j) * p.column_stride;
    const float value = tile[across * (kFinishTile + 1) + j];
    *at = from_float<Out>(p.add ? to_float(*at) + value : value);
  }
}

// Whether product, operands and means can be taken by vectors of `width` elements.
template <class T> bool finish_reads_vectors(const Finish& p, int width) {
  return takes_vectors<float>(p.product, p.product_pitch, width) && takes_vectors<float>(p.means, p.pitch, width) &&
         takes_vectors<T>(p.unit, p.pitch, width) && takes_vectors<T>(p.partner, p.pitch, width);
}

// The elements to be taken at once: as many as 16 bytes hold of the wider of operand and gradient, half of it, or 1. (Of
// product and means, which are fp32, two accesses may be one step.)
template <class T, class Out> int finish_width(const Finish& p) {
  for (int width = kWidest<T, Out>; width >= 4; width /= 2) {
    if (p.column_stride == 1 && p.d % width == 0 && takes_vectors<Out>(p.out, p.row_stride, width) &&
        finish_reads_vectors<T>(p, width)) {
      return width;
    }
  }
  return 1;
}

}  // namespace mcld
