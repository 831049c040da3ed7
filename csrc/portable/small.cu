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

template <Precision kPrecision> void launch_products(const Small& p, cudaStream_t stream) {
  using First = SimilarityTile<kPrecision, kSmallTile>;
  using Second = ProductTile<kPrecision, kSmallTile, false>;
  int64_t first = 0, second = 0;
  for (int i = 0; i < p.count; ++i) {
    const int64_t tiles = tiles_of(p.problems[i].n, 128) * 2;
    first += tiles * tiles;
    second += tiles * (p.problems[i].pitch / kSmallTile);
  }
  if (p.counts) first += p.classes * tiles_of(p.problems[0].pitch, First::kThreads * 4);
  launch(small_similarity_kernel<kPrecision>, "launch of small_similarity", dim3(unsigned(first)), First::kThreads,
         First::kSharedBytes, stream, p);
  if (!p.gradient) return;
  launch(small_product_kernel<kPrecision>, "launch of small_product", dim3(unsigned(second)), Second::kThreads,
         Second::kSharedBytes, stream, p);
}

template <class T, class Out> void launch_finish(const Small& p, cudaStream_t stream) {
  int64_t rows = 0;
  for (int i = 0; i < p.count; ++i) rows += p.problems[i].n;
  launch(small_factors_kernel<T>, "launch of small_factors", dim3(unsigned(tiles_of(rows, kSmallWarps))), kSmallThreads, 0,
         stream, p);
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
  with_precision(precision, [&](auto tag) { launch_products<decltype(tag)::value>(p, stream); });
  with_operand(precision, [&](auto operand) {
    with_gradient(gradient, [&](auto out) {
      launch_finish<typename decltype(operand)::type, typename decltype(out)::type>(p, stream);
    });
  });
}

}  // namespace mcld
