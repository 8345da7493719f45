// Only in builds with FASTMASK_TASK_TIMES, from which `make threads` reckons the time on many cores:
// all tasks run on one thread, and their times go to a file.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace fastmask {

// The number of threads to divide work for.
inline int64_t traced_threads() {
  const char* threads = std::getenv("FASTMASK_TASK_THREADS");
  return threads == nullptr ? 1 : std::atoll(threads);
}

// Calls run(begin, end) for blocks of `grain` elements, and appends their times in nanoseconds as a line to the file
// that the environment variable FASTMASK_TASK_TIMES names.
template <typename Run>
void run_and_time(int64_t begin, int64_t end, int64_t grain, const Run& run) {
  static const char* const name = std::getenv("FASTMASK_TASK_TIMES");
  static FILE* const file = name == nullptr ? nullptr : std::fopen(name, "a");
  for (int64_t i = begin; i < end; i += grain) {
    const auto start = std::chrono::steady_clock::now();
    run(i, i + grain < end ? i + grain : end);
    const std::chrono::nanoseconds time = std::chrono::steady_clock::now() - start;
    if (file != nullptr) std::fprintf(file, "%lld ", static_cast<long long>(time.count()));
  }
  if (file == nullptr) return;
  std::fprintf(file, "\n");
  std::fflush(file);
}

}  // namespace fastmask
