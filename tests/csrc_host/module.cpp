// The emulated module: the same bindings as mcld_kernels._C, over kernels compiled for the host.
#include <pybind11/pybind11.h>

namespace mcld {
void bind_portable(pybind11::module_& module);
}

PYBIND11_MODULE(mcld_emulated, module) { mcld::bind_portable(module); }
