#include "finish.cuh"

namespace mcld {
namespace {

template <class T, class Out, int kWidth> void launch_rows(const Finish& p, cudaStream_t stream) {
  const dim3 grid(unsigned(tiles_of(p.rows, kFinishWarps)));
  launch(finish_rows_kernel<T, Out, kWidth>, "launch of finish_rows", grid, kFinishThreads, 0, stream, p);
}

template <class T, int kWidth> void launch_dots(const Finish& p, cudaStream_t stream) {
  const dim3 grid(unsigned(tiles_of(p.rows, kFinishWarps)));
  launch(finish_dots_kernel<T, kWidth>, "launch of finish_dots", grid, kFinishThreads, 0, stream, p);
}

// A function, not the body of the lambda below: nvcc does not name the types of nested generic lambdas in a launch.
template <class T, class Out> void launch_finish(const Finish& p, cudaStream_t stream) {
  if (!p.dots) {
    const int width = finish_width<T, Out>(p);
    if (width == kWidest<T, Out>) return launch_rows<T, Out, kWidest<T, Out>>(p, stream);
    if (width == 4) return launch_rows<T, Out, 4>(p, stream);
    return launch_rows<T, Out, 1>(p, stream);
  }
  if (finish_reads_vectors<T>(p, kWidest<T>)) {
    launch_dots<T, kWidest<T>>(p, stream);
  } else {
    launch_dots<T, 1>(p, stream);
  }
  const dim3 tiles(unsigned(tiles_of(p.d, kFinishTile)), unsigned(tiles_of(p.rows, kFinishTile)));
  launch(finish_transposed_kernel<T, Out>, "launch of finish_transposed", tiles, kFinishThreads,
         kFinishTile * (kFinishTile + 1) * 4, stream, p);
}

}  // namespace

void finish(const Finish& p, Type type, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto operand) {
    with_gradient(type, [&](auto gradient) {
      launch_finish<typename decltype(operand)::type, typename decltype(gradient)::type>(p, stream);
    });
  });
}

}  // namespace mcld
