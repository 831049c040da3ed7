#include "row_sums.cuh"

namespace mcld {

void row_sums(const RowSums& p, cudaStream_t stream) {
  const dim3 grid(unsigned(tiles_of(p.rows, kSumThreads)));
  launch(row_sums_kernel, "launch of row_sums", grid, kSumThreads, 0, stream, p);
}

void rescale(const Rescale& p, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(unsigned(p.rows), unsigned(tiles_of(p.exp_pitch, kSumThreads * kWidest<T>)));
    launch(rescale_kernel<T>, "launch of rescale", grid, kSumThreads, 0, stream, p);
  });
}

void combine_splits(const CombineSplits& p, cudaStream_t stream) {
  const dim3 grid(unsigned(p.rows), unsigned(tiles_of(p.pitch, kSumThreads * kWidest<float>)));
  launch(combine_splits_kernel, "launch of combine_splits", grid, kSumThreads, 0, stream, p);
}

}  // namespace mcld
