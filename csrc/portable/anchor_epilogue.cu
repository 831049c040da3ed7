#include "anchor_epilogue.cuh"

namespace mcld {
namespace {

template <class T, class Out, int kWidth> void start(const AnchorEpilogue& p, cudaStream_t stream) {
  const dim3 grid(unsigned(tiles_of(p.rows, kGradWarps)));
  launch(anchor_epilogue_kernel<T, Out, kWidth>, "launch of anchor_epilogue", grid, kGradThreads, 0, stream, p);
}

template <class T, class Out> void by_width(const AnchorEpilogue& p, cudaStream_t stream) {
  const int width = anchor_width<T, Out>(p);
  if (width == kWidest<T, Out>) return start<T, Out, kWidest<T, Out>>(p, stream);
  if (width == 4) return start<T, Out, 4>(p, stream);
  return start<T, Out, 1>(p, stream);
}

}  // namespace

void anchor_epilogue(const AnchorEpilogue& p, Type type, Precision precision, cudaStream_t stream) {
  with_operand(precision, [&](auto operand) {
    with_gradient(operand, type, [&](auto gradient) {
      by_width<typename decltype(operand)::type, typename decltype(gradient)::type>(p, stream);
    });
  });
}

}  // namespace mcld
