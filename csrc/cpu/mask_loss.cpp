#include "cpu/mask_loss.h"

#include <type_traits>

#include "cpu/held_rows.h"
#include "cpu/mask_loss_sums.h"
#include "cpu/mask_terms.h"
#include "cpu/simd/load_logits.h"
#include "cpu/stretch.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

// The code of an output pixel: negative if it belongs to the target; bit 0 is set if it counts.
constexpr int8_t kTarget = -128;
constexpr int8_t kCounted = 1;

// Returns whether all pixels count.
template <typename T>
bool segment_codes(const T* row, int64_t width, int64_t target, int64_t void_value, bool ignore_void, int8_t* codes) {
  // A target beyond the type's range owns no pixel; a void value beyond it marks none.
  const bool has_target = static_cast<int64_t>(static_cast<T>(target)) == target;
  const bool has_void = ignore_void && static_cast<int64_t>(static_cast<T>(void_value)) == void_value;
  const T wanted = static_cast<T>(target);
  const T ignored = static_cast<T>(void_value);
  const int8_t target_bit = has_target ? kTarget : 0;
  const int8_t void_bit = has_void ? kCounted : 0;
  int8_t counted = kCounted;
  for (int64_t j = 0; j < width; ++j) {
    const int8_t code = (row[j] == wanted ? target_bit : 0) | kCounted;
    codes[j] = code ^ (row[j] == ignored ? void_bit : 0);
    counted &= codes[j];
  }
  return counted != 0;
}

bool mask_codes(const uint8_t* mask, const uint8_t* valid, int64_t width, int8_t* codes) {
  for (int64_t j = 0; j < width; ++j) codes[j] = static_cast<int8_t>((mask[j] != 0 ? kTarget : 0) | kCounted);
  if (valid == nullptr) return true;
  int8_t counted = kCounted;
  for (int64_t j = 0; j < width; ++j) {
    codes[j] = valid[j] != 0 ? codes[j] : 0;
    counted &= codes[j];
  }
  return counted != 0;
}

// The codes of one output row. Returns whether all of its pixels count.
bool pixel_codes(const ImageTargets& targets, int64_t y, int64_t target, int8_t* codes) {
  const int64_t width = targets.width;
  const int64_t begin = y * width;
  if (targets.segments != nullptr) {
    return with_segments(targets, [&](const auto* segments) {
      return segment_codes(segments + begin, width, target, targets.void_value, targets.ignore_void, codes);
    });
  }
  const bool has_void = targets.ignore_void && targets.valid != nullptr;
  return mask_codes(targets.masks + target * targets.height * width + begin, has_void ? targets.valid + begin : nullptr,
                    width, codes);
}

// Two neighboring rows of the prediction, stretched to W pixels. As y only increases, each row is stretched once.
class StretchedRows {
 public:
  StretchedRows(const Plane& plane, const Stretch& stretch, const MaskLossWorkspace& work)
      : plane_(plane), stretch_(stretch), source_(work.source), rows_(work.stretched) {}

  const float* row(int64_t index) {
    return rows_.row(index, [&](int64_t, float* out) {
      load_logits(row_of(plane_, index), plane_.w, source_);
      stretch_.stretch(source_, out);
    });
  }

 private:
  const Plane& plane_;
  const Stretch& stretch_;
  float* source_;
  HeldRows rows_;
};

// The slopes of two neighboring stretched rows, contracted to the maps once no later y reaches them.
class StretchedSlopes {
 public:
  StretchedSlopes(const Plane& plane, const Stretch& stretch, const Phases& layout, const MaskLossWorkspace& work)
      : map_row_(to_full_vectors(plane.w)),
        map_(plane.h * map_row_),
        size_(layout.size),
        stretch_(stretch),
        maps_(work.maps),
        rows_(work.slopes) {
    memset(maps_, 0, sizeof(float) * kMaskLossSlopes * map_);
    for (float* row : work.slopes) memset(row - kMostLanes, 0, sizeof(float) * kMostLanes);
  }

  float* row(int64_t index) {
    return rows_.row(index, [&](int64_t old, float* row) {
      contract(old, row);
      memset(row, 0, sizeof(float) * kMaskLossSlopes * size_);
    });
  }

