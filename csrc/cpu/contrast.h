// A contrast of fp32 rows on the CPU with frozen candidates, loss and gradient in one pass that keeps no similarity
// matrix. Raw pointers and sizes only.
//
// With unit rows A_i of the anchors and K_j of the candidates, t the temperature, o the offset, and E_ij = exp(A_i . K_j / t),
// but 0 for the partner j = i + o and for candidates that the mask drops:
//
//   neg_i = sum_j E_ij,   pos_i = exp(A_i . K_i+o / t)
//   diagonal positives:  loss_i = log1p(neg_i / pos_i)
//   label positives:     loss_i = log1p(neg_i / pos_i) + A_i . (K_i+o - M_i) / t,  M_i the mean of i's class
//
// and the gradient by A_i, where d and l are the weights of an anchor in terms with diagonal and with label positives:
//
//   ((d + l) sum_j E_ij K_j + (l pos_i - d neg_i) K_i+o) / (t (pos_i + neg_i)) - l / t M_i
//
// A worker takes a slice of anchors through the candidates, block after block: the exponentials of a block stay in its cache.
// They are held transposed, a candidate a row, so that both GEMMs read the candidates as they lie in memory; their norms
// multiply rows of exponentials.
//
// Where the rows lie by columns (number c of row i at data[c pitch + i], as the classes of logits do), so does the gradient,
// and the sums over the candidates are held transposed as well: both GEMMs read the candidates in place, and what follows
// takes a vector of anchors at a time.
#pragma once

#include <cstdint>

#include "cpu/isas.h"
#include "cpu/low_latency.h"

namespace mcld::cpu {

// A term of the contrast: `scale` x each anchor's loss goes to `values`, `weight` x its gradient to the gradient.
struct ContrastTerm {
  float* values;           // (n,)
  const uint8_t* counted;  // (n,): 0 for an anchor that is not in the term; null: all are
  float scale, weight;
  bool by_label;           // label positives
};

struct Contrast {
  const float *anchors, *candidates;  // (n, d) and (m, d)
  int64_t anchors_row, anchors_column, candidates_row, candidates_column;  // strides in elements
  const float* inv_norm;  // (n,) 1 / norm of the anchors' logits, where both sides are unit rows; null: neither side is
  const int64_t *keys, *candidate_keys;  // (n,) and (m,), below 2^31: a candidate of the anchor's key is dropped; or null
  int64_t keys_stride, candidate_keys_stride, no_key;  // no_key: of rows that share their key with none
  const float* class_means;              // M_i is its row class_index[i]; null without label positives
  int64_t class_means_row;
  const int64_t* class_index;            // (n,)
  int64_t n, m, d, offset;               // 0 <= offset, n + offset <= m
  ContrastTerm term[2];
  int terms;
  float* work;             // ContrastLayout(n, m, d, by_columns, threads).size floats
  float* loss;             // () the sum of the first term's values; may be null
  float* gradient;         // (n, d) by the anchors' logits; may be null
  int64_t gradient_row, gradient_column;  // strides in elements; one of them is 1
  bool accumulate;         // add to the gradient
  float* by_temperature;   // (n,) each anchor's part of the gradient by the temperature; may be null
  float temperature;
  float eps;               // a row with norm <= eps has no direction
  bool by_columns;         // all matrices; with inv_norm, without keys, label positives and by_temperature
  int threads;
  int64_t first_slice, last_slice;  // the call's part: all parts in their order, from 0 to ContrastLayout::slices, on one workspace
};

// The workspace, in floats: what all workers share, then `worker` for each of them.
struct ContrastLayout {
  static constexpr int64_t kSlice = 64;              // the most anchors of a slice
  static constexpr int64_t kBlockNumbers = 1 << 16;  // of a block of candidates: a quarter of a usual second cache
  static constexpr int64_t kLeastBlock = 128, kLargestBlock = 512;

  int64_t slice, slices, workers;  // anchors of a slice; their number; workers that take them
  int64_t block;                   // candidates of a block
  int64_t pitch;                   // of rows of d numbers
  int64_t inv_norm, keys;          // (m,) of the candidates
  int64_t shared;                  // the size of these
  int64_t anchors, exponentials, product, rows, row, vectors;  // in a worker's part
  int64_t worker, size;

  ContrastLayout(int64_t n, int64_t m, int64_t d, bool by_columns, int threads) {
    // Slices of one width, so many that every thread has the same number of them.
    const int64_t rounds = (n + kSlice * threads - 1) / (kSlice * threads);
    slice = Layout::pad((n + rounds * threads - 1) / (rounds * threads));
    slices = (n + slice - 1) / slice;
    workers = slices < threads ? slices : threads;
    pitch = Layout::spread(Layout::pad(d));
    block = kBlockNumbers / pitch / kLeastBlock * kLeastBlock;
    block = by_columns || block > kLargestBlock ? kLargestBlock : block < kLeastBlock ? kLeastBlock : block;
    if (block > m) block = m;
    inv_norm = 0, keys = Layout::pad(m), shared = 2 * Layout::pad(m);
    int64_t next = 0;
    const auto take = [&next](int64_t count) { return next += Layout::pad(count), next - Layout::pad(count); };
    anchors = take(d * slice);  // (d, slice): unit rows, transposed
    exponentials = take(block * slice);
    product = take(by_columns ? d * slice : slice * pitch);  // sum_j E_ij K_j, by columns transposed
    rows = take(by_columns ? 0 : block * pitch);  // a copy of a block, where its rows cannot be read in place
    row = take(by_columns ? 0 : 2 * pitch);       // an anchor, and its partner
    vectors = take(7 * slice);  // sums, positives, 1 / norm, keys, factors of product and partner, radial parts
    worker = next;
    size = shared + workers * worker;
  }
};

// Runs a call with the instructions of `isa`: an index of isa_names.
void contrast(const Contrast&, int isa);

MCLD_IN_EACH_ISA(void contrast(const Contrast&);)

}  // namespace mcld::cpu
