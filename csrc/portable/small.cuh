// The low-latency path: loss and gradient of all terms in five launches that a graph can replay, for a batch and classes that
// one wave of blocks holds. Each launch does its step for every similarity matrix, the rows' and the columns': (1) operands
// and labels, (2) E, its sums by row and the class means, (3) E K, (4) one warp an anchor: its loss, factors and dot product,
// (5) the gradient of all terms in one write, and the sums of the loss. Nothing of size C x B is read twice by the same step,
// and no torch operation stands between.
//
// E is of the student's rows and the teacher's columns whoever anchors. A teacher anchor i sums a column of it, and pulls row j
// of the student by E_ji f_i K_i, f_i = weight q_i / (temperature off_i): the gradient is E times the candidates weighted by f,
// no transpose. Since f needs the sums, (4) then comes before (3), and the dot products after it in a launch of their own.
#pragma once

#include <type_traits>

#include "finish.cuh"
#include "normalise.cuh"
#include "product.cuh"
#include "similarity.cuh"
#include "sums.cuh"

namespace mcld {

constexpr int kSmallTile = 64, kSmallThreads = 256, kSmallWarps = kSmallThreads / kWarp;
using SmallSum = BlockSum<kSmallThreads>;
static_assert(kSmall <= kShortRow, "rows are kept in registers");

MCLD_HOST_DEVICE int64_t small_padded(int64_t n) { return (n + 127) / 128 * 128; }

// --- (1) operands and labels

MCLD_HOST_DEVICE Normalise small_side(const Small& p, const SmallProblem& q, bool student) {
  const int64_t* strides = student ? p.student_strides : p.teacher_strides;
  Normalise side{};
  side.x = student ? p.student : p.teacher;
  side.row_stride = strides[q.columns ? 1 : 0];
  side.column_stride = strides[q.columns ? 0 : 1];
  side.out = student ? q.a : q.k;
  side.inverse = student ? q.inverse_a : q.inverse_k;
  side.n = q.n, side.d = q.d, side.padded_rows = small_padded(q.n), side.pitch = q.pitch, side.eps = p.eps;
  return side;
}

// Block x: a matrix's 8 rows, or 32 columns; the last: the labels. Block y: student, teacher.
template <class In, class Out, int kWidth> MCLD_KERNEL(kSmallThreads, 2) small_normalise_kernel(MCLD_PARAMETERS(Small) p) {
  int64_t block = block_index();
  float* shared = reinterpret_cast<float*>(shared_memory());
  for (int i = 0; i < p.count; ++i) {
    const SmallProblem& q = p.problems[i];
    // Two temperatures of the row terms share their operands.
    if (i > 0 && q.a == p.problems[i - 1].a) continue;
    const int64_t blocks = small_padded(q.n) / (q.columns ? kColumnTile : kNormaliseWarps);
    if (block >= blocks) {
      block -= blocks;
      continue;
    }
    const Normalise side = small_side(p, q, block_index_y() == 0);
    if (!q.columns) {
      normalise_row<In, Out, kWidth, true>(side, block * kNormaliseWarps + thread_index() / kWarp);
      return;
    }
    const int64_t first_i = block * kColumnTile;
    float* inverses = shared;                    // (32,)
    float* tile = shared + kColumnTile;          // (64, 33)
    const float squares = column_squares<In>(side, tile, first_i, 0, side.d);
    if (thread_index() < kColumnTile) {
      inverses[thread_index()] = inverse_norm(squares, side.eps);
      if (first_i + thread_index() < side.n) side.inverse[first_i + thread_index()] = inverses[thread_index()];
    }
    for (int64_t first_j = 0; first_j < side.pitch; first_j += kBatchTile) {
      sync_block();  // the tile's last readers are done
      write_columns<In, Out>(side, inverses, tile, first_i, first_j);
    }
    return;
  }
  if (block_index_y() != 0 || !p.target) return;
  float valid = 0, bad = 0;
  for (int64_t i = thread_index(); i < p.batch; i += kSmallThreads) {
    const Label label = Label::of(p.target[i], p.classes, p.ignore_index);
    p.same[i] = label.ignored ? -1 - i : label.kind;
    valid += label.ignored ? 0 : 1;
    bad += label.bad ? 1 : 0;
  }
  SmallSum::Storage* storage = reinterpret_cast<SmallSum::Storage*>(shared);
  valid = SmallSum::run(valid, storage[0]);
  bad = SmallSum::run(bad, storage[1]);
  if (thread_index() == 0) {
    p.facts[0] = valid;
    p.facts[1] = bad > 0 ? not_a_number() : 1;
  }
}

// --- (2) E and the class means

// The mean of a class's teacher rows, 512 columns a block of 128 threads.
template <class T> MCLD_DEVICE void small_mean(const Small& p, const SmallProblem& q, int64_t kind, int64_t column, bool first) {
  float sum[4] = {0, 0, 0, 0}, count = 0;
  for (int64_t j = 0; j < p.batch; ++j) {
    if (p.same[j] != kind) continue;
    count += 1;
    if (!p.means || column >= q.pitch) continue;
    float x[4];
    load(x, static_cast<const T*>(q.k) + j * q.pitch + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += x[i];
  }
  if (first) p.counts[kind] = count;
  if (!p.means || column >= q.pitch) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] /= count > 0 ? count : 1;
  store(p.means + kind * q.pitch + column, sum);
}

template <Precision kPrecision>
MCLD_KERNEL(SimilarityTile<kPrecision, kSmallTile>::kThreads, SimilarityTile<kPrecision, kSmallTile>::kBlocks)
small_similarity_kernel(MCLD_PARAMETERS(Small) p) {
  using Kernel = SimilarityTile<kPrecision, kSmallTile>;
  int64_t block = block_index();
  for (int i = 0; i < p.count; ++i) {
    const SmallProblem& q = p.problems[i];
    const int64_t padded = small_padded(q.n), blocks = (padded / kSmallTile) * (padded / kSmallTile);
    if (block >= blocks) {
      block -= blocks;
      continue;
    }
    Similarity s{};
    s.a = q.a, s.k = q.k, s.e = q.e, s.row_sums = q.row_sums, s.column_sums = q.column_sums;
    s.same_a = s.same_k = q.masked ? p.same : nullptr;
    s.rows = s.m = q.n, s.pitch = q.pitch, s.pitch_e = s.padded_rows = padded;
    s.scale = s.shift = q.inverse_temperature * kLog2E;
    if (kPrecision == Precision::fp16) s.shift -= kHalfLift;
    Kernel::run(s, block);
    return;
  }
  const SmallProblem& rows = p.problems[0];
  const int64_t columns_of_block = Kernel::kThreads * 4, parts = (rows.pitch + columns_of_block - 1) / columns_of_block;
  const int64_t column = block % parts * columns_of_block + thread_index() * 4;
  small_mean<Operand<kPrecision>>(p, rows, block / parts, column, column == 0);
}

// --- (3) E K

MCLD_HOST_DEVICE int small_products(const SmallProblem& q) { return (q.product ? 1 : 0) + (q.back ? 1 : 0); }

template <Precision kPrecision>
MCLD_KERNEL(ProductTile<kPrecision, kSmallTile, false>::kThreads, ProductTile<kPrecision, kSmallTile, false>::kBlocks)
small_product_kernel(MCLD_PARAMETERS(Small) p) {
  int64_t block = block_index();
  for (int i = 0; i < p.count; ++i) {
    const SmallProblem& q = p.problems[i];
    const int64_t padded = small_padded(q.n), blocks = (padded / kSmallTile) * (q.pitch / kSmallTile);
    if (block >= blocks * small_products(q)) {
      block -= blocks * small_products(q);
      continue;
    }
    const bool back = !q.product || block >= blocks;
    Product product{};
    product.e = q.e, product.k = back ? q.weighted : q.k, product.out = back ? q.back : q.product;
    product.rows = product.contraction = product.pitch_e = padded, product.pitch = q.pitch;
    ProductTile<kPrecision, kSmallTile, false>::run(product, block % blocks);
    return;
  }
}

// --- (4) an anchor's loss, factors and dot product

MCLD_DEVICE Finish small_finish(const Small& p, const SmallProblem& q) {
  Finish f{};
  f.unit = q.a, f.partner = q.k, f.inverse = q.inverse_a, f.product = q.product ? q.product : q.back;
  f.s = q.s, f.u = q.u, f.z = q.terms[1] ? q.z : nullptr, f.dots = q.dots;
  f.means = q.terms[1] ? p.means : nullptr, f.rank = p.same;
  f.rows = q.n, f.d = q.d, f.pitch = f.product_pitch = q.pitch, f.partner_rows = q.n;
  return f;
}

template <class T> MCLD_DEVICE FinishRow<T> small_row(const SmallProblem& q, const Finish& f, int64_t row) {
  FinishRow<T> found(f, row);
  if (q.product && q.back) found.back = q.back + row * q.pitch;
  return found;
}

template <class T, class U> MCLD_DEVICE float small_dot(const T* a, const U* b, int64_t pitch) {
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

// An anchor's loss against one side's negatives, and what its gradient is multiplied with.
struct SmallAnchor {
  float loss, u, s;  // u: weight q / temperature; s: that over the sum

  // In every lane. sums: (tiles, padded) of E; total: the anchor's weight in the loss.
  template <class T>
  static MCLD_DEVICE SmallAnchor of(const SmallProblem& q, const float* sums, int64_t row, float positive, float total) {
    const int64_t padded = small_padded(q.n);
    float off = 0;
    for (int64_t tile = thread_index() % kWarp; tile < padded / kSmallTile; tile += kWarp) off += sums[tile * padded + row];
    off = warp_sum(off);
    constexpr float lift = std::is_same<T, fp16>::value ? kHalfLift : 0;
    const float log_off = off == 0 ? -infinity() : (log2f(off) - lift) * kLn2 + q.inverse_temperature;
    const float x = log_off - positive * q.inverse_temperature;
    const float u = total * contrast_pull(x) * q.inverse_temperature;
    return {contrast_loss(x), u, off == 0 ? 0 : u / off};
  }
};

// The rows that small_factors works on: where candidates are weighted, their padding is to be zeros.
MCLD_HOST_DEVICE int64_t small_rows(const SmallProblem& q) { return q.weighted ? small_padded(q.n) : q.n; }

// A warp's row: its problem, and the row within it; p.count where there is none.
MCLD_DEVICE int small_problem(const Small& p, int64_t& row) {
  int which = 0;
  while (which < p.count && row >= small_rows(p.problems[which])) row -= small_rows(p.problems[which++]);
  return which;
}

template <class T> MCLD_DEVICE void small_weighted(const SmallProblem& q, int64_t row, float factor) {
  constexpr int kWidth = kWidest<T>;
  for (int64_t column = thread_index() % kWarp * kWidth; column < q.pitch; column += kWarp * kWidth) {
    float x[kWidth] = {};
    if (row < q.n) load(x, static_cast<const T*>(q.k) + row * q.pitch + column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = row < q.n ? x[i] * factor : 0;
    store(static_cast<T*>(q.weighted) + row * q.pitch + column, x);
  }
}

// kTurned: there are teacher anchors, and the products are yet to come.
template <class T, bool kTurned> MCLD_KERNEL(kSmallThreads) small_factors_kernel(MCLD_PARAMETERS(Small) p) {
  int64_t row = int64_t(block_index()) * kSmallWarps + thread_index() / kWarp;
  const int lane = thread_index() % kWarp;
  const int which = small_problem(p, row);
  if (which == p.count) return;
  const SmallProblem& q = p.problems[which];
  if (kTurned && row >= q.n) {
    small_weighted<T>(q, row, 0);
    return;
  }
  const T* a = static_cast<const T*>(q.a) + row * q.pitch;
  const float positive = small_dot(a, static_cast<const T*>(q.k) + row * q.pitch, q.pitch);

  const int directions = kTurned && q.column_sums && q.by_student ? 2 : 1;
  const int64_t kind = p.target && !q.columns ? p.same[row] : -1;
  const float poison = p.target ? p.facts[1] : 1;
  float share[3] = {0, 0, 0}, weight[3];
  if (q.terms[0]) share[0] = (p.any_mask ? poison : 1) / (q.n * directions);
  if (q.terms[1]) share[1] = (kind >= 0 ? 1 : 0) * (poison / (fmaxf(p.facts[0], 1) * directions));
  if (q.terms[2]) {
    share[2] = 1.0f / q.n;
    if (p.present_only) {
      float present = 0;
      for (int64_t c = lane; c < p.classes; c += kWarp) present += p.counts[c] > 0 ? 1 : 0;
      share[2] = (p.counts[row] > 0 ? 1 : 0) * (poison / fmaxf(warp_sum(present), 1));
    }
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    weight[i] = p.scale[i] * (p.weights ? p.weights[i] : 1);
    if (q.terms[i]) total += weight[i] * share[i];
  }

  float loss = 0, u = 0, s = 1;
  if (!kTurned || q.by_student) {
    const SmallAnchor student = SmallAnchor::of<T>(q, q.row_sums, row, positive, total);
    loss = student.loss, u = student.u, s = student.s;
  }
  if (kTurned && q.column_sums) {
    const SmallAnchor teacher = SmallAnchor::of<T>(q, q.column_sums, row, positive, total);
    loss += teacher.loss, u += teacher.u;
    if (q.weighted) small_weighted<T>(q, row, teacher.s);
  }
  // A teacher anchor's own is with the mean of student rows; over a class both sum to the same.
  float by_label = 0;
  if (q.terms[1] && kind >= 0) by_label = small_dot(a, p.means + kind * q.pitch, q.pitch);
  const float z = q.terms[1] ? directions * weight[1] * share[1] * q.inverse_temperature : 0;
  if (lane == 0) {
    q.values[row] = share[0] * loss;
    q.values[q.n + row] = share[1] * (loss + directions * (positive - by_label) * q.inverse_temperature);
    q.values[2 * q.n + row] = share[2] * loss;
  }
  if (!p.gradient) return;
  if (lane == 0) q.s[row] = s, q.u[row] = u, q.z[row] = z;
  if (kTurned) return;
  const float dot = finish_dot<kWidest<T>>(FinishRow<T>(small_finish(p, q), row, s, u, z), q.d);
  if (lane == 0) q.dots[row] = dot;
}

// One warp a row.
template <class T> MCLD_KERNEL(kSmallThreads) small_dots_kernel(MCLD_PARAMETERS(Small) p) {
  int64_t row = int64_t(block_index()) * kSmallWarps + thread_index() / kWarp;
  const int which = small_problem(p, row);
  if (which == p.count || row >= p.problems[which].n) return;
  const SmallProblem& q = p.problems[which];
  const float dot = finish_dot<kWidest<T>>(small_row<T>(q, small_finish(p, q), row), q.d);
  if (thread_index() % kWarp == 0) q.dots[row] = dot;
}

// --- (5) the gradient and the loss

// One term's sum over its anchors, in thread 0.
MCLD_DEVICE float small_sum(const float* values, int64_t n, SmallSum::Storage& storage) {
  float sum = 0;
  for (int64_t i = thread_index(); i < n; i += kSmallThreads) sum += values[i];
  return SmallSum::run(sum, storage);
}

// Block 0: the loss; the others: 32 x 32 of the gradient.
template <class T, class Out> MCLD_KERNEL(kSmallThreads) small_write_kernel(MCLD_PARAMETERS(Small) p) {
  float* shared = reinterpret_cast<float*>(shared_memory());  // (32, 33)
  if (block_index() == 0) {
    // Each term is of one matrix, so no two sums share a storage.
    SmallSum::Storage* storage = reinterpret_cast<SmallSum::Storage*>(shared);
    float loss = 0;
    for (int term = 0; term < 3; ++term) {
      float sum = 0;
      for (int i = 0; i < p.count; ++i) {
        const SmallProblem& q = p.problems[i];
        if (q.terms[term]) sum = small_sum(q.values + term * q.n, q.n, storage[term]);
      }
      if (p.scale[term] != 0) loss += p.scale[term] * (p.weights ? p.weights[term] : 1) * sum;
      if (thread_index() == 0) p.terms[term] = sum;
    }
    if (thread_index() == 0) *p.loss = loss;
    return;
  }
  const int64_t tiles = (p.classes + kFinishTile - 1) / kFinishTile, block = block_index() - 1;
  const int64_t first_row = block / tiles * kFinishTile, first_column = block % tiles * kFinishTile;
  const int across = thread_index() % kFinishTile, down = thread_index() / kFinishTile;
  float sums[kFinishTile / kSmallWarps] = {0, 0, 0, 0};
  for (int i = 0; i < p.count; ++i) {
    const SmallProblem& q = p.problems[i];
    const Finish f = small_finish(p, q);
    // The columns' own rows run down the gradient: read along them, turned in shared memory.
    sync_block();
#pragma unroll
    for (int k = 0; k < kFinishTile / kSmallWarps; ++k) {
      const int at = down + k * kSmallWarps;
      const int64_t row = (q.columns ? first_column : first_row) + at, column = (q.columns ? first_row : first_column) + across;
      float value = 0;
      if (row < q.n && column < q.d) {
        const FinishRow<T> r = small_row<T>(q, f, row);
        value = (r.at(column) - q.dots[row] * to_float(r.unit[column])) * q.inverse_a[row];
      }
      if (q.columns) {
        shared[at * (kFinishTile + 1) + across] = value;
      } else {
        sums[k] += value;
      }
    }
    sync_block();
    if (!q.columns) continue;
#pragma unroll
    for (int k = 0; k < kFinishTile / kSmallWarps; ++k) sums[k] += shared[across * (kFinishTile + 1) + down + k * kSmallWarps];
  }
#pragma unroll
  for (int k = 0; k < kFinishTile / kSmallWarps; ++k) {
    const int64_t row = first_row + down + k * kSmallWarps, column = first_column + across;
    if (row < p.batch && column < p.classes) static_cast<Out*>(p.gradient)[row * p.classes + column] = from_float<Out>(sums[k]);
  }
}

}  // namespace mcld
