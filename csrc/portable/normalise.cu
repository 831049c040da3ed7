#include "normalise.cuh"

namespace mcld {

void normalise_rows(const Normalise& p, Type type, Precision precision, cudaStream_t stream) {
  with_type(type, [&](auto in) {
    with_operand(precision, [&](auto out) {
      const dim3 grid(unsigned(tiles_of(p.padded_rows, kNormaliseWarps)));
      launch(normalise_rows_kernel<typename decltype(in)::type, typename decltype(out)::type>, "launch of normalise_rows", grid,
             kNormaliseThreads, 0, stream, p);
    });
  });
}

void normalise_columns(const Normalise& p, Type type, Precision precision, cudaStream_t stream) {
  with_type(type, [&](auto in) {
    using In = typename decltype(in)::type;
    const dim3 slices(unsigned(tiles_of(p.n, kColumnTile)), unsigned(p.splits));
    launch(column_squares_kernel<In>, "launch of column_squares", slices, kNormaliseThreads, kNormaliseThreads * 4, stream, p);
    with_operand(precision, [&](auto out) {
      const dim3 tiles(unsigned(p.pitch / kBatchTile), unsigned(p.padded_rows / kColumnTile));
      const int shared_bytes = (kColumnTile + kBatchTile * (kColumnTile + 1)) * 4;
      launch(normalise_columns_kernel<In, typename decltype(out)::type>, "launch of normalise_columns", tiles,
             kNormaliseThreads, shared_bytes, stream, p);
    });
  });
}

}  // namespace mcld
