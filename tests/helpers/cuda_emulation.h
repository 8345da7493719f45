// Runs the code of one CUDA block on the CPU: a fiber for each thread, switched where threads wait for each other, in
// an order that a seed scrambles. Stops the program where a real block would hang: if some threads of a warp or block
// wait in one collective operation and others in another, or are gone.
//
// With -fsanitize=thread each fiber is a thread of its own to ThreadSanitizer, which reports two accesses, one of them
// a write, that nothing orders. Only __syncthreads, its variants and __syncwarp order memory: a switch of fibers does
// not, and neither do shuffles, votes and reductions, for which CUDA promises nothing. As it follows the order and not
// the clock, a report depends neither on the number of cores nor on luck.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// The emulation's own memory is passed from fiber to fiber without a barrier.
#define EMULATION_FN inline __attribute__((no_sanitize("thread")))
#else
#define EMULATION_FN inline
#endif

#define __device__
#define __host__
#define __global__
#define __shared__

namespace emulation {

struct Index {
  uint32_t x;
};

enum class Wait { kNone, kWarp, kBlock, kDone };
// What threads do together.
enum class Operation { kBarrier, kBarrierCount, kBarrierOr, kWarpBarrier, kAny, kShuffleXor, kShuffle, kReduceMin };

// What ThreadSanitizer is told; nothing where it is not built in.
class Thread {
 public:
#if defined(__SANITIZE_THREAD__)
  EMULATION_FN void create() { handle_ = __tsan_create_fiber(0); }
  EMULATION_FN void adopt_current() { handle_ = __tsan_get_current_fiber(); }
  EMULATION_FN void destroy() { __tsan_destroy_fiber(handle_); }
  EMULATION_FN void enter() const { __tsan_switch_to_fiber(handle_, __tsan_switch_to_fiber_no_sync); }
  EMULATION_FN void release(void* barrier) const { enter(), __tsan_release(barrier); }
  EMULATION_FN void acquire(void* barrier) const { enter(), __tsan_acquire(barrier); }

 private:
  void* handle_ = nullptr;
#else
  void create() {}
  void adopt_current() {}
  void destroy() {}
  void enter() const {}
  void release(void*) const {}
  void acquire(void*) const {}
#endif
};

struct Fiber {
  ucontext_t context;
  Thread thread;
  std::vector<char> stack;
  Wait wait = Wait::kNone;
  Operation operation{};
  uint64_t value = 0, result = 0;
  uint64_t lanes[32];
};

inline ucontext_t scheduler;
inline Thread scheduler_thread;
inline std::vector<Fiber> fibers;
inline uint32_t current, random_state;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "CUDA emulation: %s\n", what);
  abort();
}

EMULATION_FN uint32_t current_thread() { return current; }

EMULATION_FN void wait_for(Wait wait, Operation operation, uint64_t value) {
  Fiber& fiber = fibers[current];
  fiber.wait = wait;
  fiber.operation = operation;
  fiber.value = value;
  scheduler_thread.enter();
  swapcontext(&fiber.context, &scheduler);
}

EMULATION_FN void enter() {
  body();
  wait_for(Wait::kDone, Operation::kBarrier, 0);
}

// What threads first..last did so far is seen by all of them from now on.
EMULATION_FN void order(uint32_t first, uint32_t last) {
  Fiber* const own = fibers.data();
  for (uint32_t i = first; i < last; ++i) own[i].thread.release(&own[first].value);
  for (uint32_t i = first; i < last; ++i) own[i].thread.acquire(&own[first].value);
  scheduler_thread.enter();
}

// Lets threads first..last go on if all of them wait for the same.
EMULATION_FN bool release(uint32_t first, uint32_t last, Wait wait) {
  uint64_t sum = 0;
  for (uint32_t i = first; i < last; ++i) {
    if (fibers[i].wait != wait) return false;
    if (fibers[i].operation != fibers[first].operation) fail("threads wait in different operations");
    sum += fibers[i].value;
  }
  if (wait == Wait::kBlock || fibers[first].operation == Operation::kWarpBarrier) order(first, last);
  for (uint32_t i = first; i < last; ++i) {
    for (uint32_t lane = 0; wait == Wait::kWarp && lane < 32; ++lane)
      fibers[i].lanes[lane] = fibers[first + lane].value;
    fibers[i].result = sum;
    fibers[i].wait = Wait::kNone;
  }
  return true;
}

