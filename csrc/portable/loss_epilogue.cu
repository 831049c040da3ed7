#include "loss_epilogue.cuh"

namespace mcld {

void loss_epilogue(const LossEpilogue& p, cudaStream_t stream) {
  const dim3 grid(unsigned(tiles_of(p.rows, kLossThreads)));
  launch(loss_epilogue_kernel, "launch of loss_epilogue", grid, kLossThreads, 0, stream, p);
}

}  // namespace mcld
