// The steps of rows.h, each in one pass over memory and one over what is still in the cache. Compiled once for each
// instruction set, as low_latency.cpp; results do not depend on the number of threads.
#include "cpu/rows.h"

#include "cpu/vectors.h"

namespace mcld::cpu::MCLD_CPU_ISA {
namespace {

// A matrix by rows adds kRun numbers of a row at a time, one by columns kRowsOfSum rows of memory: rounding errors do not
// grow with d.
constexpr int64_t kRun = 128 * kLanes;
constexpr int kAtOnce = 4;                     // vectors; chains of additions side by side
constexpr int64_t kStrip = kAtOnce * kLanes;   // rows of a matrix by columns that are taken together

// Sums over [0, d) of `kSums` products that add(c, sums, count) adds to vectors at c, of `count` numbers.
template <int kSums, class Add>
inline void sum_row(int64_t d, float* totals, const Add& add) {
  Vector total[kSums] = {};
  for (int64_t start = 0; start < d; start += kRun) {
    Vector part[kAtOnce][kSums] = {};
    const int64_t end = smaller(start + kRun, d);
    int64_t c = start;
    for (; c + kStrip <= end; c += kStrip) {
      for (int u = 0; u < kAtOnce; ++u) add(c + u * kLanes, part[u], int64_t(kLanes));
    }
    for (; c < end; c += kLanes) add(c, part[0], end - c);
    for (int s = 0; s < kSums; ++s) total[s] += (part[0][s] + part[1][s]) + (part[2][s] + part[3][s]);
  }
  for (int s = 0; s < kSums; ++s) totals[s] = add_lanes(total[s]);
}

// The same for kStrip rows of a matrix by columns: add(j, u, sums) adds number j of the rows of vector u.
template <int kSums, class Add>
inline void sum_strip(int64_t d, Vector (&totals)[kAtOnce][kSums], const Add& add) {
  for (int u = 0; u < kAtOnce; ++u) {
    for (int s = 0; s < kSums; ++s) totals[u][s] = Vector{};
  }
  for (int64_t start = 0; start < d; start += kRowsOfSum) {
    Vector part[kAtOnce][kSums] = {};
    const int64_t end = smaller(start + kRowsOfSum, d);
    for (int64_t j = start; j < end; ++j) {
      for (int u = 0; u < kAtOnce; ++u) add(j, u, part[u]);
    }
    for (int u = 0; u < kAtOnce; ++u) {
      for (int s = 0; s < kSums; ++s) totals[u][s] += part[u][s];
    }
  }
}

// A vector of strip rows u of a matrix by columns. A whole strip needs no count.
template <bool kWhole>
struct Strip {
  int64_t count;  // rows of the strip
  Vector at(const float* p, int u) const { return kWhole ? load(p + u * kLanes) : load_some(p + u * kLanes, count - u * kLanes); }
  void put(float* p, int u, Vector v) const {
    if (kWhole) return store(p + u * kLanes, v);
    store_some(p + u * kLanes, v, count - u * kLanes);
  }
};

template <class Body>
inline void for_strips(int threads, int64_t n, int64_t d, const Body& body) {
  for_slices(threads, n, kStrip, n * d, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += kStrip) {
      if (i + kStrip <= last) {
        body(i, Strip<true>{kStrip});
      } else {
        body(i, Strip<false>{last - i});
      }
    }
  });
}

void normalize_row(const Normalize& call, int64_t i) {
  const float* x = call.x + i * call.x_stride;
  float* rows = call.rows + i * call.rows_stride;
  float square;
  sum_row<1>(call.d, &square, [=](int64_t c, Vector* sums, int64_t count) {
    const Vector value = load_some(x + c, count);
    sums[0] += value * value;
  });
  const float inverse = inverse_norm(square, call.eps);
  call.inv_norm[i] = inverse;
  for (int64_t c = 0; c < call.d; c += kLanes) {
    store_some(rows + c, load_some(x + c, call.d - c) * inverse, call.d - c);
  }
}

template <bool kWhole>
void normalize_strip(const Normalize& call, int64_t i, Strip<kWhole> strip) {
  Vector squares[kAtOnce][1];
  sum_strip<1>(call.d, squares, [&](int64_t j, int u, Vector* sums) {
    const Vector value = strip.at(call.x + j * call.x_stride + i, u);
    sums[0] += value * value;
  });
  Vector inverse[kAtOnce];
  for (int u = 0; u < kAtOnce; ++u) {
    for (int lane = 0; lane < kLanes; ++lane) inverse[u][lane] = inverse_norm(squares[u][0][lane], call.eps);
    strip.put(call.inv_norm + i, u, inverse[u]);
  }
  for (int64_t j = 0; j < call.d; ++j) {
    for (int u = 0; u < kAtOnce; ++u) {
      const Vector value = strip.at(call.x + j * call.x_stride + i, u);
      strip.put(call.rows + j * call.rows_stride + i, u, value * inverse[u]);
    }
  }
}

