// Means of the rows of each class, for label positives: the B x B mask of equal labels is never formed.
#pragma once

#include "vectors.cuh"

namespace mcld {

constexpr int kClassMeansThreads = 256;
constexpr int kClassMeansWarps = kClassMeansThreads / kWarp;
constexpr int kClassMeansColumns = kWarp * 4;  // of a block

// Block x: a class index; block y: 128 columns. Each warp adds every eighth row of the class, then the warps' sums are added in order.
template <class T> MCLD_KERNEL(kClassMeansThreads) class_means_kernel(MCLD_PARAMETERS(ClassMeans) p) {
  float* sums = reinterpret_cast<float*>(shared_memory());  // (8, 128)
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int64_t index = block_index(), column = int64_t(block_index_y()) * kClassMeansColumns + lane * 4;
  const int64_t first = p.starts[index], last = p.starts[index + 1];
  float sum[4] = {0, 0, 0, 0};
  if (column < p.pitch) {
#pragma unroll 4
    for (int64_t k = first + warp; k < last; k += kClassMeansWarps) {
      float x[4];
      load(x, static_cast<const T*>(p.unit) + p.order[k] * p.pitch + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += x[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[warp * kClassMeansColumns + lane * 4 + i] = sum[i];
  sync_block();
  if (warp != 0 || column >= p.pitch) return;
  for (int other = 1; other < kClassMeansWarps; ++other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += sums[other * kClassMeansColumns + lane * 4 + i];
  }
  const float count = p.counts[index] > 0 ? float(p.counts[index]) : 1.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] /= count;
  store(p.out + index * p.pitch + column, sum);
}

}  // namespace mcld
