// Knowledge distillation on fp32 logits (n, C) of the CPU, row by row: loss and gradients from one pair of exponentials of
// each element, with a row in the cache. Raw pointers and sizes only.
//
// With S, T the logits of a row, t the temperature, a = (T - max T) / t, b = (S - max S) / t, A and B the sums of exp(a) and
// exp(b) over the classes, p = exp(a) / A, q = exp(b) / B, and m = sum_k p_k (a_k - b_k):
//
//   KL = m + log(B / A),   loss = t^2 / n sum of KL,   dS = t / n (q - p),   dT_k = t / n p_k (a_k - b_k - m)
//
// A probability below the smallest normal number is 0, and adds nothing even where b is -inf.
#pragma once

#include <cstdint>

#include "cpu/isas.h"
#include "cpu/low_latency.h"

namespace mcld::cpu {

struct SoftmaxKl : Logits {
  float* work;                          // softmax_kl_size floats, aligned for double
  float *student_grad, *teacher_grad;   // (n, C) contiguous, or null
  float *loss, *terms;                  // () and (1,); terms may be null
  double temperature;                   // 2 / temperature and its square are normal numbers of fp32
};

// Floats of the workspace: a sum for each block of rows, and three rows for each thread.
int64_t softmax_kl_size(int64_t n, int64_t num_classes, int threads);

// The whole call, with the instructions of `isa`: an index of isa_names.
void softmax_kl(const SoftmaxKl&, int isa);

MCLD_IN_EACH_ISA(void softmax_kl(const SoftmaxKl&);)

// Rows that one task takes and whose divergences are one sum: by the classes alone, so that no sum depends on the threads.
inline int64_t softmax_kl_rows(int64_t num_classes) {
  constexpr int64_t kElements = 2048;
  return num_classes < kElements ? kElements / num_classes : 1;
}

}  // namespace mcld::cpu
