#include "factors.cuh"

namespace mcld {

void factors(const Factors& p, cudaStream_t stream) {
  const dim3 grid(unsigned(tiles_of(p.rows, kFactorThreads)));
  launch(factors_kernel, "launch of factors", grid, kFactorThreads, 0, stream, p);
}

void totals(const Totals& p, cudaStream_t stream) {
  launch(totals_kernel, "launch of totals", dim3(1), kFactorThreads, p.count * int(sizeof(TotalSum::Storage)), stream, p);
}

}  // namespace mcld
