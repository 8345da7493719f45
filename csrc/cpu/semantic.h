// Semantic inference of one image: score[k] = sum_n P[n, k] sigmoid(x_n) with resampled mask logits x_n, and argmax_k.
//
// Pixels are processed in strips of kStrip columns, row by row within a strip: the few rows of mask logits that a row
// of pixels reads are stretched to the strip's width once, for all rows of pixels between them. Sigmoids and scores
// exist for kStrip pixels at a time.
#pragma once

#include <cstdint>

#include "common/logits.h"
#include "common/simd.h"
#include "common/taps.h"

namespace fastmask {

constexpr int64_t kStrip = kTapsPadding;
constexpr int64_t kClassBlock = 6;  // the most classes whose sums a block of registers holds

// The columns that a strip of pixels reads.
struct StripSpan {
  int64_t left, count;
};

static inline StripSpan strip_span(const Taps& columns, int64_t strip) {
  const int32_t* index = columns.index + strip * kStrip;
  return {index[0], index[(columns.taps - 1) * columns.stride + kStrip - 1] + 1 - index[0]};
}

// Classes are divided into as few blocks as possible, of about equal size.
static constexpr int64_t class_blocks(int64_t classes) { return ceil_div(classes, kClassBlock); }
static constexpr int64_t class_block_size(int64_t classes, int64_t block) {
  const int64_t blocks = class_blocks(classes);
  return classes / blocks + (block < classes % blocks ? 1 : 0);
}

// Mask logits of one image: the first query's plane, and the number of elements from one query to the next.
struct MaskPlanes {
  Plane first;
  int64_t queries, query_stride;
};

// The logits that a band of pixel rows reads, as clamped floats in the order of use: for each strip of pixels, each row
// from `top` on and each query, the columns that the strip reads. (In place, planes often map to the same cache sets,
// where a hundred of them would evict each other.)
struct PackedLogits {
  float* logits;  // [strips, rows, queries, stride], followed by 32 readable floats
  float* cells;   // [rows, strips, to_full_vectors(queries)], the largest logit of each; or null
  int64_t top, rows, strips, queries, stride;
};

// The class probabilities of one image, in the layouts that the kernels read.
struct ClassTable {
  int64_t queries, classes;
  const float* blocks;   // for each block of R classes from k on: [queries, R] from element queries * k on
  const float* rows;     // [queries, to_full_vectors(classes)], padded with the query's median
  const float* middles;  // [queries], the median of each query's probabilities
  const float* peaks;    // [to_full_vectors(queries)], each query's largest probability, 0 beyond the queries
};

// Results of one image, [rows, width]; null if not requested.
struct SemanticMaps {
  int64_t rows, width;
  void* labels;
  int64_t label_bytes;  // 1, 2 or 4
  float* score;         // the score of the winning class
  float* margin;        // its lead over the runner-up
  float* scores;        // [classes, rows, width]
};

constexpr int64_t kPackQueries = 16;  // queries read at a time

struct PackWorkspace {
  float* rows;   // [kPackQueries, w + 32 readable floats]
  float* lanes;  // [kPackQueries, kLanes + 1]

  void lay_out(Carver& carver, int64_t w) {
    carver.take(rows, kPackQueries * (to_full_vectors(w) + 32));
    carver.take(lanes, kPackQueries * (kMostLanes + 1));
  }
};

// Reads the rows [begin, end) of all queries and stores the rows of `packed`, if it has memory; counts NaN logits of
// the rows before `count_end` in nans[queries].
FASTMASK_KERNEL(void pack_logits(const MaskPlanes& planes, const Taps& columns, int64_t begin, int64_t end,
                                 int64_t count_end, const PackedLogits& packed, int32_t* nans,
                                 const PackWorkspace& work))

struct MaskStripWorkspace {
  float* stretched[kMaxTaps];  // [queries, kStrip] of each slot
  int32_t* held[kMaxTaps];     // the row of logits from which each query's row in a slot was stretched

  void lay_out(Carver& carver, int64_t queries, int row_taps) {
    for (int t = 0; t < row_taps; ++t) {
      carver.take(stretched[t], queries * kStrip);
      carver.take(held[t], to_full_vectors(queries));
    }
  }
};

struct QueryChoiceWorkspace {
  float *bounds, *weights;                         // [to_full_vectors(queries)]
  int32_t *keys, *order;                           // [to_full_vectors(queries)]
  float *above, *width, *next_above, *next_width;  // [to_full_vectors(classes)]

  void lay_out(Carver& carver, int64_t queries, int64_t classes) {
    for (float** of_queries : {&bounds, &weights}) carver.take(*of_queries, to_full_vectors(queries));
    for (int32_t** of_queries : {&keys, &order}) carver.take(*of_queries, to_full_vectors(queries));
    for (float** of_classes : {&above, &width, &next_above, &next_width}) {
      carver.take(*of_classes, to_full_vectors(classes));
    }
  }
};

constexpr int64_t kDoubtfulStride = kStrip + 2 * kMostLanes;

struct SemanticWorkspace {
  MaskStripWorkspace strip;
  QueryChoiceWorkspace choice;
  int32_t* all;              // 0, 1, ..., N-1
  float* sigmoids;           // [N, kStrip]
  float* doubtful_sigmoids;  // [N, kDoubtfulStride]

  void lay_out(Carver& carver, int64_t queries, int64_t classes, int row_taps) {
    strip.lay_out(carver, queries, row_taps);
    choice.lay_out(carver, queries, classes);
    carver.take(all, to_full_vectors(queries));
    carver.take(sigmoids, queries * kStrip);
    carver.take(doubtful_sigmoids, queries * kDoubtfulStride);
  }
};

// Computes the pixel rows [begin, end) of one strip. With packed.cells, queries that certainly cannot change a label
// are skipped; labels are the same, bit for bit.
FASTMASK_KERNEL(void semantic_strip(const PackedLogits& packed, const ClassTable& table, const Taps& rows,
                                    const Taps& columns, int64_t strip, int64_t begin, int64_t end,
                                    const SemanticMaps& maps, const SemanticWorkspace& work))

// Order "scores", first step: the scores at the rows and columns of the valid grid that are the outputs of `rows` and
// `columns`, to scores[row, class, column] with columns.stride columns.
FASTMASK_KERNEL(void semantic_grid_scores(const PackedLogits& packed, const ClassTable& table, const Taps& rows,
                                          const Taps& columns, float* scores, const SemanticWorkspace& work))

// Second step: resamples these scores to the pixels with the taps `rows` and `columns`; the first is pixel (top, left)
// of the maps. The scores are followed by 32 readable floats; `row` holds grid_columns + 32 floats.
FASTMASK_KERNEL(void semantic_resample_scores(const float* scores, int64_t classes, int64_t grid_columns,
                                              const Taps& rows, const Taps& columns, int64_t top, int64_t left,
                                              const SemanticMaps& maps, float* row))

}  // namespace fastmask
