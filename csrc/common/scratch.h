// A thread's temporary memory, kept between calls: allocating it would take longer than solving a small problem.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>

#include "common/carver.h"

namespace fastmask {

// Callers from Python get a MemoryError.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(int64_t bytes) {
    snprintf(message_, sizeof message_, "a thread needs %lld bytes of scratch memory, more than there are",
             static_cast<long long>(bytes));
  }
  const char* what() const noexcept override { return message_; }

 private:
  char message_[96];
};

class Scratch {
 public:
  // Returns a workspace, whose lay_out(carver, sizes...) has assigned its arrays. They hold arbitrary values and are
  // valid until the next call.
  template <class Workspace, class... Sizes>
  Workspace lay_out(const Sizes&... sizes) {
    Workspace workspace{};
    Carver counter(nullptr);
    workspace.lay_out(counter, sizes...);
    Carver carver(reserve(counter.used()));
    workspace.lay_out(carver, sizes...);
    return workspace;
  }

  // Sets each byte, so that tests detect reads of uninitialized memory.
  void fill(int byte) { memset(memory_.get(), byte, size_ + kAlignment); }

  // Frees the memory of an unusually large problem.
  void trim() {
    if (size_ <= kKept) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr uintptr_t kAlignment = 64;
  static constexpr int64_t kKept = 8 << 20;  // enough to match 1000 queries with 600 targets

  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      char* memory = new (std::nothrow) char[bytes + kAlignment];
      if (memory == nullptr) throw OutOfMemory(bytes);
      memory_.reset(memory);
      size_ = bytes;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (kAlignment - address % kAlignment) % kAlignment;
  }

  std::unique_ptr<char[]> memory_;
  int64_t size_ = 0;
};

// The calling thread's scratch memory.
inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace fastmask
