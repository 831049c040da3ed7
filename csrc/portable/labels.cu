#include "labels.cuh"

namespace mcld {

void describe(const Describe& p, cudaStream_t stream) {
  launch(describe_kernel, "launch of describe", dim3(1), kDescribeThreads, 2 * int(sizeof(DescribeSum::Storage)), stream, p);
}

void order(const Order& p, cudaStream_t stream) {
  launch(order_kernel, "launch of order", dim3(unsigned(tiles_of(p.ranks, kOrderWarps))), kOrderThreads, 0, stream, p);
}

}  // namespace mcld
