// The pass of teacher_anchors.h. Compiled once for each instruction set, as low_latency.cpp, whose rules hold here: what a
// thread takes never changes the order of a sum, and inline functions of the standard library stay out.
#include "cpu/teacher_anchors.h"

#include <math.h>

#include "cpu/gemm.h"
#include "cpu/vectors.h"

namespace mcld::cpu::MCLD_CPU_ISA {
namespace {

constexpr int64_t kGroup = TeacherAnchorsLayout::kGroup;
static_assert(kGroup % kPanel == 0, "a group is whole panels");
// Candidates of a block: of similarities, whose exponentials stay in the cache, and of
// the product, whose gradient does.
constexpr int64_t kRowsOfSimilarity = 192, kRowsOfProduct = 96;
static_assert(kRowsOfSimilarity % kRowsOfSum == 0, "the sums of a group of rows are one thread's");

struct Call : TeacherAnchors {
  TeacherAnchorsLayout at;
  float *student_rows, *product, *exponentials, *anchors, *transposed, *parts;
  float *inv_norm, *values, *positive, *negative, *factor;

  explicit Call(const TeacherAnchors& call) : TeacherAnchors(call), at(call.n, call.num_classes) {
    student_rows = work + at.student_rows, product = work + at.product, exponentials = work + at.exponentials;
    anchors = work + at.anchors, transposed = work + at.transposed, parts = work + at.parts;
    inv_norm = work + at.inv_norm, values = work + at.values;
    positive = work + at.positive, negative = work + at.negative, factor = work + at.factor;
  }

  float normalize_row(const float* from, int64_t stride, float* row) const {
    copy_row(from, stride, num_classes, at.width, 0, row);
    const float inverse = inverse_norm(dot(row, row, at.width), eps);
    for (int64_t c = 0; c < at.width; c += kLanes) store(row + c, load(row + c) * inverse);
    return inverse;
  }

  void normalize_student() const {
    for_slices(threads, n, 1, n * at.pitch, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        inv_norm[i] = normalize_row(student + i * student_row, student_column, student_rows + i * at.pitch);
      }
    });
  }

