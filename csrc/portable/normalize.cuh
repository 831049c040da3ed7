// L2 normalization of rows (or, through a transposed view, of columns) of the logits into operands. Rows: norm, division,
// rounding and zero padding in one kernel. Columns: squares summed by slices of the batch into a workspace, then one kernel
// that adds them in order, divides and transposes through shared memory. No fp32 copy is made.
#pragma once

#include "rows.cuh"

namespace mcld {

constexpr int kNormalizeThreads = 256;
constexpr int kNormalizeWarps = kNormalizeThreads / kWarp;
constexpr int kColumnTile = 32;  // columns of the logits (rows of the operand) by
constexpr int kBatchTile = 64;   // rows of the logits, to a block

// NaN for a norm that overflows, which would otherwise read as a zero row.
MCLD_DEVICE float inv_norm_of(float squares, float eps) {
  const float norm = sqrtf(squares);
  if (norm <= eps) return 0;
  return norm == infinity() ? not_a_number() : 1 / norm;
}

// One warp a row. kWidth elements a lane at once, neighbours in memory; d and the pitch are multiples of it.
template <class In, class Out, int kWidth> MCLD_DEVICE void normalize_short_row(const Normalize& p, int64_t row) {
  const int d = row < p.n ? int(p.d) : 0;
  ShortRow<kWidth> x;
  x.read(static_cast<const In*>(p.x) + row * p.row_stride, d);
  const float inv_norm = inv_norm_of(x.dot(x), p.eps);
  if (thread_index() % kWarp == 0 && row < p.n) p.inv_norm[row] = inv_norm;
  x.multiply(inv_norm, d);
  x.write(static_cast<Out*>(p.out) + row * p.pitch, int(p.pitch));
}

// The same for a row of any length, which is read twice, and by single elements for one of any stride.
template <class In, class Out, int kWidth> MCLD_DEVICE void normalize_long_row(const Normalize& p, int64_t row) {
  const int first = thread_index() % kWarp * kWidth;
  const int64_t d = row < p.n ? p.d : 0, stride = kWidth == 1 ? p.column_stride : 1;
  const In* x = static_cast<const In*>(p.x) + row * p.row_stride;
  float squares = 0;
#pragma unroll 4
  for (int64_t j = first; j < d; j += kWarp * kWidth) {
    float value[kWidth];
    load(value, x + j * stride);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares += value[i] * value[i];
  }
  const float inv_norm = inv_norm_of(warp_sum(squares), p.eps);
  if (first == 0 && row < p.n) p.inv_norm[row] = inv_norm;
  Out* out = static_cast<Out*>(p.out) + row * p.pitch;
#pragma unroll 4
  for (int64_t j = first; j < p.pitch; j += kWarp * kWidth) {
    float value[kWidth] = {};
    if (j < d) {
      load(value, x + j * stride);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) value[i] *= inv_norm;
    }
    store(out + j, value);
  }
}

// kShort: no row is longer than kShortRow.
template <class In, class Out, int kWidth, bool kShort = false>
MCLD_DEVICE void normalize_row(const Normalize& p, int64_t row) {
  if constexpr (kWidth == 1) {
    normalize_long_row<In, Out, 1>(p, row);
  } else if (kShort || p.pitch <= kShortRow) {
    normalize_short_row<In, Out, kWidth>(p, row);
  } else {
    normalize_long_row<In, Out, kWidth>(p, row);
  }
}

// Squares of columns first_i.. + 32 over a slice of the batch, by 32 columns by 8 rows of threads. In the threads of row 0.
template <class In> MCLD_DEVICE float column_squares(const Normalize& p, float* sums, int64_t first_i, int64_t first, int64_t last) {
  const int column = thread_index() % kColumnTile, part = thread_index() / kColumnTile;
  const int64_t i = first_i + column;
  const In* x = static_cast<const In*>(p.x) + i * p.row_stride;
  float squares = 0;
  if (i < p.n) {
#pragma unroll 4
    for (int64_t j = first + part; j < last; j += kNormalizeWarps) {
      const float value = to_float(x[j * p.column_stride]);
      squares += value * value;
    }
  }
  sums[thread_index()] = squares;  // (8, 32)
  sync_block();
  float total = 0;
  if (part == 0) {
    for (int k = 0; k < kNormalizeWarps; ++k) total += sums[k * kColumnTile + column];
  }
  return total;
}

