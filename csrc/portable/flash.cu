#include "numerics.cuh"
namespace mcld { void flash(const Flash&, Precision, cudaStream_t) {} }
