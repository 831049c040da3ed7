#include "tensor_map.h"

#include "layout.cuh"

namespace mcld::hopper {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's library is not linked: its functions are found through the runtime, at the first call.
Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    MCLD_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    MCLD_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess || !function) {
      throw CudaError("this driver has no cuTensorMapEncodeTiled: the Hopper kernels need a driver of CUDA 12 or later");
    }
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

}  // namespace

TensorMap tensor_map(const void* matrix, Precision precision, int64_t rows, int64_t pitch, int box_rows) {
  TensorMap map;
  const CUtensorMapDataType type =
      precision == Precision::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[2] = {cuuint64_t(pitch), cuuint64_t(rows)};
  const cuuint64_t row_bytes[1] = {cuuint64_t(pitch) * 2};
  const cuuint32_t box[2] = {kPanel, cuuint32_t(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = encoder()(&map, type, 2, const_cast<void*>(matrix), sizes, row_bytes, box, steps,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw CudaError("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(int(status)) + " for " +
                    std::to_string(rows) + " rows of pitch " + std::to_string(pitch));
  }
  return map;
}

int multiprocessors() {
  int device = 0, count = 0;
  MCLD_CHECK(cudaGetDevice(&device));
  MCLD_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace mcld::hopper
