// What follows once an anchor's sum over the negatives is known: its loss, the factors of its gradient, its part of each term,
// and the sums of these.
#pragma once

#include "numerics.cuh"
#include "sums.cuh"

namespace mcld {

constexpr int kFactorThreads = 256;
using TotalSum = BlockSum<kFactorThreads>;

// One thread an anchor.
MCLD_KERNEL(kFactorThreads) factors_kernel(MCLD_PARAMETERS(Factors) p) {
  const int64_t row = int64_t(block_index()) * kFactorThreads + thread_index();
  if (row >= p.rows) return;
  const float positive = p.positive[row], x = p.log_off[row] - positive * p.inverse_temperature;
  const float loss = contrast_loss(x);
  float total = 0;
  for (int i = 0; i < p.count; ++i) {
    const FactorShare& share = p.shares[i];
    const float part = (share.counted && !share.counted[row] ? 0 : share.constant) * (share.factor ? *share.factor : 1);
    const float value = share.by_label ? loss + (positive - p.by_label[row]) * p.inverse_temperature : loss;
    p.values[i * p.pitch + row] = value * part;
    const float weight = part * share.scale * (share.weight ? *share.weight : 1) * p.inverse_temperature;
    total += weight;
    if (share.by_label) p.z[row] = weight;
  }
  const float u = total * contrast_pull(x);
  p.u[row] = u;
  p.s[row] = u * p.scale[row];
}

// One block.
MCLD_KERNEL(kFactorThreads) totals_kernel(MCLD_PARAMETERS(Totals) p) {
  TotalSum::Storage* storage = reinterpret_cast<TotalSum::Storage*>(shared_memory());  // one a part
  float terms[3] = {0, 0, 0};
  for (int i = 0; i < p.count; ++i) {
    float sum = 0;
    for (int64_t k = thread_index(); k < p.width; k += kFactorThreads) sum += p.values[i * p.width + k];
    sum = TotalSum::run(sum, storage[i]);
#pragma unroll
    for (int term = 0; term < 3; ++term) terms[term] += p.part[i] == term ? sum : 0;
  }
  if (thread_index() != 0) return;
  float loss = 0;
#pragma unroll
  for (int term = 0; term < 3; ++term) {
    p.terms[term] = terms[term];
    // A term of weight 0 is not computed.
    if (p.scale[term] != 0) loss += p.scale[term] * (p.weight ? p.weight[term] : 1) * terms[term];
  }
  *p.loss = loss;
}

}  // namespace mcld
