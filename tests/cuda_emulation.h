// Runs the code of one CUDA block on the CPU: a fiber for each thread, switched where threads wait for each other, in
// an order that a seed scrambles. Stops the program where a real block would hang: if some threads of a warp or block
// wait in one collective operation and others in another, or are gone.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__

namespace emulation {

struct Index {
  uint32_t x;
};

enum class Wait { kNone, kWarp, kBlock, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Wait wait = Wait::kNone;
  int operation = 0;
  uint64_t value = 0, result = 0;
  uint64_t lanes[32];
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline uint32_t current, random_state;
inline std::function<void()> body;

inline void fail(const char* what) {
  fprintf(stderr, "CUDA emulation: %s\n", what);
  abort();
}

inline void wait_for(Wait wait, int operation, uint64_t value) {
  Fiber& fiber = fibers[current];
  fiber.wait = wait;
  fiber.operation = operation;
  fiber.value = value;
  swapcontext(&fiber.context, &scheduler);
}

inline void enter() {
  body();
  fibers[current].wait = Wait::kDone;
  swapcontext(&fibers[current].context, &scheduler);
}

// Lets threads first..last go on if all of them wait for the same.
inline bool release(uint32_t first, uint32_t last, Wait wait) {
  uint64_t sum = 0;
  for (uint32_t i = first; i < last; ++i) {
    if (fibers[i].wait != wait) return false;
    if (fibers[i].operation != fibers[first].operation) fail("threads wait in different operations");
    sum += fibers[i].value;
  }
  for (uint32_t i = first; i < last; ++i) {
    for (uint32_t lane = 0; wait == Wait::kWarp && lane < 32; ++lane)
      fibers[i].lanes[lane] = fibers[first + lane].value;
    fibers[i].result = sum;
    fibers[i].wait = Wait::kNone;
  }
  return true;
}

inline void run_block(uint32_t threads, uint32_t seed, std::function<void()> kernel) {
  random_state = seed * 2654435761u + 1;
  body = std::move(kernel);
  fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(1 << 16);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    random_state = random_state * 1664525u + 1013904223u;
    const uint32_t offset = (random_state >> 8) % threads;
    bool ran = false;
    for (uint32_t n = 0; n < threads; ++n) {
      current = (n + offset) % threads;
      if (fibers[current].wait != Wait::kNone) continue;
      ran = true;
      swapcontext(&scheduler, &fibers[current].context);
    }
    for (uint32_t warp = 0; warp < threads; warp += 32) ran |= release(warp, warp + 32, Wait::kWarp);
    ran |= release(0, threads, Wait::kBlock);
    if (ran) continue;
    for (const Fiber& fiber : fibers) {
      if (fiber.wait != Wait::kDone) fail("some threads wait for others that are elsewhere");
    }
    return;
  }
}

// Every lane's value, after all lanes of the warp came here.
inline const uint64_t* exchange(int operation, uint64_t value) {
  wait_for(Wait::kWarp, operation, value);
  return fibers[current].lanes;
}

template <class T>
uint64_t pack(T value) {
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T unpack(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace emulation

#define threadIdx (emulation::Index{emulation::current})
#define blockDim (emulation::Index{static_cast<uint32_t>(emulation::fibers.size())})

inline void __syncthreads() { emulation::wait_for(emulation::Wait::kBlock, 1, 0); }
inline int __syncthreads_count(bool x) {
  emulation::wait_for(emulation::Wait::kBlock, 2, x);
  return static_cast<int>(emulation::fibers[emulation::current].result);
}
inline int __syncthreads_or(bool x) {
  emulation::wait_for(emulation::Wait::kBlock, 3, x);
  return emulation::fibers[emulation::current].result != 0;
}
inline void __syncwarp() { emulation::exchange(4, 0); }
inline bool __any_sync(unsigned, bool x) {
  emulation::exchange(5, x);
  return emulation::fibers[emulation::current].result != 0;
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int step) {
  const uint64_t* lanes = emulation::exchange(6, emulation::pack(x));
  return emulation::unpack<T>(lanes[(emulation::current % 32) ^ step]);
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulation::unpack<T>(emulation::exchange(7, emulation::pack(x))[lane]);
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
  const uint64_t* lanes = emulation::exchange(8, x);
  uint64_t least = lanes[0];
  for (int lane = 1; lane < 32; ++lane) least = lanes[lane] < least ? lanes[lane] : least;
  return static_cast<unsigned>(least);
}
template <class T>
T atomicMax(T* at, T value) {
  const T old = *at;
  *at = value > old ? value : old;
  return old;
}
template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  *at = value < old ? value : old;
  return old;
}
inline int64_t __double_as_longlong(double x) { return emulation::unpack<int64_t>(emulation::pack(x)); }
inline double __longlong_as_double(int64_t x) { return emulation::unpack<double>(emulation::pack(x)); }
