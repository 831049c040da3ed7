// The pass of contrast.h. Compiled once for each instruction set, as low_latency.cpp, whose rules hold here: what a worker
// takes never changes the order of a sum, and inline functions of the standard library stay out.
#include "cpu/contrast.h"

#include <math.h>
#include <string.h>

#include "cpu/gemm.h"
#include "cpu/vectors.h"

namespace mcld::cpu::MCLD_CPU_ISA {
namespace {

typedef int32_t Keys __attribute__((vector_size(MCLD_VECTOR_BYTES)));

// Of rows without a key: no other row has one of them.
constexpr int32_t kNoKey = INT32_MIN, kNoAnchorKey = INT32_MIN + 1;
// Of the product by columns, taken together: they stay in the first cache. Whole tiles, and whole parts of a sum.
constexpr int64_t kRowsOfProduct = 96;
static_assert(kRowsOfProduct % kTileRows == 0 && kRowsOfProduct % kRowsOfSum == 0, "rows are not cut");
// Numbers of the vectors that hold so many.
constexpr int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

constexpr int64_t kWorkOfThread = 1 << 15;  // elements that are worth waking threads

struct Call : Contrast {
  ContrastLayout at;
  int64_t width;  // d, padded to whole vectors
  bool with_product;
  int64_t next;  // the next slice

  explicit Call(const Contrast& call) : Contrast(call), at(call.n, call.m, call.d, call.by_columns, call.threads) {
    width = whole_vectors(d);
    with_product = gradient != nullptr || by_temperature != nullptr;
    next = first_slice;
  }

  const float* candidate_inv_norm() const { return work + at.inv_norm; }
  const int32_t* candidate_key() const { return reinterpret_cast<const int32_t*>(work + at.keys); }

  // A key in 32 bits; `none` for a row without one.
  int32_t short_key(int64_t key, int32_t none) const { return key == no_key ? none : int32_t(key); }

  // ---- what all slices share

  float inv_norm_of(const float* row, int64_t stride) const {
    if (stride == 1 && width == d) return inverse_norm(dot(row, row, d), eps);
    Vector sums[2] = {};
    for (int64_t c = 0, u = 0; c < d; c += kLanes, u ^= 1) {
      float lanes[kLanes] = {};
      for (int64_t k = 0; k < smaller(kLanes, d - c); ++k) lanes[k] = row[(c + k) * stride];
      sums[u] += load(lanes) * load(lanes);
    }
    return inverse_norm(add_lanes(sums[0] + sums[1]), eps);
  }

  void read_candidates() const {
    float* inverse = work + at.inv_norm;
    int32_t* key = reinterpret_cast<int32_t*>(work + at.keys);
    for_slices(threads, m, kLanes, m * (inv_norm == nullptr ? d : 2), [=](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        inverse[j] = inv_norm != nullptr ? 1.f : inv_norm_of(candidates + j * candidates_row, candidates_column);
        if (keys != nullptr) key[j] = short_key(candidate_keys[j * candidate_keys_stride], kNoKey);
      }
    });
  }

  // ---- a slice

  struct Slice {
    int64_t first, count, width;  // anchors, and their number padded to whole vectors
    float *anchors, *exponentials, *product, *rows, *row, *partner;
    float *negative, *positive, *inv_norm;
    int32_t* keys;
    float *factor, *pull;  // of the product and of the partner in the gradient
    float* radial;         // A_i . gradient
  };

  Slice slice_of(int64_t number, int64_t worker) const {
    Slice s;
    s.first = number * at.slice, s.count = smaller(at.slice, n - s.first);
    s.width = whole_vectors(s.count);
    float* own = work + at.shared + worker * at.worker;
    s.anchors = own + at.anchors, s.exponentials = own + at.exponentials, s.product = own + at.product;
    s.rows = own + at.rows, s.row = own + at.row, s.partner = s.row + at.pitch;
    s.negative = own + at.vectors, s.positive = s.negative + at.slice, s.inv_norm = s.positive + at.slice;
    s.keys = reinterpret_cast<int32_t*>(s.inv_norm + at.slice);
    s.factor = s.inv_norm + 2 * at.slice, s.pull = s.factor + at.slice, s.radial = s.pull + at.slice;
    return s;
  }

  void read_anchors(const Slice& s) const {
    for (int64_t i = 0; i < s.width; ++i) s.negative[i] = s.radial[i] = 0;
    if (by_columns) {
      for (int64_t c = 0; c < d; ++c) {
        copy_row(anchors + c * anchors_column + s.first, 1, s.count, s.width, 0, s.anchors + c * at.slice);
      }
      return copy_row(inv_norm + s.first, 1, s.count, s.width, 0, s.inv_norm);
    }
    for (int64_t i = 0; i < s.count; ++i) {
      const int64_t row = s.first + i;
      copy_row(anchors + row * anchors_row, anchors_column, d, width, 0, s.row);
      const float inverse = inv_norm != nullptr ? 1.f : inverse_norm(dot(s.row, s.row, width), eps);
      s.inv_norm[i] = inv_norm != nullptr ? inv_norm[row] : inverse;
      for (int64_t c = 0; c < d; ++c) s.anchors[c * at.slice + i] = s.row[c] * inverse;
      if (keys != nullptr) s.keys[i] = short_key(keys[row * keys_stride], kNoAnchorKey);
    }
    for (int64_t i = s.count; i < s.width; ++i) {
      for (int64_t c = 0; c < d; ++c) s.anchors[c * at.slice + i] = 0;
      s.keys[i] = kNoAnchorKey;
    }
  }

