// The emulated module: the same bindings as mcld_kernels._C, over kernels compiled for the host.
#include <pybind11/pybind11.h>

#include "emulation.h"

namespace mcld {
void bind_portable(pybind11::module_& module);
}

PYBIND11_MODULE(mcld_emulated, module) {
  mcld::bind_portable(module);
  module.def("vector_accesses", [](int bytes) { return mcld::emulation::vector_accesses[bytes]; },
             "how many accesses of so many bytes, 8 or 16, the kernels have made");
}
