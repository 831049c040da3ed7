#include "finish.cuh"

namespace mcld {
namespace {

// A function, not the body of the lambda below: nvcc does not name the types of nested generic lambdas in a launch.
template <class T, class Out> void launch_finish(const Finish& p, cudaStream_t stream) {
  const dim3 rows(unsigned(tiles_of(p.rows, kFinishWarps)));
  if (!p.dots) {
    launch(finish_rows_kernel<T, Out>, "launch of finish_rows", rows, kFinishThreads, 0, stream, p);
    return;
  }
  launch(finish_dots_kernel<T>, "launch of finish_dots", rows, kFinishThreads, 0, stream, p);
  const dim3 tiles(unsigned(tiles_of(p.d, kFinishTile)), unsigned(tiles_of(p.rows, kFinishTile)));
  launch(finish_transposed_kernel<T, Out>, "launch of finish_transposed", tiles, kFinishThreads,
         kFinishTile * (kFinishTile + 1) * 4, stream, p);
}

}  // namespace

void finish(const Finish& p, Type type, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto operand) {
    with_type(type, [&](auto gradient) {
      launch_finish<typename decltype(operand)::type, typename decltype(gradient)::type>(p, stream);
    });
  });
}

}  // namespace mcld
