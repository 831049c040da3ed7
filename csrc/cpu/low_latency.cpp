// The steps of low_latency.h. Compiled once for each instruction set, into the namespace MCLD_CPU_ISA, with vectors of
// MCLD_VECTOR_BYTES; inline functions of the standard library stay out, since the linker keeps one copy for all.
//
// The order of a sum does not depend on the thread that takes it, nor results on the number of threads.
#include "cpu/low_latency.h"

#include <math.h>
#include <string.h>

#include "cpu/gemm.h"
#include "cpu/vectors.h"

namespace mcld::cpu::MCLD_CPU_ISA {
namespace {

// Floats of a block of rows of a similarity matrix, a quarter of a usual second cache, and the fewest rows of one: each
// block reads all candidates.
constexpr int64_t kBlock = 1 << 16, kLeastRows = 48;

struct Call : LowLatency {
  int steps;
  int64_t width, row_width, pitch, row_pitch;
  float *student_rows, *teacher_rows, *student_columns, *teacher_columns, *similarity, *row_product, *column_product;
  float *transposed, *class_means;
  float *row_inv_norm, *row_factor, *row_loss, *label_gap;  // (n,); label_gap: positive less label positive
  int32_t* class_index;                                  // (n,)
  float *column_inv_norm, *column_factor, *column_loss;  // (C,)
  float *sums, *scratch;                                 // (C,) or (n,)
  float* parts;                                          // sums of kRowsOfSum rows each, as Layout has them

  Call(const LowLatency& call, int of) : LowLatency(call), steps(of) {
    const Layout at(n, num_classes, sample, category);
    if (terms == nullptr) terms = work + at.terms;
    width = at.width, row_width = at.row_width, pitch = at.pitch, row_pitch = at.row_pitch;
    student_rows = work + at.student_rows, teacher_rows = work + at.teacher_rows;
    student_columns = work + at.student_columns, teacher_columns = work + at.teacher_columns;
    similarity = work + at.similarity, row_product = work + at.row_product;
    column_product = work + at.column_product, transposed = work + at.transposed;
    class_means = work + at.class_means;
    float* next = work + at.row_vectors;
    row_inv_norm = next, row_factor = next + row_width, row_loss = next + 2 * row_width, label_gap = next + 3 * row_width;
    class_index = reinterpret_cast<int32_t*>(next + 4 * row_width);
    next = work + at.column_vectors;
    column_inv_norm = next, column_factor = next + width, column_loss = next + 2 * width;
    sums = next + 3 * width, scratch = sums + (width > row_width ? width : row_width), parts = work + at.parts;
  }

  int64_t elements() const { return n * pitch; }
  const float* candidates() const { return anchors == kSelf ? student_rows : teacher_rows; }

  // ---- unit rows and columns

  // The logits go to `columns`, padded with zeros, and their unit rows to `rows`, which may be the same memory.
  void normalize_rows(const float* x, int64_t row_stride, int64_t column_stride, float* rows, float* columns,
                      float* inv_norm) const {
    for_slices(threads, n, 1, elements(), [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float* copy = columns + i * pitch;
        copy_row(x + i * row_stride, column_stride, num_classes, width, 0, copy);
        if (!this->rows()) continue;
        const float inverse = inverse_norm(dot(copy, copy, width), eps);
        if (inv_norm != nullptr) inv_norm[i] = inverse;
        for (int64_t c = 0; c < width; c += kLanes) store(rows + i * pitch + c, load(copy + c) * inverse);
      }
    });
  }

