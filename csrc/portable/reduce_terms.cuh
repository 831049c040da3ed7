// The terms and the loss: sums of the anchors' parts, in a fixed order.
#pragma once

#include "numerics.cuh"
#include "sums.cuh"

namespace mcld {

constexpr int kReduceTermsThreads = 256;
constexpr int kMostTerms = sizeof(ReduceTerms().term_weight.item) / sizeof(float);
using TermSum = BlockSum<kReduceTermsThreads>;

// One block.
MCLD_KERNEL(kReduceTermsThreads) reduce_terms_kernel(MCLD_PARAMETERS(ReduceTerms) p) {
  TermSum::Storage* storage = reinterpret_cast<TermSum::Storage*>(shared_memory());  // one a part
  float terms[kMostTerms] = {};
  for (int i = 0; i < p.parts.count; ++i) {
    float sum = 0;
    for (int64_t k = thread_index(); k < p.width; k += kReduceTermsThreads) sum += p.per_anchor[i * p.width + k];
    sum = TermSum::run(sum, storage[i]);
#pragma unroll
    for (int term = 0; term < kMostTerms; ++term) terms[term] += p.parts.item[i] == term ? sum : 0;
  }
  if (thread_index() != 0) return;
  float loss = 0;
#pragma unroll
  for (int term = 0; term < kMostTerms; ++term) {
    if (term >= p.term_weight.count) break;
    p.terms[term] = terms[term];
    const float weight = p.term_weight.item[term];
    // A term of weight 0 is not computed.
    if (weight != 0) loss += weight * (p.weight ? p.weight[term] : 1) * terms[term];
  }
  *p.loss = loss;
}

}  // namespace mcld
