#include "reduce_terms.cuh"

namespace mcld {

void reduce_terms(const ReduceTerms& p, cudaStream_t stream) {
  launch(reduce_terms_kernel, "launch of reduce_terms", dim3(1), kReduceTermsThreads,
         p.parts.count * int(sizeof(TermSum::Storage)), stream, p);
}

}  // namespace mcld
