#include "common/simd.h"

#include "ops/library.h"

namespace fastmask {
namespace {

int64_t request_simd_level(int64_t level) {
  return static_cast<int64_t>(set_simd_level(static_cast<SimdLevel>(level)));
}

}  // namespace
}  // namespace fastmask

FASTMASK_LIBRARY_IMPL(CompositeExplicitAutograd, library) {
  library.impl("_set_simd_level", TORCH_BOX(&fastmask::request_simd_level));
}
