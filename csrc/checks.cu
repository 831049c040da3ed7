#include "checks.h"

#include <map>
#include <mutex>
#include <utility>

#include "build_config.h"

namespace mcld {
namespace {

std::string compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return "unknown";
  }
  return std::to_string(major) + "." + std::to_string(minor);
}

}  // namespace

void check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  // The error may be sticky for the runtime's next cudaGetLastError; it has been reported here.
  cudaGetLastError();
  std::string message = std::string(call) + " failed: " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) +
                        ") at " + file + ":" + std::to_string(line);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion) {
    message += ". The module was compiled for " MCLD_CUDA_ARCHS " and this GPU has compute capability " +
               compute_capability() + ": compile it on this machine, or name this GPU, as in MCLD_CUDA_ARCHS=9.0a, and install again";
  } else if (status == cudaErrorInsufficientDriver) {
    message += ". The module was compiled with CUDA " MCLD_CUDA_VERSION
               ", which this driver does not run: update the driver, or install again with an older toolkit";
  }
  throw CudaError(message);
}

void allow_shared_bytes(const void* kernel, int bytes, const char* name) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;  // by kernel and device
  int device = 0;
  check(cudaGetDevice(&device), name, __FILE__, __LINE__);
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name, __FILE__, __LINE__);
  most = bytes;
}

bool can_await_launches(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;  // by kernel and device
  int device = 0;
  check(cudaGetDevice(&device), name, __FILE__, __LINE__);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) return found->second;
  // Of code that the driver compiled from PTX, the version of the PTX counts.
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), name, __FILE__, __LINE__);
  return known[{kernel, device}] = attributes.ptxVersion >= 90;
}

int driver_version() {
  int version = 0;
  // Without a driver the runtime succeeds and gives 0.
  if (cudaDriverGetVersion(&version) != cudaSuccess) return 0;
  return version;
}

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  MCLD_CHECK(cudaGetDevice(&current));
  if (current == device) return;
  MCLD_CHECK(cudaSetDevice(device));
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  // A destructor must not throw.
  if (previous_ >= 0) (void)cudaSetDevice(previous_);
}

}  // namespace mcld
