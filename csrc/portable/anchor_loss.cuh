// The loss of an anchor from its sum over the negatives, its part of each term, and the coefficients of its gradient.
#pragma once

#include "numerics.cuh"

namespace mcld {

struct AnchorCoefficients {
  float partner, product, class_mean;
};

// The coefficients of the anchor in `row`; `write(i, part)` receives its part of term i of the weights.
template <class Write>
MCLD_DEVICE AnchorCoefficients anchor_loss(const List<TermWeight, 2>& weights, int64_t row, float neg_lse, float inv_neg_sum,
                                           float positive, float label_positive, float inv_temperature, const Write& write) {
  const float x = neg_lse - positive * inv_temperature, loss = softplus(x);
  float total = 0, class_mean = 0;
  for (int i = 0; i < weights.count; ++i) {
    const TermWeight& term = weights.item[i];
    const float part = (term.counted && !term.counted[row] ? 0 : term.constant) * (term.factor ? *term.factor : 1);
    write(i, (term.label_positives ? loss + (positive - label_positive) * inv_temperature : loss) * part);
    const float weight = part * term.term_weight * (term.weight ? *term.weight : 1) * inv_temperature;
    total += weight;
    if (term.label_positives) class_mean = weight;
  }
  const float partner = total * sigmoid(x);
  return {partner, partner * inv_neg_sum, class_mean};
}

}  // namespace mcld
