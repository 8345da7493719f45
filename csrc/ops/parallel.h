// Work on PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <mutex>
#include <type_traits>

#include "common/scratch.h"
#ifdef FASTMASK_TASK_TIMES
#include "ops/task_times.h"
#endif

namespace fastmask {

#ifdef FASTMASK_TASK_TIMES
inline int64_t num_threads() { return traced_threads(); }
#else
inline int64_t num_threads() { return torch::stable::get_num_threads(); }
#endif

// Calls body(begin, end), or body(begin, end, scratch) with the thread's scratch memory, for parts of [begin, end) with
// at least `grain` elements. Rethrows the first exception of a part, because PyTorch's C interface reports only that
// there was an error, not which.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  std::exception_ptr error;
  std::mutex mutex;
  const auto run = [&](int64_t first, int64_t last) {
    try {
      if constexpr (std::is_invocable_v<const Body&, int64_t, int64_t, Scratch&>) {
        Scratch& scratch = thread_scratch();
        body(first, last, scratch);
        scratch.trim();
      } else {
        body(first, last);
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (error == nullptr) error = std::current_exception();
    }
  };
#ifdef FASTMASK_TASK_TIMES
  run_and_time(begin, end, grain, run);
#else
  torch::stable::parallel_for(begin, end, grain, run);
#endif
  if (error != nullptr) std::rethrow_exception(error);
}

}  // namespace fastmask
