// The losses of the anchors and the coefficients of their gradients, as a kernel of its own.
#pragma once

#include "anchor_loss.cuh"

namespace mcld {

constexpr int kLossThreads = 256;

// One thread an anchor.
MCLD_KERNEL(kLossThreads) loss_epilogue_kernel(MCLD_PARAMETERS(LossEpilogue) p) {
  const int64_t row = int64_t(block_index()) * kLossThreads + thread_index();
  if (row >= p.rows) return;
  const AnchorCoefficients coefficients =
      anchor_loss(p.weights, row, p.neg_lse[row], p.inv_neg_sum[row], p.positive[row], p.label_positive[row], p.inv_temperature,
                  [&](int i, float part) { p.per_anchor[i * p.pitch + row] = part; });
  p.partner_coef[row] = coefficients.partner;
  p.product_coef[row] = coefficients.product;
  for (int i = 0; i < p.weights.count; ++i) {
    if (p.weights.item[i].label_positives) p.class_mean_coef[row] = coefficients.class_mean;
  }
}

}  // namespace mcld
