// CUDA statuses as exceptions, and the device of launches.
//
//   MCLD_CHECK(cudaMemsetAsync(pointer, 0, bytes, stream));   // throws CudaError naming the call
//   DeviceGuard guard(device);                                // launches in this scope go to that device
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

// Throws CudaError unless status is cudaSuccess. For a missing kernel image the message gives the module's architectures,
// the GPU's compute capability, and how to rebuild.
void check(cudaError_t status, const char* call, const char* file, int line);

// Lets a kernel take so many bytes of dynamic shared memory on the current device. It asks the runtime once for each kernel
// and device. Throws CudaError with the name.
void allow_shared_bytes(const void* kernel, int bytes, const char* name);

// True if the code of a kernel for the current device is for compute capability 9.0 or later, which can wait for the launch
// before. It asks the runtime once for each kernel and device. Throws CudaError with the name.
bool can_await_launches(const void* kernel, const char* name);

// The newest CUDA version that the driver runs, 1000 major + 10 minor; 0 without a driver.
int driver_version();

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