  // slopes[0] = mask maps[0], slopes[1] = dice.inside maps[2] + dice.outside (maps[1] - maps[2])
  void write(const Plane& plane, float mask, DiceSlopes dice, float* slopes) {
    rows_.each([&](int64_t index, const float* row) { contract(index, row); });
    float* of_dice = slopes + plane.h * plane.w;
    for (int64_t y = 0; y < plane.h; ++y) {
      const float* row = maps_ + y * map_row_;
      for (int64_t x = 0; x < plane.w; ++x) {
        slopes[y * plane.w + x] = mask * row[x];
        of_dice[y * plane.w + x] = dice.inside * row[2 * map_ + x] + dice.outside * (row[map_ + x] - row[2 * map_ + x]);
      }
    }
  }

 private:
  void contract(int64_t index, const float* row) const {
    if (index < 0) return;
    for (int k = 0; k < kMaskLossSlopes; ++k) stretch_.contract(row + k * size_, maps_ + k * map_ + index * map_row_);
  }

  int64_t map_row_, map_, size_;
  const Stretch& stretch_;
  float* maps_;
  HeldRows rows_;
};

// A pair's sums over the counted pixels, in lanes. With p_t = p in the target and 1 - p outside, `errors` sums 1 - p_t.
struct PairSums {
  vdouble loss{}, intersection{}, errors{};
  int64_t target_pixels = 0, counted_pixels = 0;

  // sum p is the intersection I and the errors outside the target; those inside are sum t - I.
  MaskLossPair losses() const {
    const double overlap = sum_lanes(intersection), target = static_cast<double>(target_pixels);
    return losses_of(sum_lanes(loss), overlap, 2.0 * overlap + sum_lanes(errors) - target, target,
                     static_cast<double>(counted_pixels));
  }
};

// The same of some pixels. Float sums run over kMostTerms vectors, as the rounding of longer ones would exceed the
// reference's.
struct LaneSums {
  static constexpr int64_t kMostTerms = 64;

  vfloat loss{}, intersection{}, errors{};
  vint target{};

  void add_to(PairSums& sums) const {
    sums.loss += in_double(loss);
    sums.intersection += in_double(intersection);
    sums.errors += in_double(errors);
    sums.target_pixels += sum_lanes<int64_t>(target);
  }
};

// The sums of slopes of the pixels between two rows of logits, for the upper and for the lower row.
struct SlopeSums {
  vfloat upper[kMaskLossSlopes], lower[kMaskLossSlopes];

  void add(int k, vfloat slope, vfloat upper_weight, vfloat lower_weight) {
    upper[k] = fma(slope, upper_weight, upper[k]);
    lower[k] = fma(slope, lower_weight, lower[k]);
  }
};

// The kinds of pixels that may be found: all; those that count; those that count and are not of the target.
enum class Pixels { kAny, kCounted, kBackground };

// Whether a vector of codes in any of kRows rows has a pixel of the target.
template <int kRows>
inline bool has_target(const int8_t* codes, int64_t row) {
  uint32_t any = 0;
  for (int i = 0; i < kRows; ++i) {
    for (int k = 0; k < kLanes; k += 4) any |= load_as<uint32_t>(codes + i * row + k);
  }
  return (any & 0x80808080) != 0;
}

