// Work on PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <mutex>

namespace fastmask {

// Calls body(begin, end) for parts of [begin, end) of at least `grain`. What a part throws is thrown here again, the
// first of several: PyTorch's interface in C hands on that there was an error, not which.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (error == nullptr) error = std::current_exception();
    }
  });
  if (error != nullptr) std::rethrow_exception(error);
}

}  // namespace fastmask
