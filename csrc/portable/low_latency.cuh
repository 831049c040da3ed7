// The low-latency path: loss and gradient of all terms in five launches that a graph can replay, for a batch and classes that
// one wave of blocks holds. Each launch does its step for every similarity matrix, the rows' and the columns': (1) operands
// and labels, (2) exponentials E, their sums by row and the class means, (3) E K, (4) one warp an anchor: its loss, its
// coefficients and its projection, (5) the gradient of all terms in one write, and the sums of the loss. Nothing of size C x B
// is read twice by the same step, and no torch operation stands between.
//
// E has a row for each student row and a column for each teacher row, whichever side anchors. A teacher anchor i sums a column
// of E and adds E_ji c_i K_i to the gradient by student row j, c_i its product_coef: the gradient is E times the teacher rows
// weighted by c, no transpose. c needs the sums, so (4) then precedes (3), and the projections take a launch of their own.
#pragma once

#include <type_traits>

#include "grad_epilogue.cuh"
#include "normalize.cuh"
#include "product.cuh"
#include "similarity.cuh"
#include "sums.cuh"

namespace mcld {

constexpr int kLowLatencyThreads = 256, kLowLatencyWarps = kLowLatencyThreads / kWarp;
using LowLatencySum = BlockSum<kLowLatencyThreads>;
static_assert(kLowLatencyLimit <= kShortRow, "rows are kept in registers");

MCLD_HOST_DEVICE int64_t padded_rows(int64_t n) { return (n + kRowPadding - 1) / kRowPadding * kRowPadding; }

// --- (1) operands and labels

MCLD_HOST_DEVICE Normalize matrix_side(const LowLatency& p, const LowLatencyMatrix& q, bool student) {
  const int64_t* strides = student ? p.student_strides : p.teacher_strides;
  Normalize side{};
  side.x = student ? p.student : p.teacher;
  side.row_stride = strides[q.columns ? 1 : 0];
  side.column_stride = strides[q.columns ? 0 : 1];
  side.out = student ? q.student : q.teacher;
  side.inv_norm = student ? q.student_inv_norm : q.teacher_inv_norm;
  side.n = q.n, side.d = q.d, side.padded_rows = padded_rows(q.n), side.pitch = q.pitch, side.eps = p.eps;
  return side;
}

// Block x: 8 rows of a matrix, or 32 columns; the last one: the labels. Block y: student, teacher.
template <class In, class Out, int kWidth> MCLD_KERNEL(kLowLatencyThreads, 2) low_latency_normalize_kernel(MCLD_PARAMETERS(LowLatency) p) {
  let_launch_after_begin();
  int64_t block = block_index();
  float* shared = reinterpret_cast<float*>(shared_memory());
  for (int i = 0; i < p.matrices.count; ++i) {
    const LowLatencyMatrix& q = p.matrices.item[i];
    // Two temperatures of the row terms share their operands.
    if (i > 0 && q.student == p.matrices.item[i - 1].student) continue;
    const int64_t blocks = padded_rows(q.n) / (q.columns ? kColumnTile : kNormalizeWarps);
    if (block >= blocks) {
      block -= blocks;
      continue;
    }
    const Normalize side = matrix_side(p, q, block_index_y() == 0);
    if (!q.columns) {
      normalize_row<In, Out, kWidth, true>(side, block * kNormalizeWarps + thread_index() / kWarp);
      return;
    }
    const int64_t first_i = block * kColumnTile;
    float* inv_norms = shared;           // (32,)
    float* tile = shared + kColumnTile;  // (64, 33)
    const float squares = column_squares<In>(side, tile, first_i, 0, side.d);
    if (thread_index() < kColumnTile) {
      inv_norms[thread_index()] = inv_norm_of(squares, side.eps);
      if (first_i + thread_index() < side.n) side.inv_norm[first_i + thread_index()] = inv_norms[thread_index()];
    }
    for (int64_t first_j = 0; first_j < side.pitch; first_j += kBatchTile) {
      sync_block();  // the tile's last readers are done
      write_columns<In, Out>(side, inv_norms, tile, first_i, first_j);
    }
    return;
  }
  if (block_index_y() != 0 || !p.target) return;
  // Only the classes that are present are counted.
  for (int64_t c = thread_index(); c < p.num_classes; c += kLowLatencyThreads) p.counts[c] = 0;
  float valid = 0, bad = 0;
  for (int64_t i = thread_index(); i < p.batch; i += kLowLatencyThreads) {
    const Label label = Label::of(p.target[i], p.num_classes, p.ignore_index);
    p.key[i] = label.ignored ? -1 - i : label.class_id;
    valid += label.ignored ? 0 : 1;
    bad += label.bad ? 1 : 0;
  }
  LowLatencySum::Storage* storage = reinterpret_cast<LowLatencySum::Storage*>(shared);
  valid = LowLatencySum::run(valid, storage[0]);
  bad = LowLatencySum::run(bad, storage[1]);
  if (thread_index() == 0) {
    *p.num_valid = valid;
    *p.poison = bad > 0 ? not_a_number() : 1;
  }
}

// --- (2) E and the class means

// The mean of the teacher rows of row j's class, by the block whose row is the first of them; the others have nothing to do.
template <class T, int kThreads> MCLD_DEVICE void class_mean(const LowLatency& p, const LowLatencyMatrix& q, int64_t j) {
  constexpr int kWarps = kThreads / kWarp, kRounds = kLowLatencyLimit / kThreads;
  int* const rows = reinterpret_cast<int*>(shared_memory());  // (kLowLatencyLimit,) of the class, in their order
  int* const found = rows + kLowLatencyLimit;                  // (kRounds, kWarps)
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int64_t key = p.key[j];
  if (key < 0) return;
  uint32_t matches[kRounds];  // of the warp's 32 rows in each round
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t other = round * kThreads + thread_index();
    matches[round] = ballot(other < p.batch && p.key[other] == key);
    if (lane == 0) found[round * kWarps + warp] = count_bits(matches[round]);
  }
  sync_block();
  int count = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp && (matches[round] >> lane & 1)) {
        rows[count + count_bits(matches[round] & ((1u << lane) - 1))] = round * kThreads + thread_index();
      }
      count += found[round * kWarps + w];
    }
  }
  sync_block();
  if (rows[0] != j) return;
  if (thread_index() == 0) p.counts[key] = float(count);
  if (!p.class_means) return;
  for (int64_t column = thread_index() * 4; column < q.pitch; column += kThreads * 4) {
    float sum[4] = {0, 0, 0, 0};
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      float x[4];
      load(x, static_cast<const T*>(q.teacher) + rows[k] * q.pitch + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += x[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] /= float(count);
    store(p.class_means + key * q.pitch + column, sum);
  }
}