  // The rows of a slice and their transpose; `count` of them from anchor `begin` on.
  void take_anchors(int64_t begin, int64_t count) const {
    for_slices(threads, at.slice, kLanes, 2 * at.slice * at.width, [=](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; block += kLanes) {
        const int64_t here = smaller(kLanes, count - block);
        for (int64_t k = block; k < block + here; ++k) {
          normalize_row(teacher + (begin + k) * teacher_row, teacher_column, anchors + k * at.pitch);
        }
        float* out = transposed + block / kPanel * kPanel * num_classes + block % kPanel;
        for (int64_t c = 0; c < num_classes; ++c, out += kPanel) {
          for (int64_t k = 0; k < here; ++k) out[k] = anchors[(block + k) * at.pitch + c];
          for (int64_t k = here < 0 ? 0 : here; k < kLanes; ++k) out[k] = 0;
        }
      }
    });
  }

  // body(first, last) over blocks of candidates, each taken by the next thread that is free: a slice waits for the last one.
  template <class Body> void by_blocks(int64_t rows, const Body& body) const {
    struct Blocks {
      const Body& body;
      int64_t count, rows;
    };
    Blocks blocks{body, n, rows};
    const auto task = [](void* data, int64_t block) {
      const Blocks& b = *static_cast<Blocks*>(data);
      b.body(block * b.rows, smaller((block + 1) * b.rows, b.count));
    };
    parallel(threads, (n + rows - 1) / rows, task, &blocks);
  }

  float* row_of_group(int64_t group, int64_t j) const { return exponentials + (group * n + j) * kGroup; }

  // Rows [first, last) of a group's E from its similarities; sums over the candidates go to `parts`, an anchor's own
  // exponential to `positive`.
  void add_rows(int64_t group, int64_t first, int64_t last, int64_t begin) const {
    const float inverse = 1.f / temperature;
    for (int64_t row = first; row < last; row += kRowsOfSum) {
      const int64_t end = smaller(row + kRowsOfSum, last);
      float* part = parts + row / kRowsOfSum * at.slice + group * kGroup;
      for (int64_t k = 0; k < kGroup; k += kLanes) {
        Vector sum = {};
        for (int64_t j = row; j < end; ++j) {
          float* e = row_of_group(group, j) + k;
          Vector value = exp(load(e) * inverse);
          const int64_t own = j - begin - group * kGroup - k;
          if (own >= 0 && own < kLanes) {
            store(e, value);
            positive[j - begin] = e[own], e[own] = 0;
            value = load(e);
          }
          store(e, value);
          sum += value;
        }
        store(part + k, sum);
      }
    }
  }

  void run_slice(int64_t s) const {
    const int64_t begin = s * at.slice, count = smaller(at.slice, n - begin);
    take_anchors(begin, count);
    by_blocks(kRowsOfSimilarity, [=](int64_t first, int64_t last) {
      for (int64_t group = 0; group * kGroup < count; ++group) {
        const Panels right{transposed + group * kGroup * num_classes, kPanel, kPanel * num_classes};
        gemm_rows(student_rows + first * at.pitch, at.pitch, 1, right, row_of_group(group, first), kGroup, last - first,
                  kGroup, num_classes);
        add_rows(group, first, last, begin);
      }
    });
    const int64_t groups = (n + kRowsOfSum - 1) / kRowsOfSum;
    for_slices(threads, (count + kLanes - 1) / kLanes * kLanes, kLanes, groups * count, [=](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; k += kLanes) {
        Vector total = load(parts + k);
        for (int64_t g = 1; g < groups; ++g) total += load(parts + g * at.slice + k);
        store(negative + k, total);
      }
    });
    for (int64_t k = 0; k < count; ++k) {
      values[begin + k] = log1pf(negative[k] / positive[k]);
      factor[k] = weight / (float(n) * temperature) / (positive[k] + negative[k]);
    }
    if (gradient == nullptr) return;
    for (int64_t k = 0; k < count; ++k) row_of_group(k / kGroup, begin + k)[k % kGroup] = -negative[k];
    for_slices(threads, count, 1, count * at.width, [=](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        float* row = anchors + k * at.pitch;
        for (int64_t c = 0; c < at.width; c += kLanes) store(row + c, load(row + c) * factor[k]);
      }
    });
    by_blocks(kRowsOfProduct, [=](int64_t first, int64_t last) {
      for (int64_t group = 0; group * kGroup < count; ++group) {
        gemm_rows(row_of_group(group, first), kGroup, 1, row_major(anchors + group * kGroup * at.pitch, at.pitch),
                  product + first * at.pitch, at.pitch, last - first, at.width, smaller(kGroup, count - group * kGroup),
                  s > 0 || group > 0);
      }
    });
  }

  void write_gradient() const {
    for_slices(threads, n, 1, n * at.pitch, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const float *g = product + i * at.pitch, *unit = student_rows + i * at.pitch;
        const float along = dot(g, unit, at.width), inverse = inv_norm[i];
        write_row(gradient + i * num_classes, num_classes,
                  [=](int64_t c) { return (load(g + c) - load(unit + c) * along) * inverse; });
      }
    });
  }

  void finish() const {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += double(values[i]);
    terms[0] = float(sum / double(n)), terms[1] = terms[2] = 0;
    *loss = float(double(weight) * (sum / double(n)));
    if (gradient != nullptr) write_gradient();
  }

  void run() const {
    if (first_slice == 0) normalize_student();
    for (int64_t s = first_slice; s < last_slice; ++s) run_slice(s);
    if (last_slice == at.slices) finish();
  }
};

}  // namespace

void teacher_anchors(const TeacherAnchors& arguments) { Call(arguments).run(); }

}  // namespace mcld::cpu::MCLD_CPU_ISA
