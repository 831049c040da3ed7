#include "scale_rows.cuh"

namespace mcld {

void scale_rows(const ScaleRows& p, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(unsigned(p.padded_rows), unsigned(tiles_of(p.pitch, kScaleThreads * kWidest<T>)));
    launch(scale_rows_kernel<T>, "launch of scale_rows", grid, kScaleThreads, 0, stream, p);
  });
}

}  // namespace mcld