template <Precision kPrecision>
MCLD_KERNEL(SimilarityTile<kPrecision, kLowLatencyTile>::kThreads, SimilarityTile<kPrecision, kLowLatencyTile>::kBlocks)
low_latency_similarity_kernel(MCLD_PARAMETERS(LowLatency) p) {
  await_launch_before();
  using Kernel = SimilarityTile<kPrecision, kLowLatencyTile>;
  int64_t block = block_index();
  for (int i = 0; i < p.matrices.count; ++i) {
    const LowLatencyMatrix& q = p.matrices.item[i];
    const int64_t padded = padded_rows(q.n), blocks = (padded / kLowLatencyTile) * (padded / kLowLatencyTile);
    if (block >= blocks) {
      block -= blocks;
      continue;
    }
    Similarity s{};
    s.anchors = q.student, s.candidates = q.teacher, s.exponentials = q.exponentials;
    s.row_sums = q.row_sums, s.column_sums = q.column_sums;
    s.anchor_keys = s.candidate_keys = q.masked ? p.key : nullptr;
    s.rows = s.m = q.n, s.pitch = q.pitch, s.exp_pitch = s.padded_rows = padded;
    s.scale_log2 = s.shift = q.inv_temperature * kLog2E;
    if (kPrecision == Precision::fp16) s.shift -= kFp16Lift;
    Kernel::run(s, block);
    return;
  }
  class_mean<Operand<kPrecision>, Kernel::kThreads>(p, p.matrices.item[0], block);
}

// --- (3) E K

MCLD_HOST_DEVICE int product_count(const LowLatencyMatrix& q) { return (q.product ? 1 : 0) + (q.weighted_product ? 1 : 0); }

