// The gradient by the logits: g = product_coef G - partner_coef P + class_mean_coef (P - M), the backward of the
// normalization, the sum over the terms and the cast, in one kernel. It holds a row of up to 1024 elements in registers and
// reads a longer one a second time from cache. For a gradient whose columns are contiguous (the category term) the projections
// come from a kernel of their own and the write goes through shared memory. g is never written.
#pragma once

#include "rows.cuh"

namespace mcld {

constexpr int kGradThreads = 256;
constexpr int kGradWarps = kGradThreads / kWarp;
constexpr int kGradTile = 32;

// A row's pointers and coefficients, and columns of g from them.
template <class T> struct GradRow {
  const float *product, *mean;
  const T *unit, *partner;
  const float* second_product = nullptr;           // with the coefficient 1
  float product_coef, pair_coef, class_mean_coef;  // pair_coef: of P

  MCLD_DEVICE GradRow(const GradEpilogue& p, int64_t row)
      : GradRow(p, row, p.product_coef[row], p.partner_coef[row], p.class_mean_coef ? p.class_mean_coef[row] : 0) {}
  MCLD_DEVICE GradRow(const GradEpilogue& p, int64_t row, float product_coef, float partner_coef, float class_mean_coef)
      : product_coef(product_coef), pair_coef(class_mean_coef - partner_coef), class_mean_coef(class_mean_coef) {
    const int64_t other = row + p.offset;
    const bool paired = other >= 0 && other < p.partner_rows;
    product = p.product + row * p.product_pitch;
    unit = static_cast<const T*>(p.unit) + row * p.pitch;
    partner = paired ? static_cast<const T*>(p.partner) + other * p.pitch : nullptr;
    // A row without a class has no mean, and a class_mean_coef of 0.
    const bool has_mean = p.class_mean_coef && p.class_means && p.class_index[row] >= 0;
    mean = has_mean ? p.class_means + p.class_index[row] * p.pitch : nullptr;
  }
  MCLD_DEVICE float at(int64_t column) const {
    float g = product_coef * product[column];
    if (second_product) g += second_product[column];
    if (partner) g += pair_coef * to_float(partner[column]);
    if (mean) g -= class_mean_coef * mean[column];
    return g;
  }
  template <int kWidth> MCLD_DEVICE void load_g(float (&g)[kWidth], int64_t column) const {
    float x[kWidth];
    load(g, product + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) g[i] *= product_coef;
    if (second_product) {
      load(x, second_product + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g[i] += x[i];
    }
    if (partner) {
      load(x, partner + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g[i] += pair_coef * x[i];
    }
    if (mean) {
      load(x, mean + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g[i] -= class_mean_coef * x[i];
    }
  }
};

// g . x / x . x; 0 for a zero row. Dividing removes the radial component of g even though a rounded operand has |x| != 1.
MCLD_DEVICE float projection_quotient(float dot, float square) { return square == 0 ? 0 : dot / square; }

// The projection of a row in memory, kWidth elements a lane: product and operands are zero past d.
template <int kWidth, class T> MCLD_DEVICE float projection(const GradRow<T>& row, int64_t d) {
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
  return projection_quotient(dot, warp_sum(square));
}

// One warp a row. kWidth elements a lane at once, neighbours in the gradient; d is a multiple of it.
template <class T, class Out, int kWidth> MCLD_DEVICE void grad_short_row(const GradEpilogue& p, int64_t index) {
  const GradRow<T> row(p, index);
  const int d = int(p.d);
  ShortRow<kWidth> g, x, other;
  g.read(row.product, d);
  x.read(row.unit, d);
  g.multiply(row.product_coef, d);
  if (row.partner) {
    other.read(row.partner, d);
    g.add(row.pair_coef, other);
  }
  if (row.mean) {
    other.read(row.mean, d);
    g.add(-row.class_mean_coef, other);
  }
  const float dot = g.dot(x);
  g.add(-projection_quotient(dot, x.dot(x)), x);
  g.multiply(p.inv_norm[index], d);
  Out* out = static_cast<Out*>(p.out) + index * p.row_stride;
  if (p.accumulate) {
    other.read(out, d);
    g.add(1, other);
  }
  g.write(out, d);
}

// The same for a row of any length, which is read twice, and by single elements for one of any stride.
template <class T, class Out, int kWidth> MCLD_DEVICE void grad_long_row(const GradEpilogue& p, int64_t index) {
  const GradRow<T> row(p, index);
  const float along = projection<kWidth>(row, p.d), inv_norm = p.inv_norm[index];
#pragma unroll 4
  for (int64_t j = thread_index() % kWarp * kWidth; j < p.d; j += kWarp * kWidth) {
    float g[kWidth], x[kWidth];
    row.load_g(g, j);
    load(x, row.unit + j);
    Out* at = static_cast<Out*>(p.out) + index * p.row_stride + j * (kWidth == 1 ? p.column_stride : 1);
    float value[kWidth] = {};
    if (p.accumulate) load(value, at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] += (g[i] - along * x[i]) * inv_norm;
    store(at, value);
  }
}

template <class T, class Out, int kWidth> MCLD_KERNEL(kGradThreads, 2) grad_epilogue_rows_kernel(MCLD_PARAMETERS(GradEpilogue) p) {
  const int64_t index = int64_t(block_index()) * kGradWarps + thread_index() / kWarp;
  if (index >= p.rows) return;
  if constexpr (kWidth == 1) {
    grad_long_row<T, Out, 1>(p, index);
  } else if (p.d <= kShortRow) {
    grad_short_row<T, Out, kWidth>(p, index);
  } else {
    grad_long_row<T, Out, kWidth>(p, index);
  }
}

template <class T> MCLD_KERNEL(kGradThreads) grad_epilogue_projection_kernel(MCLD_PARAMETERS(GradEpilogue) p) {
  const int64_t index = int64_t(block_index()) * kGradWarps + thread_index() / kWarp;
  if (index >= p.rows) return;
  const float along = projection<kWidest<T>>(GradRow<T>(p, index), p.d);
  if (thread_index() % kWarp == 0) p.projection[index] = along;
}

// A block: 32 columns of the product by 32 rows, the columns first. In one dimension: a grid's second ends at 65,535.
template <class T, class Out> MCLD_KERNEL(kGradThreads) grad_epilogue_transposed_kernel(MCLD_PARAMETERS(GradEpilogue) p) {
  float* tile = reinterpret_cast<float*>(shared_memory());  // (32, 33)
  const int tiles = int((p.d + kGradTile - 1) / kGradTile);
  const int64_t first_row = int64_t(block_index() / tiles) * kGradTile, first_column = int64_t(block_index() % tiles) * kGradTile;
  const int across = thread_index() % kGradTile, down = thread_index() / kGradTile;
  for (int i = down; i < kGradTile; i += kGradWarps) {
    const int64_t index = first_row + i, j = first_column + across;
    if (index >= p.rows || j >= p.d) continue;
    const GradRow<T> row(p, index);
    tile[i * (kGradTile + 1) + across] = (row.at(j) - p.projection[index] * to_float(row.unit[j])) * p.inv_norm[index];
  }
  sync_block();
  for (int j = down; j < kGradTile; j += kGradWarps) {
    if (first_row + across >= p.rows || first_column + j >= p.d) continue;
    Out* at = static_cast<Out*>(p.out) + (first_row + across) * p.row_stride + (first_column + j) * p.column_stride;
    const float value = tile[across * (kGradTile + 1) + j];
    *at = from_float<Out>(p.accumulate ? to_float(*at) + value : value);
  }
}

// True if product, operands and class means can be read by vectors of `width` elements.
template <class T> bool grad_reads_vectors(const GradEpilogue& p, int width) {
  return takes_vectors<float>(p.product, p.product_pitch, width) && takes_vectors<float>(p.class_means, p.pitch, width) &&
         takes_vectors<T>(p.unit, p.pitch, width) && takes_vectors<T>(p.partner, p.pitch, width);
}

// The elements of an access: as many as 16 bytes hold of the wider of operand and gradient, half of that, or 1. (A step reads
// product and class means, which are fp32, by up to two accesses.)
template <class T, class Out> int grad_width(const GradEpilogue& p) {
  for (int width = kWidest<T, Out>; width >= 4; width /= 2) {
    if (p.column_stride == 1 && p.d % width == 0 && takes_vectors<Out>(p.out, p.row_stride, width) &&
        grad_reads_vectors<T>(p, width)) {
      return width;
    }
  }
  return 1;
}

}  // namespace mcld
