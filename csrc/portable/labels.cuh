// What the other kernels need to know of the labels: which rows have a class, whether a label is out of range, and the rows in
// the order of their classes. Found by counting, without a sort and without atomics.
#pragma once

#include "numerics.cuh"
#include "sums.cuh"

namespace mcld {

constexpr int kDescribeThreads = 512;
constexpr int kOrderThreads = 256, kOrderWarps = kOrderThreads / kWarp;
using DescribeSum = BlockSum<kDescribeThreads>;

// One block: the batch is read once, and its facts need a sum over all of it.
MCLD_KERNEL(kDescribeThreads) describe_kernel(MCLD_PARAMETERS(Describe) p) {
  DescribeSum::Storage* storage = reinterpret_cast<DescribeSum::Storage*>(shared_memory());  // (2,)
  float valid = 0, bad = 0;
  for (int64_t i = thread_index(); i < p.n; i += kDescribeThreads) {
    const Label label = Label::of(p.target[i], p.classes, p.ignore_index);
    p.same[i] = label.ignored ? -1 - i : label.kind;
    p.rank[i] = label.ignored ? p.classes : label.kind;
    p.valid[i] = !label.ignored;
    valid += label.ignored ? 0 : 1;
    bad += label.bad ? 1 : 0;
  }
  valid = DescribeSum::run(valid, storage[0]);
  bad = DescribeSum::run(bad, storage[1]);
  if (thread_index() != 0) return;
  const float poison = bad > 0 ? not_a_number() : 1;
  *p.poison = poison;
  *p.share = poison / fmaxf(valid, 1);
}

// One warp a rank. It reads all ranks twice: to count those below its own, which is where its rows begin, and to place its rows.
MCLD_KERNEL(kOrderThreads) order_kernel(MCLD_PARAMETERS(Order) p) {
  const int lane = thread_index() % kWarp;
  const int64_t rank = int64_t(block_index()) * kOrderWarps + thread_index() / kWarp;
  if (rank >= p.ranks) return;
  int64_t below = 0, own = 0;
#pragma unroll 4
  for (int64_t first = 0; first < p.n; first += kWarp) {
    const int64_t other = first + lane < p.n ? p.rank[first + lane] : p.ranks;
    below += count_bits(ballot(other < rank));
    own += count_bits(ballot(other == rank));
  }
  if (lane == 0) {
    p.starts[rank] = below;
    p.counts[rank] = own;
    if (rank == p.ranks - 1) p.starts[p.ranks] = p.n;
  }
  if (own == 0) return;
#pragma unroll 4
  for (int64_t first = 0; first < p.n; first += kWarp) {
    const bool match = first + lane < p.n && p.rank[first + lane] == rank;
    const uint32_t matches = ballot(match);
    if (match) p.order[below + count_bits(matches & ((1u << lane) - 1))] = first + lane;
    below += count_bits(matches);
  }
}

}  // namespace mcld
