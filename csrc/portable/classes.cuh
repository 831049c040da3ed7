// What the positives need: the mean of each class's rows, and the cosine of every anchor with its partner and with its class's
// mean. The B x B mask of equal labels is never formed.
#pragma once

#include "sums.cuh"
#include "vectors.cuh"

namespace mcld {

constexpr int kClassThreads = 256;
constexpr int kClassWarps = kClassThreads / kWarp;
constexpr int kClassColumns = kWarp * 4;  // of a block

// Block x: a rank; block y: 128 columns. Each warp adds every eighth row of the class, then the warps' sums are added in order.
template <class T> MCLD_KERNEL(kClassThreads) class_means_kernel(MCLD_PARAMETERS(ClassMeans) p) {
  float* sums = reinterpret_cast<float*>(shared_memory());  // (8, 128)
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int64_t rank = block_index(), column = int64_t(block_index_y()) * kClassColumns + lane * 4;
  const int64_t first = p.starts[rank], last = p.starts[rank + 1];
  float sum[4] = {0, 0, 0, 0};
  if (column < p.pitch) {
#pragma unroll 4
    for (int64_t k = first + warp; k < last; k += kClassWarps) {
      float x[4];
      load(x, static_cast<const T*>(p.unit) + p.order[k] * p.pitch + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += x[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[warp * kClassColumns + lane * 4 + i] = sum[i];
  sync_block();
  if (warp != 0 || column >= p.pitch) return;
  for (int other = 1; other < kClassWarps; ++other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += sums[other * kClassColumns + lane * 4 + i];
  }
  const float count = p.counts[rank] > 0 ? float(p.counts[rank]) : 1.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] /= count;
  store(p.out + rank * p.pitch + column, sum);
}

// One warp an anchor.
template <class T> MCLD_KERNEL(kClassThreads) positives_kernel(MCLD_PARAMETERS(Positives) p) {
  constexpr int kWidth = kWidest<T>;
  const int lane = thread_index() % kWarp;
  const int64_t row = int64_t(block_index()) * kClassWarps + thread_index() / kWarp;
  if (row >= p.n) return;
  const int64_t partner = row + p.offset;
  const bool paired = partner >= 0 && partner < p.m;
  const T* a = static_cast<const T*>(p.a) + row * p.pitch;
  const T* k = static_cast<const T*>(p.k) + (paired ? partner : 0) * p.pitch;
  const float* mean = p.means ? p.means + p.rank[row] * p.pitch : nullptr;
  float positive = 0, by_label = 0;
#pragma unroll 2
  for (int64_t column = lane * kWidth; column < p.pitch; column += kWarp * kWidth) {
    float x[kWidth], y[kWidth];
    load(x, a + column);
    load(y, k + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) positive += x[i] * y[i];
    if (mean) {
      load(y, mean + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) by_label += x[i] * y[i];
    }
  }
  positive = warp_sum(positive);
  by_label = warp_sum(by_label);
  if (lane != 0) return;
  p.positive[row] = paired ? positive : 0;
  if (mean) p.by_label[row] = by_label;
}

}  // namespace mcld
