// The one place where a CUDA status becomes an exception, and where launches are put on a device.
//
//   MCLD_CHECK(cudaMemsetAsync(pointer, 0, bytes, stream));   // throws CudaError naming the call
//   kernel<<<grid, block, shared, stream>>>(...);
//   MCLD_CHECK_LAUNCH("row_statistics");
//   DeviceGuard guard(device);                                // the launches in this scope go to that device
//
// Python sees mcld_kernels._C.CudaError, a RuntimeError.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace mcld {

class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws CudaError unless status is cudaSuccess. For a missing kernel image the message says which architectures
// the module holds, which one the GPU is, and how to rebuild.
void check(cudaError_t status, const char* call, const char* file, int line);

// Makes `device` current and restores the previous one at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace mcld

#define MCLD_CHECK(call) ::mcld::check((call), #call, __FILE__, __LINE__)
// A launch reports a bad configuration at once, and nothing else: what the kernel does later is not waited for.
#define MCLD_CHECK_LAUNCH(kernel) ::mcld::check(cudaGetLastError(), "launch of " kernel, __FILE__, __LINE__)
