// A call of MLKD on fp32 rows of the CPU with a frozen teacher, by whole matrices. Raw pointers and sizes only.
//
// With unit rows S, T (n, C), the rows z = [S; T] or, where the student's are enough, z = S, and cosines z_i . z_j (N, N), for
// j != i, a and b those of S and of T over the correlation's temperature, d = a - b:
//
//   correlation_i = log1p(sum_j exp(b_ij) expm1(d_ij) / Zt_i) - sum_j exp(b_ij) d_ij / Zt_i,   Zt_i = sum_j exp(b_ij)
//   alignment_i   = |S_i - T_i|^2 + (1 for each side without a direction)
//   supervised_i  = log(sum_j exp(c_ij) / exp(mean of c_ij over the other rows of i's label)),   c: over its own temperature
//
// The gradient by S is W z, less its part along S, over the norm of the logits, with W (n, N) as in losses/mlkd_correlation.py
// and losses/mlkd.py. The two GEMMs are separate steps: the caller may leave them to a library.
#pragma once

#include <cstdint>

#include "cpu/isas.h"
#include "cpu/low_latency.h"

namespace mcld::cpu {

// The teacher's logits are not read where the student's are enough.
struct Mlkd : Logits {
  const int64_t* target;           // (n,) labels for the supervised term, or null
  int64_t target_stride, ignore_index;
  float* work;                     // MlkdLayout(n, num_classes, sides()).size floats
  float* gradient;                 // (n, C) contiguous by the student, or null
  float *loss, *terms;             // () and (3,)
  float weight[3];                 // of the terms, in loss and gradient
  bool correlation, alignment, supervised;  // the terms that are computed
  int views;                       // 1 or 2: rows of z in the supervised term, in n
  float correlation_temperature, supervised_temperature;
  float eps;                       // a row with norm <= eps has no direction

  int sides() const { return correlation || alignment || views == 2 ? 2 : 1; }
};

// The steps of a call in their order.
enum MlkdStep : int {
  kMlkdNormalize = 1,   // z
  kMlkdCosines = 2,     // cosines = z z^T
  kMlkdSums = 4,        // the terms of cosines; weights = W
  kMlkdProduct = 8,     // product = W z, of the columns that W has
  kMlkdFinish = 16,     // alignment, loss and gradient
  kMlkdAllSteps = 31,
};

// Buffers in `work`, offsets and pitches in floats. Padding columns of z, up to the width, are zeros.
struct MlkdLayout {
  int64_t width, pitch;            // of matrices of C columns
  int64_t matrix_width, matrix_pitch;  // of matrices of N columns
  int64_t rows;                    // (N, C): z
  int64_t cosines;                 // (N, N)
  int64_t weights;                 // (n, N): exponentials, then W
  int64_t product;                 // (n, C)
  int64_t transposed;              // (C, N): z^T by panels; in the place of weights and product
  int64_t vectors;                 // 9 of matrix_width
  int64_t labels;                  // int32: 4 of matrix_width, a table of twice as many and more
  int64_t table;                   // entries of the table, a power of 2
  int64_t size;

  MlkdLayout(int64_t n, int64_t c, int sides) {
    const int64_t count = n * sides;
    width = Layout::pad(c), pitch = Layout::spread(width);
    matrix_width = Layout::pad(count), matrix_pitch = Layout::spread(matrix_width);
    const int64_t panels = (count + Layout::kLargestPanel - 1) / Layout::kLargestPanel * Layout::kLargestPanel;
    int64_t next = 0;
    const auto take = [&next](int64_t floats) { return next += floats, next - floats; };
    rows = take(count * pitch);
    cosines = take(count * matrix_pitch + Layout::kPad);  // vectors from the middle of the last row on reach beyond it
    transposed = weights = take(n * matrix_pitch);
    product = take(n * pitch);
    if (c * panels > n * (matrix_pitch + pitch)) take(c * panels - n * (matrix_pitch + pitch));
    vectors = take(9 * matrix_width);
    for (table = 16; table < 2 * n;) table *= 2;
    labels = take(4 * matrix_width + table);
    size = next;
  }
};

// Runs the steps of `steps`, a sum of MlkdStep, with the instructions of `isa`: an index of isa_names.
void mlkd(const Mlkd&, int steps, int isa);

MCLD_IN_EACH_ISA(void mlkd(const Mlkd&, int steps);)

}  // namespace mcld::cpu
