// Stands in for csrc/checks.h in the host emulation, where there is no CUDA status and one device.
#pragma once

#include <cuda_runtime_api.h>

namespace mcld {

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
};

}  // namespace mcld
