#include "flash.cuh"

#include <stdexcept>
#include <string>

namespace mcld {
namespace {

template <Precision kPrecision, int kRowBytes> void start(const Flash& p, cudaStream_t stream) {
  using Kernel = FlashTile<kPrecision, kRowBytes>;
  const dim3 grid(unsigned(tiles_of(p.n, Kernel::kRows)), unsigned(p.splits));
  if (p.row_maxima) {
    launch(flash_kernel<kPrecision, kRowBytes, true>, "launch of flash", grid, Kernel::kThreads, Kernel::kSharedBytes, stream, p);
  } else {
    launch(flash_kernel<kPrecision, kRowBytes, false>, "launch of flash", grid, Kernel::kThreads, Kernel::kSharedBytes, stream, p);
  }
}

}  // namespace

void flash(const Flash& p, Precision precision, cudaStream_t stream) {
  with_precision(precision, [&](auto tag) {
    constexpr Precision kPrecision = decltype(tag)::value;
    constexpr int kElement = sizeof(Operand<kPrecision>);
    const int64_t row_bytes = p.pitch * kElement;
    if (row_bytes == 64 * kElement) {
      start<kPrecision, 64 * kElement>(p, stream);
    } else if (row_bytes == 128 * kElement) {
      start<kPrecision, 128 * kElement>(p, stream);
    } else if (row_bytes == kFlashRowBytes && kElement == 2) {
      start<kPrecision, kFlashRowBytes>(p, stream);
    } else {
      throw std::invalid_argument("flash: no kernel for rows of " + std::to_string(row_bytes) + " bytes");
    }
  });
}

}  // namespace mcld
