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
  using Block = SimilarityBlock<Precision::bf16>;
  if (p.pitch % kPanel || p.exp_pitch % (Block::kColumns / 2) || p.padded_rows % Block::kRows) return "padding";
  return nullptr;
}

void similarity(const Similarity& p, Precision precision, int skew, int cluster, cudaStream_t stream) {
  if (const char* reason = similarity_unsupported(p, precision)) throw std::invalid_argument(std::string("hopper similarity: ") + reason);
  if (cluster != 1 && cluster != kSimilarityCluster) {
    throw std::invalid_argument("hopper similarity: a cluster has 1 or 2 blocks; got " + std::to_string(cluster));
  }
  using Block = SimilarityBlock<Precision::bf16>;  // the same shape in both precisions
  SimilarityParameters q;
  q.p = p;
  // The maps end at the chunk's last row and at the last candidate: the boxes are zeros beyond, which the epilogue ignores.
  q.anchors = tensor_map(p.anchors, precision, p.rows, p.pitch, Block::kRows);
  q.candidates = tensor_map(p.candidates, precision, p.m, p.pitch, Block::kColumns / cluster);
  const int64_t tile_rows = p.padded_rows / Block::kRows, tile_columns = tiles_of(p.exp_pitch, Block::kColumns);
  if (tile_rows * tile_columns > INT32_MAX / 2) throw std::invalid_argument("hopper similarity: more than 2^30 tiles");
  q.tile_rows = int(tile_rows), q.tile_columns = int(tile_columns);
  q.slices = int(p.pitch / kPanel);
  // The first warpgroup gets so far ahead with the stages there are.
  q.skew = std::max(0, std::min({skew, q.slices, Block::kStages}));
  q.cluster_rows = int(tiles_of(q.tile_rows, cluster));
  const int clusters = std::min(q.cluster_rows * q.tile_columns, std::max(1, multiprocessors() / cluster));
  const dim3 grid(unsigned(clusters * cluster));
  const char* const name = "launch of hopper_similarity";
  const bool is_bf16 = precision == Precision::bf16;
  if (cluster > 1) {
    const auto kernel =
        is_bf16 ? hopper_similarity_cluster_kernel<Precision::bf16> : hopper_similarity_cluster_kernel<Precision::fp16>;
    launch_clusters(cluster, kernel, name, grid, Block::kThreads, Block::kSharedBytes, stream, q);
  } else {
    const auto kernel = is_bf16 ? hopper_similarity_kernel<Precision::bf16> : hopper_similarity_kernel<Precision::fp16>;
    launch(kernel, name, grid, Block::kThreads, Block::kSharedBytes, stream, q);
  }
}

}  // namespace mcld::hopper
