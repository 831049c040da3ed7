// Neighbouring elements at once, by accesses of up to 16 bytes.
#pragma once

#include <algorithm>

#include "numerics.cuh"

namespace mcld {

// kWidth neighbouring elements of a row, by accesses of at most 16 bytes.
template <class T, int kWidth> struct alignas(kWidth * sizeof(T) < 16 ? kWidth * sizeof(T) : 16) Vector { T value[kWidth]; };
// The most elements that one access takes, of the widest of the types.
template <class... T> constexpr int kWidest = 16 / std::max({sizeof(T)...});

template <class T, int kWidth> MCLD_DEVICE void load(float (&x)[kWidth], const T* p) {
  const auto v = read_vector<Vector<T, kWidth>>(p);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = to_float(v.value[i]);
}
template <class T, int kWidth> MCLD_DEVICE void store(T* p, const float (&x)[kWidth]) {
  if constexpr (sizeof(T) == 2 && kWidth > 1) {
    Vector<uint32_t, kWidth / 2> v;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) v.value[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    write_vector(p, v);
  } else {
    Vector<T, kWidth> v;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v.value[i] = from_float<T>(x[i]);
    write_vector(p, v);
  }
}

// True if rows that lie `stride` elements apart can be read by vectors of `width` elements.
template <class T> bool takes_vectors(const void* rows, int64_t stride, int width) {
  const size_t bytes = std::min(width * sizeof(T), size_t(16));
  return reinterpret_cast<uintptr_t>(rows) % bytes == 0 && stride * int64_t(sizeof(T)) % int64_t(bytes) == 0;
}

}  // namespace mcld
