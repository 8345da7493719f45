// Scratch memory of a thread, kept from call to call: a small problem costs less than fresh memory would.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <new>

namespace fastmask {

// Becomes a MemoryError of Python.
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
  // At least `bytes`, at a 64-byte boundary, with arbitrary contents; valid until the next call.
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

  // Returns what an unusually large problem took.
  void trim() {
    if (size_ <= kKept) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr uintptr_t kAlignment = 64;
  static constexpr int64_t kKept = 8 << 20;  // enough for 1000 x 600

  std::unique_ptr<char[]> memory_;
  int64_t size_ = 0;
};

// Floats, all 0, at a 64-byte boundary: a vector of them never crosses a cache line.
class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t count) : data_(reinterpret_cast<float*>(memory_.reserve(count * kBytes))) {
    std::fill_n(data_, count, 0.0f);
  }

  float* data() { return data_; }

 private:
  static constexpr int64_t kBytes = sizeof(float);

  Scratch memory_;
  float* data_;
};

}  // namespace fastmask
