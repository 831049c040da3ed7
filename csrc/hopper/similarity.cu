#include "similarity.cuh"

#include <algorithm>
#include <stdexcept>

#include "tensor_map.h"

namespace mcld::hopper {

const char* similarity_unsupported(const Similarity& p, Precision precision) {
  if (precision != Precision::bf16 && precision != Precision::fp16) return "operands must have 16 bits";
  if (p.row_maxima) return "the shift must be fixed";
  if (p.column_sums) return "column sums are not computed";
  if (p.anchor_keys || p.candidate_keys) return "labels are not masked";
  if (p.pitch % kPanel || p.exp_pitch % 8 || p.padded_rows % SimilarityBlock<Precision::bf16>::kRows) return "padding";
  return nullptr;
}

void similarity(const Similarity& p, Precision precision, cudaStream_t stream) {
  if (const char* reason = similarity_unsupported(p, precision)) throw std::invalid_argument(std::string("hopper similarity: ") + reason);
  using Block = SimilarityBlock<Precision::bf16>;  // the same shape in both precisions
  SimilarityParameters q;
  q.p = p;
  // The maps end at the chunk's last row and at the last candidate: the boxes are zeros beyond, which the epilogue ignores.
  q.anchors = tensor_map(p.anchors, precision, p.rows, p.pitch, Block::kRows);
  q.candidates = tensor_map(p.candidates, precision, p.m, p.pitch, Block::kColumns);
  q.tile_rows = p.padded_rows / Block::kRows;
  q.tile_columns = tiles_of(p.exp_pitch, Block::kColumns);
  q.slices = int(p.pitch / kPanel);
  const dim3 grid(unsigned(std::min<int64_t>(q.tile_rows * q.tile_columns, multiprocessors())));
  const auto kernel =
      precision == Precision::bf16 ? hopper_similarity_kernel<Precision::bf16> : hopper_similarity_kernel<Precision::fp16>;
  launch(kernel, "launch of hopper_similarity", grid, Block::kThreads, Block::kSharedBytes, stream, q);
}

}  // namespace mcld::hopper
