#include "product.cuh"

namespace mcld {
namespace {

template <Precision kPrecision, int kTile, bool kTransposed> void start(const Product& p, cudaStream_t stream) {
  using Kernel = ProductTile<kPrecision, kTile, kTransposed>;
  const dim3 grid(unsigned(p.rows / kTile * (p.pitch / kTile)));
  launch(product_kernel<kPrecision, kTile, kTransposed>, "launch of product", grid, Kernel::kThreads, Kernel::kSharedBytes,
         stream, p);
}

}  // namespace

void product(const Product& p, Precision precision, int tile, cudaStream_t stream) {
  with_precision(precision, [&](auto tag) {
    constexpr Precision kPrecision = decltype(tag)::value;
    if (tile == kLargeTile) {
      p.transposed ? start<kPrecision, kLargeTile, true>(p, stream) : start<kPrecision, kLargeTile, false>(p, stream);
    } else {
      p.transposed ? start<kPrecision, kSmallTile, true>(p, stream) : start<kPrecision, kSmallTile, false>(p, stream);
    }
  });
}

}  // namespace mcld
