#include "labels.cuh"

#include <stdexcept>

namespace mcld {

void index_labels(const IndexLabels& p, cudaStream_t stream) {
  if (p.num_classes >= kMaxSortedClasses) throw std::invalid_argument("index_labels: too many classes");
  const int shared_bytes = (kLabelWarps + int(p.num_classes) + 1) * int(sizeof(int));
  launch(index_labels_kernel, "launch of index_labels", dim3(unsigned(p.blocks)), kLabelThreads, shared_bytes, stream, p);
}

void sort_labels(const SortLabels& p, cudaStream_t stream) {
  launch(sort_labels_kernel, "launch of sort_labels", dim3(unsigned(p.blocks)), kLabelThreads, kLabelWarps * int(sizeof(int)),
         stream, p);
}

}  // namespace mcld
