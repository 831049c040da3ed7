// The passes of clkd.h. Compiled once for each instruction set, as low_latency.cpp, whose rules hold here: what a thread
// takes never changes the order of a sum, and inline functions of the standard library stay out.
#include "cpu/clkd.h"

#include <math.h>
#include <string.h>

#include "cpu/gemm.h"
#include "cpu/vectors.h"

namespace mcld::cpu::MCLD_CPU_ISA {
namespace {

constexpr int64_t kRowsOfProduct = 48;  // rows of S_c G that are added to the gradient while they are in the cache
static_assert(kRowsOfProduct % kTileRows == 0, "whole tiles");

// The gradient by a unit vector, through its normalization, is coefficient (d - along u) with d = u - v.
struct Call : Clkd {
  ClkdLayout at;
  int64_t pitch;
  float *s, *t, *difference, *middle, *product;
  float *student_inverse, *teacher_inverse, *row_along;  // (n,)
  float *student_scale, *teacher_scale;                  // (C,): 1 / norm of the columns
  float *difference_mean, *student_mean;                  // (C,)
  float *column_along, *column_coefficient;              // (C,)
  float* column_square;                                  // (C,): sums of d^2

  explicit Call(const Clkd& call) : Clkd(call), at(call.n, call.num_classes), pitch(at.pitch) {
    s = work + at.student, t = work + at.teacher, difference = work + at.difference, middle = work + at.middle;
    product = work + at.product;
    student_inverse = work + at.rows, teacher_inverse = student_inverse + n, row_along = teacher_inverse + n;
    student_scale = work + at.columns, teacher_scale = student_scale + pitch;
    difference_mean = teacher_scale + pitch, student_mean = difference_mean + pitch;
    column_along = student_mean + pitch, column_coefficient = column_along + pitch;
    column_square = column_coefficient + pitch;
  }

  int64_t elements() const { return n * pitch; }

  float* sums_of(int64_t group, int kind) const {
    return work + at.column_sums + (group * ClkdLayout::kColumnSums + kind) * pitch;
  }

  // body(group, first row, last row) for each group of rows that a sum adds at a time.
  template <class Body> void by_groups(const Body& body) const {
    for_slices(threads, n, Layout::kRowsOfSum, elements(), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; row += Layout::kRowsOfSum) {
        body(row / Layout::kRowsOfSum, row, smaller(row + Layout::kRowsOfSum, last));
      }
    });
  }

  // The sums of one kind over all groups, in their order.
  Vector total(int kind, int64_t c) const {
    Vector sum = load(sums_of(0, kind) + c);
    for (int64_t group = 1; group < at.groups; ++group) sum += load(sums_of(group, kind) + c);
    return sum;
  }

  // The part of row i in the instance term.
  float instance_of_row(int64_t i) const {
    const float *a = s + i * pitch, *b = t + i * pitch;
    const float left = inverse_norm(dot(a, a, pitch), eps), right = inverse_norm(dot(b, b, pitch), eps);
    Vector square = {}, along = {};
    for (int64_t c = 0; c < pitch; c += kLanes) {
      const Vector u = load(a + c) * left, d = u - load(b + c) * right;
      square += d * d, along += d * u;
    }
    student_inverse[i] = left, teacher_inverse[i] = right, row_along[i] = add_lanes(along);
    return add_lanes(square);
  }

  // Squares of both sides, S - T and S: add(kind, value) takes their vectors.
  template <bool kFirst> void add_to_columns(int64_t group, int64_t i) const {
    const float *a = s + i * pitch, *b = t + i * pitch;
    float* sums = sums_of(group, 0);
    const auto add = [](float* to, Vector value) { store(to, kFirst ? value : load(to) + value); };
    for (int64_t c = 0; c < pitch; c += kLanes) {
      const Vector x = load(a + c), y = load(b + c);
      if (category) add(sums + c, x * x), add(sums + pitch + c, y * y);
      // Not the means of S and of T: late in training their difference would have few digits. Nor of S + T: of a student
      // much smaller than the teacher the rest would have few.
      if (correlation) add(sums + 2 * pitch + c, x - y), add(sums + 3 * pitch + c, x);
    }
  }

