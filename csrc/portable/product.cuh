// Product 2: E K, or E^T K, a GEMM with fp32 sums. Chunks of anchors accumulate in the order of their launches.
#pragma once

#include "tile.cuh"

namespace mcld {

template <Precision kPrecision, int kTile, bool kTransposed> struct ProductTile {
  using T = Operand<kPrecision>;
  using Core = Tile<kPrecision, kTile, kTransposed ? Major::result : Major::contraction, Major::result>;
  static constexpr int kThreads = Core::kThreads, kBlocks = Core::kBlocks;
  static constexpr int kSharedBytes = Core::kSharedBytes;

  MCLD_DEVICE static void run(const Product& p, int64_t index) {
    int64_t tile_row, tile_column;
    tile_at(index, p.rows / kTile, p.pitch / kTile, tile_row, tile_column);
    const int64_t first_row = tile_row * kTile, first_column = tile_column * kTile;
    Core core;
    core.run(shared_memory(), static_cast<const T*>(p.exponentials) + first_row * (kTransposed ? 1 : p.exp_pitch), p.exp_pitch,
             static_cast<const T*>(p.operand) + first_column, p.pitch, p.contraction / Core::kSlice);
    const float alpha = p.alpha ? *p.alpha : 1;
#pragma unroll
    for (int mt = 0; mt < Core::kM; ++mt)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* out = p.out + (first_row + Core::row(mt, half * 2)) * p.pitch + first_column;
#pragma unroll
        for (int nt = 0; nt < Core::kN; ++nt) {
          float2* at = reinterpret_cast<float2*>(out + Core::column(nt, 0));
          const float2 before = p.accumulate ? *at : make_float2(0, 0);
          *at = make_float2(before.x + alpha * core.sums[mt][nt][half * 2], before.y + alpha * core.sums[mt][nt][half * 2 + 1]);
        }
      }
  }
};

template <Precision kPrecision, int kTile, bool kTransposed>
MCLD_KERNEL(ProductTile<kPrecision, kTile, kTransposed>::kThreads, ProductTile<kPrecision, kTile, kTransposed>::kBlocks)
product_kernel(MCLD_PARAMETERS(Product) p) {
  ProductTile<kPrecision, kTile, kTransposed>::run(p, block_index());
}

}  // namespace mcld