EMULATION_FN void run_block(uint32_t threads, uint32_t seed, std::function<void()> kernel) {
  random_state = seed * 2654435761u + 1;
  body = std::move(kernel);
  fibers = std::vector<Fiber>(threads);
  scheduler_thread.adopt_current();
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(1 << 16);
    fiber.thread.create();
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
      fibers[current].thread.enter();
      swapcontext(&scheduler, &fibers[current].context);
    }
    for (uint32_t warp = 0; warp < threads; warp += 32) ran |= release(warp, warp + 32, Wait::kWarp);
    ran |= release(0, threads, Wait::kBlock);
    if (!ran) break;
  }
  for (const Fiber& fiber : fibers) {
    if (fiber.wait != Wait::kDone) fail("some threads wait for others that are elsewhere");
  }
  order(0, threads);
  scheduler_thread.acquire(&fibers[0].value);
  for (Fiber& fiber : fibers) fiber.thread.destroy();
}

// Every lane's value, after all lanes of the warp came here.
EMULATION_FN const uint64_t* exchange(Operation operation, uint64_t value) {
  wait_for(Wait::kWarp, operation, value);
  return fibers[current].lanes;
}

// The sum of the block's values, after all its threads came here.
EMULATION_FN uint64_t sum_of_block(Operation operation, uint64_t value) {
  wait_for(Wait::kBlock, operation, value);
  return fibers[current].result;
}

template <class T>
uint64_t pack(T value) {
  uint64_t word = 0;
  __builtin_memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T unpack(uint64_t word) {
  T value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

// Exchanges *at with chosen(*at, value). Atomic, but it orders no other memory.
template <class T, class F>
T exchange_atomically(T* at, T value, F chosen) {
  T old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(at, &old, chosen(old, value), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace emulation

#define threadIdx (emulation::Index{emulation::current_thread()})
#define blockDim (emulation::Index{static_cast<uint32_t>(emulation::fibers.size())})

inline void __syncthreads() { emulation::sum_of_block(emulation::Operation::kBarrier, 0); }
inline int __syncthreads_count(bool x) {
  return static_cast<int>(emulation::sum_of_block(emulation::Operation::kBarrierCount, x));
}
inline int __syncthreads_or(bool x) { return emulation::sum_of_block(emulation::Operation::kBarrierOr, x) != 0; }
inline void __syncwarp() { emulation::exchange(emulation::Operation::kWarpBarrier, 0); }
inline bool __any_sync(unsigned, bool x) {
  const uint64_t* lanes = emulation::exchange(emulation::Operation::kAny, x);
  return std::any_of(lanes, lanes + 32, [](uint64_t lane) { return lane != 0; });
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int step) {
  const uint64_t* lanes = emulation::exchange(emulation::Operation::kShuffleXor, emulation::pack(x));
  return emulation::unpack<T>(lanes[(emulation::current_thread() % 32) ^ step]);
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulation::unpack<T>(emulation::exchange(emulation::Operation::kShuffle, emulation::pack(x))[lane]);
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
  const uint64_t* lanes = emulation::exchange(emulation::Operation::kReduceMin, x);
  return static_cast<unsigned>(*std::min_element(lanes, lanes + 32));
}
template <class T>
T atomicMax(T* at, T value) {
  return emulation::exchange_atomically(at, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T atomicMin(T* at, T value) {
  return emulation::exchange_atomically(at, value, [](T a, T b) { return a < b ? a : b; });
}
inline int64_t __double_as_longlong(double x) { return emulation::unpack<int64_t>(emulation::pack(x)); }
inline double __longlong_as_double(int64_t x) { return emulation::unpack<double>(emulation::pack(x)); }
