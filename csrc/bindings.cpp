// The Python module mcld_kernels._C. It knows neither torch nor the driver's library: pointers and streams come as
// integers, so one build serves every torch, and it imports on a machine without a GPU.
//
// A launcher takes the fields of its structure, its choices, the device and the stream by keyword, and optionally a plan that
// records the launch. The caller keeps every tensor alive for the call; nothing here waits for a kernel.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>
#include <tuple>
#include <utility>

#include "build_config.h"
#include "checks.h"
#include "constants.h"
#include "fields.h"
#include "plan.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace mcld {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GNU " __VERSION__;
#else
  return "unknown";
#endif
}

py::list architectures() {
  py::list result;
  std::istringstream archs(MCLD_CUDA_ARCHS);
  for (std::string arch; std::getline(archs, arch, ';');) result.append(arch);
  return result;
}

py::dict info() {
  py::dict result;
  result["version"] = MCLD_VERSION;
  result["compiler"] = compiler();
  result["cuda"] = MCLD_CUDA_VERSION;
  result["architectures"] = architectures();
  result["hopper"] = bool(MCLD_HAS_HOPPER);
  return result;
}

py::dict constants() {
  py::dict types, precisions, columns, result;
  types["float32"] = int(Type::fp32);
  types["float16"] = int(Type::fp16);
  types["bfloat16"] = int(Type::bf16);
  precisions["bf16"] = int(Precision::bf16);
  precisions["fp16"] = int(Precision::fp16);
  precisions["tf32"] = int(Precision::tf32);
  precisions["tf32x3"] = int(Precision::tf32x3);
  for (int panels = 1; panels <= hopper::kFlashPanels; ++panels) {
    columns[py::int_(panels * hopper::kPanel)] = hopper::flash_columns(panels);
  }
  result["types"] = types;
  result["precisions"] = precisions;
  result["row_padding"] = kRowPadding;
  result["narrow_pitch"] = kNarrowPitch;
  result["pitch_multiple"] = kPitchMultiple;
  result["large_tile"] = kLargeTile;
  result["small_tile"] = kSmallTile;
  result["fp16_lift"] = kFp16Lift;
  result["flash_rows"] = kFlashRows;
  result["flash_row_bytes"] = kFlashRowBytes;
  result["max_sorted_classes"] = kMaxSortedClasses;
  result["max_sort_blocks"] = kMaxSortBlocks;
  result["sort_rows"] = kSortRows;
  result["low_latency_limit"] = kLowLatencyLimit;
  result["low_latency_tile"] = kLowLatencyTile;
  result["hopper_similarity_rows"] = hopper::kSimilarityRows;
  result["hopper_similarity_columns"] = hopper::kSimilarityColumns;
  result["hopper_flash_rows"] = hopper::kFlashRows;
  result["hopper_flash_columns"] = columns;
  return result;
}

// The newest CUDA that the driver runs, (major, minor); None without a driver.
py::object driver() {
  const int version = driver_version();
  if (version == 0) return py::none();
  return py::make_tuple(version / 1000, version % 1000 / 10);
}

template <class... Choices> using Names = std::array<const char*, sizeof...(Choices)>;
template <class Structure, class... Choices> struct LauncherOf { using type = void (*)(const Structure&, Choices..., cudaStream_t); };
template <class Structure, class... Choices> using Launcher = typename LauncherOf<Structure, Choices...>::type;

template <class... Choices, size_t... kIndices>
std::tuple<Choices...> take_choices(Fields& fields, const Names<Choices...>& names, std::index_sequence<kIndices...>) {
  (void)fields, (void)names;  // unused where there is no choice
  return std::tuple<Choices...>(static_cast<Choices>(fields.take<int>(names[kIndices]))...);
}

// Binds launcher(structure, *choices, stream): choices are enumerations or integers, given by name.
template <class Structure, class... Choices>
void bind(py::module_& module, const char* name, Launcher<Structure, Choices...> launcher, Names<Choices...> names) {
  FieldNames fields;
  Structure().visit(fields);
  std::string doc = "Keyword arguments: " + fields.text();
  for (const char* choice : names) doc += std::string(", ") + choice;
  const auto call = [launcher, names](const py::kwargs& arguments) {
    Fields fields(arguments);
    Structure structure{};
    structure.visit(fields);
    const auto choices = take_choices<Choices...>(fields, names, std::index_sequence_for<Choices...>());
    const int device = fields.take<int>("device");
    const cudaStream_t stream = fields.stream();
    const py::handle plan = fields.optional("plan");
    fields.done();
    const auto launch = [launcher, choices](const Structure& arguments, cudaStream_t stream) {
      std::apply([&](Choices... values) { launcher(arguments, values..., stream); }, choices);
    };
    {
      py::gil_scoped_release release;
      DeviceGuard guard(device);
      launch(structure, stream);
    }
    if (plan) plan.cast<Plan&>().append(structure, launch);
  };
  module.def(name, call, (doc + ", device, stream").c_str());
}

