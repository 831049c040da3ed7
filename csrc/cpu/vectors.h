// Vectors of MCLD_VECTOR_BYTES, what they compute, and loops over rows and threads. Each instruction set
// has its own copy.
#pragma once

#include <math.h>
#include <string.h>

#include "cpu/low_latency.h"

namespace mcld::cpu::MCLD_CPU_ISA {
namespace {

constexpr int kLanes = MCLD_VECTOR_BYTES / 4;
static_assert(Layout::kPad % kLanes == 0, "a padded row is whole vectors");

typedef float Vector __attribute__((vector_size(MCLD_VECTOR_BYTES)));
typedef uint32_t Bits __attribute__((vector_size(MCLD_VECTOR_BYTES)));
typedef float Unaligned __attribute__((vector_size(MCLD_VECTOR_BYTES), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline Vector splat(float x) { return x - Vector{}; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` numbers at p, and zeros; all of a vector where count >= kLanes.
inline Vector load_some(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  Vector v = {};
  if (count > 0) memcpy(&v, p, size_t(count) * sizeof(float));
  return v;
}

inline void store_some(float* p, Vector v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  if (count > 0) memcpy(p, &v, size_t(count) * sizeof(float));
}

// Copies a row of `count` numbers, `stride` apart, and fills up to `width` with `padding`.
inline void copy_row(const float* from, int64_t stride, int64_t count, int64_t width, float padding, float* to) {
  if (stride == 1) {
    memcpy(to, from, size_t(count) * sizeof(float));
  } else {
    for (int64_t c = 0; c < count; ++c) to[c] = from[c * stride];
  }
  for (int64_t c = count; c < width; ++c) to[c] = padding;
}

// Writes the vectors value(c) of a row of `count` numbers.
template <class Value>
inline void write_row(float* to, int64_t count, const Value& value) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, value(c));
  if (c < count) store_some(to + c, value(c), count - c);
}

inline float add_lanes(Vector v) {
  float lanes[kLanes];
  memcpy(lanes, &v, sizeof lanes);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// exp(x) to 1 ulp for |x| < 87, NaN for NaN: 2^k exp(r), r = x - k log(2), by a polynomial (Cephes expf).
inline Vector exp(Vector x) {
  const float round = 12582912.f;  // 1.5 2^23: the sum's last bits are the nearest integer
  const Vector shifted = x * 1.44269504088896341f + round;
  const Vector k = shifted - round;
  const Vector r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  Bits bits;  // unsigned: of NaN and what is out of range the sum may wrap
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;
  Vector power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline float exp(float x) { return exp(splat(x))[0]; }

inline float dot(const float* a, const float* b, int64_t pitch) {
  Vector sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= pitch; c += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) sums[u] += load(a + c + u * kLanes) * load(b + c + u * kLanes);
  }
  for (; c < pitch; c += kLanes) sums[0] += load(a + c) * load(b + c);
  return add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// x . (a - b): exactly 0 where a and b are equal, as for a class of one row.
inline float dot_difference(const float* x, const float* a, const float* b, int64_t pitch) {
  Vector sums[2] = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= pitch; c += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) {
      const int64_t at = c + u * kLanes;
      sums[u] += load(x + at) * (load(a + at) - load(b + at));
    }
  }
  for (; c < pitch; c += kLanes) sums[0] += load(x + c) * (load(a + c) - load(b + c));
  return add_lanes(sums[0] + sums[1]);
}

// 1 / norm; 0 for norm <= eps, NaN for a norm that is not finite: an overflow must show, not read as a zero direction.
inline float inverse_norm(float square, float eps) {
  const float norm = sqrtf(square);
  return norm <= eps ? 0.f : norm == INFINITY ? NAN : 1.f / norm;
}

// body(first, last) over slices of range(count) that begin at multiples of `align`, on several threads where the work, in
// elements, is worth waking them.
template <class Body>
inline void for_slices(int threads, int64_t count, int64_t align, int64_t work, const Body& body) {
  if (threads == 1 || work < 1 << 15) return body(0, count);
  struct Slices {
    const Body& body;
    int64_t count, step;
  };
  const int64_t parts = 4 * threads;
  Slices slices{body, count, ((count + parts - 1) / parts + align - 1) / align * align};
  const auto task = [](void* data, int64_t block) {
    const Slices& s = *static_cast<Slices*>(data);
    s.body(block * s.step, smaller((block + 1) * s.step, s.count));
  };
  parallel(threads, (count + slices.step - 1) / slices.step, task, &slices);
}

// Sums of columns add so many rows at a time, so that their rounding error grows with neither n nor C.
constexpr int64_t kRowsOfSum = Layout::kRowsOfSum;

// add(row, column) is a vector; its sums over `rows` rows of columns [first, last) go to `sums`; `part` is workspace.
template <class Add>
inline void add_rows(int64_t rows, int64_t first, int64_t last, float* sums, float* part, const Add& add) {
  for (int64_t c = first; c < last; c += kLanes) store(sums + c, Vector{});
  for (int64_t row = 0; row < rows; row += kRowsOfSum) {
    const int64_t end = smaller(row + kRowsOfSum, rows);
    for (int64_t c = first; c < last; c += kLanes) store(part + c, add(row, c));
    for (int64_t i = row + 1; i < end; ++i) {
      for (int64_t c = first; c < last; c += kLanes) store(part + c, load(part + c) + add(i, c));
    }
    for (int64_t c = first; c < last; c += kLanes) store(sums + c, load(sums + c) + load(part + c));
  }
}

}  // namespace
}  // namespace mcld::cpu::MCLD_CPU_ISA
