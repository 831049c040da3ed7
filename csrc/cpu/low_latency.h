// A whole call of MCLD on fp32 logits of the CPU: a frozen teacher, no masks. Raw pointers and sizes only.
//
// With S, T the logits (n, C), rn and cn unit rows and columns, t a temperature, and sums over the negatives alone:
//
//   E = exp(rn(S) rn(T)^T / t) without its diagonal, neg_i = sum_j E_ij, pos_i = exp(rn(S)_i . rn(T)_i / t)
//   loss_i = log1p(neg_i / pos_i), gradient by rn(S)_i: weight / (n t (pos_i + neg_i)) (sum_j E_ij rn(T)_j - neg_i rn(T)_i)
//
// With teacher anchors (of the instance-wise term alone) the sums run over the columns of the same E and the student rows
// are candidates: neg_j = sum_i E_ij, f_j = weight / (n t (pos_j + neg_j)), and the gradient by rn(S)_i is
// sum_j E_ij f_j rn(T)_j - neg_i f_i rn(T)_i: the factors go to the teacher rows, so that E is multiplied as it is.
// With student rows on both sides E is symmetric, and a row is an anchor and a candidate of all others: the gradient by
// rn(S)_i is sum_j E_ij (f_i + f_j) rn(S)_j - neg_i f_i rn(T)_i.
//
// For columns it is the same of F = exp(cn(T)^T cn(S) / t), stored with anchors as columns so that both GEMMs read rows.
// The two GEMMs of a similarity matrix are separate steps: the caller may leave them to a library. Where one call takes both
// the similarities and their sums, a block of rows goes from one to the other while it is in the cache, and a call
// without a gradient keeps no matrix at all.
#pragma once

#include <cstdint>

#include "cpu/isas.h"

namespace mcld::cpu {

// The anchors, and the rows against which they stand.
enum Anchors : int {
  kStudent,  // student rows against teacher rows
  kTeacher,  // teacher rows against student rows
  kSelf,     // student rows against the other student rows; the positive is the teacher row
};

// What every call on the logits of both sides has.
struct Logits {
  const float *student, *teacher;  // (n, C)
  int64_t student_row, student_column, teacher_row, teacher_column;  // strides in elements
  int64_t n, num_classes;
  int threads;
};

struct LowLatency : Logits {
  const int64_t* target;           // (n,) labels in [0, C) for the sample-wise term, or null
  int64_t target_stride;
  float* work;                     // Layout(n, num_classes, sample, category).size floats
  float* gradient;                 // (n, C) contiguous by the student, or null
  float *loss, *terms;             // () and (3,); terms may be null
  float row_temperature, column_temperature;
  float weight[3];                 // of the terms, in loss and gradient
  bool instance, sample, category; // the terms that are computed
  Anchors anchors;                 // others than kStudent for the instance-wise term alone
  float eps;                       // a row or column with norm <= eps has no direction

  bool rows() const { return instance || sample; }
};

// The steps of a call in their order. GEMM steps may be taken by the caller, on the buffers of Layout.
enum Step : int {
  kNormalize = 1,            // unit rows and columns, class means
  kRowSimilarity = 2,        // similarity = student_rows teacher_rows^T; with kSelf student_rows twice
  kRowSums = 4,              // similarity -> exponentials, row terms
  kRowProduct = 8,           // row_product = similarity teacher_rows; with kSelf student_rows
  kRowGradient = 16,         // row_product -> gradient by the student of the row terms
  kColumnSimilarity = 32,    // similarity = teacher_columns^T student_columns
  kColumnSums = 64,          // similarity -> exponentials, category-wise term
  kColumnProduct = 128,      // column_product = teacher_columns similarity
  kFinish = 256,             // the whole gradient, loss and terms
  kAllSteps = 511,
};

// Buffers in `work`, offsets and pitches in floats. Padding columns of unit matrices, up to the width, are
// zeros; nothing reads what lies between width and pitch.
struct Layout {
  static constexpr int64_t kPad = 16;
  static constexpr int64_t kLargestPanel = 64;  // columns
  static constexpr int64_t kRowsOfSum = 32;  // sums of columns add so many rows at a time
  static constexpr int64_t pad(int64_t x) { return (x + kPad - 1) / kPad * kPad; }
  // Rows a multiple of 1 KiB apart share few sets of the first cache.
  static constexpr int64_t spread(int64_t width) { return width % 256 == 0 ? width + kPad : width; }

  int64_t width, row_width;  // padded C and n
  int64_t pitch, row_pitch;  // of matrices of C and of n columns, at least their padded width
  int64_t student_rows, teacher_rows, student_columns, teacher_columns;  // (n, C); without category columns are rows
  int64_t similarity;        // (n, n) of row_pitch, then (C, C) of pitch with category
  int64_t row_product;       // (n, C)
  int64_t column_product;    // (n, C), in the place of teacher_rows
  int64_t transposed;        // (C, n): the candidates^T by panels; in the place of row_product and beyond
  int64_t class_means;       // (min(n, C), C) with sample
  int64_t row_vectors, column_vectors;  // 5 of row_width; 3 of width, 2 of the larger width
  int64_t parts;             // sums of kRowsOfSum rows each, of the larger width
  int64_t terms;             // kPad, where the caller has none
  int64_t size;

  Layout(int64_t n, int64_t c, bool sample, bool category) {
    width = pad(c), row_width = pad(n), pitch = spread(width), row_pitch = spread(row_width);
    const int64_t panels = (n + kLargestPanel - 1) / kLargestPanel * kLargestPanel;
    const int64_t larger = width > row_width ? width : row_width;
    int64_t next = 0;
    const auto take = [&next](int64_t count) { return next += count, next - count; };
    student_rows = take(n * pitch), teacher_rows = take(n * pitch);
    student_columns = category ? take(n * pitch) : student_rows;
    teacher_columns = category ? take(n * pitch) : teacher_rows;
    similarity = take(category && c * pitch > n * row_pitch ? c * pitch : n * row_pitch);
    column_product = teacher_rows;
    row_product = transposed = take(n * pitch > c * panels ? n * pitch : c * panels);
    class_means = take(sample ? (n < c ? n : c) * pitch : 0);
    row_vectors = take(5 * row_width), column_vectors = take(3 * width + 2 * larger);
    parts = take((larger + kRowsOfSum - 1) / kRowsOfSum * larger);
    terms = take(kPad);
    size = next;
  }
};

// Runs the steps of `steps`, a sum of Step, with the instructions of `isa`: an index of isa_names.
void low_latency(const LowLatency&, int steps, int isa);

// Instruction sets that this machine runs, the fastest last.
int num_isas();
const char* isa_name(int isa);

// Calls task(data, block) for every block in [0, blocks), on up to `threads` threads.
void parallel(int threads, int64_t blocks, void (*task)(void*, int64_t), void* data);

MCLD_IN_EACH_ISA(void low_latency(const LowLatency&, int steps);)

}  // namespace mcld::cpu
