#include "reduce.cuh"

namespace mcld {

void statistics(const Statistics& p, cudaStream_t stream) {
  const dim3 grid(unsigned(tiles_of(p.rows, kReduceThreads)));
  launch(statistics_kernel, "launch of statistics", grid, kReduceThreads, 0, stream, p);
}

void rescale(const Rescale& p, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(unsigned(p.rows), unsigned(tiles_of(p.pitch_e, kReduceThreads * kWidest<T>)));
    launch(rescale_kernel<T>, "launch of rescale", grid, kReduceThreads, 0, stream, p);
  });
}

void scale_rows(const ScaleRows& p, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(unsigned(p.padded_rows), unsigned(tiles_of(p.pitch, kReduceThreads * kWidest<T>)));
    launch(scale_rows_kernel<T>, "launch of scale_rows", grid, kReduceThreads, 0, stream, p);
  });
}

void combine(const Combine& p, cudaStream_t stream) {
  const dim3 grid(unsigned(p.rows), unsigned(tiles_of(p.pitch, kReduceThreads * kWidest<float>)));
  launch(combine_kernel, "launch of combine", grid, kReduceThreads, 0, stream, p);
}

}  // namespace mcld
