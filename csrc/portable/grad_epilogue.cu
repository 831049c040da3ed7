#include "grad_epilogue.cuh"

#include <stdexcept>

namespace mcld {
namespace {

template <class T, class Out, int kWidth> void launch_rows(const GradEpilogue& p, cudaStream_t stream) {
  const dim3 grid(unsigned(tiles_of(p.rows, kGradWarps)));
  launch(grad_epilogue_rows_kernel<T, Out, kWidth>, "launch of grad_epilogue_rows", grid, kGradThreads, 0, stream, p);
}

template <class T> void launch_projection(const GradEpilogue& p, cudaStream_t stream) {
  if (!grad_reads_vectors<T>(p, kWidest<T>)) {
    throw std::invalid_argument("grad_epilogue: for a gradient by columns, rows of operands, product and class means must be "
                                "aligned to 16 bytes");
  }
  const dim3 grid(unsigned(tiles_of(p.rows, kGradWarps)));
  launch(grad_epilogue_projection_kernel<T>, "launch of grad_epilogue_projection", grid, kGradThreads, 0, stream, p);
}

// A function, not the body of the lambda below: nvcc does not name the types of nested generic lambdas in a launch.
template <class T, class Out> void launch_grad_epilogue(const GradEpilogue& p, cudaStream_t stream) {
  if (!p.projection) {
    const int width = grad_width<T, Out>(p);
    if (width == kWidest<T, Out>) return launch_rows<T, Out, kWidest<T, Out>>(p, stream);
    if (width == 4) return launch_rows<T, Out, 4>(p, stream);
    return launch_rows<T, Out, 1>(p, stream);
  }
  launch_projection<T>(p, stream);
  const dim3 tiles(unsigned(tiles_of(p.d, kGradTile) * tiles_of(p.rows, kGradTile)));
  launch(grad_epilogue_transposed_kernel<T, Out>, "launch of grad_epilogue_transposed", tiles, kGradThreads,
         kGradTile * (kGradTile + 1) * 4, stream, p);
}

}  // namespace

void grad_epilogue(const GradEpilogue& p, Type type, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto operand) {
    with_gradient(operand, type, [&](auto gradient) {
      launch_grad_epilogue<typename decltype(operand)::type, typename decltype(gradient)::type>(p, stream);
    });
  });
}

}  // namespace mcld