// 0 where x is a row of zeros.
inline float projection(float product, float square) { return product / (square == 0 ? 1.f : square); }

template <bool kPartner, bool kMean>
void grad_row(const GradEpilogue& call, int64_t i) {
  const float* product = call.product + i * call.product_stride;
  const float* x = call.unit + i * call.unit_stride;
  const float* partner = kPartner ? call.partner + (i - call.first) * call.partner_stride : nullptr;
  const float* mean = kMean ? call.class_means + call.class_index[i] * call.class_means_stride : nullptr;
  const float product_factor = call.product_factor[i];
  const float partner_factor = kPartner ? call.partner_factor[i - call.first] : 0;
  const float mean_factor = kMean ? call.mean_factor[i] : 0;
  const auto gradient = [=](int64_t c, int64_t count) {
    Vector g = load_some(product + c, count) * product_factor;
    if (kPartner) g += load_some(partner + c, count) * partner_factor;
    if (kMean) g -= load_some(mean + c, count) * mean_factor;
    return g;
  };
  float dots[2];
  sum_row<2>(call.d, dots, [=](int64_t c, Vector* sums, int64_t count) {
    const Vector value = load_some(x + c, count);
    sums[0] += gradient(c, count) * value;
    sums[1] += value * value;
  });
  const float radial = projection(dots[0], dots[1]), inverse = call.inv_norm[i];
  float* out = call.out + i * call.out_stride;
  for (int64_t c = 0; c < call.d; c += kLanes) {
    const int64_t count = call.d - c;
    Vector g = (gradient(c, count) - load_some(x + c, count) * radial) * inverse;
    if (call.accumulate) g += load_some(out + c, count);
    store_some(out + c, g, count);
  }
}

void grad_one_row(const GradEpilogue& call, int64_t i) {
  const bool partner = i >= call.first && i < call.last;
  if (call.class_means != nullptr) return partner ? grad_row<true, true>(call, i) : grad_row<false, true>(call, i);
  partner ? grad_row<true, false>(call, i) : grad_row<false, false>(call, i);
}

template <bool kPartner, bool kWhole>
void grad_strip(const GradEpilogue& call, int64_t i, Strip<kWhole> strip) {
  Vector product_factor[kAtOnce], partner_factor[kAtOnce];
  for (int u = 0; u < kAtOnce; ++u) {
    product_factor[u] = strip.at(call.product_factor + i, u);
    if (kPartner) partner_factor[u] = strip.at(call.partner_factor + i - call.first, u);
  }
  const auto gradient = [&](int64_t j, int u) {
    Vector g = strip.at(call.product + j * call.product_stride + i, u) * product_factor[u];
    if (kPartner) g += strip.at(call.partner + j * call.partner_stride + i - call.first, u) * partner_factor[u];
    return g;
  };
  Vector dots[kAtOnce][2];
  sum_strip<2>(call.d, dots, [&](int64_t j, int u, Vector* sums) {
    const Vector value = strip.at(call.unit + j * call.unit_stride + i, u);
    sums[0] += gradient(j, u) * value;
    sums[1] += value * value;
  });
  Vector radial[kAtOnce], inverse[kAtOnce];
  for (int u = 0; u < kAtOnce; ++u) {
    for (int lane = 0; lane < kLanes; ++lane) radial[u][lane] = projection(dots[u][0][lane], dots[u][1][lane]);
    inverse[u] = strip.at(call.inv_norm + i, u);
  }
  for (int64_t j = 0; j < call.d; ++j) {
    float* out = call.out + j * call.out_stride + i;
    for (int u = 0; u < kAtOnce; ++u) {
      Vector g = (gradient(j, u) - strip.at(call.unit + j * call.unit_stride + i, u) * radial[u]) * inverse[u];
      if (call.accumulate) g += strip.at(out, u);
      strip.put(out, u, g);
    }
  }
}

}  // namespace

void normalize(const Normalize& call) {
  if (call.by_columns) {
    return for_strips(call.threads, call.n, call.d, [&](int64_t i, auto strip) { normalize_strip(call, i, strip); });
  }
  for_slices(call.threads, call.n, 1, call.n * call.d, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) normalize_row(call, i);
  });
}

void grad_epilogue(const GradEpilogue& call) {
  if (call.by_columns) {  // every row or none has a partner
    return for_strips(call.threads, call.n, call.d, [&](int64_t i, auto strip) {
      call.last > call.first ? grad_strip<true>(call, i, strip) : grad_strip<false>(call, i, strip);
    });
  }
  for_slices(call.threads, call.n, 1, call.n * call.d, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) grad_one_row(call, i);
  });
}

}  // namespace mcld::cpu::MCLD_CPU_ISA
