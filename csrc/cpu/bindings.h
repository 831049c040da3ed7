#pragma once

#include <pybind11/pybind11.h>

namespace mcld::cpu {

void bind(pybind11::module_& module);

}  // namespace mcld::cpu