// Adds a pixel to the sums. With z = x inside the target and -x outside, the same formulas hold for both kinds of
// pixel: p_t = sigmoid(z), q = 1 - p_t, cross-entropy softplus(-z), focal a q^gamma softplus(-z), and
//   -d focal / dz = a q^gamma (gamma p_t softplus(-z) + q),   -d cross-entropy / dz = q,   dp / dx = p_t q.
template <bool kFocal, bool kSquare, bool kSlopes, Pixels kPixels>
inline void add_pixel(const int8_t* codes, vfloat x, MaskTerm term, vfloat upper_weight, vfloat lower_weight,
                      LaneSums& sums, SlopeSums& slopes) {
  constexpr bool kHasTarget = kPixels != Pixels::kBackground, kAllCount = kPixels != Pixels::kAny;
  const vint code = kHasTarget ? load_bytes(codes) : splat(int32_t{kCounted});
  const vint target = code < 0;
  const vint flip = ~code & INT32_MIN;
  const vint counted = kAllCount ? vint{} : (code & splat(int32_t{kCounted})) != 0;
  const auto of_counted = [&](vfloat v) { return kAllCount ? v : masked(counted, v); };

  const Sigmoid s = sigmoid(from_bits(bits(x) ^ flip));
  vfloat loss = s.softplus_neg, slope = s.q;
  if (kFocal) {
    const vfloat alpha = target ? splat(term.alpha) : splat(1.0f - term.alpha);
    const vfloat modulation = focal_power<kSquare>(s.q, s.softplus_pos, term.gamma) * alpha;
    slope = modulation * fma(term.gamma * s.p, loss, slope);
    loss *= modulation;
  }
  sums.loss += of_counted(loss);
  sums.errors += of_counted(s.q);
  if (kHasTarget) {
    const vint counted_target = kAllCount ? target : target & counted;
    sums.intersection += masked(counted_target, s.p);
    sums.target -= counted_target;
  }
  if (kSlopes) {
    const vfloat steepness = of_counted(s.p * s.q);
    slopes.add(0, of_counted(kHasTarget ? from_bits(bits(slope) ^ flip) : -slope), upper_weight, lower_weight);
    slopes.add(1, steepness, upper_weight, lower_weight);
    if (kHasTarget) slopes.add(2, masked(target, steepness), upper_weight, lower_weight);
  }
}

// Computes a pair, in groups of output rows that lie between the same two rows of logits.
template <bool kFocal, bool kSquare, bool kSlopes>
class Pair {
 public:
  Pair(const Plane& plane, const Resampling& resampling, const ImageTargets& targets, int64_t target, MaskTerm term,
       const MaskLossWorkspace& work)
      : targets_(targets),
        target_(target),
        term_(term),
        work_(work),
        rows_(resampling.rows),
        stretch_(resampling, plane.w),
        layout_(resampling.phases) {}

  MaskLossPair losses(const Plane& plane, float* slopes) {
    StretchedRows stretched(plane, stretch_, work_);
    [[maybe_unused]] std::conditional_t<kSlopes, StretchedSlopes, NoSlopes> gradients(plane, stretch_, layout_, work_);
    memset(work_.reordered, 0, kMaskLossRows * layout_.size);
    for (int64_t y = 0; y < targets_.height;) {
      const int64_t upper = rows_.index[y], lower = rows_.index[rows_.stride + y];
      int64_t end = y + 1;
      while (end < targets_.height && rows_.index[end] == upper && rows_.index[rows_.stride + end] == lower) {
        ++end;
      }
      const float* const upper_row = stretched.row(upper);
      const float* const lower_row = stretched.row(lower);
      float* const upper_slopes = gradients.row(upper);
      add_rows(y, end, upper_row, lower_row, upper_slopes, gradients.row(lower));
      y = end;
    }
    const MaskLossPair pair = sums_.losses();
    if constexpr (kSlopes) {
      gradients.write(plane, -1.0f / (pair.sums.pixels > 0 ? pair.sums.pixels : 1.0f), dice_slopes(pair.sums), slopes);
    }
    return pair;
  }

 private:
  struct NoSlopes {
    NoSlopes(const Plane&, const Stretch&, const Phases&, const MaskLossWorkspace&) {}
    float* row(int64_t) { return nullptr; }
  };

  // Adds the output rows [begin, end). The slopes of both rows of logits may be the same row.
  void add_rows(int64_t begin, int64_t end, const float* upper, const float* lower, float* upper_slopes,
                float* lower_slopes) {
    int64_t y = begin;
    for (; y + kMaskLossRows <= end; y += kMaskLossRows)
      add<kMaskLossRows>(y, upper, lower, upper_slopes, lower_slopes);
    for (; y < end; ++y) add<1>(y, upper, lower, upper_slopes, lower_slopes);
  }

