// The steps of mlkd.h. Compiled once for each instruction set, as low_latency.cpp, whose rules hold here: what a thread
// takes never changes the order of a sum, and inline functions of the standard library stay out.
#include "cpu/mlkd.h"

#include <math.h>
#include <string.h>

#include "cpu/gemm.h"
#include "cpu/vectors.h"

namespace mcld::cpu::MCLD_CPU_ISA {
namespace {

constexpr int64_t kVectorsOfSum = 16;  // vectors that a sum along a row adds at a time, for its rounding error
constexpr int64_t kElementsOfExp = 4;  // elements of a copy that take the time of an exponential and what follows it
constexpr float kLeastRatio = -0.5f;   // LEAST_RATIO of losses/mlkd_correlation.py

// exp(x) - 1 to some ulp, |x| < 87: its series where the difference would cancel.
inline Vector expm1(Vector x) {
  Vector series = x * (1.f / 362880) + 1.f / 40320;
  series = series * x + 1.f / 5040;
  series = series * x + 1.f / 720;
  series = series * x + 1.f / 120;
  series = series * x + 1.f / 24;
  series = series * x + 1.f / 6;
  series = series * x + 0.5f;
  series = series * (x * x) + x;
  const auto is_small = (x < 0.5f) & (x > -0.5f);
  const Vector direct = exp(x) - 1.f;
  Bits a, b, mask;
  memcpy(&a, &series, sizeof a), memcpy(&b, &direct, sizeof b), memcpy(&mask, &is_small, sizeof mask);
  a = (a & mask) | (b & ~mask);
  memcpy(&series, &a, sizeof a);
  return series;
}

struct Call : Mlkd {
  MlkdLayout at;
  int64_t count;  // N
  float *z, *cosines, *weights, *product;
  float *inv_norm, *total, *value, *factor;   // (N,); the last three of the supervised term
  float *divergence, *inverse, *gap, *alone;  // (n,), of the correlation
  float* distance;                            // (n,), of the alignment
  int32_t *first_of, *previous, *members;     // (n,): see index_labels
  int32_t *last_of, *table;
  float share;  // of a counted anchor in the gradient by its similarities

  explicit Call(const Mlkd& call) : Mlkd(call), at(call.n, call.num_classes, call.sides()), count(n * sides()) {
    z = work + at.rows, cosines = work + at.cosines, weights = work + at.weights, product = work + at.product;
    const int64_t w = at.matrix_width;
    inv_norm = work + at.vectors, total = inv_norm + w, value = total + w, factor = value + w;
    divergence = factor + w, inverse = divergence + w, gap = inverse + w, alone = gap + w, distance = alone + w;
    first_of = reinterpret_cast<int32_t*>(work + at.labels), previous = first_of + w, members = previous + w;
    last_of = members + w, table = last_of + w;
  }

  bool with_gradient() const { return gradient != nullptr; }
  // Columns of W, from the first on.
  int64_t columns() const { return supervised ? views * n : n; }

  // ---- unit rows and their cosines

  void normalize() const {
    for_slices(threads, count, 1, count * at.pitch, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float* row = z + i * at.pitch;
        if (i < n) {
          copy_row(student + i * student_row, student_column, num_classes, at.width, 0, row);
        } else {
          copy_row(teacher + (i - n) * teacher_row, teacher_column, num_classes, at.width, 0, row);
        }
        const float inverse = inverse_norm(dot(row, row, at.width), eps);
        inv_norm[i] = inverse;
        for (int64_t c = 0; c < at.width; c += kLanes) store(row + c, load(row + c) * inverse);
      }
    });
  }

  void multiply_rows() const {
    float* transposed = work + at.transposed;
    for_slices(threads, at.matrix_width, kLanes, num_classes * at.matrix_width, [=](int64_t first, int64_t end) {
      for (int64_t block = first; block < end; block += kLanes) {
        const int64_t last = smaller(kLanes, count - block);
        float* out = transposed + block / kPanel * kPanel * num_classes + block % kPanel;
        for (int64_t c = 0; c < num_classes; ++c, out += kPanel) {
          for (int64_t j = 0; j < last; ++j) out[j] = z[(block + j) * at.pitch + c];
          for (int64_t j = last < 0 ? 0 : last; j < kLanes; ++j) out[j] = 0;
        }
      }
    });
    gemm(threads, z, at.pitch, 1, {transposed, kPanel, kPanel * num_classes}, cosines, at.matrix_pitch, count,
         at.matrix_width, num_classes);
  }

  // ---- labels

