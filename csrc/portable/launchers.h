// What the portable kernels offer to the host: one function a launch, raw device pointers, sizes and a stream.
//
// An *operand* is a row-major matrix of the operand type whose pitch is a multiple of 64 elements (of 128 where a product
// takes tiles of 128), whose rows are a multiple of 128, and which is zero outside its n rows and d columns: no product then
// checks a bound. Pitches are in elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mcld {

// Types of logits and gradients. A gradient is held in fp32 or bf16; operands of fp16 are made of fp16 logits alone.
enum class Type : int { fp32 = 0, fp16 = 1, bf16 = 2 };

// How a product takes its operands. tf32x3: fp32 accuracy from three tf32 products. Both tf32 kinds hold operands in fp32.
enum class Precision : int { bf16 = 0, fp16 = 1, tf32 = 2, tf32x3 = 3 };

struct Normalise {
  const void* x;  // (n, d) logits of any strides
  int64_t row_stride, column_stride;
  void* out;       // operand, padded_rows x pitch, written whole
  float* inverse;  // (n,) 1 / norm, 0 for norm <= eps, NaN for a norm that is not finite
  float* work;     // (splits, n), for columns only
  int64_t n, d, padded_rows, pitch;
  int splits;
  float eps;
};
void normalise_rows(const Normalise&, Type, Precision, cudaStream_t);
void normalise_columns(const Normalise&, Type, Precision, cudaStream_t);

struct Describe {
  const int64_t* target;  // (n,) labels
  int64_t n, classes, ignore_index;
  int64_t* same;          // (n,) the label, or a negative number of its own where it is ignored
  int64_t* rank;          // (n,) the label, or `classes` where it is ignored
  bool* valid;            // (n,) not ignored
  float *poison, *share;  // () 1, or NaN if a label is out of range; that over the number of valid rows
};
void describe(const Describe&, cudaStream_t);

struct Order {
  const int64_t* rank;                // (n,) in [0, ranks)
  int64_t n, ranks;
  int64_t *counts, *starts, *order;   // (ranks,), (ranks + 1,), (n,): rows by rank, ties by row
};
void order(const Order&, cudaStream_t);

struct ClassMeans {
  const void* unit;       // operand
  const int64_t* order;   // rows by rank
  const int64_t* starts;  // (ranks + 1,)
  const int64_t* counts;  // (ranks,) divisors, at least 1 is used
  float* out;             // (ranks, pitch): rounded, a mean would pull a row off the direction of its class
  int64_t ranks, pitch;
};
void class_means(const ClassMeans&, Precision, cudaStream_t);

struct Positives {
  const void *a, *k;    // operands of one pitch
  const float* means;   // (ranks, pitch) or null
  const int64_t* rank;  // (n,)
  float* positive;      // (n,) A_i . K_(i + offset), 0 where there is none
  float* by_label;      // (n,) A_i . M_rank(i), if means
  int64_t n, m, offset, pitch;
};
void positives(const Positives&, Precision, cudaStream_t);

struct Similarity {
  const void *a, *k;       // operands: the chunk's anchors, all candidates
  void* e;                 // (padded rows, pitch_e) or null: exp2(scale A_i . K_j - shift), 0 where dropped
  float* row_sums;         // (tiles of columns, padded rows)
  float* row_maxima;       // the same shape, or null: then `shift` holds for all, else it is the tile row's own, an integer
  float* column_sums;      // (tiles of rows, pitch_e) or null
  float* parts;            // (splits, padded rows, pitch_e) workspace where splits > 1
  int splits;              // parts of the contraction, computed side by side and added in order
  const int64_t *same_a, *same_k;  // (rows,), (m,) or null: equal ones are dropped
  int64_t rows, m, pitch, pitch_e, padded_rows;
  int64_t diagonal;        // the positive of the chunk's row i is candidate i + diagonal, and is dropped
  float scale, shift;
};
// The rows and columns of a tile: 128 or 64. Padded sizes must be multiples of it.
void similarity(const Similarity&, Precision, int tile, cudaStream_t);

struct Statistics {
  const float* sums;    // (tiles, pitch)
  const float* maxima;  // the same shape, or null
  float* row_maxima;    // (rows,) if maxima
  float* total;         // (rows,) running sum over chunks, or null
  float* log_off;       // (rows,) natural logarithm of the sum; -inf where it is 0
  float* scale;         // (rows,) 1 / sum; 0 where it is 0
  int64_t rows, pitch;
  int tiles;
  bool add;  // to `total`
  float shift;
};
void statistics(const Statistics&, cudaStream_t);

struct Rescale {
  void* e;
  const float *maxima, *row_maxima;  // (tiles, padded_rows), (rows,)
  int64_t rows, padded_rows, pitch_e;
  int tile;
};
void rescale(const Rescale&, Precision, cudaStream_t);

struct ScaleRows {
  const void* a;        // operand rows
  void* out;            // operand rows, zeros from `rows` to padded_rows
  const float* factor;  // (rows,)
  int64_t rows, padded_rows, pitch;
};
void scale_rows(const ScaleRows&, Precision, cudaStream_t);

