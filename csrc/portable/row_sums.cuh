// Sums between the products: the sums of tiles into log-sum-exps, the online maximum's rescale of E, and the products of
// flash's splits. Every sum runs in a fixed order.
#pragma once

#include "vectors.cuh"

namespace mcld {

constexpr int kSumThreads = 256;

// exp2(maximum - overall), the factor that brings a tile's sums to the row's maximum. Both are integers or -inf.
MCLD_DEVICE float power(float maximum, float overall) { return maximum == -infinity() ? 0 : exp2f(maximum - overall); }

// One thread a row.
MCLD_KERNEL(kSumThreads) row_sums_kernel(MCLD_PARAMETERS(RowSums) p) {
  const int64_t row = int64_t(block_index()) * kSumThreads + thread_index();
  if (row >= p.rows) return;
  float best = -infinity(), sum = 0;
  if (p.tile_maxima) {
    for (int tile = 0; tile < p.tiles; ++tile) best = fmaxf(best, p.tile_maxima[tile * p.pitch + row]);
    p.row_maxima[row] = best;
  }
  for (int tile = 0; tile < p.tiles; ++tile) {
    const float part = p.tile_sums[tile * p.pitch + row];
    // A tile of which all is dropped has sum 0; one of NaN has no maximum but must spread.
    sum += !p.tile_maxima || part != part ? part : part * power(p.tile_maxima[tile * p.pitch + row], best);
  }
  if (p.total) {
    if (p.accumulate) sum += p.total[row];
    p.total[row] = sum;
  }
  p.neg_lse[row] = sum == 0 ? -infinity() : (log2f(sum) + (p.tile_maxima ? best : p.shift)) * kLn2;
  p.inv_neg_sum[row] = sum == 0 ? 0 : 1 / sum;
}

// Block x: a row; block y and the threads: 16 bytes each, all of one tile.
template <class T> MCLD_KERNEL(kSumThreads) rescale_kernel(MCLD_PARAMETERS(Rescale) p) {
  const int64_t row = block_index();
  const int64_t column = (int64_t(block_index_y()) * kSumThreads + thread_index()) * kWidest<T>;
  if (column >= p.exp_pitch) return;
  const float factor = power(p.tile_maxima[column / p.tile * p.padded_rows + row], p.row_maxima[row]);
  if (factor == 1) return;
  T* at = static_cast<T*>(p.exponentials) + row * p.exp_pitch + column;
  float x[kWidest<T>];
  load(x, at);
#pragma unroll
  for (int i = 0; i < kWidest<T>; ++i) x[i] *= factor;
  store(at, x);
}

// The splits of a flash product, added in order. Block x: a row; block y and the threads: 16 bytes each.
MCLD_KERNEL(kSumThreads) combine_splits_kernel(MCLD_PARAMETERS(CombineSplits) p) {
  const int64_t row = block_index();
  const int64_t column = (int64_t(block_index_y()) * kSumThreads + thread_index()) * 4;
  if (column >= p.pitch) return;
  float sum[4] = {0, 0, 0, 0};
  for (int split = 0; split < p.splits; ++split) {
    const float factor = p.split_maxima ? power(p.split_maxima[split * p.padded_rows + row], p.row_maxima[row]) : 1;
    float part[4];
    load(part, p.products + (split * p.padded_rows + row) * p.pitch + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += part[i] * factor;
  }
  store(p.out + row * p.pitch + column, sum);
}

}  // namespace mcld