  void read_logits() const {
    by_groups([this](int64_t group, int64_t first, int64_t last) {
      float error = 0;
      for (int64_t i = first; i < last; ++i) {
        copy_row(student + i * student_row, student_column, num_classes, pitch, 0, s + i * pitch);
        copy_row(teacher + i * teacher_row, teacher_column, num_classes, pitch, 0, t + i * pitch);
        if (instance) error += instance_of_row(i);
        if (category || correlation) i == first ? add_to_columns<true>(group, i) : add_to_columns<false>(group, i);
      }
      work[at.row_sums + group] = error;
    });
    const float rows = 1.f / float(n);
    for (int64_t c = 0; c < pitch; c += kLanes) {
      if (category) store(student_scale + c, total(0, c)), store(teacher_scale + c, total(1, c));
      if (correlation) store(difference_mean + c, total(2, c) * rows), store(student_mean + c, total(3, c) * rows);
    }
    if (!category) return;
    for (int64_t c = 0; c < pitch; ++c) {
      student_scale[c] = inverse_norm(student_scale[c], eps), teacher_scale[c] = inverse_norm(teacher_scale[c], eps);
    }
  }

  // d^2 and d u of the columns.
  template <bool kFirst> void add_errors(int64_t group, int64_t i) const {
    const float *a = s + i * pitch, *b = t + i * pitch;
    float* sums = sums_of(group, 0);
    const auto add = [](float* to, Vector value) { store(to, kFirst ? value : load(to) + value); };
    for (int64_t c = 0; c < pitch; c += kLanes) {
      const Vector u = load(a + c) * load(student_scale + c), d = u - load(b + c) * load(teacher_scale + c);
      add(sums + c, d * d), add(sums + pitch + c, d * u);
    }
  }

  void centre(int64_t i) const {
    const float *a = s + i * pitch, *b = t + i * pitch;
    for (int64_t c = 0; c < pitch; c += kLanes) {
      const Vector x = load(a + c), y = load(b + c);
      store(difference + i * pitch + c, (x - y) - load(difference_mean + c));
      store(middle + i * pitch + c, (x + y) * 0.5f - (load(student_mean + c) - load(difference_mean + c) * 0.5f));
    }
  }

