#include "classes.cuh"

namespace mcld {

void class_means(const ClassMeans& p, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto tag) {
    const dim3 grid(unsigned(p.ranks), unsigned(tiles_of(p.pitch, kClassColumns)));
    launch(class_means_kernel<typename decltype(tag)::type>, "launch of class_means", grid, kClassThreads,
           kClassWarps * kClassColumns * 4, stream, p);
  });
}

void positives(const Positives& p, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto tag) {
    const dim3 grid(unsigned(tiles_of(p.n, kClassWarps)));
    launch(positives_kernel<typename decltype(tag)::type>, "launch of positives", grid, kClassThreads, 0, stream, p);
  });
}

}  // namespace mcld
