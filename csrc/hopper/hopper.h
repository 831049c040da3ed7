// What the Hopper kernels offer to the host. The arguments are those of the portable kernels, portable/launchers.h, so one
// stands in for the other; what a kernel here cannot do, its `refuses` names.
#pragma once

#include "portable/launchers.h"

namespace mcld::hopper {

// The columns of a tile: row_sums has ceil(pitch_e / kSimilarityColumns) rows.
constexpr int kSimilarityColumns = 256;

// Why the kernel cannot do this, or null if it can. Only 16-bit operands, a fixed shift, and no label mask.
const char* similarity_refuses(const Similarity&, Precision);
const char* flash_refuses(const Flash&, Precision);

// On a device of compute capability 9.0. Throw std::invalid_argument with the reason where `refuses` has one.
void similarity(const Similarity&, Precision, cudaStream_t);
void flash(const Flash&, Precision, cudaStream_t);

}  // namespace mcld::hopper
