// The small sums between the products: per-tile sums into log-sum-exp and scale, the online maximum's rescale of E, the anchors
// scaled for E^T A, and the partial products of flash's splits. Every sum runs in a fixed order.
#pragma once

#include "vectors.cuh"

namespace mcld {

constexpr int kReduceThreads = 256;

// exp2(maximum - overall), both integers or -inf: what brings a tile's sums to the row's maximum.
MCLD_DEVICE float power(float maximum, float overall) { return maximum == -infinity() ? 0 : exp2f(maximum - overall); }

// One thread a row.
MCLD_KERNEL(kReduceThreads) statistics_kernel(MCLD_PARAMETERS(Statistics) p) {
  const int64_t row = int64_t(block_index()) * kReduceThreads + thread_index();
  if (row >= p.rows) return;
  float best = -infinity(), sum = 0;
  if (p.maxima) {
    for (int tile = 0; tile < p.tiles; ++tile) best = fmaxf(best, p.maxima[tile * p.pitch + row]);
    p.row_maxima[row] = best;
  }
  for (int tile = 0; tile < p.tiles; ++tile) {
    const float part = p.sums[tile * p.pitch + row];
    // A tile of which all is dropped has sum 0; one of NaN has no maximum but must spread.
    sum += !p.maxima || part != part ? part : part * power(p.maxima[tile * p.pitch + row], best);
  }
  if (p.total) {
    if (p.add) sum += p.total[row];
    p.total[row] = sum;
  }
  p.log_off[row] = sum == 0 ? -infinity() : (log2f(sum) + (p.maxima ? best : p.shift)) * kLn2;
  p.scale[row] = sum == 0 ? 0 : 1 / sum;
}

// Block x: a row; block y and the threads: 16 bytes each, all of one tile.
template <class T> MCLD_KERNEL(kReduceThreads) rescale_kernel(MCLD_PARAMETERS(Rescale) p) {
  const int64_t row = block_index();
  const int64_t column = (int64_t(block_index_y()) * kReduceThreads + thread_index()) * kWidest<T>;
  if (column >= p.pitch_e) return;
  const float factor = power(p.maxima[column / p.tile * p.padded_rows + row], p.row_maxima[row]);
  if (factor == 1) return;
  T* at = static_cast<T*>(p.e) + row * p.pitch_e + column;
  float x[kWidest<T>];
  load(x, at);
#pragma unroll
  for (int i = 0; i < kWidest<T>; ++i) x[i] *= factor;
  store(at, x);
}

// Block x: a row; block y and the threads: 16 bytes each.
template <class T> MCLD_KERNEL(kReduceThreads) scale_rows_kernel(MCLD_PARAMETERS(ScaleRows) p) {
  const int64_t row = block_index();
  const int64_t column = (int64_t(block_index_y()) * kReduceThreads + thread_index()) * kWidest<T>;
  if (column >= p.pitch) return;
  float x[kWidest<T>] = {};
  if (row < p.rows) {
    const float factor = p.factor[row];
    load(x, static_cast<const T*>(p.a) + row * p.pitch + column);
#pragma unroll
    for (int i = 0; i < kWidest<T>; ++i) x[i] *= factor;
  }
  store(static_cast<T*>(p.out) + row * p.pitch + column, x);
}

// The splits of a flash product, added in order. Block x: a row; block y and the threads: 16 bytes each.
MCLD_KERNEL(kReduceThreads) combine_kernel(MCLD_PARAMETERS(Combine) p) {
  const int64_t row = block_index();
  const int64_t column = (int64_t(block_index_y()) * kReduceThreads + thread_index()) * 4;
  if (column >= p.pitch) return;
  float sum[4] = {0, 0, 0, 0};
  for (int split = 0; split < p.splits; ++split) {
    const float factor = p.maxima ? power(p.maxima[split * p.padded_rows + row], p.row_maxima[row]) : 1;
    float part[4];
    load(part, p.parts + (split * p.padded_rows + row) * p.pitch + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += part[i] * factor;
  }
  store(p.out + row * p.pitch + column, sum);
}

}  // namespace mcld
