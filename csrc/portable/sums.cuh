// Sums over a warp and over a block, by CUB: its order of additions is fixed, so a sum repeats bitwise. Separate from
// platform.cuh, because CUB's headers take longer to compile than most kernels here. The sums of the 4 lanes that share a row of an mma
// fragment (similarity.cuh, flash.cuh) stay on shuffles, which leave them in all four at once.
#pragma once

#include "platform.cuh"

#ifndef MCLD_HOST_EMULATION

#include <cub/block/block_reduce.cuh>
#include <cub/warp/warp_reduce.cuh>

namespace mcld {

// In every lane.
MCLD_DEVICE float warp_sum(float x) {
  using Reduce = cub::WarpReduce<float>;
  typename Reduce::TempStorage nothing;  // a whole warp is reduced by shuffles
  return __shfl_sync(0xffffffffu, Reduce(nothing).Sum(x), 0);
}

// In thread 0 of kThreads. The storage lies in shared memory; a barrier must stand between two uses of it.
template <int kThreads> struct BlockSum {
  using Storage = typename cub::BlockReduce<float, kThreads>::TempStorage;
  static MCLD_DEVICE float run(float x, Storage& storage) { return cub::BlockReduce<float, kThreads>(storage).Sum(x); }
};

}  // namespace mcld

#endif
