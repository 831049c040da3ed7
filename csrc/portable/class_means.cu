#include "class_means.cuh"

namespace mcld {

void class_means(const ClassMeans& p, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto tag) {
    const dim3 grid(unsigned(p.num_classes_present), unsigned(tiles_of(p.pitch, kClassMeansColumns)));
    launch(class_means_kernel<typename decltype(tag)::type>, "launch of class_means", grid, kClassMeansThreads,
           kClassMeansWarps * kClassMeansColumns * 4, stream, p);
  });
}

}  // namespace mcld
