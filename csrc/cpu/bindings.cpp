// The Python module mcld_kernels._cpu. It knows no torch: pointers come as integers, so one build serves every torch. They
// come by position, since a small call is mostly its arguments.
#include <pybind11/pybind11.h>

#include <tuple>

#include "cpu/clkd.h"
#include "cpu/contrast.h"
#include "cpu/low_latency.h"
#include "cpu/mlkd.h"
#include "cpu/rows.h"
#include "cpu/softmax_kl.h"
#include "cpu/teacher_anchors.h"

namespace py = pybind11;

namespace mcld::cpu {
namespace {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

void check_isa(int isa) {
  if (isa < 0 || isa >= num_isas()) throw py::value_error("no such instruction set on this machine");
}

void take_logits(Logits& call, uintptr_t student, int64_t student_row, int64_t student_column, uintptr_t teacher,
                 int64_t teacher_row, int64_t teacher_column, int64_t n, int64_t num_classes, int threads) {
  call.student = pointer<const float>(student), call.student_row = student_row, call.student_column = student_column;
  call.teacher = pointer<const float>(teacher), call.teacher_row = teacher_row, call.teacher_column = teacher_column;
  call.n = n, call.num_classes = num_classes, call.threads = threads;
}

// Runs all slices of a call, `step` of them at a time, so that a signal (Ctrl-C) is heard in between.
template <class Call> void run_in_parts(Call& call, int64_t slices, int64_t step, void (*kernel)(const Call&, int), int isa) {
  for (call.first_slice = 0; call.first_slice < slices; call.first_slice = call.last_slice) {
    call.last_slice = call.first_slice + step < slices ? call.first_slice + step : slices;
    {
      py::gil_scoped_release release;
      kernel(call, isa);
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

void run(int steps, int isa, int threads, uintptr_t student, int64_t student_row, int64_t student_column, uintptr_t teacher,
         int64_t teacher_row, int64_t teacher_column, uintptr_t target, int64_t target_stride, int64_t n, int64_t num_classes,
         uintptr_t work, uintptr_t gradient, uintptr_t loss, uintptr_t terms, float row_temperature, float column_temperature,
         float instance_weight, float sample_weight, float category_weight, bool instance, bool sample, bool category,
         int anchors, float eps) {
  check_isa(isa);
  if (anchors < kStudent || anchors > kSelf) throw py::value_error("no such anchors");
  LowLatency call;
  take_logits(call, student, student_row, student_column, teacher, teacher_row, teacher_column, n, num_classes, threads);
  call.target = pointer<const int64_t>(target), call.target_stride = target_stride;
  call.work = pointer<float>(work), call.gradient = pointer<float>(gradient);
  call.loss = pointer<float>(loss), call.terms = pointer<float>(terms);
  call.row_temperature = row_temperature, call.column_temperature = column_temperature;
  call.weight[0] = instance_weight, call.weight[1] = sample_weight, call.weight[2] = category_weight;
  call.instance = instance, call.sample = sample, call.category = category;
  call.anchors = Anchors(anchors);
  call.eps = eps;
  py::gil_scoped_release release;
  low_latency(call, steps, isa);
}

void run_normalize(int isa, int threads, uintptr_t x, int64_t x_stride, uintptr_t rows, int64_t rows_stride, uintptr_t inv_norm,
                   int64_t n, int64_t d, float eps, bool by_columns) {
  check_isa(isa);
  const Normalize call{pointer<const float>(x), x_stride, pointer<float>(rows), rows_stride, pointer<float>(inv_norm),
                       n, d, eps, by_columns, threads};
  py::gil_scoped_release release;
  normalize(call, isa);
}

void run_grad_epilogue(int isa, int threads, uintptr_t product, int64_t product_stride, uintptr_t product_factor,
                       uintptr_t partner, int64_t partner_stride, int64_t first, int64_t last, uintptr_t partner_factor,
                       uintptr_t class_means, int64_t class_means_stride, uintptr_t class_index, uintptr_t mean_factor,
                       uintptr_t unit, int64_t unit_stride, uintptr_t inv_norm, uintptr_t out, int64_t out_stride, int64_t n,
                       int64_t d, bool accumulate, bool by_columns) {
  check_isa(isa);
  GradEpilogue call;
  call.product = pointer<const float>(product), call.product_stride = product_stride;
  call.product_factor = pointer<const float>(product_factor);
  call.partner = pointer<const float>(partner), call.partner_stride = partner_stride;
  call.first = first, call.last = last, call.partner_factor = pointer<const float>(partner_factor);
  call.class_means = pointer<const float>(class_means), call.class_means_stride = class_means_stride;
  call.class_index = pointer<const int64_t>(class_index), call.mean_factor = pointer<const float>(mean_factor);
  call.unit = pointer<const float>(unit), call.unit_stride = unit_stride;
  call.inv_norm = pointer<const float>(inv_norm);
  call.out = pointer<float>(out), call.out_stride = out_stride;
  call.n = n, call.d = d, call.accumulate = accumulate, call.by_columns = by_columns, call.threads = threads;
  py::gil_scoped_release release;
  grad_epilogue(call, isa);
}

void run_softmax_kl(int isa, int threads, uintptr_t student, int64_t student_row, int64_t student_column, uintptr_t teacher,
                    int64_t teacher_row, int64_t teacher_column, int64_t n, int64_t num_classes, uintptr_t work,
                    uintptr_t student_grad, uintptr_t teacher_grad, uintptr_t loss, uintptr_t terms, double temperature) {
  check_isa(isa);
  SoftmaxKl call;
  take_logits(call, student, student_row, student_column, teacher, teacher_row, teacher_column, n, num_classes, threads);
  call.work = pointer<float>(work);
  call.student_grad = pointer<float>(student_grad), call.teacher_grad = pointer<float>(teacher_grad);
  call.loss = pointer<float>(loss), call.terms = pointer<float>(terms);
  call.temperature = temperature;
  py::gil_scoped_release release;
  softmax_kl(call, isa);
}

void run_clkd(int isa, int threads, uintptr_t student, int64_t student_row, int64_t student_column, uintptr_t teacher,
              int64_t teacher_row, int64_t teacher_column, int64_t n, int64_t num_classes, uintptr_t work, uintptr_t gradient,
              uintptr_t loss, uintptr_t terms, float instance_weight, float category_weight, float correlation_weight,
              bool instance, bool category, bool correlation, double row_factor, double column_factor, double gram_factor,
              float eps) {
  check_isa(isa);
  Clkd call;
  take_logits(call, student, student_row, student_column, teacher, teacher_row, teacher_column, n, num_classes, threads);
  call.work = pointer<float>(work), call.gradient = pointer<float>(gradient);
  call.loss = pointer<float>(loss), call.terms = pointer<float>(terms);
  call.weight[0] = instance_weight, call.weight[1] = category_weight, call.weight[2] = correlation_weight;
  call.instance = instance, call.category = category, call.correlation = correlation;
  call.row_factor = row_factor, call.column_factor = column_factor, call.gram_factor = gram_factor;
  call.eps = eps;
  py::gil_scoped_release release;
  clkd(call, isa);
}

void run_mlkd(int steps, int isa, int threads, uintptr_t student, int64_t student_row, int64_t student_column,
              uintptr_t teacher, int64_t teacher_row, int64_t teacher_column, uintptr_t target, int64_t target_stride, int64_t n,
              int64_t num_classes, uintptr_t work, uintptr_t gradient, uintptr_t loss, uintptr_t terms,
              float correlation_weight, float alignment_weight, float supervised_weight, bool correlation, bool alignment,
              bool supervised, int views, int64_t ignore_index, float correlation_temperature, float supervised_temperature,
              float eps) {
  check_isa(isa);
  if (views != 1 && views != 2) throw py::value_error("one or two views");
  Mlkd call;
  take_logits(call, student, student_row, student_column, teacher, teacher_row, teacher_column, n, num_classes, threads);
  call.target = pointer<const int64_t>(target), call.target_stride = target_stride, call.ignore_index = ignore_index;
  call.work = pointer<float>(work), call.gradient = pointer<float>(gradient);
  call.loss = pointer<float>(loss), call.terms = pointer<float>(terms);
  call.weight[0] = correlation_weight, call.weight[1] = alignment_weight, call.weight[2] = supervised_weight;
  call.correlation = correlation, call.alignment = alignment, call.supervised = supervised, call.views = views;
  call.correlation_temperature = correlation_temperature, call.supervised_temperature = supervised_temperature;
  call.eps = eps;
  py::gil_scoped_release release;
  mlkd(call, steps, isa);
}

py::dict mlkd_layout(int64_t n, int64_t num_classes, int sides) {
  const MlkdLayout at(n, num_classes, sides);
  py::dict result;
  result["size"] = at.size;
  result["pitch"] = at.pitch;
  result["matrix_pitch"] = at.matrix_pitch;
  result["rows"] = at.rows;
  result["cosines"] = at.cosines;
  result["weights"] = at.weights;
  result["product"] = at.product;
  return result;
}

int64_t clkd_size(int64_t n, int64_t num_classes) { return ClkdLayout(n, num_classes).size; }

void run_contrast(int isa, int threads, uintptr_t anchors, int64_t anchors_row, int64_t anchors_column, uintptr_t candidates,
                  int64_t candidates_row, int64_t candidates_column, uintptr_t inv_norm, uintptr_t keys, int64_t keys_stride,
                  uintptr_t candidate_keys, int64_t candidate_keys_stride, int64_t no_key, uintptr_t class_means,
                  int64_t class_means_row, uintptr_t class_index, int64_t n, int64_t m, int64_t d, int64_t offset,
                  uintptr_t work, uintptr_t loss, uintptr_t gradient, int64_t gradient_row, int64_t gradient_column,
                  bool accumulate, uintptr_t by_temperature, float temperature, float eps, bool by_columns,
                  int64_t part, const py::args& terms) {
  check_isa(isa);
  Contrast call;
  call.anchors = pointer<const float>(anchors), call.candidates = pointer<const float>(candidates);
  call.anchors_row = anchors_row, call.anchors_column = anchors_column;
  call.candidates_row = candidates_row, call.candidates_column = candidates_column;
  call.inv_norm = pointer<const float>(inv_norm);
  call.keys = pointer<const int64_t>(keys), call.keys_stride = keys_stride;
  call.candidate_keys = pointer<const int64_t>(candidate_keys), call.candidate_keys_stride = candidate_keys_stride;
  call.no_key = no_key;
  call.class_means = pointer<const float>(class_means), call.class_means_row = class_means_row;
  call.class_index = pointer<const int64_t>(class_index);
  call.n = n, call.m = m, call.d = d, call.offset = offset;
  call.work = pointer<float>(work), call.loss = pointer<float>(loss);
  call.gradient = pointer<float>(gradient), call.accumulate = accumulate;
  call.gradient_row = gradient_row, call.gradient_column = gradient_column, call.by_columns = by_columns;
  call.by_temperature = pointer<float>(by_temperature);
  call.temperature = temperature, call.eps = eps, call.threads = threads;
  call.terms = 0;
  for (const py::handle& term : terms) {
    if (call.terms == 2) throw py::value_error("a contrast has one or two terms");
    const auto [values, counted, scale, weight, by_label] = term.cast<std::tuple<uintptr_t, uintptr_t, float, float, bool>>();
    call.term[call.terms++] = {pointer<float>(values), pointer<const uint8_t>(counted), scale, weight, by_label};
  }
  if (call.terms == 0) throw py::value_error("a contrast has one or two terms");
  // In parts of so many multiply-adds of a worker's similarities.
  const ContrastLayout at(n, m, d, by_columns, threads);
  const int64_t of_slice = at.slice * m * d, step = at.workers * (of_slice < part ? part / of_slice : 1);
  run_in_parts(call, at.slices, step, contrast, isa);
}

void run_teacher_anchors(int isa, int threads, uintptr_t student, int64_t student_row, int64_t student_column,
                         uintptr_t teacher, int64_t teacher_row, int64_t teacher_column, int64_t n, int64_t num_classes,
                         uintptr_t work, uintptr_t gradient, uintptr_t loss, uintptr_t terms, float weight, float temperature,
                         float eps, int64_t part) {
  check_isa(isa);
  TeacherAnchors call;
  take_logits(call, student, student_row, student_column, teacher, teacher_row, teacher_column, n, num_classes, threads);
  call.work = pointer<float>(work), call.gradient = pointer<float>(gradient);
  call.loss = pointer<float>(loss), call.terms = pointer<float>(terms);
  call.weight = weight, call.temperature = temperature, call.eps = eps;
  // In parts of so many multiply-adds of a thread's similarities.
  const TeacherAnchorsLayout at(n, num_classes);
  const int64_t of_slice = at.slice * n * num_classes / threads, step = of_slice > part ? 1 : part / (of_slice + 1) + 1;
  run_in_parts(call, at.slices, step, teacher_anchors, isa);
}

int64_t teacher_anchors_size(int64_t n, int64_t num_classes) { return TeacherAnchorsLayout(n, num_classes).size; }

int64_t contrast_size(int64_t n, int64_t m, int64_t d, bool by_columns, int threads) {
  return ContrastLayout(n, m, d, by_columns, threads).size;
}

py::dict layout(int64_t n, int64_t num_classes, bool sample, bool category) {
  const Layout at(n, num_classes, sample, category);
  py::dict result;
  result["size"] = at.size;
  result["pitch"] = at.pitch;
  result["row_pitch"] = at.row_pitch;
  result["student_rows"] = at.student_rows;
  result["teacher_rows"] = at.teacher_rows;
  result["student_columns"] = at.student_columns;
  result["teacher_columns"] = at.teacher_columns;
  result["similarity"] = at.similarity;
  result["row_product"] = at.row_product;
  result["column_product"] = at.column_product;
  return result;
}

py::list isas() {
  py::list names;
  for (int isa = 0; isa < num_isas(); ++isa) names.append(isa_name(isa));
  return names;
}

}  // namespace
}  // namespace mcld::cpu

PYBIND11_MODULE(_cpu, module) {
  using namespace mcld::cpu;
  module.doc() = "Kernels of mcld_kernels for a CPU.";
  module.attr("NORMALIZE") = int(kNormalize);
  module.attr("ROW_SUMS") = int(kRowSums);
  module.attr("ROW_GRADIENT") = int(kRowGradient);
  module.attr("COLUMN_SUMS") = int(kColumnSums);
  module.attr("FINISH") = int(kFinish);
  module.attr("ALL_STEPS") = int(kAllSteps);
  module.attr("MLKD_NORMALIZE") = int(kMlkdNormalize);
  module.attr("MLKD_SUMS") = int(kMlkdSums);
  module.attr("MLKD_FINISH") = int(kMlkdFinish);
  module.attr("MLKD_ALL_STEPS") = int(kMlkdAllSteps);
  module.def("isas", &isas, "Names of the instruction sets that this machine runs, the fastest last.");
  module.def("layout", &layout, "Size, pitches and offsets of the workspace for n x C logits, in floats.");
  module.def("clkd_size", &clkd_size, "Size of the workspace of `clkd` for n x C logits, in floats.");
  module.def("clkd", &run_clkd, "A call of CLKD; see csrc/cpu/clkd.h for the arguments.");
  module.def("contrast_size", &contrast_size, "Size of the workspace of `contrast`, in floats.");
  module.def("contrast", &run_contrast, "A contrast of rows; see csrc/cpu/contrast.h for the arguments.");
  module.def("mlkd_layout", &mlkd_layout, "Size, pitches and offsets of the workspace of `mlkd`, in floats.");
  module.def("mlkd", &run_mlkd, "Steps of a call of MLKD; see csrc/cpu/mlkd.h for the arguments.");
  module.def("low_latency", &run, "Steps of a call; see csrc/cpu/low_latency.h for the arguments.");
  module.def("normalize", &run_normalize, "Unit rows; see csrc/cpu/rows.h for the arguments.");
  module.def("grad_epilogue", &run_grad_epilogue, "The gradient by rows of logits; see csrc/cpu/rows.h for the arguments.");
  module.def("softmax_kl_size", &softmax_kl_size, "Size of the workspace of softmax_kl, in floats.");
  module.def("softmax_kl", &run_softmax_kl, "Knowledge distillation; see csrc/cpu/softmax_kl.h for the arguments.");
  module.def("teacher_anchors_size", &teacher_anchors_size, "Size of the workspace of `teacher_anchors`, in floats.");
  module.def("teacher_anchors", &run_teacher_anchors, "Teacher anchors; see csrc/cpu/teacher_anchors.h for the arguments.");
}
