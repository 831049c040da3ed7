#include "small.cuh"

namespace mcld {
namespace {

template <class In, class Out, int kWidth> void launch_normalise(const Small& p, cudaStream_t stream) {
  int64_t blocks = p.target ? 1 : 0;
  for (int i = 0; i < p.count; ++i) {
    const SmallProblem& q = p.problems[i];
    if (i == 0 || q.a != p.problems[i - 1].a) blocks += tiles_of(q.n, 128) * 128 / (q.columns ? kColumnTile : kNormaliseWarps);
  }
  launch(small_normalise_kernel<In, Out, kWidth>, "launch of small_normalise", dim3(unsigned(blocks), 2), kSmallThreads,
         (kColumnTile + kBatchTile * (kColumnTile + 1)) * 4, stream, p);
}

template <class In, class Out> void launch_normalise(const Small& p, cudaStream_t stream) {
  bool wide = true;  // rows of both logits
  for (int i = 0; i < p.count; ++i) {
    for (const bool student : {true, false}) {
      const Normalise side = small_side(p, p.problems[i], student);
      wide &= p.problems[i].columns || normalise_width<In, Out>(side) == kWidest<In, Out>;
    }
  }
  if (wide) {
    launch_normalise<In, Out, kWidest<In, Out>>(p, stream);
  } else {
    launch_normalise<In, Out, 1>(p, stream);
  }
}

bool turned(const Small& p) {
  bool found = false;
  for (int i = 0; i < p.count; ++i) found |= p.problems[i].column_sums != nullptr;
  return found;
}

template <Precision kPrecision> void launch_similarity(const Small& p, cudaStream_t stream) {
  using Kernel = SimilarityTile<kPrecision, kSmallTile>;
  int64_t blocks = 0;
  for (int i = 0; i < p.count; ++i) blocks += tiles_of(p.problems[i].n, 128) * tiles_of(p.problems[i].n, 128) * 4;
  if (p.counts) blocks += p.classes * tiles_of(p.problems[0].pitch, Kernel::kThreads * 4);
  launch(small_similarity_kernel<kPrecision>, "launch of small_similarity", dim3(unsigned(blocks)), Kernel::kThreads,
         Kernel::kSharedBytes, stream, p);
}

template <Precision kPrecision> void launch_product(const Small& p, cudaStream_t stream) {
  using Kernel = ProductTile<kPrecision, kSmallTile, false>;
  int64_t blocks = 0;
  for (int i = 0; i < p.count; ++i) {
    const SmallProblem& q = p.problems[i];
    blocks += tiles_of(q.n, 128) * 2 * (q.pitch / kSmallTile) * small_products(q);
  }
  launch(small_product_kernel<kPrecision>, "launch of small_product", dim3(unsigned(blocks)), Kernel::kThreads,
         Kernel::kSharedBytes, stream, p);
}

// A warp a row of every problem.
dim3 row_grid(const Small& p) {
  int64_t rows = 0;
  for (int i = 0; i < p.count; ++i) rows += small_rows(p.problems[i]);
  return dim3(unsigned(tiles_of(rows, kSmallWarps)));
}

template <class T> void launch_factors(const Small& p, cudaStream_t stream) {
  const dim3 grid = row_grid(p);
  if (turned(p)) {
    launch(small_factors_kernel<T, true>, "launch of small_factors", grid, kSmallThreads, 0, stream, p);
  } else {
    launch(small_factors_kernel<T, false>, "launch of small_factors", grid, kSmallThreads, 0, stream, p);
  }
}

template <class T> void launch_dots(const Small& p, cudaStream_t stream) {
  launch(small_dots_kernel<T>, "launch of small_dots", row_grid(p), kSmallThreads, 0, stream, p);
}

template <class T, class Out> void launch_write(const Small& p, cudaStream_t stream) {
  const int64_t tiles = p.gradient ? tiles_of(p.batch, kFinishTile) * tiles_of(p.classes, kFinishTile) : 0;
  launch(small_write_kernel<T, Out>, "launch of small_write", dim3(unsigned(1 + tiles)), kSmallThreads,
         kFinishTile * (kFinishTile + 1) * 4, stream, p);
}

}  // namespace

void small(const Small& p, Type logits, Type gradient, Precision precision, cudaStream_t stream) {
  with_logits(logits, precision, [&](auto in, auto operand) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(operand)::type;
    if constexpr (std::is_same_v<In, float> || std::is_same_v<In, Out>) {
      launch_normalise<In, Out>(p, stream);
    } else {
      throw std::invalid_argument("small: 16-bit logits are the operands");
    }
  });
  with_precision(precision, [&](auto tag) {
    constexpr Precision kPrecision = decltype(tag)::value;
    using T = Operand<kPrecision>;
    launch_similarity<kPrecision>(p, stream);
    if (turned(p)) {
      launch_factors<T>(p, stream);
      if (p.gradient) launch_product<kPrecision>(p, stream), launch_dots<T>(p, stream);
    } else {
      if (p.gradient) launch_product<kPrecision>(p, stream);
      launch_factors<T>(p, stream);
    }
    with_gradient(gradient, [&](auto out) { launch_write<T, typename decltype(out)::type>(p, stream); });
  });
}

}  // namespace mcld
