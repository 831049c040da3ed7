#include "labels.cuh"

namespace mcld {

void index_labels(const IndexLabels& p, cudaStream_t stream) {
  launch(index_labels_kernel, "launch of index_labels", dim3(1), kIndexThreads, 2 * int(sizeof(IndexSum::Storage)), stream, p);
}

void sort_labels(const SortLabels& p, cudaStream_t stream) {
  const dim3 grid(unsigned(tiles_of(p.num_classes_present, kSortWarps)));
  launch(sort_labels_kernel, "launch of sort_labels", grid, kSortThreads, 0, stream, p);
}

}  // namespace mcld
