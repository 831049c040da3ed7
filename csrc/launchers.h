// The launchers: one function a launch, on raw device pointers, sizes and a stream.
//
// An *operand* is a row-major matrix of the operand type, padded as constants.h has it and zero outside its n rows and d
// columns, so that no product checks a bound. Pitches are in elements.
//
// A structure names its members in MCLD_FIELDS, from which fields.h reads it out of keyword arguments.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "constants.h"

#define MCLD_FIELDS(...) \
  template <class Visitor> void visit(Visitor& visitor) { visitor(#__VA_ARGS__, __VA_ARGS__); }

namespace mcld {

// A list of 1 to kMost items.
template <class T, int kMost> struct List {
  T item[kMost];
  int count;
};

struct Normalize {
  const void* x;  // (n, d) logits of any strides
  int64_t row_stride, column_stride;
  void* out;           // operand, padded_rows x pitch, written whole
  float* inv_norm;     // (n,) 1 / norm, 0 for norm <= eps, NaN for a norm that is not finite
  float* square_sums;  // (splits, n) workspace, for columns only
  int64_t n, d, padded_rows, pitch;
  int splits;
  float eps;
  MCLD_FIELDS(x, row_stride, column_stride, out, inv_norm, square_sums, n, d, padded_rows, pitch, splits, eps)
};
void normalize_rows(const Normalize&, Type, Precision, cudaStream_t);
void normalize_columns(const Normalize&, Type, Precision, cudaStream_t);

struct IndexLabels {
  const int64_t* target;  // (n,) labels
  int64_t n, num_classes, ignore_index;
  int64_t* key;          // (n,) the label, or a negative number that equals no other where it is ignored
  int64_t* class_index;  // (n,) the label, or num_classes where it is ignored
  bool* valid;           // (n,) not ignored
  int* histogram;        // (blocks, num_classes + 1) rows of each class index among those of a block
  int* rank;             // (n,) earlier rows of the same class index in the block
  int* sums;             // (2, blocks) rows that are valid, and whose label is out of range
  int blocks;            // each takes the next rows_per_block rows
  int rows_per_block;    // a multiple of 32
  MCLD_FIELDS(target, n, num_classes, ignore_index, key, class_index, valid, histogram, rank, sums, blocks, rows_per_block)
};
// For at most kMaxSortedClasses class indices.
void index_labels(const IndexLabels&, cudaStream_t);

struct SortLabels {
  const int64_t* class_index;  // (n,) in [0, num_classes_present)
  const int *histogram, *rank, *sums;  // of index_labels
  int64_t n, num_classes_present;
  int blocks, rows_per_block;
  int* first;          // (blocks, num_classes_present) workspace: the place in `order` of a block's first row of a class index
  int64_t* counts;     // (num_classes_present,)
  int64_t* starts;     // (num_classes_present + 1,)
  int64_t* order;      // (n,) rows by class index, ties by row
  float* poison;       // () 1, or NaN if a label is out of range
  float* mean_factor;  // () poison / the number of valid rows
  MCLD_FIELDS(class_index, histogram, rank, sums, n, num_classes_present, blocks, rows_per_block, first, counts, starts, order,
              poison, mean_factor)
};
void sort_labels(const SortLabels&, cudaStream_t);

struct ClassMeans {
  const void* unit;       // operand
  const int64_t* order;   // rows by class index
  const int64_t* starts;  // (num_classes_present + 1,)
  const int64_t* counts;  // (num_classes_present,) divisors, at least 1 is used
  float* out;             // (num_classes_present, pitch); not rounded, which would turn a mean off its class's direction
  int64_t num_classes_present, pitch;
  MCLD_FIELDS(unit, order, starts, counts, out, num_classes_present, pitch)
};
void class_means(const ClassMeans&, Precision, cudaStream_t);

struct PositiveCosines {
  const void *anchors, *candidates;  // operands of one pitch
  const float* class_means;          // (num_classes_present, pitch) or null
  const int64_t* class_index;        // (n,)
  float* positive;                   // (n,) A_i . K_(i + offset), 0 where there is none
  float* label_positive;             // (n,) A_i . class_means[class_index_i], if there are class means
  int64_t n, m, offset, pitch;
  MCLD_FIELDS(anchors, candidates, class_means, class_index, positive, label_positive, n, m, offset, pitch)
};
void positive_cosines(const PositiveCosines&, Precision, cudaStream_t);

struct Similarity {
  const void *anchors, *candidates;  // operands: a chunk of the anchors, all candidates
  void* exponentials;     // (padded_rows, exp_pitch) or null: exp2(scale_log2 A_i . K_j - shift), 0 for no negative
  float* row_sums;        // (tiles of columns, padded_rows)
  float* row_maxima;      // the same shape: each tile's row has its own shift, an integer; null: `shift` holds for all
  float* column_sums;     // (tiles of rows, exp_pitch) or null
  float* split_products;  // (splits, padded_rows, exp_pitch) workspace where splits > 1
  int splits;             // parts of the contraction, computed side by side and added in order
  const int64_t *anchor_keys, *candidate_keys;  // (rows,), (m,) or null: pairs of equal keys are not negatives
  int64_t rows, m, pitch, exp_pitch, padded_rows;
  int64_t offset;  // the positive of the chunk's row i is candidate i + offset
  float scale_log2, shift;
  MCLD_FIELDS(anchors, candidates, exponentials, row_sums, row_maxima, column_sums, split_products, splits, anchor_keys,
              candidate_keys, rows, m, pitch, exp_pitch, padded_rows, offset, scale_log2, shift)
};
// tile: kLargeTile or kSmallTile.
void similarity(const Similarity&, Precision, int tile, cudaStream_t);

struct RowSums {
  const float* tile_sums;    // (tiles, pitch)
  const float* tile_maxima;  // the same shape, or null
  float* row_maxima;         // (rows,) if tile_maxima
  float* total;              // (rows,) running sum over chunks, or null
  float* neg_lse;            // (rows,) natural logarithm of the sum; -inf where it is 0
  float* inv_neg_sum;        // (rows,) 1 / sum; 0 where it is 0
  int64_t rows, pitch;
  int tiles;
  bool accumulate;  // in `total`
  float shift;
  MCLD_FIELDS(tile_sums, tile_maxima, row_maxima, total, neg_lse, inv_neg_sum, rows, pitch, tiles, accumulate, shift)
};
void row_sums(const RowSums&, cudaStream_t);

struct Rescale {
  void* exponentials;                     // (padded_rows, exp_pitch)
  const float *tile_maxima, *row_maxima;  // (tiles, padded_rows), (rows,)
  int64_t rows, padded_rows, exp_pitch;
  int tile;
  MCLD_FIELDS(exponentials, tile_maxima, row_maxima, rows, padded_rows, exp_pitch, tile)
};
void rescale(const Rescale&, Precision, cudaStream_t);

struct ScaleRows {
  const void* x;        // operand rows
  void* out;            // operand rows, zeros from `rows` to padded_rows
  const float* factor;  // (rows,)
  int64_t rows, padded_rows, pitch;
  MCLD_FIELDS(x, out, factor, rows, padded_rows, pitch)
};
void scale_rows(const ScaleRows&, Precision, cudaStream_t);

struct Product {
  const void* exponentials;  // (rows, exp_pitch)
  const void* operand;       // (contraction, pitch)
  float* out;                // (rows, pitch)
  const float* alpha;        // () factor of the product, or null
  int64_t rows, contraction, exp_pitch, pitch;  // multiples of the tile
  bool transposed;  // E^T K: rows counts the columns of the exponentials, contraction their rows
  bool accumulate;
  MCLD_FIELDS(exponentials, operand, out, alpha, rows, contraction, exp_pitch, pitch, transposed, accumulate)
};
// tile: kLargeTile or kSmallTile.
void product(const Product&, Precision, int tile, cudaStream_t);

struct Flash {
  const void *anchors, *candidates;  // operands, of at most kFlashRowBytes a row
  float* product;     // (splits, padded_rows, pitch) or null: sum_j exp2(scale_log2 A_i . K_j - shift) K_j over the negatives
  float* row_sums;    // (splits, padded_rows)
  float* row_maxima;  // the same shape: the shift of each row; null: `shift` holds for all
  const float* candidate_factor;  // (m,) or null: multiplies candidate j in `product`
  const float* candidate_shift;   // (m,) or null: candidate j's own shift; then no row_maxima
  const int64_t *anchor_keys, *candidate_keys;  // (n,), (m,) or null: pairs of equal keys are not negatives
  int64_t n, m, d, pitch, padded_rows, offset;
  int splits;  // of the candidates
  float scale_log2, shift;
  MCLD_FIELDS(anchors, candidates, product, row_sums, row_maxima, candidate_factor, candidate_shift, anchor_keys,
              candidate_keys, n, m, d, pitch, padded_rows, offset, splits, scale_log2, shift)
};
void flash(const Flash&, Precision, cudaStream_t);

struct CombineSplits {
  const float* products;  // (splits, padded_rows, pitch)
  const float *split_maxima, *row_maxima;  // (splits, padded_rows) or null, (rows,)
  float* out;                              // (rows, pitch)
  int64_t rows, padded_rows, pitch;
  int splits;
  MCLD_FIELDS(products, split_maxima, row_maxima, out, rows, padded_rows, pitch, splits)
};
void combine_splits(const CombineSplits&, cudaStream_t);

// The weight of an anchor in a term: constant x factor where counted; in the loss, x term_weight x weight.
struct TermWeight {
  const float* factor;   // () or null
  const bool* counted;   // (rows,) or null: every anchor
  const float* weight;   // () or null
  float constant, term_weight;
  bool label_positives;  // positives are the class means, not the diagonal
  MCLD_FIELDS(factor, counted, weight, constant, term_weight, label_positives)
};

struct LossEpilogue {
  const float *neg_lse, *inv_neg_sum, *positive, *label_positive;  // (rows,)
  float *partner_coef, *product_coef;                              // (rows,)
  float* class_mean_coef;  // (rows,), written where a term has label positives
  float* per_anchor;       // (weights, pitch)
  int64_t rows, pitch;
  float inv_temperature;
  List<TermWeight, 2> weights;
  MCLD_FIELDS(neg_lse, inv_neg_sum, positive, label_positive, partner_coef, product_coef, class_mean_coef, per_anchor, rows,
              pitch, inv_temperature, weights)
};
void loss_epilogue(const LossEpilogue&, cudaStream_t);

struct ReduceTerms {
  const float* per_anchor;  // (parts, width)
  int64_t width;
  List<int, 16> parts;  // the term of each row of per_anchor
  List<float, 8> term_weight;
  const float* weight;  // (terms,) or null
  float *loss, *terms;  // (), (terms,)
  MCLD_FIELDS(per_anchor, width, parts, term_weight, weight, loss, terms)
};
void reduce_terms(const ReduceTerms&, cudaStream_t);

struct GradEpilogue {
  void* out;  // (rows, d) gradient of any strides
  int64_t row_stride, column_stride;
  const void *unit, *partner;  // operands of one pitch; unit begins at the chunk
  const float* class_means;    // (num_classes_present, pitch) or null
  const float *inv_norm, *product;                              // (rows,), (rows, product_pitch)
  const float *product_coef, *partner_coef, *class_mean_coef;  // (rows,); class_mean_coef may be null
  const int64_t* class_index;  // (rows,)
  float* projection;           // (rows,) workspace, for a gradient whose columns are contiguous; all other rows are then
                               // aligned to 16 bytes, as those of the operands always are
  int64_t rows, d, pitch, product_pitch;
  int64_t offset, partner_rows;  // P of the chunk's row r is row r + offset of partner, if there is one
  bool accumulate;
  MCLD_FIELDS(out, row_stride, column_stride, unit, partner, class_means, inv_norm, product, product_coef, partner_coef,
              class_mean_coef, class_index, projection, rows, d, pitch, product_pitch, offset, partner_rows, accumulate)
};
void grad_epilogue(const GradEpilogue&, Type, Precision, cudaStream_t);

// All that follows product 2 for a chunk of anchors with a fixed shift, in one launch: row_sums, positive_cosines,
// loss_epilogue, combine_splits and grad_epilogue, for a gradient whose rows are contiguous.
struct AnchorEpilogue {
  void* out;  // (rows, d) gradient, row_stride elements from row to row
  int64_t row_stride;
  const void *unit, *partner;  // operands of one pitch; unit begins at the chunk
  const float* class_means;    // (num_classes_present, pitch), where a term has label positives
  const int64_t* class_index;  // (rows,)
  const float* inv_norm;       // (rows,)
  const float* products;       // (splits, product_rows, product_pitch), added in order
  const float* tile_sums;      // (tiles, sums_pitch), added in a fixed order
  float* per_anchor;           // (weights, per_anchor_pitch)
  int64_t rows, d, pitch, product_rows, product_pitch, sums_pitch, per_anchor_pitch;
  int64_t offset, partner_rows;  // P of the chunk's row r is row r + offset of partner, if there is one
  int splits, tiles;
  float shift, inv_temperature;
  List<TermWeight, 2> weights;
  bool accumulate;
  MCLD_FIELDS(out, row_stride, unit, partner, class_means, class_index, inv_norm, products, tile_sums, per_anchor, rows, d, pitch,
              product_rows, product_pitch, sums_pitch, per_anchor_pitch, offset, partner_rows, splits, tiles, shift,
              inv_temperature, weights, accumulate)
};
void anchor_epilogue(const AnchorEpilogue&, Type, Precision, cudaStream_t);

// The low-latency path, for at most kLowLatencyLimit rows and columns, one shift for all and logits of one type: all terms in
// five launches with student anchors (normalize, similarity, product, loss, outputs), in six with teacher anchors, whose
// coefficients the product needs (loss before product, then projection).

struct LowLatencyMatrix {  // one similarity matrix: of the rows, or of the columns
  void *student, *teacher;  // operands
  float *student_inv_norm, *teacher_inv_norm;
  void* exponentials;       // (padded, padded), or null without a gradient
  float* row_sums;          // (padded / kLowLatencyTile, padded)
  float* column_sums;       // the same by column, for teacher anchors, or null
  float* product;           // (padded, pitch) E K, for student anchors, or null
  void* weighted_teacher;   // operand: K by the teacher anchors' coefficients, or null
  float* weighted_product;  // (padded, pitch) E times it
  float *product_coef, *partner_coef, *class_mean_coef, *projection;  // (n,)
  float* per_anchor;                                                  // (3, n)
  int64_t n, d, pitch;
  float inv_temperature;
  bool terms[3];         // the terms (instance, sample, category) of this matrix
  bool masked, columns;  // masked: pairs of one class are not negatives; columns: rows are the logits' columns
  bool student_anchors;  // with teacher anchors, which have column_sums, both are possible
  MCLD_FIELDS(student, teacher, student_inv_norm, teacher_inv_norm, exponentials, row_sums, column_sums, product,
              weighted_teacher, weighted_product, product_coef, partner_coef, class_mean_coef, projection, per_anchor, n, d,
              pitch, inv_temperature, terms, masked, columns, student_anchors)
};

struct LowLatency {
  const void *student, *teacher;
  int64_t student_strides[2], teacher_strides[2];
  const int64_t* target;  // (batch,) or null
  int64_t ignore_index;
  const float* weight;  // (3,) or null
  float term_weight[3];
  int64_t batch, num_classes;
  float eps;
  bool present_only, mask_same_class;
  bool dependent;  // launches may begin while the one before ends
  List<LowLatencyMatrix, 3> matrices;
  int64_t* key;                // (batch,) the class, or a negative number that equals no other where ignored
  float *num_valid, *poison;   // () rows with a class; 1, or NaN if a label is out of range
  float* counts;               // (num_classes,) rows of each class
  float* class_means;          // (num_classes, pitch of the rows' operands), written for the classes that are present
  float *loss, *terms;         // (), (3,)
  void* gradient;              // (batch, num_classes) contiguous, or null
  MCLD_FIELDS(student, teacher, student_strides, teacher_strides, target, ignore_index, weight, term_weight, batch,
              num_classes, eps, present_only, mask_same_class, dependent, matrices, key, num_valid, poison, counts, class_means, loss,
              terms, gradient)
};
void low_latency(const LowLatency&, Type logits, Type gradient, Precision, cudaStream_t);

// Kernels for compute capability 9.0. They take the portable kernels' arguments, for 16-bit operands, a fixed shift and no
// label mask. *_unsupported gives the reason why a kernel cannot take some arguments, or null; the launchers throw
// std::invalid_argument with it.
namespace hopper {

const char* similarity_unsupported(const Similarity&, Precision);
const char* flash_unsupported(const Flash&, Precision);
// skew: slices of the contraction that the second warpgroup of a block begins behind the first, so that each takes its
// exponentials beside the other's products; 0 for none. cluster: blocks that share the candidates they load, 1 or 2.
void similarity(const Similarity&, Precision, int skew, int cluster, cudaStream_t);
void flash(const Flash&, Precision, cudaStream_t);

}  // namespace hopper
}  // namespace mcld
