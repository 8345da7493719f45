// SIMD levels, chosen when the library loads.
//
// Files in csrc/cpu are compiled once per level, with FASTMASK_SIMD naming the level and the namespace. Each kernel is
// declared for all levels with FASTMASK_KERNEL and called through FASTMASK_SELECT.
#pragma once

namespace fastmask {

enum class SimdLevel : int { kPortable = 0, kNeon = 1, kAvx2 = 2, kAvx512 = 3 };

// The level in use: the best that this processor has, unless set_simd_level lowered it.
SimdLevel simd_level();

// Caps the level (for tests). Returns the level now in use: the best, up to this one, that the processor has.
SimdLevel set_simd_level(SimdLevel level);

const char* simd_level_name(SimdLevel level);

}  // namespace fastmask

#if defined(__x86_64__) && !defined(FASTMASK_PORTABLE)
#define FASTMASK_KERNEL(declaration) \
  namespace portable {               \
  declaration;                       \
  }                                  \
  namespace avx2 {                   \
  declaration;                       \
  }                                  \
  namespace avx512 {                 \
  declaration;                       \
  }
#define FASTMASK_SELECT(name)                                                \
  (::fastmask::simd_level() == ::fastmask::SimdLevel::kAvx512 ? avx512::name \
   : ::fastmask::simd_level() == ::fastmask::SimdLevel::kAvx2 ? avx2::name   \
                                                              : portable::name)
#elif defined(__aarch64__) && !defined(FASTMASK_PORTABLE)
#define FASTMASK_KERNEL(declaration) \
  namespace portable {               \
  declaration;                       \
  }                                  \
  namespace neon {                   \
  declaration;                       \
  }
#define FASTMASK_SELECT(name) (::fastmask::simd_level() == ::fastmask::SimdLevel::kNeon ? neon::name : portable::name)
#else
#define FASTMASK_KERNEL(declaration) \
  namespace portable {               \
  declaration;                       \
  }
#define FASTMASK_SELECT(name) (portable::name)
#endif
