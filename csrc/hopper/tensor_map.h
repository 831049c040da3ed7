// TMA maps of operands, and the number of multiprocessors.
#pragma once

#include "launchers.h"
#include "ptx.cuh"

namespace mcld::hopper {

// TMA's map of a row-major 16-bit matrix (rows, pitch): boxes of 64 columns by box_rows rows, swizzled by 128 bytes, zeros
// outside. Throws CudaError where there is no driver, or one too old for TMA.
TensorMap tensor_map(const void* matrix, Precision, int64_t rows, int64_t pitch, int box_rows);

// Multiprocessors of the current device.
int multiprocessors();

}  // namespace mcld::hopper
