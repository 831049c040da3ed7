#include "positive_cosines.cuh"

namespace mcld {

void positive_cosines(const PositiveCosines& p, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto tag) {
    const dim3 grid(unsigned(tiles_of(p.n, kPositiveWarps)));
    launch(positive_cosines_kernel<typename decltype(tag)::type>, "launch of positive_cosines", grid, kPositiveThreads, 0, stream, p);
  });
}

}  // namespace mcld
