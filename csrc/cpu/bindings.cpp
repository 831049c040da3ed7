// The Python module mcld_kernels._cpu. It knows no torch: pointers come as integers, so one build serves every torch. They
// come by position, since a small call is mostly its arguments.
#include <pybind11/pybind11.h>

#include "cpu/clkd.h"
#include "cpu/low_latency.h"

namespace py = pybind11;

namespace mcld::cpu {
namespace {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

void run(int steps, int isa, int threads, uintptr_t student, int64_t student_row, int64_t student_column, uintptr_t teacher,
         int64_t teacher_row, int64_t teacher_column, uintptr_t target, int64_t target_stride, int64_t n, int64_t num_classes,
         uintptr_t work, uintptr_t gradient, uintptr_t loss, uintptr_t terms, float row_temperature, float column_temperature,
         float instance_weight, float sample_weight, float category_weight, bool instance, bool sample, bool category,
         int anchors, float eps) {
  if (isa < 0 || isa >= num_isas()) throw py::value_error("no such instruction set on this machine");
  if (anchors < kStudent || anchors > kSelf) throw py::value_error("no such anchors");
  LowLatency call;
  call.student = pointer<const float>(student), call.student_row = student_row, call.student_column = student_column;
  call.teacher = pointer<const float>(teacher), call.teacher_row = teacher_row, call.teacher_column = teacher_column;
  call.target = pointer<const int64_t>(target), call.target_stride = target_stride;
  call.n = n, call.num_classes = num_classes;
  call.work = pointer<float>(work), call.gradient = pointer<float>(gradient);
  call.loss = pointer<float>(loss), call.terms = pointer<float>(terms);
  call.row_temperature = row_temperature, call.column_temperature = column_temperature;
  call.weight[0] = instance_weight, call.weight[1] = sample_weight, call.weight[2] = category_weight;
  call.instance = instance, call.sample = sample, call.category = category;
  call.anchors = Anchors(anchors);
  call.eps = eps, call.threads = threads;
  py::gil_scoped_release release;
  low_latency(call, steps, isa);
}

void run_clkd(int isa, int threads, uintptr_t student, int64_t student_row, int64_t student_column, uintptr_t teacher,
              int64_t teacher_row, int64_t teacher_column, int64_t n, int64_t num_classes, uintptr_t work, uintptr_t gradient,
              uintptr_t loss, uintptr_t terms, float instance_weight, float category_weight, float correlation_weight,
              bool instance, bool category, bool correlation, double row_factor, double column_factor, double gram_factor,
              float eps) {
  if (isa < 0 || isa >= num_isas()) throw py::value_error("no such instruction set on this machine");
  Clkd call;
  call.student = pointer<const float>(student), call.student_row = student_row, call.student_column = student_column;
  call.teacher = pointer<const float>(teacher), call.teacher_row = teacher_row, call.teacher_column = teacher_column;
  call.n = n, call.num_classes = num_classes;
  call.work = pointer<float>(work), call.gradient = pointer<float>(gradient);
  call.loss = pointer<float>(loss), call.terms = pointer<float>(terms);
  call.weight[0] = instance_weight, call.weight[1] = category_weight, call.weight[2] = correlation_weight;
  call.instance = instance, call.category = category, call.correlation = correlation;
  call.row_factor = row_factor, call.column_factor = column_factor, call.gram_factor = gram_factor;
  call.eps = eps, call.threads = threads;
  py::gil_scoped_release release;
  clkd(call, isa);
}

int64_t clkd_size(int64_t n, int64_t num_classes) { return ClkdLayout(n, num_classes).size; }

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
  module.def("isas", &isas, "Names of the instruction sets that this machine runs, the fastest last.");
  module.def("layout", &layout, "Size, pitches and offsets of the workspace for n x C logits, in floats.");
  module.def("clkd_size", &clkd_size, "Size of the workspace of `clkd` for n x C logits, in floats.");
  module.def("clkd", &run_clkd, "A call of CLKD; see csrc/cpu/clkd.h for the arguments.");
  module.def("low_latency", &run, "Steps of a call; see csrc/cpu/low_latency.h for the arguments.");
}
