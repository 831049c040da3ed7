#include "normalize.cuh"

namespace mcld {
namespace {

template <class In, class Out, int kWidth> void launch_rows(const Normalize& p, cudaStream_t stream) {
  const dim3 grid(unsigned(tiles_of(p.padded_rows, kNormalizeWarps)));
  launch(normalize_rows_kernel<In, Out, kWidth>, "launch of normalize_rows", grid, kNormalizeThreads, 0, stream, p);
}

template <class In, class Out> void launch_rows(const Normalize& p, cudaStream_t stream) {
  const int width = normalize_width<In, Out>(p);
  if (width == kWidest<In, Out>) return launch_rows<In, Out, kWidest<In, Out>>(p, stream);
  if (width == 4) return launch_rows<In, Out, 4>(p, stream);
  launch_rows<In, Out, 1>(p, stream);
}

template <class In, class Out> void launch_columns(const Normalize& p, cudaStream_t stream) {
  const dim3 slices(unsigned(tiles_of(p.n, kColumnTile)), unsigned(p.splits));
  launch(column_squares_kernel<In>, "launch of column_squares", slices, kNormalizeThreads, kNormalizeThreads * 4, stream, p);
  const dim3 tiles(unsigned(p.pitch / kBatchTile * (p.padded_rows / kColumnTile)));
  launch(normalize_columns_kernel<In, Out>, "launch of normalize_columns", tiles, kNormalizeThreads,
         (kColumnTile + kBatchTile * (kColumnTile + 1)) * 4, stream, p);
}

}  // namespace

void normalize_rows(const Normalize& p, Type type, Precision precision, cudaStream_t stream) {
  with_logits(type, precision, [&](auto in, auto out) {
    launch_rows<typename decltype(in)::type, typename decltype(out)::type>(p, stream);
  });
}

void normalize_columns(const Normalize& p, Type type, Precision precision, cudaStream_t stream) {
  with_logits(type, precision, [&](auto in, auto out) {
    launch_columns<typename decltype(in)::type, typename decltype(out)::type>(p, stream);
  });
}

}  // namespace mcld