struct Product {
  const void *e, *k;  // e: (rows, pitch_e); k: (contraction, pitch)
  float* out;         // (padded rows, pitch)
  const float* alpha;  // () factor of the product, or null
  int64_t rows, contraction, pitch_e, pitch;  // all multiples of the tile
  bool transposed;    // E^T K: rows counts the columns of e, contraction its rows
  bool add;
};
void product(const Product&, Precision, int tile, cudaStream_t);

struct Flash {
  const void *a, *k;  // operands
  float* out;         // (splits, padded_rows, pitch) or null: sums of exp2(...) K_j
  float* sums;        // (splits, padded_rows)
  float* maxima;      // the same, or null: then `shift` holds for all
  const float* column_factor;      // (m,) or null: candidate j counts this often in `out`,
  const float* column_shift;       // and has its own shift (m,), if not null; then no maxima
  const int64_t *same_a, *same_k;  // (n,), (m,) or null
  int64_t n, m, pitch, padded_rows, diagonal;
  int splits;
  float scale, shift;
};
// Rows of operands may have at most 512 bytes.
void flash(const Flash&, Precision, cudaStream_t);

struct Combine {
  const float *parts, *maxima, *row_maxima;  // (splits, padded_rows, pitch), (splits, padded_rows) or null, (rows,)
  float* out;                                // (rows, pitch)
  int64_t rows, padded_rows, pitch;
  int splits;
};
void combine(const Combine&, cudaStream_t);

struct FactorShare {        // an anchor's part in the mean of a term
  const float* factor;      // () or null
  const bool* counted;      // (rows,) or null: all
  const float* weight;      // () or null
  float constant, scale;    // the part is constant x factor where counted, the weight in the loss scale x weight
  bool by_label;            // the sample-wise term
};

struct Factors {
  const float *log_off, *scale, *positive, *by_label;  // (rows,)
  float *u, *s, *z;                                    // (rows,); z where a share is by label
  float* values;                                       // (count, pitch)
  int64_t rows, pitch;
  float inverse_temperature;
  FactorShare shares[2];
  int count;
};
void factors(const Factors&, cudaStream_t);

struct Totals {
  const float* values;         // (count, width)
  int64_t width;
  int part[5];                 // the term of each row
  int count;
  float scale[3];
  const float* weight;         // (3,) or null
  float *loss, *terms;         // (), (3,)
};
void totals(const Totals&, cudaStream_t);

struct Finish {
  void* out;  // (rows, d) gradient of any strides
  int64_t row_stride, column_stride;
  const void *unit, *partner;  // operands of one pitch; unit begins at the chunk
  const float* means;          // (ranks, pitch) or null
  const float *inverse, *product, *s, *u, *z;
  const int64_t* rank;
  float* dots;  // (rows,) workspace, for a gradient whose columns are contiguous
  int64_t rows, d, pitch, product_pitch;
  int64_t shift, partner_rows;  // P of the chunk's row r is row r + shift of partner, if there is one
  bool add;
};
void finish(const Finish&, Type, Precision, cudaStream_t);

// The low-latency path: at most kSmall rows and columns, one shift for all, both logits of one type. All terms at once. With
// student anchors in five launches: small_normalise, small_similarity, small_product, small_factors, small_write. With teacher
// anchors, whose factors the product needs (not in fp16), in six: small_factors comes before it, small_dots after it.
constexpr int kSmall = 1024;

struct SmallProblem {  // one similarity matrix: the rows', or the columns'
  void *a, *k;                 // operands of student and teacher
  float *inverse_a, *inverse_k;
  void* e;                     // (padded, padded) or null: no gradient is wanted
  float* row_sums;             // (padded / 64, padded)
  float* column_sums;          // the same by column, for teacher anchors, or null
  float* product;              // (padded, pitch) E K, for student anchors, or null
  void* weighted;              // operand rows: K by the teacher anchors' factors, or null;
  float* back;                 // (padded, pitch) E times these
  float *s, *u, *z, *dots;     // (n,)
  float* values;               // (3, n) each row's share of each term
  int64_t n, d, pitch;
  float inverse_temperature;
  bool terms[3];               // which of instance, sample, category are of this matrix
  bool masked, columns;        // candidates of the anchor's class dropped; rows are the logits' columns
  bool by_student;             // whether the student's rows are anchors; both sides' may be
};

struct Small {
  const void *student, *teacher;
  int64_t student_strides[2], teacher_strides[2];
  const int64_t* target;  // (batch,) or null
  int64_t ignore_index;
  const float* weights;   // (3,) or null
  float scale[3];
  int64_t batch, classes;
  float eps;
  bool present_only, any_mask;
  SmallProblem problems[3];
  int count;
  int64_t* same;    // (batch,) the class, or a negative number of its own where ignored
  float* facts;     // (2,) rows with a class; 1, or NaN if a label is out of range
  float* counts;    // (classes,) rows of each class
  float* means;     // (classes, pitch of the rows' operands)
  float* loss;      // ()
  float* terms;     // (3,)
  void* gradient;   // (batch, classes) contiguous, or null
};
void small(const Small&, Type logits, Type gradient, Precision, cudaStream_t);

}  // namespace mcld
