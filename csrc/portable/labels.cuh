// Row metadata of the labels: keys, class indices, the poison of labels out of range, and the rows in the order of their
// class indices by counting, without a comparison sort and without atomics.
#pragma once

#include "numerics.cuh"
#include "sums.cuh"

namespace mcld {

constexpr int kIndexThreads = 512;
constexpr int kSortThreads = 256, kSortWarps = kSortThreads / kWarp;
using IndexSum = BlockSum<kIndexThreads>;

// One block, which sums over the whole batch.
MCLD_KERNEL(kIndexThreads) index_labels_kernel(MCLD_PARAMETERS(IndexLabels) p) {
  IndexSum::Storage* storage = reinterpret_cast<IndexSum::Storage*>(shared_memory());  // (2,)
  float valid = 0, bad = 0;
  for (int64_t i = thread_index(); i < p.n; i += kIndexThreads) {
    const Label label = Label::of(p.target[i], p.num_classes, p.ignore_index);
    p.key[i] = label.ignored ? -1 - i : label.class_id;
    p.class_index[i] = label.ignored ? p.num_classes : label.class_id;
    p.valid[i] = !label.ignored;
    valid += label.ignored ? 0 : 1;
    bad += label.bad ? 1 : 0;
  }
  valid = IndexSum::run(valid, storage[0]);
  bad = IndexSum::run(bad, storage[1]);
  if (thread_index() != 0) return;
  const float poison = bad > 0 ? not_a_number() : 1;
  *p.poison = poison;
  *p.mean_factor = poison / fmaxf(valid, 1);
}

// One warp a class index. It reads all indices twice: to count those below its own, where its rows begin, and to place its rows.
MCLD_KERNEL(kSortThreads) sort_labels_kernel(MCLD_PARAMETERS(SortLabels) p) {
  const int lane = thread_index() % kWarp;
  const int64_t index = int64_t(block_index()) * kSortWarps + thread_index() / kWarp;
  if (index >= p.num_classes_present) return;
  int64_t below = 0, own = 0;
#pragma unroll 4
  for (int64_t first = 0; first < p.n; first += kWarp) {
    const int64_t other = first + lane < p.n ? p.class_index[first + lane] : p.num_classes_present;
    below += count_bits(ballot(other < index));
    own += count_bits(ballot(other == index));
  }
  if (lane == 0) {
    p.starts[index] = below;
    p.counts[index] = own;
    if (index == p.num_classes_present - 1) p.starts[p.num_classes_present] = p.n;
  }
  if (own == 0) return;
#pragma unroll 4
  for (int64_t first = 0; first < p.n; first += kWarp) {
    const bool match = first + lane < p.n && p.class_index[first + lane] == index;
    const uint32_t matches = ballot(match);
    if (match) p.order[below + count_bits(matches & ((1u << lane) - 1))] = first + lane;
    below += count_bits(matches);
  }
}

}  // namespace mcld