template <Precision kPrecision>
MCLD_KERNEL(ProductTile<kPrecision, kLowLatencyTile, false>::kThreads, ProductTile<kPrecision, kLowLatencyTile, false>::kBlocks)
low_latency_product_kernel(MCLD_PARAMETERS(LowLatency) p) {
  await_launch_before();
  int64_t block = block_index();
  for (int i = 0; i < p.matrices.count; ++i) {
    const LowLatencyMatrix& q = p.matrices.item[i];
    const int64_t padded = padded_rows(q.n), blocks = (padded / kLowLatencyTile) * (q.pitch / kLowLatencyTile);
    if (block >= blocks * product_count(q)) {
      block -= blocks * product_count(q);
      continue;
    }
    const bool weighted = !q.product || block >= blocks;
    Product product{};
    product.exponentials = q.exponentials, product.operand = weighted ? q.weighted_teacher : q.teacher;
    product.out = weighted ? q.weighted_product : q.product;
    product.rows = product.contraction = product.exp_pitch = padded, product.pitch = q.pitch;
    ProductTile<kPrecision, kLowLatencyTile, false>::run(product, block % blocks);
    return;
  }
}

// --- (4) an anchor's loss, coefficients and projection

MCLD_DEVICE GradEpilogue matrix_gradient(const LowLatency& p, const LowLatencyMatrix& q) {
  GradEpilogue f{};
  f.unit = q.student, f.partner = q.teacher, f.inv_norm = q.student_inv_norm;
  f.product = q.product ? q.product : q.weighted_product;
  f.product_coef = q.product_coef, f.partner_coef = q.partner_coef;
  f.class_mean_coef = q.terms[1] ? q.class_mean_coef : nullptr, f.projection = q.projection;
  f.class_means = q.terms[1] ? p.class_means : nullptr, f.class_index = p.key;
  f.rows = q.n, f.d = q.d, f.pitch = f.product_pitch = q.pitch, f.partner_rows = q.n;
  return f;
}

template <class T> MCLD_DEVICE GradRow<T> grad_row(const LowLatencyMatrix& q, const GradEpilogue& f, int64_t row) {
  GradRow<T> result(f, row);
  if (q.product && q.weighted_product) result.second_product = q.weighted_product + row * q.pitch;
  return result;
}

