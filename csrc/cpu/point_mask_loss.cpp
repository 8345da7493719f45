#include "cpu/point_mask_loss.h"

#include "cpu/mask_loss_sums.h"
#include "cpu/mask_terms.h"
#include "cpu/simd/gather.h"
#include "cpu/simd/pairs.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

constexpr int64_t kBlock = 128;  // points whose terms are summed in float

// The x and y coordinates of the first `count` points, kLanes at most; the others are off the map.
inline void load_points(const float* points, int64_t count, vfloat& x, vfloat& y) {
  if (count >= kLanes) {
    load_pairs(points, x, y);
    return;
  }
  float some[2 * kLanes];
  for (int64_t i = 0; i < 2 * kLanes; ++i) some[i] = i < 2 * count ? points[i] : -1.0f;
  load_pairs(some, x, y);
}

// Gathers pixels of an H x W map as words of four bytes that begin at a pixel, or at the last possible byte.
template <typename T>
struct Pixels {
  const uint8_t* data;
  int32_t last_word;  // the last pixel from which four bytes can be read
  uint8_t few[4];     // a copy of a map with fewer bytes

  Pixels(const void* map, int64_t count) : data(static_cast<const uint8_t*>(map)), few{} {
    const int64_t whole = 4 / static_cast<int64_t>(sizeof(T));
    last_word = static_cast<int32_t>(count > whole ? count - whole : 0);
    if (count < whole) {
      memcpy(few, map, count * sizeof(T));
      data = few;
    }
  }
  Pixels(const Pixels&) = delete;

  // Pixels `at` and at + 1 of a row; beyond the map's end, the second is arbitrary.
  void pair(vint at, vint& first, vint& second) const {
    const vint from = minimum(at, splat(last_word));
    if constexpr (sizeof(T) == 4) {
      first = gather_words(data, from * 4);
      second = gather_words(data, (from < last_word ? from + 1 : from) * 4);
    } else {
      constexpr int kBits = 8 * sizeof(T);
      constexpr int32_t kMask = (1 << kBits) - 1;
      const vint word = gather_words(data, from * static_cast<int32_t>(sizeof(T))) >> ((at - from) * kBits);
      first = word & kMask;
      second = (word >> kBits) & kMask;
    }
  }
};

// The pixels of the targets around points: four positions, and the bilinear weight of each, 0 beyond the map.
struct PixelTaps {
  vint upper, lower;  // the left pixel of each pair
  vfloat weights[4];  // upper left, upper right, lower left, lower right
};

// The first of two neighboring pixels of the map around each position, and the weights of both.
inline vint pixel_axis(vfloat coordinates, int64_t size, vfloat (&weight)[2]) {
  const vfloat at = axis_positions(coordinates, splat(static_cast<float>(size)));
  const int32_t last = static_cast<int32_t>(size > 1 ? size - 2 : 0);
  const vint first = minimum(maximum(__builtin_convertvector(at, vint), vint{}), splat(last));
  // A position before the map is less than 0 pixels behind the first of the pair, one after the map more than 1.
  const vfloat behind = at - __builtin_convertvector(first, vfloat);
  weight[0] = maximum_of_numbers(minimum_of_numbers(1.0f - behind, 1.0f + behind), vfloat{});
  weight[1] = maximum_of_numbers(minimum_of_numbers(behind, 2.0f - behind), vfloat{});
  if (size == 1) weight[1] = vfloat{};
  return first;
}

inline PixelTaps pixel_taps(vfloat x, vfloat y, const ImageTargets& targets) {
  vfloat columns[2], rows[2];
  const int32_t width = static_cast<int32_t>(targets.width);
  const vint column = pixel_axis(x, targets.width, columns);
  const vint row = pixel_axis(y, targets.height, rows);
  PixelTaps taps;
  taps.upper = row * width + column;
  taps.lower = targets.height > 1 ? taps.upper + width : taps.upper;
  for (int i = 0; i < 4; ++i) taps.weights[i] = rows[i / 2] * columns[i % 2];
  return taps;
}

