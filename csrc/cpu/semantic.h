// Semantic inference of one image: score[k] = sum_n P[n, k] sigmoid(x_n), x_n the resampled mask logits, and argmax_k.
//
// Pixels are taken a strip of kStrip columns at a time, and row by row within it: the few rows of mask logits that a
// row of pixels reads are stretched to the strip's width once for all rows of pixels between them. Sigmoids and scores
// exist for kStrip pixels at a time.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/simd.h"
#include "common/taps.h"

namespace fastmask {

constexpr int64_t kStrip = kTapsPadding;
constexpr int64_t kClassBlock = 6;  // classes whose sums a register block holds at most

// Classes are divided into as few blocks as hold them, as equal as can be.
static constexpr int64_t class_blocks(int64_t classes) { return (classes + kClassBlock - 1) / kClassBlock; }
static constexpr int64_t class_block_size(int64_t classes, int64_t block) {
  const int64_t blocks = class_blocks(classes);
  return classes / blocks + (block < classes % blocks ? 1 : 0);
}

static constexpr int64_t to_full_vectors(int64_t count) { return (count + 15) / 16 * 16; }

// Mask logits of one image: element offset + n * query_stride + row * row_stride + column.
struct MaskPlanes {
  const void* logits;
  Dtype dtype;
  int64_t offset, query_stride, row_stride;
  int64_t queries, rows, columns;
};

// What a band of rows of pixels reads of them, as bounded floats and in the order of use: of each strip of pixels, each
// row from `top` on and each query, the columns that the strip reads. (Planes often lie at the same place of every
// cache, where a hundred of them displace each other.)
struct PackedLogits {
  float* logits;  // [strips, rows, queries, stride], followed by 32 floats that can be read
  float* cells;   // [rows, strips, to_full_vectors(queries)], the largest logit of each; or null
  int64_t top, rows, strips, queries, stride;
};

// Class probabilities of one image, in the layouts that the kernels read.
struct ClassTable {
  int64_t queries, classes;
  const float* blocks;   // for each block of R classes from k on: [queries, R] from element queries * k on
  const float* rows;     // [queries, to_full_vectors(classes)], the query's middle beyond the classes
  const float* middles;  // [queries], the median of each query's probabilities
  const float* peaks;    // [to_full_vectors(queries)], the largest of them, 0 beyond the queries
};

// Results of one image, [rows, width]; null for what is not wanted.
struct SemanticMaps {
  int64_t rows, width;
  void* labels;
  int64_t label_bytes;  // 1, 2 or 4
  float* score;         // the winning class's
  float* margin;        // over the runner-up
  float* scores;        // [classes, rows, width]
};

// Reads the rows [begin, end) of all queries. Those of `packed` go there, unless it has none; NaN logits of the rows
// before `count_end` are counted in nans[queries].
FASTMASK_KERNEL(void pack_logits(const MaskPlanes& planes, const Taps& columns, int64_t begin, int64_t end,
                                 int64_t count_end, const PackedLogits& packed, int32_t* nans, float* scratch))
constexpr int64_t kPackQueries = 16;
static constexpr int64_t pack_scratch(int64_t columns) { return kPackQueries * (to_full_vectors(columns) + 32 + 17); }

// The rows of pixels [begin, end) of one strip. With packed.cells, queries that cannot change a label are left out
// where that is certain; labels stay the same, bit for bit.
FASTMASK_KERNEL(void semantic_strip(const PackedLogits& packed, const ClassTable& table, const Taps& rows,
                                    const Taps& columns, int64_t strip, int64_t begin, int64_t end,
                                    const SemanticMaps& maps, float* scratch))
static constexpr int64_t mask_strip_scratch(int64_t queries, int row_taps) {
  return row_taps * (queries * kStrip + to_full_vectors(queries));
}
static constexpr int64_t semantic_scratch(int64_t queries, int64_t classes, int row_taps) {
  return mask_strip_scratch(queries, row_taps) + 5 * to_full_vectors(queries) + 4 * to_full_vectors(classes) +
         queries * (2 * kStrip + 32);
}

// For the order of scores, in two steps. First the scores at the rows and columns of the valid grid that `rows` and
// `columns` make, to scores[row, class, column] with columns.stride columns.
FASTMASK_KERNEL(void semantic_grid_scores(const PackedLogits& packed, const ClassTable& table, const Taps& rows,
                                          const Taps& columns, float* scores, float* scratch))
static constexpr int64_t grid_scores_scratch(int64_t queries, int row_taps) {
  return mask_strip_scratch(queries, row_taps) + queries * kStrip + to_full_vectors(queries);
}

// Then these scores, resampled to the pixels whose taps `rows` and `columns` are, of which the first is pixel
// (top, left) of the maps. The scores are followed by 32 floats that can be read.
FASTMASK_KERNEL(void semantic_resample_scores(const float* scores, int64_t classes, int64_t grid_columns,
                                              const Taps& rows, const Taps& columns, int64_t top, int64_t left,
                                              const SemanticMaps& maps, float* scratch))
static constexpr int64_t resample_scratch(int64_t grid_columns) { return to_full_vectors(grid_columns) + 32; }

}  // namespace fastmask
