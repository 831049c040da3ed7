// The contrast of teacher rows with the student rows as candidates, fp32 on the CPU: loss and gradient by the student in one
// pass over slices of the anchors. Raw pointers and sizes only.
//
// With unit rows S, T of the logits (n, C), t the temperature, E_ji = exp(S_j . T_i / t) for j != i, else 0:
//
//   neg_i = sum_j E_ji,  pos_i = exp(S_i . T_i / t),  loss_i = log1p(neg_i / pos_i)
//   gradient by S_j = sum_i f_i E_ji T_i - f_j neg_j T_j,   f_i = weight / (n t (pos_i + neg_i))
//
// A slice of anchors needs the sums over all candidates before its part of the gradient: its E (n, slice), a candidate a row,
// is kept between its two GEMMs. Nothing of size n x n is. All threads work on one slice, each on its candidates, so that the
// order of a sum does not depend on their number.
#pragma once

#include <cstdint>

#include "cpu/isas.h"
#include "cpu/low_latency.h"

namespace mcld::cpu {

struct TeacherAnchors : Logits {
  float* work;           // TeacherAnchorsLayout(n, num_classes).size floats
  float* gradient;       // (n, C) contiguous by the student, or null
  float *loss, *terms;   // () the weighted term, and (3,) the term and zeros
  float weight, temperature;
  float eps;             // a row with norm <= eps has no direction
  int64_t first_slice, last_slice;  // the call's part: all parts in their order, from 0 to slices, on one workspace
};

// The workspace, offsets and pitches in floats.
struct TeacherAnchorsLayout {
  static constexpr int64_t kGroup = 128;         // anchors whose exponentials lie together
  static constexpr int64_t kSlice = 4 * kGroup;  // the most anchors of a slice

  int64_t slice, slices;       // anchors of a slice, a multiple of kGroup; their number
  int64_t width, pitch;        // of matrices of C columns
  int64_t student_rows;        // (n, C)
  int64_t product;             // (n, C)
  int64_t exponentials;        // of each group (n, kGroup): E
  int64_t anchors;             // (slice, C)
  int64_t transposed;          // (C, slice): anchors^T by panels
  int64_t parts;               // (groups of Layout::kRowsOfSum candidates, slice): their sums
  int64_t inv_norm, values;    // (n,): of the student's rows; each anchor's loss
  int64_t positive, negative, factor;  // (slice,)
  int64_t size;

  TeacherAnchorsLayout(int64_t n, int64_t c) {
    slices = (n + kSlice - 1) / kSlice;
    slice = ((n + slices - 1) / slices + kGroup - 1) / kGroup * kGroup;
    slices = (n + slice - 1) / slice;
    width = Layout::pad(c), pitch = Layout::spread(width);
    int64_t next = 0;
    const auto take = [&next](int64_t floats) { return next += floats, next - floats; };
    student_rows = take(n * pitch), product = take(n * pitch), exponentials = take(n * slice);
    anchors = take(slice * pitch), transposed = take(c * slice);
    parts = take((n + Layout::kRowsOfSum - 1) / Layout::kRowsOfSum * slice);
    inv_norm = take(Layout::pad(n)), values = take(Layout::pad(n));
    positive = take(slice), negative = take(slice), factor = take(slice);
    size = next;
  }
};

// Runs a part of a call with the instructions of `isa`: an index of isa_names.
void teacher_anchors(const TeacherAnchors&, int isa);

MCLD_IN_EACH_ISA(void teacher_anchors(const TeacherAnchors&);)

}  // namespace mcld::cpu
