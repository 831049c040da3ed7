// The steps of low_latency.h. Compiled once for each instruction set, into the namespace MCLD_CPU_ISA, with vectors of
// MCLD_VECTOR_BYTES; inline functions of the standard library stay out, since the linker keeps one copy for all.
//
// What a thread takes never changes the order of a sum, so results do not depend on the number of threads.
#include "cpu/low_latency.h"

#include <math.h>
#include <string.h>

#include "cpu/gemm.h"
#include "cpu/vectors.h"

namespace mcld::cpu::MCLD_CPU_ISA {
namespace {

struct Call : LowLatency {
  int64_t pitch, row_pitch;
  float *student_rows, *teacher_rows, *student_columns, *teacher_columns, *similarity, *row_product, *column_product;
  float *transposed, *class_means;
  float *row_inv_norm, *row_factor, *row_loss;           // (n,)
  int32_t* class_index;                                  // (n,)
  float *column_inv_norm, *column_factor, *column_loss;  // (C,)
  float *sums, *parts, *scratch;                         // (C,) or (n,)

  explicit Call(const LowLatency& call) : LowLatency(call) {
    const Layout at(n, num_classes, sample, category);
    if (terms == nullptr) terms = work + at.terms;
    pitch = at.pitch, row_pitch = at.row_pitch;
    student_rows = work + at.student_rows, teacher_rows = work + at.teacher_rows;
    student_columns = work + at.student_columns, teacher_columns = work + at.teacher_columns;
    similarity = work + at.similarity, row_product = work + at.row_product;
    column_product = work + at.column_product, transposed = work + at.transposed;
    class_means = work + at.class_means;
    float* next = work + at.row_vectors;
    row_inv_norm = next, row_factor = next + row_pitch, row_loss = next + 2 * row_pitch;
    class_index = reinterpret_cast<int32_t*>(next + 3 * row_pitch);
    next = work + at.column_vectors;
    column_inv_norm = next, column_factor = next + pitch, column_loss = next + 2 * pitch;
    const int64_t width = pitch > row_pitch ? pitch : row_pitch;
    sums = next + 3 * pitch, parts = sums + width, scratch = parts + width;
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
        const float* from = x + i * row_stride;
        if (column_stride == 1) {
          memcpy(copy, from, size_t(num_classes) * sizeof(float));
        } else {
          for (int64_t c = 0; c < num_classes; ++c) copy[c] = from[c * column_stride];
        }
        for (int64_t c = num_classes; c < pitch; ++c) copy[c] = 0;
        if (!this->rows()) continue;
        const float inverse = inverse_norm(dot(copy, copy, pitch), eps);
        if (inv_norm != nullptr) inv_norm[i] = inverse;
        for (int64_t c = 0; c < pitch; c += kLanes) store(rows + i * pitch + c, load(copy + c) * inverse);
      }
    });
  }

  // Divides columns by their norm, in place.
  void normalize_columns(float* x, float* inv_norm) const {
    for_slices(threads, pitch, kLanes, elements(), [=](int64_t first, int64_t last) {
      add_rows(n, first, last, sums, parts, [=](int64_t i, int64_t c) {
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
        for (int64_t c = 0; c < pitch; c += kLanes) {
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

  // Anchors are the columns of `similarity` (count, count), which becomes exponentials, with -neg_k on the diagonal. Writes
  // each anchor's loss and its factor of the gradient; returns the sum of the losses.
  double sum_columns(int64_t count, int64_t width, float temperature, float term_weight, float* loss_of,
                     float* factor) const {
    const float inverse = 1.f / temperature;
    float* positive = scratch;
    for_slices(threads, width, kLanes, count * width, [=](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) positive[k] = k < count ? similarity[k * width + k] : 0.f;
      for (int64_t k = first; k < last; k += kLanes) store(positive + k, exp(load(positive + k) * inverse));
      add_rows(count, first, last, sums, parts, [=](int64_t l, int64_t k) {
        float* at = similarity + l * width + k;
        const Vector value = exp(load(at) * inverse);
        store(at, value);
        if (l - k < 0 || l - k >= kLanes) return value;
        at[l - k] = 0;
        return load(at);
      });
      for (int64_t k = first; k < smaller(last, count); ++k) {
        const float negative = sums[k];
        loss_of[k] = log1pf(negative / positive[k]);
        factor[k] = term_weight / (float(count) * temperature) / (positive[k] + negative);
        similarity[k * width + k] = -negative;
      }
      for (int64_t k = first > count ? first : count; k < last; ++k) factor[k] = 0;
    });
    double loss_sum = 0;
    for (int64_t k = 0; k < count; ++k) loss_sum += loss_of[k];
    return loss_sum;
  }

  // ---- rows

  void row_similarity() const {
    const float* from = candidates();
    for_slices(threads, row_pitch, kLanes, num_classes * row_pitch, [=](int64_t first, int64_t end) {
      for (int64_t block = first; block < end; block += kLanes) {
        const int64_t last = smaller(kLanes, n - block);
        for (int64_t c = 0; c < num_classes; ++c) {
          float* out = transposed + c * row_pitch + block;
          for (int64_t j = 0; j < last; ++j) out[j] = from[(block + j) * pitch + c];
          for (int64_t j = last < 0 ? 0 : last; j < kLanes; ++j) out[j] = 0;
        }
      }
    });
    gemm(threads, student_rows, pitch, 1, transposed, row_pitch, similarity, row_pitch, n, row_pitch, num_classes);
  }

  // The instance-wise term of teacher anchors, which are the columns of `similarity`.
  void teacher_sums() const {
    const double loss_sum = sum_columns(n, row_pitch, row_temperature, weight[0], row_loss, row_factor);
    terms[0] = float(loss_sum / double(n)), terms[1] = 0;
    if (gradient == nullptr) return;
    for_slices(threads, n, 1, elements(), [=](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        float* row = teacher_rows + j * pitch;
        for (int64_t c = 0; c < pitch; c += kLanes) store(row + c, load(row + c) * row_factor[j]);
        row_factor[j] = 1;  // the product has it
      }
    });
  }

  void row_sums() const {
    if (anchors == kTeacher) return teacher_sums();
    const float inverse = 1.f / row_temperature;
    const float coefficient = (instance ? weight[0] : 0.f) + (sample ? weight[1] : 0.f);
    const float label_part = sample && coefficient > 0 ? weight[1] / coefficient : 0.f;
    const float diagonal_part = instance && coefficient > 0 ? weight[0] / coefficient : 0.f;
    for_slices(threads, n, 1, n * row_pitch, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float* e = similarity + i * row_pitch;
        const float cosine = anchors == kSelf ? dot(student_rows + i * pitch, teacher_rows + i * pitch, pitch) : e[i];
        const float positive = exp(cosine * inverse);
        if (sample) {
          const float* mean = class_means + class_index[i] * pitch;
          label_gap()[i] = dot_difference(student_rows + i * pitch, teacher_rows + i * pitch, mean, pitch) * inverse;
        }
        Vector total[4] = {};
        const auto add = [&](int64_t begin, int64_t end) {
          int64_t j = begin;
          for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
            for (int u = 0; u < 4; ++u) {
              const Vector value = exp(load(e + j + u * kLanes) * inverse);
              store(e + j + u * kLanes, value);
              total[u] += value;
            }
          }
          for (; j < end; j += kLanes) {
            const Vector value = exp(load(e + j) * inverse);
            store(e + j, value);
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
    });
    if (anchors == kSelf && gradient != nullptr) weigh_both();
    double loss_sum = 0, label_sum = 0;
    for (int64_t i = 0; i < n; ++i) loss_sum += row_loss[i];
    if (sample) {
      for (int64_t i = 0; i < n; ++i) label_sum += label_gap()[i];
    }
    terms[0] = instance ? float(loss_sum / double(n)) : 0.f;
    terms[1] = sample ? float((loss_sum + label_sum) / double(n)) : 0.f;
  }

  // The coefficients of rows that are anchors and candidates of one another.
  void weigh_both() const {
    for (int64_t j = n; j < row_pitch; ++j) row_factor[j] = 0;
    for_slices(threads, n, 1, n * row_pitch, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float* e = similarity + i * row_pitch;
        const Vector factor = splat(row_factor[i]);
        for (int64_t j = 0; j < row_pitch; j += kLanes) store(e + j, load(e + j) * (load(row_factor + j) + factor));
      }
    });
    for (int64_t i = 0; i < n; ++i) row_factor[i] = 1;  // the product has it
  }

  // (n,) positive less label positive, in row_product, which is written later.
  float* label_gap() const { return row_product; }

  void write_row(float* to, const float* from) const { memcpy(to, from, size_t(num_classes) * sizeof(float)); }

  void row_gradient() const {
    const float label = sample ? weight[1] / (float(n) * row_temperature) : 0.f;
    for_slices(threads, n, 1, elements(), [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float* g = row_product + i * pitch;
        const float* unit = student_rows + i * pitch;
        const float* mean = sample ? class_means + class_index[i] * pitch : nullptr;
        const float factor = row_factor[i];
        for (int64_t c = num_classes; c < pitch; ++c) g[c] = 0;  // a library's product leaves the padding as it was
        Vector total = {};
        for (int64_t c = 0; c < pitch; c += kLanes) {
          Vector value = load(g + c) * factor;
          if (sample) value -= load(mean + c) * label;
          if (anchors == kSelf) value -= load(teacher_rows + i * pitch + c) * scratch[i];
          store(g + c, value);
          total += value * load(unit + c);
        }
        const float along = add_lanes(total), inverse = row_inv_norm[i];
        for (int64_t c = 0; c < pitch; c += kLanes) store(g + c, (load(g + c) - load(unit + c) * along) * inverse);
        if (!category) write_row(gradient + i * num_classes, g);
      }
    });
  }

  // ---- columns

  void column_similarity() const {
    gemm(threads, teacher_columns, 1, pitch, student_columns, pitch, similarity, pitch, num_classes, pitch, n);
  }

  void column_sums() const {
    const double loss_sum =
        sum_columns(num_classes, pitch, column_temperature, weight[2], column_loss, column_factor);
    terms[2] = float(loss_sum / double(num_classes));
  }

  void column_gradient() const {
    for_slices(threads, pitch, kLanes, elements(), [=](int64_t first, int64_t last) {
      add_rows(n, first, last, sums, parts, [=](int64_t i, int64_t c) {
        return load(column_product + i * pitch + c) * load(student_columns + i * pitch + c);
      });
      // With g = factor product: (g - (g . x) x) inv_norm = (product - sums x) (factor inv_norm).
      for (int64_t c = first; c < last; c += kLanes) {
        store(scratch + c, load(column_factor + c) * load(column_inv_norm + c));
      }
      const int64_t whole = smaller(last, num_classes / kLanes * kLanes);
      for (int64_t i = 0; i < n; ++i) {
        const auto value = [&](int64_t c) {
          const int64_t at = i * pitch + c;
          const Vector columns = (load(column_product + at) - load(sums + c) * load(student_columns + at)) * load(scratch + c);
          return rows() ? columns + load(row_product + at) : columns;
        };
        float* out = gradient + i * num_classes;
        int64_t c = first;
        for (; c < whole; c += kLanes) store(out + c, value(c));
        for (; c < smaller(last, num_classes); c += kLanes) {
          const Vector tail = value(c);
          memcpy(out + c, &tail, size_t(num_classes - c) * sizeof(float));
        }
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
  const Call call(arguments);
  const bool with_gradient = call.gradient != nullptr;
  if (steps & kNormalize) call.normalize();
  if (call.rows()) {
    if (steps & kRowSimilarity) call.row_similarity();
    if (steps & kRowSums) call.row_sums();
    if (with_gradient && steps & kRowProduct) {
      gemm(call.threads, call.similarity, call.row_pitch, 1, call.candidates(), call.pitch, call.row_product, call.pitch,
           call.n, call.pitch, call.n);
    }
    if (with_gradient && steps & kRowGradient) call.row_gradient();
  }
  if (call.category) {
    if (steps & kColumnSimilarity) call.column_similarity();
    if (steps & kColumnSums) call.column_sums();
    if (with_gradient && steps & kColumnProduct) {
      gemm(call.threads, call.teacher_columns, call.pitch, 1, call.similarity, call.pitch, call.column_product, call.pitch,
           call.n, call.pitch, call.num_classes);
    }
  }
  if (steps & kFinish) call.finish();
}

}  // namespace mcld::cpu::MCLD_CPU_ISA
