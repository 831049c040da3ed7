// A whole call of CLKD on fp32 logits of the CPU with a frozen teacher. Raw pointers and sizes only.
//
// With S, T the logits (n, C), u, v their unit rows or unit columns, S_c, T_c less the mean over the batch:
//
//   instance, category = row_factor, column_factor x sum (u - v)^2 of rows and of columns
//   correlation = gram_factor ||G||^2,  G = S_c^T S_c - T_c^T T_c = X + X^T,  X = D^T M,  D = S_c - T_c,  M = (S_c + T_c) / 2
//
// and the gradients 2 factor (d - (d . u) u) / norm with d = u - v, and 4 gram_factor S_c G. The squares of the columns, their
// means and the rows' part take one pass over the logits, (u - v) of the columns, D and M a second, the gradient a third.
#pragma once

#include "cpu/isas.h"
#include "cpu/low_latency.h"

namespace mcld::cpu {

struct Clkd : Logits {
  float* work;      // ClkdLayout(n, num_classes).size floats
  float* gradient;  // (n, C) contiguous by the student, or null
  float *loss, *terms;  // () and (3,)
  float weight[3];      // of the terms, in loss and gradient
  bool instance, category, correlation;  // the terms that are computed
  double row_factor, column_factor, gram_factor;
  float eps;  // a row or column with norm <= eps has no direction
};

// Buffers in `work`, offsets and pitches in floats. Padding columns, up to the pitch, are zeros.
struct ClkdLayout {
  static constexpr int64_t kColumnSums = 4;  // kinds of sums that a pass adds, each (C,), for a group of rows

  int64_t groups;                                // of Layout::kRowsOfSum rows
  int64_t pitch;                                 // of matrices of C columns
  int64_t student, teacher, difference, middle;  // (n, C): S, T, D, M
  int64_t product;                               // (C, C): X, then 4 weight gram_factor G
  int64_t rows;                                  // 3 of n: 1 / norm of both sides, (u - v) . u
  int64_t columns;                               // 7 of C
  int64_t row_sums, column_sums;                 // of each group
  int64_t gram_sums;                             // (C,): of G^2
  int64_t size;

  ClkdLayout(int64_t n, int64_t c) {
    groups = (n + Layout::kRowsOfSum - 1) / Layout::kRowsOfSum;
    pitch = Layout::spread(Layout::pad(c));
    int64_t next = 0;
    const auto take = [&next](int64_t count) { return next += Layout::pad(count), next - Layout::pad(count); };
    student = take(n * pitch), teacher = take(n * pitch);
    difference = take(n * pitch), middle = take(n * pitch);
    product = take(c * pitch);
    rows = take(3 * n), columns = take(7 * pitch);
    row_sums = take(groups), column_sums = take(kColumnSums * groups * pitch);
    gram_sums = take(c);
    size = next;
  }
};

// Runs a call with the instructions of `isa`: an index of isa_names.
void clkd(const Clkd&, int isa);

MCLD_IN_EACH_ISA(void clkd(const Clkd&);)

}  // namespace mcld::cpu
