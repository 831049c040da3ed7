// The memory check, in builds with MCLD_CHECK_MEMORY: the kernels are compiled with AddressSanitizer, the emulator is not, for
// speed, and says here what it reads on their behalf. In other builds nothing here does anything.
#pragma once

#ifdef MCLD_CHECK_MEMORY

#include <sanitizer/asan_interface.h>

extern "C" void __asan_report_load_n(void* address, size_t bytes);

namespace mcld::emulation::memory_check {

inline void read(const void* address, int bytes) {
  void* const p = const_cast<void*>(address);
  if (void* const bad = __asan_region_is_poisoned(p, bytes)) __asan_report_load_n(bad, 1);
}

// Bytes that nobody may touch while this lives.
class Forbidden {
 public:
  Forbidden(const char* at, int bytes) : at_(at), bytes_(bytes) { __asan_poison_memory_region(at, bytes); }
  ~Forbidden() { __asan_unpoison_memory_region(at_, bytes_); }

 private:
  const char* at_;
  int bytes_;
};

}  // namespace mcld::emulation::memory_check

#else

namespace mcld::emulation::memory_check {

inline void read(const void*, int) {}
struct Forbidden {
  Forbidden(const char*, int) {}
};

}  // namespace mcld::emulation::memory_check

#endif
