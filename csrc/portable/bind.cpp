// Python's view of the launchers: a call takes the fields of a parameter structure by name, pointers as integers (0: null),
// then the device and the stream. The module's owner keeps every tensor alive for the call; nothing here waits for a kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "launchers.h"
#ifndef MCLD_HOST_EMULATION
#include "build_config.h"
#endif
#if MCLD_HAS_HOPPER
#include "hopper/hopper.h"
#endif

namespace py = pybind11;

namespace mcld {
namespace {

// Reads a structure's fields from keyword arguments: each must be there, and none may be left over.
class Fields {
 public:
  explicit Fields(const py::dict& arguments) : arguments_(arguments) {}

  template <class T> void operator()(const char* name, T*& field) {
    field = reinterpret_cast<T*>(static_cast<uintptr_t>(get(name).cast<uint64_t>()));
  }
  template <class T> void operator()(const char* name, T& field) { field = get(name).cast<T>(); }

  template <class T, size_t kCount> void operator()(const char* name, T (&field)[kCount]) {
    const auto values = get(name).cast<std::array<T, kCount>>();
    std::copy(values.begin(), values.end(), field);
  }

  py::object object(const char* name) { return py::reinterpret_borrow<py::object>(get(name)); }
  int integer(const char* name) { return get(name).cast<int>(); }
  cudaStream_t stream() { return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(get("stream").cast<uint64_t>())); }
  void done() const {
    if (used_ != arguments_.size()) throw py::type_error("unknown arguments among " + std::string(py::str(arguments_)));
  }

