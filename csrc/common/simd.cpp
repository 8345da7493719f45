#include "common/simd.h"

#include <algorithm>
#include <atomic>

#if defined(__x86_64__) && !defined(FASTMASK_PORTABLE)
#include <cpuid.h>
#endif

namespace fastmask {
namespace {

#if defined(__x86_64__) && !defined(FASTMASK_PORTABLE)
// Clang 14 does not know __builtin_cpu_supports("f16c").
bool has_f16c() {
  unsigned int eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

SimdLevel detect() {
#if defined(__x86_64__) && !defined(FASTMASK_PORTABLE)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return SimdLevel::kAvx512;
  if (avx2) return SimdLevel::kAvx2;
#elif defined(__aarch64__) && !defined(FASTMASK_PORTABLE)
  return SimdLevel::kNeon;  // every such processor has it
#endif
  return SimdLevel::kPortable;
}

const SimdLevel best = detect();
std::atomic<SimdLevel> current{best};

}  // namespace

SimdLevel simd_level() { return current.load(std::memory_order_relaxed); }

SimdLevel set_simd_level(SimdLevel level) {
  level = std::clamp(level, SimdLevel::kPortable, best);
  // AVX2 does not include NEON.
  if (level == SimdLevel::kNeon && best != SimdLevel::kNeon) level = SimdLevel::kPortable;
  current.store(level, std::memory_order_relaxed);
  return simd_level();
}

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kAvx2:
      return "avx2";
    case SimdLevel::kNeon:
      return "neon";
    default:
      return "portable";
  }
}

}  // namespace fastmask
