#include "similarity.cuh"

namespace mcld {

void similarity(const Similarity& p, Precision precision, int tile, cudaStream_t stream) {
  with_precision(precision, [&](auto tag) {
    constexpr Precision kPrecision = decltype(tag)::value;
    const dim3 grid(unsigned(p.padded_rows / tile * (p.pitch_e / tile)));
    if (tile == 128) {
      using Kernel = SimilarityTile<kPrecision, 128>;
      launch(similarity_kernel<kPrecision, 128>, "launch of similarity", grid, Kernel::kThreads, Kernel::kSharedBytes, stream, p);
    } else {
      using Kernel = SimilarityTile<kPrecision, 64>;
      launch(similarity_kernel<kPrecision, 64>, "launch of similarity", grid, Kernel::kThreads, Kernel::kSharedBytes, stream, p);
    }
  });
}

}  // namespace mcld
