#include "flash.cuh"

#include <stdexcept>

#include "tensor_map.h"

namespace mcld::hopper {
namespace {

template <Precision kPrecision, int kWidth> void launch_flash(const Flash& p, cudaStream_t stream) {
  using Block = FlashBlock<kPrecision, kWidth>;
  FlashParameters q;
  q.p = p;
  // The maps end at the last anchor and the last candidate: the boxes are zeros beyond.
  q.anchors = tensor_map(p.anchors, kPrecision, p.n, p.pitch, Block::kRows);
  q.candidates = tensor_map(p.candidates, kPrecision, p.m, p.pitch, Block::kColumns);
  q.tiles = tiles_of(p.m, Block::kColumns);
  if (p.splits > q.tiles) throw std::invalid_argument("hopper flash: more splits than tiles of candidates");
  const dim3 grid(unsigned(tiles_of(p.n, Block::kRows)), unsigned(p.splits));
  launch(hopper_flash_kernel<kPrecision, kWidth>, "launch of hopper_flash", grid, Block::kThreads, Block::kSharedBytes,
         stream, q);
}

template <Precision kPrecision> void by_width(const Flash& p, cudaStream_t stream) {
  switch (p.pitch / kPanel) {
    case 1: return launch_flash<kPrecision, 64>(p, stream);
    // 100 classes: 7 of 8 steps of the similarities, and 104 of 128 columns of the product.
    case 2: return p.d <= 104 ? launch_flash<kPrecision, 104>(p, stream) : launch_flash<kPrecision, 128>(p, stream);
    case 3: return launch_flash<kPrecision, 192>(p, stream);
    default: return launch_flash<kPrecision, 256>(p, stream);
  }
}

}  // namespace

const char* flash_unsupported(const Flash& p, Precision precision) {
  if (precision != Precision::bf16 && precision != Precision::fp16) return "operands must have 16 bits";
  if (p.row_maxima) return "the shift must be fixed";
  if (!p.product) return "sums without the product are for the similarity kernel";
  if (p.candidate_factor || p.candidate_shift) return "candidates are not weighted";
  if (p.anchor_keys || p.candidate_keys) return "labels are not masked";
  if (p.d < 1 || p.d > p.pitch) return "columns";
  if (p.pitch % kPanel || p.pitch < kPanel || p.pitch > kFlashPanels * kPanel) return "the pitch must be 64, 128, 192 or 256";
  return nullptr;
}

void flash(const Flash& p, Precision precision, cudaStream_t stream) {
  if (const char* reason = flash_unsupported(p, precision)) throw std::invalid_argument(std::string("hopper flash: ") + reason);
  precision == Precision::bf16 ? by_width<Precision::bf16>(p, stream) : by_width<Precision::fp16>(p, stream);
}

}  // namespace mcld::hopper
