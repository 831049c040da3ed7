// Row metadata of the labels, and the rows in the order of their class indices: a counting sort by blocks of rows, without
// atomics, so that it repeats bitwise. index_labels counts each class index among the rows of a block, and each row's earlier
// rows of the same; sort_labels adds the counts up and places the rows.
#pragma once

#include "numerics.cuh"

namespace mcld {

constexpr int kLabelThreads = 1024, kLabelWarps = kLabelThreads / kWarp;

// The sum over the lanes before this one.
MCLD_DEVICE int exclusive_warp_sum(int x) {
  const int lane = thread_index() % kWarp;
  int sum = x;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = shuffle_from(sum, lane >= step ? lane - step : lane);
    sum += lane >= step ? other : 0;
  }
  return sum - x;
}

// The sum over the threads before this one, and over all in `total`. `warps`: (kLabelWarps,) in shared memory, which all
// threads have left; a barrier must stand before its next use.
MCLD_DEVICE int exclusive_block_sum(int x, int* warps, int& total) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int before = exclusive_warp_sum(x);
  if (lane == kWarp - 1) warps[warp] = before + x;
  sync_block();
  const int of_lane = warps[lane];  // as many warps as lanes
  const int of_warps = exclusive_warp_sum(of_lane);
  total = shuffle_from(of_warps + of_lane, kWarp - 1);
  return shuffle_from(of_warps, warp) + before;
}

MCLD_KERNEL(kLabelThreads) index_labels_kernel(MCLD_PARAMETERS(IndexLabels) p) {
  static_assert(kLabelWarps == kWarp);
  const int classes = int(p.num_classes) + 1, warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  int* const warps = reinterpret_cast<int*>(shared_memory());  // (kLabelWarps,)
  int* const counts = warps + kLabelWarps;                     // (classes,) of the rows so far
  for (int c = thread_index(); c < classes; c += kLabelThreads) counts[c] = 0;
  const int64_t first = int64_t(block_index()) * p.rows_per_block;
  const int64_t end = first + p.rows_per_block < p.n ? first + p.rows_per_block : p.n;
  int valid = 0, bad = 0;
  sync_block();
  for (int64_t from = first; from < end; from += kLabelThreads) {
    const int64_t row = from + thread_index();
    const bool inside = row < end;
    const Label label = Label::of(inside ? p.target[row] : p.ignore_index, p.num_classes, p.ignore_index);
    const int index = label.ignored ? int(p.num_classes) : int(label.class_id);
    if (inside) {
      p.key[row] = label.ignored ? -1 - row : label.class_id;
      p.class_index[row] = index;
      p.valid[row] = !label.ignored;
      valid += !label.ignored;
      bad += label.bad;
    }
    // Lanes with the same class index, rows past the end among themselves; the last of them counts for all.
    const uint32_t same = match_lanes(inside ? index : -1);
    const int earlier = count_bits(same & ((1u << lane) - 1)), last = 31 - leading_zeros(same);
    // One warp after another, in the order of the rows.
    for (int turn = 0; turn < kLabelWarps; ++turn) {
      if (turn == warp) {
        int before = 0;
        if (inside && lane == last) {
          before = counts[index];
          counts[index] = before + earlier + 1;
        }
        before = shuffle_from(before, last);
        if (inside) p.rank[row] = before + earlier;
      }
      sync_block();
    }
  }
  for (int c = thread_index(); c < classes; c += kLabelThreads) p.histogram[int64_t(block_index()) * classes + c] = counts[c];
  int total;
  exclusive_block_sum(valid, warps, total);
  if (thread_index() == 0) p.sums[block_index()] = total;
  sync_block();
  exclusive_block_sum(bad, warps, total);
  if (thread_index() == 0) p.sums[p.blocks + block_index()] = total;
}

MCLD_KERNEL(kLabelThreads) sort_labels_kernel(MCLD_PARAMETERS(SortLabels) p) {
  const int classes = int(p.num_classes_present), block = block_index();
  int* const warps = reinterpret_cast<int*>(shared_memory());  // (kLabelWarps,)
  int* const first = p.first + int64_t(block) * classes;       // of this block
  // Each block finds the places of its own rows; the first one writes what holds for all.
  int before = 0;  // rows of smaller class indices
  for (int from = 0; from < classes; from += kLabelThreads) {
    const int c = from + thread_index();
    int count = 0, earlier = 0;
    if (c < classes) {
#pragma unroll 8
      for (int other = 0; other < p.blocks; ++other) {
        const int x = p.histogram[int64_t(other) * classes + c];
        count += x;
        earlier += other < block ? x : 0;
      }
    }
    int total;
    const int start = before + exclusive_block_sum(count, warps, total);
    before += total;
    if (c < classes) {
      first[c] = start + earlier;
      if (block == 0) p.starts[c] = start, p.counts[c] = count;
    }
    sync_block();
  }
  const int64_t begin = int64_t(block) * p.rows_per_block, end = begin + p.rows_per_block < p.n ? begin + p.rows_per_block : p.n;
  for (int64_t row = begin + thread_index(); row < end; row += kLabelThreads) p.order[first[p.class_index[row]] + p.rank[row]] = row;
  if (block != 0 || thread_index() != 0) return;
  p.starts[classes] = p.n;
  int64_t valid = 0, bad = 0;
  for (int other = 0; other < p.blocks; ++other) valid += p.sums[other], bad += p.sums[p.blocks + other];
  const float poison = bad > 0 ? not_a_number() : 1;
  *p.poison = poison;
  *p.mean_factor = poison / float(valid > 1 ? valid : 1);
}

}  // namespace mcld
