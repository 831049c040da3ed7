#include "low_latency.cuh"

namespace mcld {
namespace {

template <class In, class Out, int kWidth> void launch_normalize(const LowLatency& p, cudaStream_t stream) {
  int64_t blocks = p.target ? 1 : 0;
  for (int i = 0; i < p.matrices.count; ++i) {
    const LowLatencyMatrix& q = p.matrices.item[i];
    if (i == 0 || q.student != p.matrices.item[i - 1].student) {
      blocks += padded_rows(q.n) / (q.columns ? kColumnTile : kNormalizeWarps);
    }
  }
  launch(low_latency_normalize_kernel<In, Out, kWidth>, "launch of low_latency_normalize", dim3(unsigned(blocks), 2), kLowLatencyThreads,
         (kColumnTile + kBatchTile * (kColumnTile + 1)) * 4, stream, p);
}

template <class In, class Out> void launch_normalize(const LowLatency& p, cudaStream_t stream) {
  bool wide = true;  // rows of both logits
  for (int i = 0; i < p.matrices.count; ++i) {
    for (const bool student : {true, false}) {
      const Normalize side = matrix_side(p, p.matrices.item[i], student);
      wide &= p.matrices.item[i].columns || normalize_width<In, Out>(side) == kWidest<In, Out>;
    }
  }
  if (wide) {
    launch_normalize<In, Out, kWidest<In, Out>>(p, stream);
  } else {
    launch_normalize<In, Out, 1>(p, stream);
  }
}

bool has_teacher_anchors(const LowLatency& p) {
  bool result = false;
  for (int i = 0; i < p.matrices.count; ++i) result |= p.matrices.item[i].column_sums != nullptr;
  return result;
}

template <Precision kPrecision> void launch_similarity(const LowLatency& p, cudaStream_t stream) {
  using Kernel = SimilarityTile<kPrecision, kLowLatencyTile>;
  int64_t blocks = 0;
  for (int i = 0; i < p.matrices.count; ++i) {
    const int64_t tiles = padded_rows(p.matrices.item[i].n) / kLowLatencyTile;
    blocks += tiles * tiles;
  }
  if (p.counts) blocks += p.batch;  // the class means
  launch_dependent(p.dependent, low_latency_similarity_kernel<kPrecision>, "launch of low_latency_similarity", dim3(unsigned(blocks)), Kernel::kThreads,
         Kernel::kSharedBytes, stream, p);
}

template <Precision kPrecision> void launch_product(const LowLatency& p, cudaStream_t stream) {
  using Kernel = ProductTile<kPrecision, kLowLatencyTile, false>;
  int64_t blocks = 0;
  for (int i = 0; i < p.matrices.count; ++i) {
    const LowLatencyMatrix& q = p.matrices.item[i];
    blocks += padded_rows(q.n) / kLowLatencyTile * (q.pitch / kLowLatencyTile) * product_count(q);
  }
  launch_dependent(p.dependent, low_latency_product_kernel<kPrecision>, "launch of low_latency_product", dim3(unsigned(blocks)), Kernel::kThreads,
         Kernel::kSharedBytes, stream, p);
}

// A warp for each row of every matrix.
dim3 row_grid(const LowLatency& p) {
  int64_t rows = 0;
  for (int i = 0; i < p.matrices.count; ++i) rows += loss_rows(p.matrices.item[i]);
  return dim3(unsigned(tiles_of(rows, kLowLatencyWarps)));
}

template <class T> void launch_loss(const LowLatency& p, cudaStream_t stream) {
  const dim3 grid = row_grid(p);
  if constexpr (!std::is_same_v<T, fp16>) {
    if (has_teacher_anchors(p)) {
      return launch_dependent(p.dependent, low_latency_loss_kernel<T, true>, "launch of low_latency_loss", grid, kLowLatencyThreads, 0, stream, p);
    }
  }
  launch_dependent(p.dependent, low_latency_loss_kernel<T, false>, "launch of low_latency_loss", grid, kLowLatencyThreads, 0, stream, p);
}

template <class T> void launch_projection(const LowLatency& p, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, fp16>) {
    launch_dependent(p.dependent, low_latency_projection_kernel<T>, "launch of low_latency_projection", row_grid(p), kLowLatencyThreads, 0, stream, p);
  }
}

// A gradient in bf16 is that of logits in bf16, which are the operands.
template <class T> void launch_outputs(const LowLatency& p, Type gradient, cudaStream_t stream) {
  const int64_t tiles = p.gradient ? tiles_of(p.batch, kGradTile) * tiles_of(p.num_classes, kGradTile) : 0;
  const auto start = [&](auto kernel) {
    launch_dependent(p.dependent, kernel, "launch of low_latency_outputs", dim3(unsigned(1 + tiles)), kLowLatencyThreads,
                     kGradTile * (kGradTile + 1) * 4, stream, p);
  };
  if constexpr (std::is_same_v<T, bf16>) {
    if (gradient == Type::bf16) return start(low_latency_outputs_kernel<T, bf16>);
  }
  start(low_latency_outputs_kernel<T, float>);
}

}  // namespace

void low_latency(const LowLatency& p, Type logits, Type gradient, Precision precision, cudaStream_t stream) {
  if (precision == Precision::fp16 && has_teacher_anchors(p)) {
    throw std::invalid_argument("low_latency: the coefficients of teacher anchors have no range in fp16");
  }
  if (gradient != (logits == Type::bf16 ? Type::bf16 : Type::fp32)) {
    throw std::invalid_argument("low_latency: the gradient is held in bf16 for bf16 logits, else in fp32");
  }
  with_logits(logits, precision, [&](auto in, auto operand) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(operand)::type;
    if constexpr (std::is_same_v<In, float> || std::is_same_v<In, Out>) {
      launch_normalize<In, Out>(p, stream);
    } else {
      throw std::invalid_argument("low_latency: 16-bit logits are the operands");
    }
  });
  with_precision(precision, [&](auto tag) {
    constexpr Precision kPrecision = decltype(tag)::value;
    using T = Operand<kPrecision>;
    launch_similarity<kPrecision>(p, stream);
    if (has_teacher_anchors(p)) {
      launch_loss<T>(p, stream);
      if (p.gradient) launch_product<kPrecision>(p, stream), launch_projection<T>(p, stream);
    } else {
      if (p.gradient) launch_product<kPrecision>(p, stream);
      launch_loss<T>(p, stream);
    }
    launch_outputs<T>(p, gradient, stream);
  });
}

}  // namespace mcld
