// All that follows product 2 for a chunk of anchors: the sums over the negatives, the cosines with partner and class mean, loss
// and coefficients, and the gradient with the backward of the normalization. One warp an anchor reads its rows twice, the
// second time from cache: the projection of the gradient needs only dot products of the rows, so it is known before the
// gradient is. Nothing of size n x d is written but the gradient.
#pragma once

#include "anchor_loss.cuh"
#include "grad_epilogue.cuh"

namespace mcld {

// kWidth elements a lane at once, neighbours in the gradient; d is a multiple of it.
template <class T, class Out, int kWidth> struct AnchorRow {
  const AnchorEpilogue& p;
  const T *unit, *partner;  // partner, mean: null where there is none
  const float *product, *mean;

  MCLD_DEVICE AnchorRow(const AnchorEpilogue& p, int64_t row) : p(p) {
    const int64_t other = row + p.offset;
    unit = static_cast<const T*>(p.unit) + row * p.pitch;
    partner = other >= 0 && other < p.partner_rows ? static_cast<const T*>(p.partner) + other * p.pitch : nullptr;
    product = p.products + row * p.product_pitch;
    mean = p.class_means ? p.class_means + p.class_index[row] * p.pitch : nullptr;
  }

  // The product, its splits added in order.
  MCLD_DEVICE void load_product(float (&g)[kWidth], int64_t column) const {
    load(g, product + column);
    for (int split = 1; split < p.splits; ++split) {
      float x[kWidth];
      load(x, product + split * p.product_rows * p.product_pitch + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g[i] += x[i];
    }
  }

  MCLD_DEVICE void run(int64_t row) const {
    const int lane = thread_index() % kWarp;
    float of_product = 0, of_partner = 0, of_mean = 0, square = 0;  // dot products with the unit row
#pragma unroll 4
    for (int64_t j = lane * kWidth; j < p.d; j += kWarp * kWidth) {
      float x[kWidth], y[kWidth];
      load(x, unit + j);
      load_product(y, j);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) of_product += y[i] * x[i], square += x[i] * x[i];
      if (partner) {
        load(y, partner + j);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) of_partner += y[i] * x[i];
      }
      if (mean) {
        load(y, mean + j);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) of_mean += y[i] * x[i];
      }
    }
    float sum = 0;
    for (int tile = lane; tile < p.tiles; tile += kWarp) sum += p.tile_sums[tile * p.sums_pitch + row];
    of_product = warp_sum(of_product), of_partner = warp_sum(of_partner), of_mean = warp_sum(of_mean);
    square = warp_sum(square), sum = warp_sum(sum);

    const float neg_lse = sum == 0 ? -infinity() : (log2f(sum) + p.shift) * kLn2, inv_neg_sum = sum == 0 ? 0 : 1 / sum;
    // Without class means the label's positive is the partner.
    const AnchorCoefficients c = anchor_loss(
        p.weights, row, neg_lse, inv_neg_sum, of_partner, mean ? of_mean : of_partner, p.inv_temperature, [&](int i, float part) {
          if (lane == 0) p.per_anchor[i * p.per_anchor_pitch + row] = part;
        });
    const float pair = c.class_mean - c.partner;
    const float dot = c.product * of_product + pair * of_partner - (mean ? c.class_mean * of_mean : 0);
    const float along = projection_quotient(dot, square), inv_norm = p.inv_norm[row];
    Out* const out = static_cast<Out*>(p.out) + row * p.row_stride;
#pragma unroll 4
    for (int64_t j = lane * kWidth; j < p.d; j += kWarp * kWidth) {
      float g[kWidth], x[kWidth], value[kWidth] = {};
      load_product(g, j);
      load(x, unit + j);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g[i] = c.product * g[i] - along * x[i];
      if (partner) {
        load(x, partner + j);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) g[i] += pair * x[i];
      }
      if (mean) {
        load(x, mean + j);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) g[i] -= c.class_mean * x[i];
      }
      if (p.accumulate) load(value, out + j);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) value[i] += g[i] * inv_norm;
      store(out + j, value);
    }
  }
};

template <class T, class Out, int kWidth> MCLD_KERNEL(kGradThreads, 2) anchor_epilogue_kernel(MCLD_PARAMETERS(AnchorEpilogue) p) {
  const int64_t row = int64_t(block_index()) * kGradWarps + thread_index() / kWarp;
  if (row < p.rows) AnchorRow<T, Out, kWidth>(p, row).run(row);
}

// The elements of an access, as `grad_width` has them.
template <class T, class Out> int anchor_width(const AnchorEpilogue& p) {
  GradEpilogue q{};
  q.out = p.out, q.row_stride = p.row_stride, q.column_stride = 1, q.d = p.d, q.pitch = p.pitch;
  q.unit = p.unit, q.partner = p.partner, q.class_means = p.class_means, q.product = p.products;
  q.product_pitch = p.product_pitch;
  return grad_width<T, Out>(q);
}

}  // namespace mcld
