// Operand rows multiplied by a factor each: the anchors by their coefficients, for E^T A.
#pragma once

#include "vectors.cuh"

namespace mcld {

constexpr int kScaleThreads = 256;

// Block x: a row; block y and the threads: 16 bytes each.
template <class T> MCLD_KERNEL(kScaleThreads) scale_rows_kernel(MCLD_PARAMETERS(ScaleRows) p) {
  const int64_t row = block_index();
  const int64_t column = (int64_t(block_index_y()) * kScaleThreads + thread_index()) * kWidest<T>;
  if (column >= p.pitch) return;
  float x[kWidest<T>] = {};
  if (row < p.rows) {
    const float factor = p.factor[row];
    load(x, static_cast<const T*>(p.x) + row * p.pitch + column);
#pragma unroll
    for (int i = 0; i < kWidest<T>; ++i) x[i] *= factor;
  }
  store(static_cast<T*>(p.out) + row * p.pitch + column, x);
}

}  // namespace mcld