  void read_columns() const {
    by_groups([this](int64_t group, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (category) i == first ? add_errors<true>(group, i) : add_errors<false>(group, i);
        if (correlation) centre(i);
      }
    });
    if (!category) return;
    const float coefficient = float(2 * double(weight[1]) * column_factor);
    for (int64_t c = 0; c < pitch; c += kLanes) {
      store(column_square + c, total(0, c)), store(column_along + c, total(1, c));
      store(column_coefficient + c, load(student_scale + c) * coefficient);
    }
  }

  // A tile of kLanes x kLanes of X^T at (row, column): G is X + X^T.
  void transpose_tile(int64_t row, int64_t column, float (*tile)[kLanes]) const {
    const int64_t rows = smaller(kLanes, num_classes - row), columns = smaller(kLanes, num_classes - column);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < kLanes; ++j) tile[i][j] = j < columns ? product[(column + j) * pitch + row + i] : 0.f;
    }
  }

  // X becomes `scale` G, where there is a gradient; returns ||G||^2. A thread takes whole pairs of tiles.
  double symmetrize(float scale) const {
    float* squares = work + at.gram_sums;
    const int64_t tiles = (num_classes + kLanes - 1) / kLanes;
    // Row r of tiles from the diagonal on, which writes row r and column r: the work shrinks, so rows r and tiles - 1 - r
    // go together.
    const auto row_of_tiles = [=](int64_t r) {
      const int64_t row = r * kLanes, rows = smaller(kLanes, num_classes - row);
      float total = 0;
      for (int64_t column = row; column < num_classes; column += kLanes) {
        const int64_t columns = smaller(kLanes, num_classes - column);
        float tile[kLanes][kLanes], sums[kLanes][kLanes];
        transpose_tile(row, column, tile);
        Vector square = {};
        for (int64_t i = 0; i < rows; ++i) {
          const Vector g = load(product + (row + i) * pitch + column) + load(tile[i]);
          square += g * g;
          store(sums[i], g);
        }
        total += column == row ? add_lanes(square) : 2 * add_lanes(square);
        if (gradient == nullptr) continue;
        for (int64_t i = 0; i < rows; ++i) store(product + (row + i) * pitch + column, load(sums[i]) * scale);
        if (column == row) continue;
        for (int64_t j = 0; j < columns; ++j) {
          for (int64_t i = 0; i < rows; ++i) product[(column + j) * pitch + row + i] = sums[i][j] * scale;
        }
      }
      squares[r] = total;
    };
    for_slices(threads, (tiles + 1) / 2, 1, num_classes * pitch, [=](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        row_of_tiles(r);
        if (tiles - 1 - r != r) row_of_tiles(tiles - 1 - r);
      }
    });
    double sum = 0;
    for (int64_t r = 0; r < tiles; ++r) sum += double(squares[r]);
    return sum;
  }

  double correlate() const {
    gemm(threads, difference, 1, pitch, row_major(middle, pitch), product, pitch, num_classes, pitch, n);
    return symmetrize(float(4 * double(weight[2]) * gram_factor)) * gram_factor;
  }

  // The gradient's row i; `gram` has the correlation's part of it, where there is one.
  void write_gradient_row(int64_t i, const float* gram) const {
    const float *a = s + i * pitch, *b = t + i * pitch;
    const float left = instance ? student_inverse[i] : 0.f, right = instance ? teacher_inverse[i] : 0.f;
    const float along = instance ? row_along[i] : 0.f;
    const float coefficient = instance ? float(2 * double(weight[0]) * row_factor) * left : 0.f;
    write_row(gradient + i * num_classes, num_classes, [=](int64_t c) {
      const Vector x = load(a + c), y = load(b + c);
      Vector g = correlation ? load(gram + c) : Vector{};
      if (instance) {
        const Vector u = x * left;
        g += ((u - y * right) - u * along) * coefficient;
      }
      if (category) {
        const Vector u = x * load(student_scale + c);
        g += ((u - y * load(teacher_scale + c)) - u * load(column_along + c)) * load(column_coefficient + c);
      }
      return g;
    });
  }

  void write_gradient() const {
    const int64_t products = correlation ? pitch * num_classes / kProductsOfElement : 0;
    for_slices(threads, n, kTileRows, n * (pitch + products), [=](int64_t first, int64_t last) {
      for (int64_t start = first; start < last; start += kRowsOfProduct) {
        const int64_t end = smaller(start + kRowsOfProduct, last);
        float* gram = difference + start * pitch;  // S_c G in the place of D
        if (correlation) {
          float* centred = middle + start * pitch;  // S_c in the place of M; M + D / 2 has few digits of a small student
          for (int64_t i = start; i < end; ++i) {
            for (int64_t c = 0; c < pitch; c += kLanes) {
              store(middle + i * pitch + c, load(s + i * pitch + c) - load(student_mean + c));
            }
          }
          gemm_rows(centred, pitch, 1, row_major(product, pitch), gram, pitch, end - start, pitch, num_classes);
        }
        for (int64_t i = start; i < end; ++i) write_gradient_row(i, gram + (i - start) * pitch);
      }
    });
  }

  void run() const {
    double sums[3] = {};
    read_logits();
    if (category || correlation) read_columns();
    if (instance) {
      for (int64_t group = 0; group < at.groups; ++group) sums[0] += double(work[at.row_sums + group]);
      sums[0] *= row_factor;
    }
    if (category) {
      for (int64_t c = 0; c < num_classes; ++c) sums[1] += double(column_square[c]);
      sums[1] *= column_factor;
    }
    if (correlation) sums[2] = correlate();
    double total = 0;
    for (int k = 0; k < 3; ++k) terms[k] = float(sums[k]);
    if (instance) total += double(weight[0]) * sums[0];
    if (category) total += double(weight[1]) * sums[1];
    if (correlation) total += double(weight[2]) * sums[2];
    *loss = float(total);
    if (gradient != nullptr) write_gradient();
  }
};

}  // namespace

void clkd(const Clkd& arguments) { Call(arguments).run(); }

}  // namespace mcld::cpu::MCLD_CPU_ISA
