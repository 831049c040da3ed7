// The rows of softmax_kl.h. Compiled once for each instruction set, as low_latency.cpp.
#include "cpu/softmax_kl.h"

#include <math.h>
#include <string.h>

#include "cpu/vectors.h"

namespace mcld::cpu::MCLD_CPU_ISA {
namespace {

constexpr int64_t kVectorsOfSum = 32;     // vectors added in fp32; sums of them are double
constexpr float kLowestExponent = -87.f;  // exp of it is the last normal number that `exp` gives
constexpr int64_t kElementsOfThread = 1 << 12;  // what is worth waking a thread

struct Call : SoftmaxKl {
  int64_t width, rows_of_block, next = 0;
  float twice_inverse;  // 2 / temperature
  double* sums;         // of the divergences of each block of rows
  float* rows;          // 3 x width floats for each worker

  explicit Call(const SoftmaxKl& call) : SoftmaxKl(call) {
    width = Layout::pad(num_classes), rows_of_block = softmax_kl_rows(num_classes);
    twice_inverse = float(2 / temperature);
    sums = reinterpret_cast<double*>(work), rows = work + Layout::pad(2 * blocks());
  }

  int64_t blocks() const { return (n + rows_of_block - 1) / rows_of_block; }

  // Copies a row, padded with -inf, whose probability is 0; returns half of the largest logit. A NaN is left to the sums.
  float load_row(const float* from, int64_t stride, float* to) const {
    copy_row(from, stride, num_classes, width, -INFINITY, to);
    Vector peak = load(to), peaks[2] = {peak, peak};
    int64_t c = kLanes;
    for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
      for (int u = 0; u < 2; ++u) peaks[u] = larger(load(to + c + u * kLanes), peaks[u]);
    }
    for (; c < width; c += kLanes) peaks[0] = larger(load(to + c), peaks[0]);
    return 0.5f * largest_lane(larger(peaks[0], peaks[1]));
  }

  static Vector larger(Vector a, Vector b) { return a > b ? a : b; }

  static float largest_lane(Vector v) {
    float lanes[kLanes];
    memcpy(lanes, &v, sizeof lanes);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    }
    return lanes[0];
  }

  // exp(x) of x <= 0; 0 where it is no normal number, NaN for NaN.
  static Vector exp_or_zero(Vector x) { return x < kLowestExponent ? Vector{} : exp(x); }

  struct Sums {
    double teacher = 0, student = 0, gap = 0;  // A, B and A m
  };

  // The sums of a row of both sides; with kGrad its logits become exp(a) and exp(b), and `gaps` a - b.
  template <bool kGrad>
  Sums add_row(float* of_teacher, float* of_student, float* gaps, float teacher_peak, float student_peak) const {
    Sums total;
    for (int64_t first = 0; first < width; first += kVectorsOfSum * kLanes) {
      const int64_t last = smaller(first + kVectorsOfSum * kLanes, width);
      Vector teacher_sum = {}, student_sum = {}, gap_sum = {};
      for (int64_t c = first; c < last; c += kLanes) {
        // Less the largest first, as the rounding of an exponent is relative to its size; halves do not overflow.
        const Vector a = (load(of_teacher + c) * 0.5f - teacher_peak) * twice_inverse;
        const Vector b = (load(of_student + c) * 0.5f - student_peak) * twice_inverse;
        const Vector teacher_exp = exp_or_zero(a), student_exp = exp_or_zero(b), gap = a - b;
        teacher_sum += teacher_exp, student_sum += student_exp;
        gap_sum += teacher_exp == 0.f ? Vector{} : teacher_exp * gap;
        if (kGrad) store(of_teacher + c, teacher_exp), store(of_student + c, student_exp), store(gaps + c, gap);
      }
      total.teacher += double(add_lanes(teacher_sum)), total.student += double(add_lanes(student_sum));
      total.gap += double(add_lanes(gap_sum));
    }
    return total;
  }

  // KL of row i; writes its gradients.
  double divergence(int64_t i, float* scratch) const {
    float *of_teacher = scratch, *of_student = scratch + width, *gaps = scratch + 2 * width;
    const float teacher_peak = load_row(teacher + i * teacher_row, teacher_column, of_teacher);
    const float student_peak = load_row(student + i * student_row, student_column, of_student);
    const auto add = student_grad || teacher_grad ? &Call::add_row<true> : &Call::add_row<false>;
    const Sums total = (this->*add)(of_teacher, of_student, gaps, teacher_peak, student_peak);
    const double mean = total.gap / total.teacher, ratio = total.student / total.teacher;
    if (student_grad != nullptr) {
      // In this form equal logits give exactly 0.
      const float scale = float(temperature / (double(n) * total.student)), factor = float(ratio);
      write_row(student_grad + i * num_classes, num_classes,
                [=](int64_t c) { return (load(of_student + c) - load(of_teacher + c) * factor) * scale; });
    }
    if (teacher_grad != nullptr) {
      const float scale = float(temperature / (double(n) * total.teacher)), center = float(mean);
      const Vector none = splat(scale * 0.f);  // NaN where a sum is NaN
      write_row(teacher_grad + i * num_classes, num_classes, [=](int64_t c) {
        const Vector p = load(of_teacher + c);
        return p == 0.f ? none : p * (load(gaps + c) - center) * scale;
      });
    }
    return mean + log(ratio);
  }

  // Takes blocks of rows until there are none left.
  void take_blocks(int64_t worker) {
    float* scratch = rows + worker * 3 * width;
    for (int64_t block; (block = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < blocks();) {
      double sum = 0;
      for (int64_t i = block * rows_of_block; i < smaller((block + 1) * rows_of_block, n); ++i) sum += divergence(i, scratch);
      sums[block] = sum;
    }
  }

  void run() {
    const int64_t workers = n * width < 2 * kElementsOfThread ? 1 : smaller(threads, blocks());
    const auto task = [](void* data, int64_t worker) { static_cast<Call*>(data)->take_blocks(worker); };
    parallel(int(workers), workers, task, this);
    double total = 0;
    for (int64_t block = 0; block < blocks(); ++block) total += sums[block];
    *loss = float(total * temperature * temperature / double(n));
    if (terms != nullptr) *terms = *loss;
  }
};

}  // namespace

void softmax_kl(const SoftmaxKl& call) { Call(call).run(); }

}  // namespace mcld::cpu::MCLD_CPU_ISA
