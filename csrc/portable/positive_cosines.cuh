// Cosines of every anchor with its partner and with the mean of its class.
#pragma once

#include "sums.cuh"
#include "vectors.cuh"

namespace mcld {

constexpr int kPositiveThreads = 256;
constexpr int kPositiveWarps = kPositiveThreads / kWarp;

// One warp an anchor.
template <class T> MCLD_KERNEL(kPositiveThreads) positive_cosines_kernel(MCLD_PARAMETERS(PositiveCosines) p) {
  constexpr int kWidth = kWidest<T>;
  const int lane = thread_index() % kWarp;
  const int64_t row = int64_t(block_index()) * kPositiveWarps + thread_index() / kWarp;
  if (row >= p.n) return;
  const int64_t partner = row + p.offset;
  const bool paired = partner >= 0 && partner < p.m;
  const T* a = static_cast<const T*>(p.anchors) + row * p.pitch;
  const T* k = static_cast<const T*>(p.candidates) + (paired ? partner : 0) * p.pitch;
  const float* mean = p.class_means ? p.class_means + p.class_index[row] * p.pitch : nullptr;
  float positive = 0, label_positive = 0;
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
      for (int i = 0; i < kWidth; ++i) label_positive += x[i] * y[i];
    }
  }
  positive = warp_sum(positive);
  label_positive = warp_sum(label_positive);
  if (lane != 0) return;
  p.positive[row] = paired ? positive : 0;
  if (mean) p.label_positive[row] = label_positive;
}

}  // namespace mcld
