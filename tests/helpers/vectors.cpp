// Compares the vectors of one SIMD level, lane by lane, with scalar arithmetic. Compiled once for each level; prints
// what differs.
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cpu/assign_costs.h"
#include "cpu/simd/functions.h"
#include "cpu/simd/gather.h"
#include "cpu/simd/load_logits.h"
#include "cpu/simd/pack.h"
#include "cpu/simd/philox.h"

namespace fastmask::FASTMASK_SIMD {
namespace {

int failures = 0;
std::mt19937 random_bits(0);
constexpr int kRounds = 2000;

uint32_t bits_of(float x) { return std::isnan(x) ? 0x7fc00000 : std::bit_cast<uint32_t>(x); }  // all NaN are one
uint32_t bits_of(int32_t x) { return static_cast<uint32_t>(x); }
uint64_t bits_of(double x) { return std::isnan(x) ? ~0ull : std::bit_cast<uint64_t>(x); }

template <class T>
void same(const char* what, int lane, T actual, T expected) {
  if (bits_of(actual) == bits_of(expected) || ++failures > 20) return;
  printf("%s: lane %d is %.9g, expected %.9g\n", what, lane, double(actual), double(expected));
}

void equal(const char* what, int64_t actual, int64_t expected) {
  if (actual == expected || ++failures > 20) return;
  printf("%s is %lld, expected %lld\n", what, static_cast<long long>(actual), static_cast<long long>(expected));
}

// expected(i) in each lane.
template <class V, class F>
void lanes(const char* what, V actual, F expected) {
  for (int i = 0; i < kLanes; ++i)
    same(what, i, actual[i], static_cast<std::decay_t<decltype(actual[0])>>(expected(i)));
}

float any_float() {
  static const float special[] = {0.0f,   -0.0f,   1.0f,    -1.0f,    87.3f,     -88.0f,
                                  1e-45f, -1e-39f, 3.4e38f, INFINITY, -INFINITY, NAN};
  const uint32_t bits = random_bits();
  if (bits % 4 == 0) return special[(bits >> 8) % std::size(special)];
  if (bits % 4 == 1) return std::bit_cast<float>(static_cast<uint32_t>(random_bits()));
  return static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-24f;
}

int32_t any_int() {
  static const int32_t special[] = {0, 1, -1, INT32_MAX, INT32_MIN};
  const uint32_t bits = random_bits();
  return bits % 3 == 0 ? special[(bits >> 8) % std::size(special)] : static_cast<int32_t>(bits) >> (bits % 32);
}

vfloat any_floats() {
  return by_lane<vfloat>([](int) { return any_float(); });
}
vint any_ints() {
  return by_lane([](int) { return any_int(); });
}

void arithmetic() {
  for (int round = 0; round < kRounds; ++round) {
    const vfloat a = any_floats(), b = any_floats(), c = any_floats();
    const float bound = static_cast<float>(any_int());
    lanes("minimum", minimum(a, b), [&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
    lanes("maximum", maximum(a, b), [&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
    // Either zero may come of two.
    const vfloat shifted = a + 0.0f;
    lanes("at_most", at_most(shifted, bound) + 0.0f, [&](int i) { return bound < shifted[i] ? bound : shifted[i]; });
    lanes("at_least", at_least(shifted, bound) + 0.0f, [&](int i) { return bound > shifted[i] ? bound : shifted[i]; });
    const vfloat x = by_lane<vfloat>([&](int i) { return std::isnan(a[i]) ? 1.0f : a[i] + 0.0f; });
    const vfloat y = by_lane<vfloat>([&](int i) { return std::isnan(b[i]) ? 2.0f : b[i] + 0.0f; });
    lanes("minimum_of_numbers", minimum_of_numbers(x, y), [&](int i) { return x[i] < y[i] ? x[i] : y[i]; });
    lanes("maximum_of_numbers", maximum_of_numbers(x, y), [&](int i) { return x[i] > y[i] ? x[i] : y[i]; });
    const bool fused = fma(splat(1.0f + 0x1p-23f), splat(1.0f - 0x1p-23f), splat(-1.0f))[0] != 0.0f;
    equal("fused", fused, FASTMASK_BY_LEVEL(true, true, false, true));
    lanes("fma", fma(a, b, c), [&](int i) { return fused ? std::fma(a[i], b[i], c[i]) : a[i] * b[i] + c[i]; });
    lanes("masked", masked(a > b, c), [&](int i) { return a[i] > b[i] ? c[i] : 0.0f; });
    equal("lane_bits", lane_bits(a > b), bits_where([&](int i) { return a[i] > b[i]; }));

    const vint m = any_ints(), n = any_ints(), k = any_ints();
    lanes("minimum of integers", minimum(m, n), [&](int i) { return m[i] < n[i] ? m[i] : n[i]; });
    lanes("maximum of integers", maximum(m, n), [&](int i) { return m[i] > n[i] ? m[i] : n[i]; });
    lanes("minimum_unsigned", minimum_unsigned(m, n),
          [&](int i) { return static_cast<uint32_t>(m[i]) < static_cast<uint32_t>(n[i]) ? m[i] : n[i]; });
    lanes("with_tag", bits(with_tag(a, m & k, k)), [&](int i) { return (bits(a)[i] & ~k[i]) | (m[i] & k[i]); });
    equal("equal_lanes", equal_lanes(m, n), bits_where([&](int i) { return m[i] == n[i]; }));
    equal("lanes_up_to", lanes_up_to(m, n[0]), bits_where([&](int i) { return m[i] <= n[0]; }));
    lanes("choose_less", choose_less(m, n, k, m), [&](int i) { return m[i] < n[i] ? k[i] : m[i]; });
    lanes("choose_equal", choose_equal(m, n, k, m), [&](int i) { return m[i] == n[i] ? k[i] : m[i]; });
    lanes("choose_less_unsigned", choose_less_unsigned(m, n, k, m),
          [&](int i) { return static_cast<uint32_t>(m[i]) < static_cast<uint32_t>(n[i]) ? k[i] : m[i]; });
    int32_t least = m[0];
    for (int i = 1; i < kLanes; ++i) least = m[i] < least ? m[i] : least;
    equal("least_lane", least_lane(m), least);
    const uint32_t word = random_bits();
    for (int part = 0; part < 32 / kLanes; ++part) {
      lanes("select", select(word, part),
            [&](int i) { return -static_cast<int32_t>(word >> (part * kLanes + i) & 1); });
    }
    const vwide products = multiply((vwide)m, word);
    for (int i = 0; i < kHalf; ++i) {
      const uint64_t product = uint64_t{static_cast<uint32_t>(m[2 * i])} * word;
      same("multiply, low", i, static_cast<int32_t>(products[i]), static_cast<int32_t>(product));
      same("multiply, high", i, static_cast<int32_t>(products[i] >> 32), static_cast<int32_t>(product >> 32));
    }

    const Doubles wide = widen(a) * splat(1.0 / 3.0);
    const auto lane = [](const Doubles& v, int i) { return i < kHalf ? v.low[i] : v.high[i - kHalf]; };
    const vint whole = truncate(wide);
    for (int i = 0; i < kLanes; ++i) {
      const double value = static_cast<double>(a[i]) * (1.0 / 3.0);
      same("widen", i, lane(wide, i), value);
      same("truncate", i, whole[i], value > -0x1p31 && value < 0x1p31 ? static_cast<int32_t>(value) : INT32_MIN);
    }
  }
}

void memory() {
  float table[256];
  int8_t bytes[256];
  for (float& x : table) x = any_float();
  for (int8_t& x : bytes) x = static_cast<int8_t>(random_bits());
  for (int round = 0; round < kRounds; ++round) {
    const int at = static_cast<int>(random_bits() % 128);
    const vint index = by_lane([](int) { return static_cast<int32_t>(random_bits() % 250); });
    lanes("load_bytes", load_bytes(bytes + at), [&](int i) { return int32_t{bytes[at + i]}; });
    lanes("gather", gather(table, index), [&](int i) { return table[index[i]]; });
    const int32_t stride = index[0];
    const auto [upper_left, upper_right, lower_left, lower_right] =
        gather_corners(table, stride, (index - stride) < 0 ? vint{} : index - stride);
    const auto corner = [&](int i) { return index[i] < stride ? 0 : index[i] - stride; };
    lanes("gather_corners, upper left", upper_left, [&](int i) { return table[corner(i)]; });
    lanes("gather_corners, upper right", upper_right, [&](int i) { return table[corner(i) + 1]; });
    lanes("gather_corners, lower left", lower_left, [&](int i) { return table[corner(i) + stride]; });
    lanes("gather_corners, lower right", lower_right, [&](int i) { return table[corner(i) + stride + 1]; });
    const uint32_t chosen = random_bits() & kAllLanes;
    const Packing packing(chosen);
    equal("number of chosen lanes", packing.count(), std::popcount(chosen));
    const vfloat any = any_floats(), packed = packing(any);
    const vint packed_bits = packing(bits(any));
    for (int i = 0, to = 0; i < kLanes; ++i) {
      if ((chosen >> i & 1) == 0) continue;
      same("packed float", i, packed[to], any[i]);
      same("packed integer", i, packed_bits[to++], bits(any)[i]);
    }
    const vfloat whole = by_lane<vfloat>([](int) { return static_cast<float>(any_int() >> 8) * 0.25f; });
    lanes("floor_to_int", floor_to_int(whole), [&](int i) { return static_cast<int32_t>(std::floor(whole[i])); });
    const vint words = gather_words(reinterpret_cast<const uint8_t*>(bytes), index);
    lanes("gather_words", words, [&](int i) { return load_as<int32_t>(bytes + index[i]); });
    const int count = round % kLanes;
    std::vector<float> exactly(table + at, table + at + count);
    const vfloat some = load_some(exactly.data(), count);
    lanes("load_some", some, [&](int i) { return i < count ? exactly[i] : 0.0f; });
    std::vector<float> out(count);
    store_some(out.data(), some, count);
    for (int i = 0; i < count; ++i) same("store_some", i, out[i], exactly[i]);
    vfloat square[kLanes], before[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = before[i] = any_floats();
    transpose(square);
    for (int j = 0; j < kLanes; ++j) lanes("transpose", square[j], [&](int i) { return before[i][j]; });
  }
}

// All values of 16 bits, and their rounding, at every length.
void halves() {
  for (const Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16}) {
    const bool half = dtype == Dtype::kFloat16;
    std::vector<uint16_t> all(65536), back;
    for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
    std::vector<float> loaded(65536 + 16);
    for (int64_t count : {65536, 1, 2, 3, 5, 7, 11, 19}) {
      load_logits({all.data(), dtype, 65536 - count}, count, loaded.data());
      for (int64_t i = 0; i < count; ++i) {
        const uint16_t bits = all[65536 - count + i];
        same(half ? "load half" : "load bfloat16", static_cast<int>(i), loaded[i],
             half ? half_to_float(bits) : bfloat16_to_float(bits));
      }
      for (int64_t i = 0; i < count; ++i) loaded[i] *= 1.0f + static_cast<float>(random_bits() % 4096) * 0x1p-23f;
      back.assign(65536 + 16, 0x1234);
      store_logits(loaded.data(), count, back.data(), dtype, 0);
      equal("stored beyond the last", back[count] == 0x1234 && back[count + 8] == 0x1234, 1);
      for (int64_t i = 0; i < count; ++i) {
        if (std::isnan(loaded[i])) continue;  // the payload is the processor's
        equal(half ? "store half" : "store bfloat16", back[i],
              half ? float_to_half(loaded[i]) : float_to_bfloat16(loaded[i]));
      }
    }
  }
}

// Against the C library in double precision. Without fused multiply-adds, the argument of an exponential is rounded to
// a multiple of 2^-18 where it is large.
constexpr double kFunctionError = FASTMASK_BY_LEVEL(0x1.8p-22, 0x1.8p-22, 0x1p-18, 0x1.8p-22);

void functions() {
  double worst_exp = 0, worst_logistic = 0, worst_softplus = 0;
  for (int round = 0; round < kRounds; ++round) {
    const vfloat x =
        by_lane<vfloat>([](int) { return static_cast<float>(static_cast<int32_t>(random_bits())) * 0x1p-25f; });
    const vfloat power = exp_neg(from_bits(bits(x) & INT32_MAX)), p = logistic(x);
    const Sigmoid s = sigmoid(x);
    for (int i = 0; i < kLanes; ++i) {
      const auto error = [](double actual, double exact) { return std::abs(actual - exact) / exact; };
      worst_exp = std::max(worst_exp, error(power[i], std::exp(-std::abs(double(x[i])))));
      worst_logistic = std::max(worst_logistic, error(p[i], 1 / (1 + std::exp(-double(x[i])))));
      worst_softplus = std::max(worst_softplus, error(s.softplus_neg[i], std::log1p(std::exp(-double(x[i])))));
    }
  }
  for (const auto& [what, worst] :
       {std::pair{"exp_neg", worst_exp}, {"logistic", worst_logistic}, {"softplus", worst_softplus}}) {
    equal(what, worst > kFunctionError, 0);
    if (worst > kFunctionError) printf("%s: the relative error reaches %.3g\n", what, worst);
  }
  const Sigmoid nan = sigmoid(splat(NAN));
  equal("sigmoid of NaN is NaN",
        std::isnan(nan.p[0]) && std::isnan(nan.softplus_pos[0]) && std::isnan(nan.softplus_neg[0]), 1);
  equal("logistic(-1e30) is 0", logistic(splat(-1e30f))[0] == 0.0f && logistic(splat(1e30f))[0] == 1.0f, 1);
}

}  // namespace
}  // namespace fastmask::FASTMASK_SIMD

int main() {
  using namespace fastmask::FASTMASK_SIMD;
  arithmetic();
  memory();
  halves();
  functions();
  printf("%d lanes, %d failures\n", kLanes, failures);
  return failures != 0;
}
