// The steps around the products of a contrast, on fp32 logits of the CPU: unit rows, and the gradient by the logits.
// Raw pointers and sizes only.
//
// A row has d numbers, as `kernels.UnitRows` has them. Matrices lie by rows (the numbers of a row next to one another) or
// by columns (the first numbers of all rows next to one another, as the classes of logits do); `stride` is the distance
// between the runs.
#pragma once

#include <cstdint>

#include "cpu/isas.h"

namespace mcld::cpu {

struct Normalize {
  const float* x;    // (n, d)
  int64_t x_stride;
  float* rows;       // (n, d): x / |x|
  int64_t rows_stride;
  float* inv_norm;   // (n,): 1 / |x|, 0 for |x| <= eps
  int64_t n, d;
  float eps;
  bool by_columns;   // all matrices
  int threads;
};

// With P a row of `partner` and M one of `class_means`, g = product_factor product + partner_factor P - mean_factor M, and
// the gradient is (g - (g . x / x . x) x) inv_norm.
struct GradEpilogue {
  const float* product;         // (n, d)
  int64_t product_stride;
  const float* product_factor;  // (n,)
  const float* partner;         // (last - first, d), of rows first to last
  int64_t partner_stride, first, last;
  const float* partner_factor;  // (last - first,)
  const float* class_means;     // by rows; row class_index[i] belongs to row i; null: none, and null by columns
  int64_t class_means_stride;
  const int64_t* class_index;   // (n,)
  const float* mean_factor;     // (n,)
  const float* unit;            // (n, d): x
  int64_t unit_stride;
  const float* inv_norm;        // (n,)
  float* out;                   // (n, d)
  int64_t out_stride;
  int64_t n, d;
  bool accumulate;              // adds to `out`
  bool by_columns;              // all matrices
  int threads;
};

void normalize(const Normalize&, int isa);
void grad_epilogue(const GradEpilogue&, int isa);

MCLD_IN_EACH_ISA(void normalize(const Normalize&); void grad_epilogue(const GradEpilogue&);)

}  // namespace mcld::cpu