  // Adds kRows output rows. As their number is constant, the compiler keeps its constants over a whole row.
  template <int kRows>
  void add(int64_t y, const float* upper, const float* lower, float* upper_slopes, float* lower_slopes) {
    bool all_count = true;
    for (int i = 0; i < kRows; ++i) {
      all_count &= pixel_codes(targets_, y + i, target_, work_.codes);
      stretch_.reorder(work_.codes, work_.reordered + i * layout_.size);
    }
    if (all_count) {
      sums_.counted_pixels += kRows * targets_.width;
    } else {
      for (int64_t i = 0; i < kRows * layout_.size; ++i) sums_.counted_pixels += work_.reordered[i] & kCounted;
    }
    const int64_t whole = all_count ? layout_.columns - layout_.columns % kLanes : 0;
    for (int64_t k = 0; k < layout_.count; ++k) {
      const int64_t from = k * layout_.stride;
      add_columns<kRows, true>(y, from, from + whole, upper, lower, upper_slopes, lower_slopes);
      add_columns<kRows, false>(y, from + whole, from + layout_.columns, upper, lower, upper_slopes, lower_slopes);
    }
  }

  template <int kRows, bool kAllCount>
  void add_columns(int64_t y, int64_t from, int64_t to, const float* upper, const float* lower, float* upper_slopes,
                   float* lower_slopes) {
    vfloat upper_weight[kRows], lower_weight[kRows];
    for (int i = 0; i < kRows; ++i) {
      upper_weight[i] = splat(rows_.weight[y + i]);
      lower_weight[i] = splat(rows_.weight[rows_.stride + y + i]);
    }
    const int64_t row = layout_.size;
    const int8_t* const codes = work_.reordered;
    for (int64_t block = from; block < to; block += LaneSums::kMostTerms / kRows * kLanes) {
      const int64_t most = block + LaneSums::kMostTerms / kRows * kLanes, end = most < to ? most : to;
      LaneSums sums;
      for (int64_t j = block; j < end; j += kLanes) {
        const vfloat above = load(upper + j), below = load(lower + j);
        const auto add = [&]<Pixels kPixels>() {
          SlopeSums slopes{};
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            add_pixel<kFocal, kSquare, kSlopes, kPixels>(codes + i * row + j,
                                                         fma(below, lower_weight[i], above * upper_weight[i]), term_,
                                                         upper_weight[i], lower_weight[i], sums, slopes);
          }
          if (!kSlopes) return;
          for (int k = 0; k < (kPixels == Pixels::kBackground ? kMaskLossSlopes - 1 : kMaskLossSlopes); ++k) {
            add_at(upper_slopes + k * row + j, slopes.upper[k]);
            add_at(lower_slopes + k * row + j, slopes.lower[k]);
          }
        };
        if (!kAllCount) {
          add.template operator()<Pixels::kAny>();
        } else if (has_target<kRows>(codes + j, row)) {
          add.template operator()<Pixels::kCounted>();
        } else {
          add.template operator()<Pixels::kBackground>();
        }
      }
      sums.add_to(sums_);
    }
  }

  static void add_at(float* sum, vfloat v) { store(sum, load(sum) + v); }

  const ImageTargets& targets_;
  const int64_t target_;
  const MaskTerm term_;
  const MaskLossWorkspace& work_;
  const Taps rows_;
  const Stretch stretch_;
  const Phases& layout_;
  PairSums sums_;
};

}  // namespace

MaskLossPair mask_loss_pair(const Plane& plane, const Resampling& resampling, const ImageTargets& targets,
                            int64_t target, MaskTerm term, const MaskLossWorkspace& work, float* slopes) {
  return with_term(term, [&]<bool kFocal, bool kSquare>() {
    if (slopes == nullptr) {
      return Pair<kFocal, kSquare, false>(plane, resampling, targets, target, term, work).losses(plane, nullptr);
    }
    return Pair<kFocal, kSquare, true>(plane, resampling, targets, target, term, work).losses(plane, slopes);
  });
}

void add_slopes(const float* slopes, int64_t pixels, float mask, float dice, float* grad) {
  for (int64_t i = 0; i < pixels; ++i) grad[i] += mask * slopes[i] + dice * slopes[pixels + i];
}

void store_row(const float* in, int64_t count, void* out, Dtype dtype, int64_t offset) {
  store_logits(in, count, out, dtype, offset);
}

}  // namespace fastmask::FASTMASK_SIMD
