#include "similarity.cuh"

namespace mcld {
namespace {

template <Precision kPrecision, int kTile> void start(const Similarity& p, cudaStream_t stream) {
  using Kernel = SimilarityTile<kPrecision, kTile>;
  const unsigned tiles = unsigned(p.padded_rows / kTile * (p.exp_pitch / kTile));
  if (p.splits > 1) {
    launch(similarity_part_kernel<kPrecision, kTile>, "launch of similarity_part", dim3(tiles, unsigned(p.splits)),
           Kernel::kThreads, Kernel::kSharedBytes, stream, p);
  }
  launch(similarity_kernel<kPrecision, kTile>, "launch of similarity", dim3(tiles), Kernel::kThreads, Kernel::kSharedBytes,
         stream, p);
}

}  // namespace

void similarity(const Similarity& p, Precision precision, int tile, cudaStream_t stream) {
  with_precision(precision, [&](auto tag) {
    constexpr Precision kPrecision = decltype(tag)::value;
    tile == kLargeTile ? start<kPrecision, kLargeTile>(p, stream) : start<kPrecision, kSmallTile>(p, stream);
  });
}

}  // namespace mcld