  // Divides columns by their norm, in place.
  void normalize_columns(float* x, float* inv_norm) const {
    for_slices(threads, width, kLanes, elements(), [=](int64_t first, int64_t last) {
      add_rows(n, first, last, sums, scratch, [=](int64_t i, int64_t c) {
        const Vector value = load(x + i * pitch + c);
        return value * value;
      });
      for (int64_t c = first; c < last; ++c) inv_norm[c] = inverse_norm(sums[c], eps);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = first; c < last; c += kLanes) {
          store(x + i * pitch + c, load(x + i * pitch + c) * load(inv_norm + c));
        }
      }
    });
  }

  // Means of the teacher rows of each class that occurs, in the order in which the classes do.
  void mean_classes() const {
    int32_t *slot = reinterpret_cast<int32_t*>(scratch), *count = reinterpret_cast<int32_t*>(sums);
    for (int64_t c = 0; c < num_classes; ++c) slot[c] = -1;
    int32_t present = 0;
    for (int64_t i = 0; i < n; ++i) {
      int32_t& s = slot[target[i * target_stride]];
      if (s < 0) count[present] = 0, s = present++;
      class_index[i] = s, ++count[s];
    }
    // Rows by class, ties by row. The losses of rows and columns are not written yet.
    int32_t *order = reinterpret_cast<int32_t*>(row_loss), *end = reinterpret_cast<int32_t*>(column_loss);
    for (int32_t s = 0, start = 0; s < present; ++s) end[s] = start, start += count[s];
    for (int64_t i = 0; i < n; ++i) order[end[class_index[i]]++] = int32_t(i);
    for_slices(threads, present, 1, elements(), [=](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        const float inverse = 1.f / float(count[s]);
        const int32_t* row = order + end[s] - count[s];
        for (int64_t c = 0; c < width; c += kLanes) {
          Vector total = {};
          for (int64_t i = 0; i < count[s]; i += kRowsOfSum) {
            const int64_t stop = smaller(i + kRowsOfSum, count[s]);
            Vector part = {};
            for (int64_t r = i; r < stop; ++r) part += load(teacher_rows + row[r] * pitch + c);
            total += part;
          }
          store(class_means + s * pitch + c, total * inverse);
        }
      }
    });
  }

  void normalize() const {
    normalize_rows(student, student_row, student_column, student_rows, student_columns, row_inv_norm);
    normalize_rows(teacher, teacher_row, teacher_column, teacher_rows, teacher_columns, nullptr);
    if (category) {
      normalize_columns(teacher_columns, column_inv_norm);  // overwritten by the student's
      normalize_columns(student_columns, column_inv_norm);
    }
    if (sample) mean_classes();
  }

  // ---- a similarity matrix (count, count) by blocks of rows

  // multiply(first, last, e) writes rows [first, last) to e, sum(first, last, e) takes their exponentials and sums. A
  // block begins at a multiple of `align`.
  template <class Multiply, class Sum>
  void by_blocks(int64_t count, int64_t align, int64_t matrix_width, int64_t matrix_pitch, int64_t depth, bool multiplies,
                 bool sums_up, const Multiply& multiply, const Sum& sum) const {
    const int64_t products = multiplies ? matrix_width * depth / kProductsOfElement : 0;
    const bool keeps = gradient != nullptr || !(multiplies && sums_up);
    const int64_t rows_of_block = kBlock / matrix_pitch > kLeastRows ? kBlock / matrix_pitch : kLeastRows;
    const int64_t step = rows_of_block / align * align;
    for_slices(threads, count, align, count * (products + matrix_width), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i += step) {
        const int64_t end = smaller(i + step, last);
        float* e = similarity + (keeps ? i : first) * matrix_pitch;
        if (multiplies) multiply(i, end, e);
        if (sums_up) sum(i, end, e);
      }
    });
  }

  // Anchors are the columns: the rows [first, last) in `e` become exponentials, if a gradient needs them, with 0 on the
  // diagonal, which goes to scratch; sums of kRowsOfSum rows each go to `parts`.
  template <bool kStore>
  void add_to_columns(int64_t first, int64_t last, float* e, int64_t matrix_width, int64_t matrix_pitch,
                      float inverse) const {
    for (int64_t l = first; l < last; ++l, e += matrix_pitch) {
      float* part = parts + l / kRowsOfSum * matrix_width;
      const bool begins = l % kRowsOfSum == 0;
      const auto add = [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; k += kLanes) {
          const Vector value = exp(load(e + k) * inverse);
          if (kStore) store(e + k, value);
          store(part + k, begins ? value : load(part + k) + value);
        }
      };
      const int64_t diagonal = l / kLanes * kLanes;
      add(0, diagonal);
      float lanes[kLanes];
      store(lanes, exp(load(e + diagonal) * inverse));
      scratch[l] = lanes[l - diagonal], lanes[l - diagonal] = 0;
      const Vector value = load(lanes);
      if (kStore) store(e + diagonal, value);
      store(part + diagonal, begins ? value : load(part + diagonal) + value);
      add(diagonal + kLanes, matrix_width);
    }
  }

  // After add_to_columns: each anchor's loss and its factor of the gradient, -neg_k on the diagonal; returns the sum of
  // the losses.
  double finish_columns(int64_t count, int64_t matrix_width, int64_t matrix_pitch, float temperature, float term_weight,
                        float* loss_of, float* factor) const {
    const int64_t groups = (count + kRowsOfSum - 1) / kRowsOfSum;
    for_slices(threads, matrix_width, kLanes, (groups + 16) * matrix_width, [=](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; k += kLanes) {
        Vector total = load(parts + k);
        for (int64_t g = 1; g < groups; ++g) total += load(parts + g * matrix_width + k);
        store(sums + k, total);
      }
      for (int64_t k = first; k < smaller(last, count); ++k) {
        const float negative = sums[k], positive = scratch[k];
        loss_of[k] = log1pf(negative / positive);
        factor[k] = term_weight / (float(count) * temperature) / (positive + negative);
        if (gradient != nullptr) similarity[k * matrix_pitch + k] = -negative;
      }
      for (int64_t k = first > count ? first : count; k < last; ++k) factor[k] = 0;
    });
    double loss_sum = 0;
    for (int64_t k = 0; k < count; ++k) loss_sum += loss_of[k];
    return loss_sum;
  }

  // ---- rows

  // The candidates^T by panels: each of kPanel rows, or of what is left.
  void transpose() const {
    const float* from = candidates();
    for_slices(threads, row_width, kLanes, num_classes * row_width, [=](int64_t first, int64_t end) {
      for (int64_t block = first; block < end; block += kLanes) {
        const int64_t last = smaller(kLanes, n - block);
        float* out = transposed + block / kPanel * kPanel * num_classes + block % kPanel;
        for (int64_t c = 0; c < num_classes; ++c, out += kPanel) {
          for (int64_t j = 0; j < last; ++j) out[j] = from[(block + j) * pitch + c];
          for (int64_t j = last < 0 ? 0 : last; j < kLanes; ++j) out[j] = 0;
        }
      }
    });
  }

  void row_terms() const {
    const bool multiplies = steps & kRowSimilarity, sums_up = steps & kRowSums, by_columns = anchors == kTeacher;
    if (multiplies) transpose();
    const Panels right{transposed, kPanel, kPanel * num_classes};
    by_blocks(
        n, by_columns ? kRowsOfSum : kTileRows, row_width, row_pitch, num_classes, multiplies, sums_up,
        [=](int64_t first, int64_t last, float* e) {
          gemm_rows(student_rows + first * pitch, pitch, 1, right, e, row_pitch, last - first, row_width, num_classes);
        },
        [=](int64_t first, int64_t last, float* e) {
          if (by_columns) {
            const auto add = gradient != nullptr ? &Call::add_to_columns<true> : &Call::add_to_columns<false>;
            (this->*add)(first, last, e, row_width, row_pitch, 1.f / row_temperature);
          } else {
            gradient != nullptr ? add_rows_of<true>(first, last, e) : add_rows_of<false>(first, last, e);
          }
        });
    if (sums_up) by_columns ? finish_teacher_anchors() : finish_rows();
  }

  // The instance-wise term of teacher anchors, which are the columns of `similarity`.
  void finish_teacher_anchors() const {
    const double loss_sum = finish_columns(n, row_width, row_pitch, row_temperature, weight[0], row_loss, row_factor);
    terms[0] = float(loss_sum / double(n)), terms[1] = 0;
    if (gradient == nullptr) return;
    for_slices(threads, n, 1, elements(), [=](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        float* row = teacher_rows + j * pitch;
        for (int64_t c = 0; c < width; c += kLanes) store(row + c, load(row + c) * row_factor[j]);
        row_factor[j] = 1;  // the product has it
      }
    });
  }

  // Anchors are rows: those of [first, last) in `e` become exponentials, if a gradient needs them, with the partner's
  // coefficient on the diagonal. Writes each anchor's loss and its factor of the gradient.
  template <bool kStore> void add_rows_of(int64_t first, int64_t last, float* e) const {
    const float inverse = 1.f / row_temperature;
    const float coefficient = (instance ? weight[0] : 0.f) + (sample ? weight[1] : 0.f);
    const float label_part = sample && coefficient > 0 ? weight[1] / coefficient : 0.f;
    const float diagonal_part = instance && coefficient > 0 ? weight[0] / coefficient : 0.f;
    for (int64_t i = first; i < last; ++i, e += row_pitch) {
      const float cosine = anchors == kSelf ? dot(student_rows + i * pitch, teacher_rows + i * pitch, width) : e[i];
      const float positive = exp(cosine * inverse);
      if (sample) {
        const float* mean = class_means + class_index[i] * pitch;
        label_gap[i] = dot_difference(student_rows + i * pitch, teacher_rows + i * pitch, mean, width) * inverse;
      }
      Vector total[4] = {};
      const auto add = [&](int64_t begin, int64_t end) {
        int64_t j = begin;
        for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
          for (int u = 0; u < 4; ++u) {
            const Vector value = exp(load(e + j + u * kLanes) * inverse);
            if (kStore) store(e + j + u * kLanes, value);
            total[u] += value;
          }
        }
        for (; j < end; j += kLanes) {
          const Vector value = exp(load(e + j) * inverse);
          if (kStore) store(e + j, value);
          total[0] += value;
        }
      };
      // The vectors of the diagonal and of the padding apart: both are no negatives.
      const auto add_masked = [&](int64_t j) {
        store(e + j, exp(load(e + j) * inverse));
        if (j <= i && i < j + kLanes) e[i] = 0;
        for (int64_t p = n; p < j + kLanes; ++p) e[p] = 0;
        total[0] += load(e + j);
      };
      const int64_t diagonal = i / kLanes * kLanes, whole = n / kLanes * kLanes;
      add(0, diagonal);
      add_masked(diagonal);
      if (diagonal < whole) add(diagonal + kLanes, whole);
      if (diagonal != whole && whole < n) add_masked(whole);
      const float negative = add_lanes((total[0] + total[1]) + (total[2] + total[3]));
      row_loss[i] = log1pf(negative / positive);
      row_factor[i] = coefficient / (float(n) * row_temperature) / (positive + negative);
      // Label positives pull by partner - mean: the partner's part cancels here, before it is rounded.
      e[i] = anchors == kSelf ? 0.f : label_part * positive - diagonal_part * negative;
      if (anchors == kSelf) scratch[i] = negative * row_factor[i];
    }
  }

  void finish_rows() const {
    if (anchors == kSelf && gradient != nullptr) weigh_both();
    double loss_sum = 0, label_sum = 0;
    for (int64_t i = 0; i < n; ++i) loss_sum += row_loss[i];
    if (sample) {
      for (int64_t i = 0; i < n; ++i) label_sum += label_gap[i];
    }
    terms[0] = instance ? float(loss_sum / double(n)) : 0.f;
    terms[1] = sample ? float((loss_sum + label_sum) / double(n)) : 0.f;
  }

  // The coefficients of rows that are anchors and candidates of one another.
  void weigh_both() const {
    for (int64_t j = n; j < row_width; ++j) row_factor[j] = 0;
    for_slices(threads, n, 1, n * row_width, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float* e = similarity + i * row_pitch;
        const Vector factor = splat(row_factor[i]);
        for (int64_t j = 0; j < row_width; j += kLanes) store(e + j, load(e + j) * (load(row_factor + j) + factor));
      }
    });
    for (int64_t i = 0; i < n; ++i) row_factor[i] = 1;  // the product has it
  }

  void write_row(float* to, const float* from) const { memcpy(to, from, size_t(num_classes) * sizeof(float)); }

  void row_gradient() const {
    const float label = sample ? weight[1] / (float(n) * row_temperature) : 0.f;
    for_slices(threads, n, 1, elements(), [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float* g = row_product + i * pitch;
        const float* unit = student_rows + i * pitch;
        const float* mean = sample ? class_means + class_index[i] * pitch : nullptr;
        const float factor = row_factor[i];
        for (int64_t c = num_classes; c < width; ++c) g[c] = 0;  // a library's product leaves the padding as it was
        Vector total = {};
        for (int64_t c = 0; c < width; c += kLanes) {
          Vector value = load(g + c) * factor;
          if (sample) value -= load(mean + c) * label;
          if (anchors == kSelf) value -= load(teacher_rows + i * pitch + c) * scratch[i];
          store(g + c, value);
          total += value * load(unit + c);
        }
        const float along = add_lanes(total), inverse = row_inv_norm[i];
        for (int64_t c = 0; c < width; c += kLanes) store(g + c, (load(g + c) - load(unit + c) * along) * inverse);
        if (!category) write_row(gradient + i * num_classes, g);
      }
    });
  }

  // ---- columns

  void column_terms() const {
    const bool multiplies = steps & kColumnSimilarity, sums_up = steps & kColumnSums;
    by_blocks(
        num_classes, kRowsOfSum, width, pitch, n, multiplies, sums_up,
        [=](int64_t first, int64_t last, float* e) {
          gemm_rows(teacher_columns + first, 1, pitch, row_major(student_columns, pitch), e, pitch, last - first, width, n);
        },
        [=](int64_t first, int64_t last, float* e) {
          const auto add = gradient != nullptr ? &Call::add_to_columns<true> : &Call::add_to_columns<false>;
          (this->*add)(first, last, e, width, pitch, 1.f / column_temperature);
        });
    if (!sums_up) return;
    const double loss_sum =
        finish_columns(num_classes, width, pitch, column_temperature, weight[2], column_loss, column_factor);
    terms[2] = float(loss_sum / double(num_classes));
  }

  void column_gradient() const {
    for_slices(threads, width, kLanes, elements(), [=](int64_t first, int64_t last) {
      add_rows(n, first, last, sums, scratch, [=](int64_t i, int64_t c) {
        return load(column_product + i * pitch + c) * load(student_columns + i * pitch + c);
      });
      // With g = factor product: (g - (g . x) x) inv_norm = (product - sums x) (factor inv_norm).
      for (int64_t c = first; c < last; c += kLanes) {
        store(scratch + c, load(column_factor + c) * load(column_inv_norm + c));
      }
      const int64_t end = smaller(last, num_classes);
      for (int64_t i = 0; i < n; ++i) {
        const auto value = [&](int64_t c) {
          const int64_t at = i * pitch + c;
          const Vector columns = (load(column_product + at) - load(sums + c) * load(student_columns + at)) * load(scratch + c);
          return rows() ? columns + load(row_product + at) : columns;
        };
        float* out = gradient + i * num_classes;
        for (int64_t c = first; c < end; c += kLanes) store_some(out + c, value(c), num_classes - c);
      }
    });
  }

  void finish() const {
    if (!rows()) terms[0] = terms[1] = 0;
    if (!category) terms[2] = 0;
    float total = 0;
    if (instance) total += weight[0] * terms[0];
    if (sample) total += weight[1] * terms[1];
    if (category) total += weight[2] * terms[2];
    *loss = total;
    if (gradient != nullptr && category) column_gradient();
  }
};

}  // namespace

void low_latency(const LowLatency& arguments, int steps) {
  const Call call(arguments, steps);
  const bool with_gradient = call.gradient != nullptr;
  if (steps & kNormalize) call.normalize();
  if (call.rows()) {
    call.row_terms();
    if (with_gradient && steps & kRowProduct) {
      gemm(call.threads, call.similarity, call.row_pitch, 1, row_major(call.candidates(), call.pitch), call.row_product,
           call.pitch, call.n, call.width, call.n);
    }
    if (with_gradient && steps & kRowGradient) call.row_gradient();
  }
  if (call.category) {
    call.column_terms();
    if (with_gradient && steps & kColumnProduct) {
      gemm(call.threads, call.teacher_columns, call.pitch, 1, row_major(call.similarity, call.pitch), call.column_product,
           call.pitch, call.n, call.width, call.num_classes);
    }
  }
  if (steps & kFinish) call.finish();
}

}  // namespace mcld::cpu::MCLD_CPU_ISA