struct Shares {
  vfloat target;  // t, the share of the target's pixels
  vfloat weight;  // v, 1 - the share of void pixels
};

// Looks up points in targets of type T: segments, or one mask and the valid pixels.
template <typename T>
class Reader {
 public:
  Reader(const ImageTargets& targets, int64_t target)
      : targets_(targets),
        segments_(targets.segments != nullptr),
        has_void_(targets.ignore_void && (segments_ ? fits(targets.void_value) : targets.valid != nullptr)),
        plane_(segments_ ? targets.segments : targets.masks + target * targets.height * targets.width,
               targets.height * targets.width),
        valid_(targets.valid != nullptr ? targets.valid : plane_.data, targets.valid != nullptr ? size() : 1),
        target_(code(target)),
        void_(code(targets.void_value)) {}

  Shares at(vfloat x, vfloat y) const {
    const PixelTaps taps = pixel_taps(x, y, targets_);
    vint pixels[4], is_void[4];
    plane_.pair(taps.upper, pixels[0], pixels[1]);
    plane_.pair(taps.lower, pixels[2], pixels[3]);
    if (has_void_ && !segments_) {
      valid_.pair(taps.upper, is_void[0], is_void[1]);
      valid_.pair(taps.lower, is_void[2], is_void[3]);
    }
    Shares shares{{}, splat(1.0f)};
    vfloat void_share = {};
    for (int i = 0; i < 4; ++i) {
      vint belongs = segments_ ? pixels[i] == target_ : pixels[i] != 0;
      if (has_void_) {
        is_void[i] = segments_ ? pixels[i] == void_ : is_void[i] == 0;
        belongs &= ~is_void[i];
        void_share += masked(is_void[i], taps.weights[i]);
      }
      shares.target += masked(belongs, taps.weights[i]);
    }
    if (has_void_) {
      shares.weight = 1.0f - void_share;
      const vint counts = shares.weight >= kLeastWeight;
      shares.weight = masked(counts, shares.weight);
      shares.target = masked(counts, shares.target);
    }
    return shares;
  }

 private:
  int64_t size() const { return targets_.height * targets_.width; }

  static bool fits(int64_t value) { return static_cast<int64_t>(static_cast<T>(value)) == value; }

  // The bits of a value in a pixel of type T; a value beyond the type's range gets bits that no pixel has.
  static int32_t code(int64_t value) {
    if constexpr (sizeof(T) == 4) return static_cast<int32_t>(value);
    return fits(value) ? static_cast<int32_t>(value) & ((1 << (8 * sizeof(T) % 32)) - 1) : -1;
  }

  ImageTargets targets_;  // a copy, so that the compiler knows that no store changes it
  bool segments_, has_void_;
  Pixels<T> plane_;
  Pixels<uint8_t> valid_;
  int32_t target_, void_;
};

// The loss is t F+ + (v - t) F-.
template <bool kFocal, bool kSquare, bool kSlopes>
inline PixelTerms point_terms(vfloat x, const Shares& shares, MaskTerm term) {
  return pixel_terms<kFocal, kSquare, kSlopes>(masked(shares.weight > 0.0f, x), term);  // x may be NaN at weight 0
}

using Quad = float __attribute__((vector_size(16)));