 private:
  py::handle get(const char* name) {
    if (!arguments_.contains(name)) throw py::type_error(std::string("missing argument ") + name);
    ++used_;
    return arguments_[name];
  }
  const py::dict& arguments_;
  size_t used_ = 0;
};

#define MCLD_FIELD(name) fields(#name, p.name)

// A list of structures, each a dict: at least one.
template <class T, size_t kMost> void read_list(Fields& fields, const char* name, T (&found)[kMost], int& count) {
  const py::list list = fields.object(name);
  count = int(list.size());
  if (count < 1 || count > int(kMost)) throw py::value_error(std::string(name) + ": 1 to " + std::to_string(kMost) + " of them");
  for (int i = 0; i < count; ++i) {
    const py::dict one = list[i];
    Fields own(one);
    read(own, found[i]);
    own.done();
  }
}

void read(Fields& fields, Normalise& p) {
  MCLD_FIELD(x), MCLD_FIELD(row_stride), MCLD_FIELD(column_stride), MCLD_FIELD(out), MCLD_FIELD(inverse), MCLD_FIELD(work);
  MCLD_FIELD(n), MCLD_FIELD(d), MCLD_FIELD(padded_rows), MCLD_FIELD(pitch), MCLD_FIELD(splits), MCLD_FIELD(eps);
}
void read(Fields& fields, Describe& p) {
  MCLD_FIELD(target), MCLD_FIELD(n), MCLD_FIELD(classes), MCLD_FIELD(ignore_index), MCLD_FIELD(same), MCLD_FIELD(rank);
  MCLD_FIELD(valid), MCLD_FIELD(poison), MCLD_FIELD(share);
}
void read(Fields& fields, Order& p) {
  MCLD_FIELD(rank), MCLD_FIELD(n), MCLD_FIELD(ranks), MCLD_FIELD(counts), MCLD_FIELD(starts), MCLD_FIELD(order);
}
void read(Fields& fields, FactorShare& p) {
  MCLD_FIELD(factor), MCLD_FIELD(counted), MCLD_FIELD(weight), MCLD_FIELD(constant), MCLD_FIELD(scale), MCLD_FIELD(by_label);
}
void read(Fields& fields, Factors& p) {
  MCLD_FIELD(log_off), MCLD_FIELD(scale), MCLD_FIELD(positive), MCLD_FIELD(by_label), MCLD_FIELD(u), MCLD_FIELD(s);
  MCLD_FIELD(z), MCLD_FIELD(values), MCLD_FIELD(rows), MCLD_FIELD(pitch), MCLD_FIELD(inverse_temperature);
  read_list(fields, "shares", p.shares, p.count);
}
void read(Fields& fields, Totals& p) {
  MCLD_FIELD(values), MCLD_FIELD(width), MCLD_FIELD(scale), MCLD_FIELD(weight), MCLD_FIELD(loss), MCLD_FIELD(terms);
  const auto parts = fields.object("part").cast<std::vector<int>>();
  if (parts.size() > std::size(p.part)) throw py::value_error("totals takes at most 5 parts");
  std::copy(parts.begin(), parts.end(), p.part);
  p.count = int(parts.size());
}
void read(Fields& fields, ClassMeans& p) {
  MCLD_FIELD(unit), MCLD_FIELD(order), MCLD_FIELD(starts), MCLD_FIELD(counts), MCLD_FIELD(out), MCLD_FIELD(ranks);
  MCLD_FIELD(pitch);
}
void read(Fields& fields, Positives& p) {
  MCLD_FIELD(a), MCLD_FIELD(k), MCLD_FIELD(means), MCLD_FIELD(rank), MCLD_FIELD(positive), MCLD_FIELD(by_label);
  MCLD_FIELD(n), MCLD_FIELD(m), MCLD_FIELD(offset), MCLD_FIELD(pitch);
}
void read(Fields& fields, Similarity& p) {
  MCLD_FIELD(a), MCLD_FIELD(k), MCLD_FIELD(e), MCLD_FIELD(row_sums), MCLD_FIELD(row_maxima), MCLD_FIELD(column_sums);
  MCLD_FIELD(same_a), MCLD_FIELD(same_k), MCLD_FIELD(rows), MCLD_FIELD(m), MCLD_FIELD(pitch), MCLD_FIELD(pitch_e);
  MCLD_FIELD(padded_rows), MCLD_FIELD(parts), MCLD_FIELD(splits), MCLD_FIELD(diagonal), MCLD_FIELD(scale), MCLD_FIELD(shift);
}
void read(Fields& fields, Statistics& p) {
  MCLD_FIELD(sums), MCLD_FIELD(maxima), MCLD_FIELD(row_maxima), MCLD_FIELD(total), MCLD_FIELD(log_off), MCLD_FIELD(scale);
  MCLD_FIELD(rows), MCLD_FIELD(pitch), MCLD_FIELD(tiles), MCLD_FIELD(add), MCLD_FIELD(shift);
}
void read(Fields& fields, Rescale& p) {
  MCLD_FIELD(e), MCLD_FIELD(maxima), MCLD_FIELD(row_maxima), MCLD_FIELD(rows), MCLD_FIELD(padded_rows), MCLD_FIELD(pitch_e);
  MCLD_FIELD(tile);
}
void read(Fields& fields, ScaleRows& p) {
  MCLD_FIELD(a), MCLD_FIELD(out), MCLD_FIELD(factor), MCLD_FIELD(rows), MCLD_FIELD(padded_rows), MCLD_FIELD(pitch);
}
void read(Fields& fields, Product& p) {
  MCLD_FIELD(e), MCLD_FIELD(k), MCLD_FIELD(out), MCLD_FIELD(alpha), MCLD_FIELD(rows), MCLD_FIELD(contraction);
  MCLD_FIELD(pitch_e);
  MCLD_FIELD(pitch), MCLD_FIELD(transposed), MCLD_FIELD(add);
}
void read(Fields& fields, Flash& p) {
  MCLD_FIELD(a), MCLD_FIELD(k), MCLD_FIELD(out), MCLD_FIELD(sums), MCLD_FIELD(maxima), MCLD_FIELD(column_factor);
  MCLD_FIELD(column_shift);
  MCLD_FIELD(same_a), MCLD_FIELD(same_k), MCLD_FIELD(n), MCLD_FIELD(m), MCLD_FIELD(pitch), MCLD_FIELD(padded_rows);
  MCLD_FIELD(diagonal), MCLD_FIELD(splits), MCLD_FIELD(scale), MCLD_FIELD(shift);
}
void read(Fields& fields, Combine& p) {
  MCLD_FIELD(parts), MCLD_FIELD(maxima), MCLD_FIELD(row_maxima), MCLD_FIELD(out), MCLD_FIELD(rows), MCLD_FIELD(padded_rows);
  MCLD_FIELD(pitch), MCLD_FIELD(splits);
}
void read(Fields& fields, Finish& p) {
  MCLD_FIELD(out), MCLD_FIELD(row_stride), MCLD_FIELD(column_stride), MCLD_FIELD(unit), MCLD_FIELD(partner), MCLD_FIELD(means);
  MCLD_FIELD(inverse), MCLD_FIELD(product), MCLD_FIELD(s), MCLD_FIELD(u), MCLD_FIELD(z), MCLD_FIELD(rank), MCLD_FIELD(dots);
  MCLD_FIELD(rows), MCLD_FIELD(d), MCLD_FIELD(pitch), MCLD_FIELD(product_pitch), MCLD_FIELD(shift), MCLD_FIELD(partner_rows);
  MCLD_FIELD(add);
}
void read(Fields& fields, SmallProblem& p) {
  MCLD_FIELD(a), MCLD_FIELD(k), MCLD_FIELD(inverse_a), MCLD_FIELD(inverse_k), MCLD_FIELD(e), MCLD_FIELD(row_sums);
  MCLD_FIELD(column_sums), MCLD_FIELD(weighted), MCLD_FIELD(back), MCLD_FIELD(by_student), MCLD_FIELD(product), MCLD_FIELD(s), MCLD_FIELD(u), MCLD_FIELD(z), MCLD_FIELD(dots), MCLD_FIELD(values), MCLD_FIELD(n);
  MCLD_FIELD(d), MCLD_FIELD(pitch), MCLD_FIELD(inverse_temperature), MCLD_FIELD(terms), MCLD_FIELD(masked);
  MCLD_FIELD(columns);
}
void read(Fields& fields, Small& p) {
  MCLD_FIELD(student), MCLD_FIELD(teacher), MCLD_FIELD(student_strides), MCLD_FIELD(teacher_strides), MCLD_FIELD(target);
  MCLD_FIELD(ignore_index), MCLD_FIELD(weights), MCLD_FIELD(scale), MCLD_FIELD(batch), MCLD_FIELD(classes), MCLD_FIELD(eps);
  MCLD_FIELD(present_only), MCLD_FIELD(any_mask), MCLD_FIELD(same), MCLD_FIELD(facts), MCLD_FIELD(counts);
  MCLD_FIELD(means), MCLD_FIELD(loss), MCLD_FIELD(terms), MCLD_FIELD(gradient);
  read_list(fields, "problems", p.problems, p.count);
}

#undef MCLD_FIELD

template <class Parameters, class... Choices> struct LauncherOf { using type = void (*)(const Parameters&, Choices..., cudaStream_t); };
template <class Parameters, class... Choices> using Launcher = typename LauncherOf<Parameters, Choices...>::type;
template <class... Choices> using Names = std::array<const char*, sizeof...(Choices)>;

template <class... Choices, size_t... kIndices>
std::tuple<Choices...> choose(Fields& fields, const Names<Choices...>& names, std::index_sequence<kIndices...>) {
  (void)fields, (void)names;  // unused where there is no choice
  return std::tuple<Choices...>(static_cast<Choices>(fields.integer(names[kIndices]))...);
}

// Binds launcher(parameters, *choices, stream): `choices` are enumerations or integers, given by name.
template <class Parameters, class... Choices>
void bind(py::module_& module, const char* name, Launcher<Parameters, Choices...> launcher, Names<Choices...> choices) {
  module.def(name, [launcher, choices](const py::kwargs& arguments) {
    Fields fields(arguments);
    Parameters parameters{};
    read(fields, parameters);
    const auto chosen = choose<Choices...>(fields, choices, std::index_sequence_for<Choices...>());
    const int device = fields.integer("device");
    const cudaStream_t stream = fields.stream();
    fields.done();
    py::gil_scoped_release release;
    DeviceGuard guard(device);
    std::apply([&](Choices... values) { launcher(parameters, values..., stream); }, chosen);
  });
}

}  // namespace

