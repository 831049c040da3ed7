// The loss of an anchor from its sum over the negatives, its part of each term, and the coefficients of its gradient.
#pragma once

#include "numerics.cuh"

namespace mcld {

constexpr int kLossThreads = 256;

// One thread an anchor.
MCLD_KERNEL(kLossThreads) loss_epilogue_kernel(MCLD_PARAMETERS(LossEpilogue) p) {
  const int64_t row = int64_t(block_index()) * kLossThreads + thread_index();
  if (row >= p.rows) return;
  const float positive = p.positive[row], x = p.neg_lse[row] - positive * p.inv_temperature;
  const float loss = softplus(x);
  float total = 0;
  for (int i = 0; i < p.weights.count; ++i) {
    const TermWeight& term = p.weights.item[i];
    const float part = (term.counted && !term.counted[row] ? 0 : term.constant) * (term.factor ? *term.factor : 1);
    const float value = term.label_positives ? loss + (positive - p.label_positive[row]) * p.inv_temperature : loss;
    p.per_anchor[i * p.pitch + row] = value * part;
    const float weight = part * term.term_weight * (term.weight ? *term.weight : 1) * p.inv_temperature;
    total += weight;
    if (term.label_positives) p.class_mean_coef[row] = weight;
  }
  const float partner = total * sigmoid(x);
  p.partner_coef[row] = partner;
  p.product_coef[row] = partner * p.inv_neg_sum[row];
}

}  // namespace mcld