  // The rows of each label, from the last one on: `previous` is the row of the label before a row, or -1; first_of its first
  // row, which knows `last_of` the label and how many `members` it has. Rows without a class have no members.
  void index_labels() const {
    const int64_t mask = at.table - 1;
    for (int64_t k = 0; k < at.table; ++k) table[k] = -1;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t label = target[i * target_stride];
      previous[i] = -1, members[i] = 0, first_of[i] = int32_t(i), last_of[i] = int32_t(i);
      if (label == ignore_index) continue;
      int64_t slot = int64_t((uint64_t(label) * 0x9e3779b97f4a7c15u) >> 32) & mask;
      while (table[slot] >= 0 && target[table[slot] * target_stride] != label) slot = (slot + 1) & mask;
      if (table[slot] < 0) table[slot] = int32_t(i);
      const int32_t first = table[slot];
      first_of[i] = first;
      if (first != int32_t(i)) previous[i] = last_of[first], last_of[first] = int32_t(i);
      ++members[first];
    }
  }

  // Rows that row i is to be near in the supervised term; rows without a label have none.
  int64_t positives_of(int64_t i) const { return views * int64_t(members[first_of[i]]) - 1; }

  // take(column) for each of them, of an anchor in any view.
  template <class Take> void for_positives(int64_t anchor, const Take& take) const {
    for (int32_t row = last_of[first_of[anchor % n]]; row >= 0; row = previous[row]) {
      for (int64_t column = row; column < views * n; column += n) {
        if (column != anchor) take(column);
      }
    }
  }

  // ---- sums along the rows of the cosines

  // Zeros in the place of column `diagonal`, and from column `end` on.
  static Vector masked(Vector v, int64_t column, int64_t diagonal, int64_t end) {
    if (column + kLanes <= end && (diagonal < column || diagonal >= column + kLanes)) return v;
    float lanes[kLanes];
    store(lanes, v);
    if (diagonal >= column && diagonal < column + kLanes) lanes[diagonal - column] = 0;
    for (int64_t k = end > column ? end - column : 0; k < kLanes; ++k) lanes[k] = 0;
    return load(lanes);
  }

  // add(column, sums) over the vectors of a row of `end` columns, in parts.
  template <int kSums, class Add> static void sum_row(int64_t end, float* out, const Add& add) {
    Vector sums[kSums] = {};
    for (int64_t j = 0; j < end;) {
      Vector part[kSums] = {};
      for (const int64_t stop = smaller(j + kVectorsOfSum * kLanes, end); j < stop; j += kLanes) add(j, part);
      for (int k = 0; k < kSums; ++k) sums[k] += part[k];
    }
    for (int k = 0; k < kSums; ++k) out[k] = add_lanes(sums[k]);
  }

  // The exponentials of an anchor, kept for the gradient by a student row.
  void supervise_row(int64_t i) const {
    const float* row = cosines + i * at.matrix_pitch;
    float* e = weights + i * at.matrix_pitch;
    const float inverse = 1.f / supervised_temperature;
    const int64_t end = views * n;
    const bool keeps = with_gradient() && i < n;
    sum_row<1>(end, total + i, [=](int64_t j, Vector* sums) {
      const Vector x = masked(exp(load(row + j) * inverse), j, i, end);
      if (keeps) store(e + j, x);
      sums[0] += x;
    });
    const int64_t others = positives_of(i % n);
    value[i] = 0 * total[i];  // NaN shows without an anchor, too
    if (others < 1) return;
    float positive = 0;
    for_positives(i, [&](int64_t j) { positive += row[j]; });
    // The logarithm of a sum that is all but its positive is small only as one of a ratio.
    value[i] = logf(total[i] * exp(-positive * inverse / float(others)));
  }

  void correlate_row(int64_t i) const {
    const float *a = cosines + i * at.matrix_pitch, *b = cosines + (n + i) * at.matrix_pitch + n;
    const float scale = 1.f / correlation_temperature;
    float sums[3];  // of exp(b), exp(b) d, exp(b) expm1(d)
    sum_row<3>(n, sums, [=](int64_t j, Vector* sums) {
      const Vector e = masked(exp(load(b + j) * scale), j, i, n);
      const Vector d = masked((load(a + j) - load(b + j)) * scale, j, i, n);
      sums[0] += e, sums[1] += e * d, sums[2] += e * expm1(d);
    });
    const float ratio = sums[2] / sums[0], mean = sums[1] / sums[0];  // Zs / Zt - 1
    if (ratio < kLeastRatio) {  // Zs would cancel in Zt + (Zs - Zt)
      float own;
      sum_row<1>(n, &own, [=](int64_t j, Vector* sums) { sums[0] += masked(exp(load(a + j) * scale), j, i, n); });
      divergence[i] = logf(own / sums[0]) - mean;
      inverse[i] = 0, gap[i] = -1.f / sums[0], alone[i] = 1.f / own;
    } else {
      divergence[i] = log1pf(ratio) - mean;
      inverse[i] = 1.f / (sums[0] * (1.f + ratio)), gap[i] = -ratio * inverse[i], alone[i] = 0;
    }
  }

  // Row i of W.
  void weigh_row(int64_t i, bool any_alone) const {
    float* w = weights + i * at.matrix_pitch;
    if (supervised) {
      for (int64_t j = 0; j < views * n; j += kLanes) store(w + j, load(w + j) * (load(factor + j) + factor[i]));
    }
    if (correlation) {
      const float *a = cosines + i * at.matrix_pitch, *b = cosines + (n + i) * at.matrix_pitch + n;
      const float scale = 1.f / correlation_temperature, coefficient = weight[0] / (float(n) * correlation_temperature);
      for (int64_t j = 0; j < n; j += kLanes) {
        const Vector left = load(a + j) * scale, right = load(b + j) * scale;
        const Vector d = (load(a + j) - load(b + j)) * scale;
        Vector x = (expm1(d) * (load(inverse + j) + inverse[i]) + (load(gap + j) + gap[i])) * exp(right);
        if (any_alone) x += exp(left) * (load(alone + j) + alone[i]);
        x = masked(x * coefficient, j, i, n);
        store(w + j, supervised ? load(w + j) + x : x);
      }
    }
    if (!supervised || positives_of(i) < 1) return;
    const float pull = 2 * share / float(positives_of(i));
    for_positives(i, [=](int64_t j) { w[j] -= pull; });
  }

  void sum_up() {
    double sums[2] = {};
    int64_t anchors = 0;
    if (supervised) index_labels();
    const int64_t rows = supervised ? views * n : n;
    for_slices(threads, rows, 1, kElementsOfExp * rows * at.matrix_width, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (supervised) supervise_row(i);
        if (correlation && i < n) correlate_row(i);
      }
    });
    bool any_alone = false;
    if (correlation) {
      for (int64_t i = 0; i < n; ++i) sums[0] += double(divergence[i]), any_alone |= alone[i] != 0;
      for (int64_t i = n; i < at.matrix_width && i < n + kLanes; ++i) inverse[i] = gap[i] = alone[i] = 0;
    }
    if (supervised) {
      for (int64_t i = 0; i < n; ++i) anchors += positives_of(i) > 0 ? views : 0;
      const float number = anchors > 0 ? float(anchors) : 1.f;
      for (int64_t i = 0; i < rows; ++i) sums[1] += double(value[i]);
      sums[1] /= double(number);
      share = weight[2] / (number * supervised_temperature);
      for (int64_t i = 0; i < rows; ++i) factor[i] = positives_of(i % n) > 0 ? share / total[i] : 0.f;
      for (int64_t i = rows; i < at.matrix_width; ++i) factor[i] = 0;
    }
    terms[0] = float(sums[0] / double(n)), terms[2] = float(sums[1]);
    if (!with_gradient()) return;
    for_slices(threads, n, 1, kElementsOfExp * n * at.matrix_width, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) weigh_row(i, any_alone);
    });
  }

  // ---- alignment and gradient

  void finish_row(int64_t i, bool multiplies) const {
    const float *unit = z + i * at.pitch, *other = z + (n + i) * at.pitch;
    float* g = product + i * at.pitch;
    const float pull = alignment ? 2 * weight[1] / float(n) : 0.f;
    float sums[2];  // |s - t|^2, g . s
    if (with_gradient() && multiplies) {
      for (int64_t c = num_classes; c < at.width; ++c) g[c] = 0;  // a library's product leaves the padding as it was
    }
    sum_row<2>(at.width, sums, [=](int64_t c, Vector* sums) {
      Vector x = multiplies && with_gradient() ? load(g + c) : Vector{};
      if (alignment) {
        const Vector d = load(unit + c) - load(other + c);
        sums[0] += d * d, x += d * pull;
      }
      if (with_gradient()) store(g + c, x);
      sums[1] += x * load(unit + c);
    });
    // A row without a direction is zeros: of its 2 - 2 s . t the square holds 1 less.
    if (alignment) distance[i] = sums[0] + float((inv_norm[i] == 0) + (inv_norm[n + i] == 0));
    if (!with_gradient()) return;
    write_row(gradient + i * num_classes, num_classes,
              [=](int64_t c) { return (load(g + c) - load(unit + c) * sums[1]) * inv_norm[i]; });
  }

  void finish() const {
    const bool multiplies = correlation || supervised;
    if (alignment || with_gradient()) {
      for_slices(threads, n, 1, n * at.pitch, [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) finish_row(i, multiplies);
      });
    }
    double of_alignment = 0;
    for (int64_t i = 0; alignment && i < n; ++i) of_alignment += double(distance[i]);
    terms[1] = float(of_alignment / double(n));
    if (!multiplies) terms[0] = terms[2] = 0;
    double sum = 0;
    if (correlation) sum += double(weight[0]) * double(terms[0]);
    if (alignment) sum += double(weight[1]) * double(terms[1]);
    if (supervised) sum += double(weight[2]) * double(terms[2]);
    *loss = float(sum);
  }
};

}  // namespace

void mlkd(const Mlkd& arguments, int steps) {
  Call call(arguments);
  const bool multiplies = call.correlation || call.supervised;
  if (steps & kMlkdNormalize) call.normalize();
  if (multiplies && steps & kMlkdCosines) call.multiply_rows();
  if (multiplies && steps & kMlkdSums) call.sum_up();
  if (multiplies && call.with_gradient() && steps & kMlkdProduct) {
    gemm(call.threads, call.weights, call.at.matrix_pitch, 1, row_major(call.z, call.at.pitch), call.product, call.at.pitch,
         call.n, call.at.width, call.columns());
  }
  if (steps & kMlkdFinish) call.finish();
}

}  // namespace mcld::cpu::MCLD_CPU_ISA
