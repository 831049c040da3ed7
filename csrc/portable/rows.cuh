// Rows that a warp keeps in its registers.
#pragma once

#include "sums.cuh"
#include "vectors.cuh"

namespace mcld {

// A row of at most kShortRow elements in the registers of a warp, 32 a lane, so that memory is read once: step k is elements
// (32 k + lane) kWidth and its neighbours, zeros past d, which is a multiple of kWidth. Every member loops over all steps, so
// that the loads of a row are in flight together.
constexpr int kShortRow = 1024;
template <int kWidth> struct ShortRow {
  static constexpr int kSteps = kShortRow / (kWarp * kWidth);
  float x[kSteps][kWidth];

  static MCLD_DEVICE int column(int step) { return (step * kWarp + thread_index() % kWarp) * kWidth; }

  template <class T> MCLD_DEVICE void read(const T* row, int d) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[k][i] = 0;
      if (column(k) < d) load(x[k], row + column(k));
    }
  }
  template <class T> MCLD_DEVICE void write(T* row, int size) const {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (column(k) < size) store(row + column(k), x[k]);
    }
  }
  // The zeros past d stay, even if the factor is NaN.
  MCLD_DEVICE void multiply(float factor, int d) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const float inside = column(k) < d ? factor : 0;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[k][i] *= inside;
    }
  }
  MCLD_DEVICE void add(float factor, const ShortRow& other) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[k][i] += factor * other.x[k][i];
    }
  }
  // In every lane.
  MCLD_DEVICE float dot(const ShortRow& other) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += x[k][i] * other.x[k][i];
    }
    return warp_sum(sum);
  }
};

}  // namespace mcld