  // Similarities of the candidates [first, last) become exponentials: adds them to the sums, and stores them times the
  // candidate's 1 / norm, which the product needs.
  template <bool kMask, bool kStore> void add_block(const Slice& s, int64_t first, int64_t last) const {
    const float inverse = 1.f / temperature;
    for (int64_t start = first; start < last; start += kRowsOfSum) {
      const int64_t end = smaller(start + kRowsOfSum, last);
      for (int64_t i = 0; i < s.width; i += kLanes) {
        Keys own = {};
        if (kMask) memcpy(&own, s.keys + i, sizeof own);
        const int64_t partner = s.first + i + offset;  // of the vector's first anchor
        float* e = s.exponentials + (start - first) * at.slice + i;
        Vector sum = {};
        for (int64_t j = start; j < end; ++j, e += at.slice) {
          const float of_candidate = candidate_inv_norm()[j];
          Vector value = exp(load(e) * (of_candidate * inverse));
          if (uint64_t(j - partner) < uint64_t(kLanes)) {
            float lanes[kLanes];
            store(lanes, value);
            s.positive[i + j - partner] = lanes[j - partner], lanes[j - partner] = 0;
            value = load(lanes);
          }
          if (kMask) value = own == candidate_key()[j] ? Vector{} : value;
          sum += value;
          if (kStore) store(e, value * of_candidate);
        }
        store(s.negative + i, load(s.negative + i) + sum);
      }
    }
  }

  void take_slice(const Slice& s) const {
    read_anchors(s);
    const auto add = keys == nullptr ? with_product ? &Call::add_block<false, true> : &Call::add_block<false, false>
                                     : with_product ? &Call::add_block<true, true> : &Call::add_block<true, false>;
    for (int64_t first = 0; first < m; first += at.block) {
      const int64_t last = smaller(first + at.block, m);
      const float* rows = candidates + first * candidates_row;
      int64_t pitch = candidates_row, column = by_columns ? candidates_column : 1;
      // The last vector of a row may reach into the next ones, whose numbers go to columns that nobody reads, but not past
      // the last row of all.
      if (!by_columns && (candidates_column != 1 || (m - last) * candidates_row < width - d)) {
        for (int64_t j = 0; j < last - first; ++j) {
          copy_row(rows + j * candidates_row, candidates_column, d, width, 0, s.rows + j * at.pitch);
        }
        rows = s.rows, pitch = at.pitch;
      }
      gemm_rows(rows, pitch, column, row_major(s.anchors, at.slice), s.exponentials, at.slice, last - first, s.width, d);
      (this->*add)(s, first, last);
      if (by_columns && last == m) {
        for (int64_t i = 0; i < s.count; ++i) finish_terms(s, i, 0);
      }
      if (!with_product) continue;
      if (by_columns) {
        add_columns(s, first, last);
      } else {
        gemm_rows(s.exponentials, 1, at.slice, row_major(rows, pitch), s.product, at.pitch, s.count, width, last - first,
                  first > 0);
      }
    }
    if (by_columns) return finish_columns(s);
    for (int64_t i = 0; i < s.count; ++i) finish(s, i);
  }

  // Writes what anchor i of the slice has in the terms, and returns the weight of those with label positives; `gap` is what
  // these add to its loss.
  float finish_terms(const Slice& s, int64_t i, float gap) const {
    const int64_t row = s.first + i;
    const float negative = s.negative[i], positive = s.positive[i], contrasted = log1pf(negative / positive);
    float weights[2] = {};  // of diagonal and of label positives
    for (int k = 0; k < terms; ++k) {
      // A factor, not a choice: NaN in what does not count shows as well.
      const float counted = term[k].counted == nullptr || term[k].counted[row] != 0 ? 1.f : 0.f;
      term[k].values[row] = (term[k].by_label ? contrasted + gap : contrasted) * (term[k].scale * counted);
      weights[term[k].by_label] += term[k].weight * counted;
    }
    const float share = 1.f / (temperature * (positive + negative));
    s.factor[i] = (weights[0] + weights[1]) * share;
    s.pull[i] = (weights[1] * positive - weights[0] * negative) * share * candidate_inv_norm()[row + offset];
    return weights[1];
  }

