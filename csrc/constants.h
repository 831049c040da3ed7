// Constants that C++ and Python share. bindings.cpp exports each of them once, as mcld_kernels._C.constants; Python has no
// definition of its own.
#pragma once

#include <cstdint>

namespace mcld {

// Types of logits and gradients. A gradient is held in fp32 or bf16; fp16 operands are made of fp16 logits only.
enum class Type : int { fp32 = 0, fp16 = 1, bf16 = 2 };

// Operands of a product. Both tf32 kinds are held in fp32; tf32x3 has fp32 accuracy from three tf32 products.
enum class Precision : int { bf16 = 0, fp16 = 1, tf32 = 2, tf32x3 = 3 };

// Rows of an operand are padded to a multiple of kRowPadding. Its pitch is kNarrowPitch or a multiple of kPitchMultiple.
constexpr int kRowPadding = 128;
constexpr int kNarrowPitch = 64;
constexpr int kPitchMultiple = 128;

// Tiles of the portable similarity and product kernels; padded sizes are multiples of the tile in use.
constexpr int kLargeTile = 128;
constexpr int kSmallTile = 64;

// With one shift for all rows, fp16 exponentials are multiplied by 2^kFp16Lift, which moves them into fp16's range.
constexpr int kFp16Lift = 15;

// Portable flash: the anchors of a block, and the most bytes in a row of operands.
constexpr int kFlashRows = 64;
constexpr int kFlashRowBytes = 512;

// Labels are sorted by counting up to so many class indices, whose counts fit a block's shared memory; by so many blocks.
constexpr int kMaxSortedClasses = 24576;
constexpr int kMaxSortBlocks = 64;
constexpr int kSortRows = 1024;  // of a block, or the least multiple that needs no more blocks

// The low-latency path: the most rows and classes, and the tile of its products.
constexpr int kLowLatencyLimit = 1024;
constexpr int kLowLatencyTile = kSmallTile;

namespace hopper {

// Anchors and candidates of a similarity tile; row_sums has ceil(exp_pitch / kSimilarityColumns) rows.
constexpr int kSimilarityRows = 128;
constexpr int kSimilarityColumns = 256;

// Flash: the anchors of a block, the panels (of kPanel columns) of the widest pitch, and the candidates of a tile by panels:
// a row takes the registers of 64 panels sums, of the tile's similarities, and half as many for the exponentials.
constexpr int kPanel = 64;
constexpr int kFlashRows = 128;
constexpr int kFlashPanels = 4;
constexpr int flash_columns(int panels) { return panels <= 2 ? 128 : 64; }

}  // namespace hopper
}  // namespace mcld