void bind_plan(py::module_& module) {
  py::class_<Plan>(module, "Plan", py::module_local(), "A recorded sequence of launches that runs again on other tensors.")
      .def(py::init<>())
      .def("__len__", &Plan::size)
      .def("pointers", &Plan::pointers, "index"_a, "The addresses among the arguments of a launch that is not placed yet.")
      .def(
          "place",
          [](Plan& plan, const std::vector<std::tuple<uint64_t, uint64_t, int, uint64_t>>& ranges) {
            std::vector<Range> converted;
            for (const auto& [begin, bytes, base, offset] : ranges) converted.push_back({begin, bytes, base, offset});
            plan.place(converted);
          },
          "ranges"_a, "Make the recorded addresses offsets: ranges of (begin, bytes, base, offset). ValueError for one in none.")
      .def(
          "run",
          [](const Plan& plan, const std::vector<uint64_t>& bases, int device, uint64_t stream, size_t first, size_t last) {
            py::gil_scoped_release release;
            DeviceGuard guard(device);
            plan.run(bases, reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(stream)), first, last);
          },
          "bases"_a, "device"_a, "stream"_a, "first"_a, "last"_a, "Launch numbers first to last - 1 with these bases.");
}

void bind_launchers(py::module_& module) {
  bind<Normalize, Type, Precision>(module, "normalize_rows", normalize_rows, {"type", "precision"});
  bind<Normalize, Type, Precision>(module, "normalize_columns", normalize_columns, {"type", "precision"});
  bind<IndexLabels>(module, "index_labels", index_labels, {});
  bind<SortLabels>(module, "sort_labels", sort_labels, {});
  bind<ClassMeans, Precision>(module, "class_means", class_means, {"precision"});
  bind<PositiveCosines, Precision>(module, "positive_cosines", positive_cosines, {"precision"});
  bind<Similarity, Precision, int>(module, "similarity", similarity, {"precision", "tile"});
  bind<RowSums>(module, "row_sums", row_sums, {});
  bind<Rescale, Precision>(module, "rescale", rescale, {"precision"});
  bind<ScaleRows, Precision>(module, "scale_rows", scale_rows, {"precision"});
  bind<Product, Precision, int>(module, "product", product, {"precision", "tile"});
  bind<Flash, Precision>(module, "flash", flash, {"precision"});
  bind<CombineSplits>(module, "combine_splits", combine_splits, {});
  bind<LossEpilogue>(module, "loss_epilogue", loss_epilogue, {});
  bind<ReduceTerms>(module, "reduce_terms", reduce_terms, {});
  bind<GradEpilogue, Type, Precision>(module, "grad_epilogue", grad_epilogue, {"type", "precision"});
  bind<AnchorEpilogue, Type, Precision>(module, "anchor_epilogue", anchor_epilogue, {"type", "precision"});
  bind<LowLatency, Type, Type, Precision>(module, "low_latency", low_latency, {"type", "gradient_type", "precision"});
#if MCLD_HAS_HOPPER
  bind<Similarity, Precision, int, int>(module, "hopper_similarity", hopper::similarity, {"precision", "skew", "cluster"});
  bind<Flash, Precision>(module, "hopper_flash", hopper::flash, {"precision"});
#endif
}

}  // namespace
}  // namespace mcld

PYBIND11_MODULE(MCLD_MODULE, module) {
  module.doc() = "Compiled kernels of mcld_kernels.";
  module.def("info", &mcld::info,
             "The contents of this build: version, compiler, cuda, architectures, and whether the Hopper kernels are in.");
  module.attr("constants") = mcld::constants();
  // Local: another module of these kernels in the process, as the tests' is, raises its own.
  py::register_local_exception<mcld::CudaError>(module, "CudaError", PyExc_RuntimeError);
  module.def("driver_version", &mcld::driver,
             "The newest CUDA that the driver runs, (major, minor); None without a driver.");
  mcld::bind_plan(module);
  mcld::bind_launchers(module);
}