  // Writes what anchor i of the slice has in the terms and in the gradients.
  void finish(const Slice& s, int64_t i) const {
    const int64_t row = s.first + i, partner = row + offset;
    const float* mean = nullptr;
    float gap = 0;
    if (class_means != nullptr || with_product) {
      copy_row(anchors + row * anchors_row, anchors_column, d, width, 0, s.row);
      copy_row(candidates + partner * candidates_row, candidates_column, d, width, 0, s.partner);
    }
    if (class_means != nullptr) {
      mean = class_means + class_index[row] * class_means_row;
      Vector sum = {};
      for (int64_t c = 0; c < d; c += kLanes) sum += load(s.row + c) * (load(s.partner + c) - load_some(mean + c, d - c));
      gap = add_lanes(sum) / temperature;
    }
    const float of_mean = finish_terms(s, i, gap) / temperature;
    if (!with_product) return;
    const float factor = s.factor[i], pull = s.pull[i], unit = inv_norm != nullptr ? 1.f : s.inv_norm[i];
    float* product = s.product + i * at.pitch;
    Vector along = {};
    for (int64_t c = 0; c < width; c += kLanes) {
      Vector g = load(product + c) * factor + load(s.partner + c) * pull;
      if (mean != nullptr) g -= load_some(mean + c, d - c) * of_mean;
      const Vector x = load(s.row + c) * unit;
      store(product + c, g), store(s.row + c, x);
      along += c + kLanes <= d ? g * x : some(g * x, d - c);
    }
    const float radial = add_lanes(along);
    if (by_temperature != nullptr) by_temperature[row] = -radial / temperature;
    if (gradient == nullptr) return;
    float* out = gradient + row * gradient_row;
    const float inverse = s.inv_norm[i];
    const auto value = [&](int64_t c) { return (load(product + c) - load(s.row + c) * radial) * inverse; };
    if (accumulate) {
      write_row(out, d, [&](int64_t c) { return load_some(out + c, d - c) + value(c); });
    } else {
      write_row(out, d, value);
    }
  }

  // By columns: adds the candidates [first, last) to the product. After the last of all, what is in the cache becomes the
  // gradient by the unit rows.
  void add_columns(const Slice& s, int64_t first, int64_t last) const {
    for (int64_t start = 0; start < d; start += kRowsOfProduct) {
      const int64_t count = smaller(kRowsOfProduct, d - start);
      gemm_rows(candidates + start * candidates_column + first, candidates_column, 1, row_major(s.exponentials, at.slice),
                s.product + start * at.slice, at.slice, count, s.width, last - first, first > 0);
      for (int64_t c = start; last == m && c < start + count; c += kRowsOfSum) {
        pull_columns(s, c, smaller(c + kRowsOfSum, start + count));
      }
    }
  }

  // The numbers [first, last) of the product become those of the gradient by the unit rows.
  void pull_columns(const Slice& s, int64_t first, int64_t last) const {
    for (int64_t i = 0; i < s.width; i += kLanes) {
      const Vector factor = load(s.factor + i), pull = load(s.pull + i);
      const float* partner = candidates + s.first + offset + i;
      Vector sum = {};
      for (int64_t c = first; c < last; ++c) {
        float* g = s.product + c * at.slice + i;
        store(g, load(g) * factor + load_some(partner + c * candidates_column, s.count - i) * pull);
        sum += load(g) * load(s.anchors + c * at.slice + i);
      }
      store(s.radial + i, load(s.radial + i) + sum);
    }
  }

  // Writes the gradient by the logits of a slice by columns.
  void finish_columns(const Slice& s) const {
    if (gradient == nullptr) return;
    for (int64_t c = 0; c < d; ++c) {
      const float *g = s.product + c * at.slice, *x = s.anchors + c * at.slice;
      float* out = gradient + c * gradient_column + s.first;
      write_row(out, s.count, [=](int64_t i) {
        const Vector value = (load(g + i) - load(x + i) * load(s.radial + i)) * load(s.inv_norm + i);
        return accumulate ? load_some(out + i, s.count - i) + value : value;
      });
    }
  }

  // The first `count` lanes, and zeros.
  static Vector some(Vector v, int64_t count) {
    float lanes[kLanes];
    store(lanes, v);
    return load_some(lanes, count);
  }

  void take_slices(int64_t worker) {
    for (int64_t slice; (slice = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < last_slice;) {
      take_slice(slice_of(slice, worker));
    }
  }

  void run() {
    if (first_slice == 0) read_candidates();
    const int64_t workers = n * m * (1 + d / kProductsOfElement) < kWorkOfThread ? 1 : at.workers;
    const auto task = [](void* data, int64_t worker) { static_cast<Call*>(data)->take_slices(worker); };
    parallel(int(workers), workers, task, this);
    if (loss == nullptr || last_slice < at.slices) return;
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += double(term[0].values[i]);
    *loss = float(total);
  }
};

}  // namespace

void contrast(const Contrast& arguments) { Call(arguments).run(); }

}  // namespace mcld::cpu::MCLD_CPU_ISA
