// The Python module mcld_kernels._C. It knows neither torch nor the driver's library: pointers and streams come as
// integers, so one build serves every torch, and it imports on a machine without a GPU.
//
// info() is always here; the launchers' bindings are in portable/bind.cpp.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_config.h"
#include "cpu/bindings.h"

namespace py = pybind11;

#if MCLD_HAS_PORTABLE
#include "checks.h"

namespace mcld {
void bind_portable(py::module_& module);
}
#endif

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
  const std::string cuda = MCLD_CUDA_VERSION;
  py::dict result;
  result["version"] = MCLD_VERSION;
  result["compiler"] = compiler();
  result["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  result["reason"] = cuda.empty() ? py::object(py::str(MCLD_CUDA_REASON)) : py::object(py::none());
  result["architectures"] = architectures();
  result["portable"] = bool(MCLD_HAS_PORTABLE);
  result["hopper"] = bool(MCLD_HAS_HOPPER);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of mcld_kernels.";
  mcld::cpu::bind(module);
  module.def("info", &info,
             "What this build holds: version, compiler, cuda (None, with the reason, where it is not in), "
             "architectures, and whether the portable and the Hopper kernels are compiled in.");
#if MCLD_HAS_PORTABLE
  py::register_exception<mcld::CudaError>(module, "CudaError", PyExc_RuntimeError);
  mcld::bind_portable(module);
#endif
}