template <class T, class U> MCLD_DEVICE float row_dot(const T* a, const U* b, int64_t pitch) {
  constexpr int kWidth = kWidest<T>;
  float sum = 0;
  for (int64_t column = thread_index() % kWarp * kWidth; column < pitch; column += kWarp * kWidth) {
    float x[kWidth], y[kWidth];
    load(x, a + column);
    load(y, b + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += x[i] * y[i];
  }
  return warp_sum(sum);
}

// An anchor's loss against one side's negatives, and the coefficients of its gradient.
struct AnchorLoss {
  float loss, partner_coef, product_coef;

  // In every lane. sums: (tiles, padded) of E; total: the anchor's weight in the loss.
  template <class T>
  static MCLD_DEVICE AnchorLoss of(const LowLatencyMatrix& q, const float* sums, int64_t row, float positive, float total) {
    const int64_t padded = padded_rows(q.n);
    float neg_sum = 0;
    for (int64_t tile = thread_index() % kWarp; tile < padded / kLowLatencyTile; tile += kWarp) neg_sum += sums[tile * padded + row];
    neg_sum = warp_sum(neg_sum);
    constexpr float lift = std::is_same<T, fp16>::value ? kFp16Lift : 0;
    const float neg_lse = neg_sum == 0 ? -infinity() : (log2f(neg_sum) - lift) * kLn2 + q.inv_temperature;
    const float x = neg_lse - positive * q.inv_temperature;
    const float partner_coef = total * sigmoid(x) * q.inv_temperature;
    return {softplus(x), partner_coef, neg_sum == 0 ? 0 : partner_coef / neg_sum};
  }
};

// The rows of the loss kernel: the padding of weighted teacher rows is written as zeros.
MCLD_HOST_DEVICE int64_t loss_rows(const LowLatencyMatrix& q) { return q.weighted_teacher ? padded_rows(q.n) : q.n; }

// The matrix of a warp's row, and the row within it; matrices.count where there is none.
MCLD_DEVICE int matrix_of(const LowLatency& p, int64_t& row) {
  int which = 0;
  while (which < p.matrices.count && row >= loss_rows(p.matrices.item[which])) row -= loss_rows(p.matrices.item[which++]);
  return which;
}

template <class T> MCLD_DEVICE void weigh_teacher(const LowLatencyMatrix& q, int64_t row, float factor) {
  constexpr int kWidth = kWidest<T>;
  for (int64_t column = thread_index() % kWarp * kWidth; column < q.pitch; column += kWarp * kWidth) {
    float x[kWidth] = {};
    if (row < q.n) load(x, static_cast<const T*>(q.teacher) + row * q.pitch + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = row < q.n ? x[i] * factor : 0;
    store(static_cast<T*>(q.weighted_teacher) + row * q.pitch + column, x);
  }
}

// kTeacherAnchors: there are teacher anchors, and the products are not yet computed.
template <class T, bool kTeacherAnchors> MCLD_KERNEL(kLowLatencyThreads) low_latency_loss_kernel(MCLD_PARAMETERS(LowLatency) p) {
  await_launch_before();
  int64_t row = int64_t(block_index()) * kLowLatencyWarps + thread_index() / kWarp;
  const int lane = thread_index() % kWarp;
  const int which = matrix_of(p, row);
  if (which == p.matrices.count) return;
  const LowLatencyMatrix& q = p.matrices.item[which];
  if (kTeacherAnchors && row >= q.n) {
    weigh_teacher<T>(q, row, 0);
    return;
  }
  const T* a = static_cast<const T*>(q.student) + row * q.pitch;
  const float positive = row_dot(a, static_cast<const T*>(q.teacher) + row * q.pitch, q.pitch);

  const int directions = kTeacherAnchors && q.column_sums && q.student_anchors ? 2 : 1;
  const int64_t class_id = p.target && !q.columns ? p.key[row] : -1;
  const float poison = p.target ? *p.poison : 1;
  float part[3] = {0, 0, 0}, weight[3];
  if (q.terms[0]) part[0] = (p.mask_same_class ? poison : 1) / (q.n * directions);
  if (q.terms[1]) part[1] = (class_id >= 0 ? 1 : 0) * (poison / (fmaxf(*p.num_valid, 1) * directions));
  if (q.terms[2]) {
    part[2] = 1.0f / q.n;
    if (p.present_only) {
      float present = 0;
      for (int64_t c = lane; c < p.num_classes; c += kWarp) present += p.counts[c] > 0 ? 1 : 0;
      part[2] = (p.counts[row] > 0 ? 1 : 0) * (poison / fmaxf(warp_sum(present), 1));
    }
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    weight[i] = p.term_weight[i] * (p.weight ? p.weight[i] : 1);
    if (q.terms[i]) total += weight[i] * part[i];
  }

  float loss = 0, partner_coef = 0, product_coef = 1;
  if (!kTeacherAnchors || q.student_anchors) {
    const AnchorLoss student = AnchorLoss::of<T>(q, q.row_sums, row, positive, total);
    loss = student.loss, partner_coef = student.partner_coef, product_coef = student.product_coef;
  }
  if (kTeacherAnchors && q.column_sums) {
    const AnchorLoss teacher = AnchorLoss::of<T>(q, q.column_sums, row, positive, total);
    loss += teacher.loss, partner_coef += teacher.partner_coef;
    if (q.weighted_teacher) weigh_teacher<T>(q, row, teacher.product_coef);
  }
  // A teacher anchor's label positive is with the mean of student rows; over a class both sum to the same.
  float label_positive = 0;
  if (q.terms[1] && class_id >= 0) label_positive = row_dot(a, p.class_means + class_id * q.pitch, q.pitch);
  const float class_mean_coef = q.terms[1] ? directions * weight[1] * part[1] * q.inv_temperature : 0;
  if (lane == 0) {
    q.per_anchor[row] = part[0] * loss;
    q.per_anchor[q.n + row] = part[1] * (loss + directions * (positive - label_positive) * q.inv_temperature);
    q.per_anchor[2 * q.n + row] = part[2] * loss;
  }
  if (!p.gradient) return;
  if (lane == 0) {
    q.product_coef[row] = product_coef;
    q.partner_coef[row] = partner_coef;
    q.class_mean_coef[row] = class_mean_coef;
  }
  if (kTeacherAnchors) return;
  const GradRow<T> g(matrix_gradient(p, q), row, product_coef, partner_coef, class_mean_coef);
  const float along = projection<kWidest<T>>(g, q.d);
  if (lane == 0) q.projection[row] = along;
}

// One warp a row.
template <class T> MCLD_KERNEL(kLowLatencyThreads) low_latency_projection_kernel(MCLD_PARAMETERS(LowLatency) p) {
  await_launch_before();
  int64_t row = int64_t(block_index()) * kLowLatencyWarps + thread_index() / kWarp;
  const int which = matrix_of(p, row);
  if (which == p.matrices.count || row >= p.matrices.item[which].n) return;
  const LowLatencyMatrix& q = p.matrices.item[which];
  const float along = projection<kWidest<T>>(grad_row<T>(q, matrix_gradient(p, q), row), q.d);
  if (thread_index() % kWarp == 0) q.projection[row] = along;
}

// --- (5) the gradient and the loss

// The sum of a term over its anchors, in thread 0.
MCLD_DEVICE float term_sum(const float* per_anchor, int64_t n, LowLatencySum::Storage& storage) {
  float sum = 0;
  for (int64_t i = thread_index(); i < n; i += kLowLatencyThreads) sum += per_anchor[i];
  return LowLatencySum::run(sum, storage);
}

// Block 0: the loss; the others: 32 x 32 of the gradient.
template <class T, class Out> MCLD_KERNEL(kLowLatencyThreads) low_latency_outputs_kernel(MCLD_PARAMETERS(LowLatency) p) {
  await_launch_before();
  float* shared = reinterpret_cast<float*>(shared_memory());  // (32, 33)
  if (block_index() == 0) {
    // A term has one matrix, so no two sums share a storage.
    LowLatencySum::Storage* storage = reinterpret_cast<LowLatencySum::Storage*>(shared);
    float loss = 0;
    for (int term = 0; term < 3; ++term) {
      float sum = 0;
      for (int i = 0; i < p.matrices.count; ++i) {
        const LowLatencyMatrix& q = p.matrices.item[i];
        if (q.terms[term]) sum = term_sum(q.per_anchor + term * q.n, q.n, storage[term]);
      }
      if (p.term_weight[term] != 0) loss += p.term_weight[term] * (p.weight ? p.weight[term] : 1) * sum;
      if (thread_index() == 0) p.terms[term] = sum;
    }
    if (thread_index() == 0) *p.loss = loss;
    return;
  }
  const int64_t tiles = (p.num_classes + kGradTile - 1) / kGradTile, block = block_index() - 1;
  const int64_t first_row = block / tiles * kGradTile, first_column = block % tiles * kGradTile;
  const int across = thread_index() % kGradTile, down = thread_index() / kGradTile;
  float sums[kGradTile / kLowLatencyWarps] = {0, 0, 0, 0};
  for (int i = 0; i < p.matrices.count; ++i) {
    const LowLatencyMatrix& q = p.matrices.item[i];
    const GradEpilogue f = matrix_gradient(p, q);
    // Rows of the columns' matrix are columns of the gradient: read along them, transposed through shared memory.
    sync_block();
#pragma unroll
    for (int k = 0; k < kGradTile / kLowLatencyWarps; ++k) {
      const int at = down + k * kLowLatencyWarps;
      const int64_t row = (q.columns ? first_column : first_row) + at, column = (q.columns ? first_row : first_column) + across;
      float value = 0;
      if (row < q.n && column < q.d) {
        const GradRow<T> r = grad_row<T>(q, f, row);
        value = (r.at(column) - q.projection[row] * to_float(r.unit[column])) * q.student_inv_norm[row];
      }
      if (q.columns) {
        shared[at * (kGradTile + 1) + across] = value;
      } else {
        sums[k] += value;
      }
    }
    sync_block();
    if (!q.columns) continue;
#pragma unroll
    for (int k = 0; k < kGradTile / kLowLatencyWarps; ++k) sums[k] += shared[across * (kGradTile + 1) + down + k * kLowLatencyWarps];
  }
#pragma unroll
  for (int k = 0; k < kGradTile / kLowLatencyWarps; ++k) {
    const int64_t row = first_row + down + k * kLowLatencyWarps, column = first_column + across;
    if (row < p.batch && column < p.num_classes) static_cast<Out*>(p.gradient)[row * p.num_classes + column] = from_float<Out>(sums[k]);
  }
}

}  // namespace mcld