// 64 rows of the batch by 32 columns of the logits, which become rows of the operand; their inv_norms lie in shared memory.
template <class In, class Out>
MCLD_DEVICE void write_columns(const Normalize& p, const float* inv_norms, float* tile, int64_t first_i, int64_t first_j) {
  const int column = thread_index() % kColumnTile, part = thread_index() / kColumnTile;
  const int64_t i = first_i + column;
  const In* x = static_cast<const In*>(p.x) + i * p.row_stride;
  for (int k = part; k < kBatchTile; k += kNormalizeWarps) {
    const int64_t j = first_j + k;
    tile[k * (kColumnTile + 1) + column] = i < p.n && j < p.d ? to_float(x[j * p.column_stride]) : 0.0f;
  }
  sync_block();
  Out* out = static_cast<Out*>(p.out);
  for (int k = thread_index(); k < kColumnTile * kBatchTile; k += kNormalizeThreads) {
    const int row = k / kBatchTile, j = k % kBatchTile;
    // Padding is zero even in a row whose inv_norm is NaN.
    const bool inside = first_i + row < p.n && first_j + j < p.d;
    const float value = inside ? tile[j * (kColumnTile + 1) + row] * inv_norms[row] : 0.0f;
    out[(first_i + row) * p.pitch + first_j + j] = from_float<Out>(value);
  }
}

// 8 rows a block.
template <class In, class Out, int kWidth>
MCLD_KERNEL(kNormalizeThreads) normalize_rows_kernel(MCLD_PARAMETERS(Normalize) p) {
  const int64_t row = int64_t(block_index()) * kNormalizeWarps + thread_index() / kWarp;
  if (row >= p.padded_rows) return;
  normalize_row<In, Out, kWidth>(p, row);
}

// The elements to be taken at once: as many as 16 bytes hold of the wider type, half of it, or 1.
template <class In, class Out> int normalize_width(const Normalize& p) {
  for (int width = kWidest<In, Out>; width >= 4; width /= 2) {
    if (p.column_stride == 1 && p.d % width == 0 && takes_vectors<In>(p.x, p.row_stride, width) &&
        takes_vectors<Out>(p.out, p.pitch, width)) {
      return width;
    }
  }
  return 1;
}

// Block x: 32 columns; block y: a slice of the batch.
template <class In> MCLD_KERNEL(kNormalizeThreads) column_squares_kernel(MCLD_PARAMETERS(Normalize) p) {
  const int64_t first_i = int64_t(block_index()) * kColumnTile, i = first_i + thread_index();
  const int64_t slice = (p.d + p.splits - 1) / p.splits;
  const int64_t first = block_index_y() * slice, last = first + slice < p.d ? first + slice : p.d;
  const float squares = column_squares<In>(p, reinterpret_cast<float*>(shared_memory()), first_i, first, last);
  if (thread_index() < kColumnTile && i < p.n) p.square_sums[block_index_y() * p.n + i] = squares;
}

// A block: 64 rows of the batch by 32 columns of the logits, the rows first. In one dimension: a grid's second ends at 65,535.
template <class In, class Out> MCLD_KERNEL(kNormalizeThreads) normalize_columns_kernel(MCLD_PARAMETERS(Normalize) p) {
  float* inv_norms = reinterpret_cast<float*>(shared_memory());  // (32,), then the tile (64, 33)
  const int slices = int(p.pitch / kBatchTile), slice = block_index() % slices;
  const int64_t first_i = int64_t(block_index() / slices) * kColumnTile, i = first_i + thread_index();
  if (thread_index() < kColumnTile) {
    float squares = 0;
    if (i < p.n) {
      for (int k = 0; k < p.splits; ++k) squares += p.square_sums[k * p.n + i];
    }
    inv_norms[thread_index()] = i < p.n ? inv_norm_of(squares, p.eps) : 0;
    if (i < p.n && slice == 0) p.inv_norm[i] = inv_norms[thread_index()];
  }
  write_columns<In, Out>(p, inv_norms, inv_norms + kColumnTile, first_i, int64_t(slice) * kBatchTile);
}

}  // namespace mcld
