// Stands in for the CUDA runtime's header in the host emulation: the names that csrc/launchers.h and csrc/checks.h use.
#pragma once

using cudaStream_t = void*;
using cudaError_t = int;