// quads[kLanes][4]: a, b, c and d of each lane.
inline void store_quads(vfloat a, vfloat b, vfloat c, vfloat d, float* quads) {
  [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
    // In each half or quarter of a vector, lanes 0 and 1, or 2 and 3, of both.
    const auto low = [](vfloat u, vfloat v) {
      return shuffle<(kLane / 4 * 4 + kLane % 4 / 2 + kLane % 2 * kLanes)...>(u, v);
    };
    const auto high = [](vfloat u, vfloat v) {
      return shuffle<(kLane / 4 * 4 + 2 + kLane % 4 / 2 + kLane % 2 * kLanes)...>(u, v);
    };
    const auto first = [](vfloat u, vfloat v) {
      return shuffle<(kLane / 4 * 4 + kLane % 2 + kLane % 4 / 2 * kLanes)...>(u, v);
    };
    const auto second = [](vfloat u, vfloat v) {
      return shuffle<(kLane / 4 * 4 + 2 + kLane % 2 + kLane % 4 / 2 * kLanes)...>(u, v);
    };
    const vfloat ab[2] = {low(a, b), high(a, b)}, cd[2] = {low(c, d), high(c, d)};
    for (int i = 0; i < 2; ++i) {
      const vfloat pairs[2] = {first(ab[i], cd[i]), second(ab[i], cd[i])};
      for (int k = 0; k < 2; ++k) {
        for (int part = 0; part < kLanes / 4; ++part) {
          memcpy(quads + 4 * (4 * part + 2 * i + k), reinterpret_cast<const char*>(&pairs[k]) + 16 * part, 16);
        }
      }
    }
  }(std::make_integer_sequence<int, kLanes>{});
}

inline void add_quad(float* sum, const float* quad) {
  Quad a, b;
  memcpy(&a, sum, sizeof a);
  memcpy(&b, quad, sizeof b);
  a += b;
  memcpy(sum, &a, sizeof a);
}

// Adds the slopes of both losses to the four logits of each point, one point after the other: map [cells][2].
void scatter(const PointMaskLossWorkspace work, int64_t num_points, int32_t stride, float mask, DiceSlopes dice,
             float* map) {
  for (int64_t i = 0; i < num_points; i += kLanes) {
    const vfloat of_mask = mask * load(work.mask_slopes + i);
    const vfloat of_dice = fma(splat(dice.inside), load(work.inside + i), dice.outside * load(work.outside + i));
    const vfloat right = load(work.right + i), lower = load(work.lower + i);
    const vfloat left = 1.0f - right, upper = 1.0f - lower;
    const vfloat weights[4] = {upper * left, upper * right, lower * left, lower * right};
    float quads[2][4 * kLanes];
    for (int k = 0; k < 2; ++k) {
      const vfloat first = weights[2 * k], second = weights[2 * k + 1];
      store_quads(first * of_mask, first * of_dice, second * of_mask, second * of_dice, quads[k]);
    }
    const int64_t count = num_points - i < kLanes ? num_points - i : kLanes;
    for (int64_t k = 0; k < count; ++k) {
      float* const cell = map + 2 * static_cast<int64_t>(work.cells[i + k]);
      add_quad(cell, quads[0] + 4 * k);
      add_quad(cell + 2 * stride, quads[1] + 4 * k);
    }
  }
}

// slopes [2, h, w] from the map with its border.
void separate(const float* map, const Plane& plane, float* slopes) {
  const int64_t h = plane.h, w = plane.w;
  for (int64_t y = 0; y < h; ++y) {
    const float* row = map + 2 * ((y + 1) * (w + 2) + 1);
    float *const mask = slopes + y * w, *const dice = mask + h * w;
    int64_t column = 0;
    for (; column + kLanes <= w; column += kLanes) {
      vfloat of_mask, of_dice;
      load_pairs(row + 2 * column, of_mask, of_dice);
      store(mask + column, of_mask);
      store(dice + column, of_dice);
    }
    for (; column < w; ++column) {
      mask[column] = row[2 * column];
      dice[column] = row[2 * column + 1];
    }
  }
}