void bind_portable(py::module_& module) {
  bind<Normalise, Type, Precision>(module, "normalise_rows", normalise_rows, {"type", "precision"});
  bind<Normalise, Type, Precision>(module, "normalise_columns", normalise_columns, {"type", "precision"});
  bind<Describe>(module, "describe", describe, {});
  bind<Order>(module, "order", order, {});
  bind<Factors>(module, "factors", factors, {});
  bind<Totals>(module, "totals", totals, {});
  bind<ClassMeans, Precision>(module, "class_means", class_means, {"precision"});
  bind<Positives, Precision>(module, "positives", positives, {"precision"});
  bind<Similarity, Precision, int>(module, "similarity", similarity, {"precision", "tile"});
  bind<Statistics>(module, "statistics", statistics, {});
  bind<Rescale, Precision>(module, "rescale", rescale, {"precision"});
  bind<ScaleRows, Precision>(module, "scale_rows", scale_rows, {"precision"});
  bind<Product, Precision, int>(module, "product", product, {"precision", "tile"});
  bind<Flash, Precision>(module, "flash", flash, {"precision"});
  bind<Combine>(module, "combine", combine, {});
  bind<Small, Type, Type, Precision>(module, "small", small, {"type", "gradient_type", "precision"});
  bind<Finish, Type, Precision>(module, "finish", finish, {"type", "precision"});
#if MCLD_HAS_HOPPER
  bind<Similarity, Precision>(module, "hopper_similarity", hopper::similarity, {"precision"});
  bind<Flash, Precision>(module, "hopper_flash", hopper::flash, {"precision"});
#endif
}

}  // namespace mcld