// With U = sum v p + sum t + 1 and I = 2 sum p t + 1:
//   d mask / dx = (t dF+/dx + (v - t) dF-/dx) / sum v,   d dice / dx = (I v - 2 t U) / U^2 p (1 - p).
// The arguments are copies, so that the compiler knows that no store changes them.
template <bool kFocal, bool kSquare, bool kSlopes, typename T>
MaskLossPair losses(const Plane plane, const ImageTargets& targets, int64_t target, const float* points,
                    int64_t num_points, MaskTerm term, const PointMaskLossWorkspace work, float* pair_slopes) {
  const Reader<T> reader(targets, target);
  const int32_t stride = static_cast<int32_t>(plane.w) + 2;
  double loss = 0, intersection = 0, prediction = 0, of_target = 0, weight = 0;
  for (int64_t begin = 0; begin < num_points; begin += kBlock) {
    const int64_t end = num_points - begin < kBlock ? num_points : begin + kBlock;
    vfloat losses = {}, intersections = {}, predictions = {}, targets_sum = {}, weights = {};
    for (int64_t i = begin; i < end; i += kLanes) {
      vfloat x, y;
      load_points(points + 2 * i, end - i, x, y);
      const Positions columns = positions(x, plane.w), rows = positions(y, plane.h);
      const vfloat logit = sample(work.map, stride, columns, rows);
      Shares shares = reader.at(x, y);
      if (i + kLanes > end) {
        for (int64_t k = end - i; k < kLanes; ++k) shares.target[k] = shares.weight[k] = 0.0f;
      }
      const vfloat t = shares.target, v = shares.weight;
      const PixelTerms terms = point_terms<kFocal, kSquare, kSlopes>(logit, shares, term);
      losses += fma(t, terms.foreground, (v - t) * terms.background);
      intersections += terms.p * t;
      predictions += terms.p * v;
      targets_sum += t;
      weights += v;
      if (kSlopes) {
        const vfloat steepness = terms.p * terms.q;
        const vint counts = v > 0.0f;
        store(work.mask_slopes + i, masked(counts, (v - t) * terms.background_slope - t * terms.foreground_slope));
        store(work.inside + i, masked(counts, t * steepness));
        store(work.outside + i, masked(counts, (v - t) * steepness));
        store(work.right + i, columns.weight);
        store(work.lower + i, rows.weight);
        store(work.cells + i, rows.first * stride + columns.first);
      }
    }
    loss += sum_lanes(losses);
    intersection += sum_lanes(intersections);
    prediction += sum_lanes(predictions);
    of_target += sum_lanes(targets_sum);
    weight += sum_lanes(weights);
  }
  const MaskLossPair pair = losses_of(loss, intersection, prediction, of_target, weight);
  if (!kSlopes) return pair;
  memset(work.slopes, 0, 2 * sizeof(float) * bordered_size(plane.h, plane.w));
  const float mask = 1.0f / (pair.sums.pixels > 1.0f ? pair.sums.pixels : 1.0f);
  scatter(work, num_points, stride, mask, dice_slopes(pair.sums), work.slopes);
  separate(work.slopes, plane, pair_slopes);
  return pair;
}

// Calls run.operator()<kFocal, kSquare, T>() for the kind of loss and the type of the targets.
template <typename Run>
auto dispatch(MaskTerm term, const ImageTargets& targets, const Run& run) {
  return with_term(term, [&]<bool kFocal, bool kSquare>() {
    if (targets.segments == nullptr) return run.template operator()<kFocal, kSquare, uint8_t>();
    return with_segments(targets, [&]<typename T>(const T*) { return run.template operator()<kFocal, kSquare, T>(); });
  });
}

}  // namespace

MaskLossPair point_mask_loss_pair(const Plane& plane, const ImageTargets& targets, int64_t target, const float* points,
                                  int64_t num_points, MaskTerm term, const PointMaskLossWorkspace& work,
                                  float* slopes) {
  load_bordered(plane, work.map);
  return dispatch(term, targets, [&]<bool kFocal, bool kSquare, typename T>() {
    const auto run = slopes == nullptr ? losses<kFocal, kSquare, false, T> : losses<kFocal, kSquare, true, T>;
    return run(plane, targets, target, points, num_points, term, work, slopes);
  });
}

}  // namespace fastmask::FASTMASK_SIMD
