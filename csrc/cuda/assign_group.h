// The matcher's group on a GPU: one block. All warps scan rows for the bidders of an auction round; one warp grows the
// shortest augmenting paths.
#pragma once

#include "cuda/assign.h"
#include "matcher/lanes.h"

namespace fastmask {
namespace matcher {

constexpr unsigned kAll = 0xffffffff;

__device__ inline Best shuffled(const Best& x, int step) {
  return {__shfl_xor_sync(kAll, x.first, step), __shfl_xor_sync(kAll, x.index, step),
          __shfl_xor_sync(kAll, x.second, step)};
}

__device__ inline Candidate shuffled(const Candidate& x, int step) {
  return {{__shfl_xor_sync(kAll, x.length.broken, step), __shfl_xor_sync(kAll, x.length.finite, step)},
          __shfl_xor_sync(kAll, x.rank, step)};
}

class CudaGroup {
 public:
  __device__ CudaGroup() : thread_(static_cast<int32_t>(threadIdx.x)), threads_(static_cast<int32_t>(blockDim.x)) {}

  __device__ void sync() const { __syncthreads(); }
  __device__ void fence() const { __syncwarp(); }
  __device__ int32_t lane() const { return thread_ % kWarp; }
  __device__ int32_t lanes() const { return kWarp; }

  template <class F>
  __device__ void elements(int64_t count, F f) const {
    for (int64_t k = thread_; k < count; k += threads_) f(static_cast<int32_t>(k));
  }
  template <class F>
  __device__ void one(F f) const {
    if (lane() == 0) f();
  }
  template <class F>
  __device__ void solo(F f) const {
    if (thread_ < kWarp) f();
  }
  template <class F>
  __device__ int32_t count(int32_t n, F f) const {
    int32_t total = 0;
    for (int32_t base = 0; base < n; base += threads_) {
      const int32_t i = base + thread_;
      total += __syncthreads_count(i < n && f(i));
    }
    return total;
  }
  // Every warp adds the same numbers in the same order.
  template <class F>
  __device__ double sum(int32_t n, F f) const {
    double own = 0;
    for (int32_t i = lane(); i < n; i += kWarp) own += f(i);
    double total = 0;
    for (int step = 0; step < kWarp; ++step) total += __shfl_sync(kAll, own, step);
    return total;
  }
  template <class F>
  __device__ Candidate least(int32_t n, F f) const {
    Candidate best = kNoCandidate;
    for (int32_t k = lane(); k < n; k += kWarp) best = combine<CudaGroup>(best, f(k));
    __syncwarp();  // what the lanes wrote is seen by all from here on, which shuffles alone do not promise
    for (int step = kWarp / 2; step > 0; step /= 2) best = combine<CudaGroup>(best, shuffled(best, step));
    return best;
  }

  __device__ void enlist(const State&) const {}
  __device__ void outbid(const State&, int32_t) const {}
  __device__ void maximum(int64_t* at, int64_t value) const {
    atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
  }
  template <class F>
  __device__ void bidders(const State& s, F f) const {
    for (int32_t i = thread_ / kWarp; i < s.persons; i += threads_ / kWarp) {
      const bool bids = s.phase[i] == kBidding;
      __syncwarp();  // all lanes have read the phase, which one of them may change
      if (bids) f(i);
    }
  }
  template <class F>
  __device__ void bidders_alone(const State& s, F f) const {
    elements(s.persons, [&](int32_t i) {
      if (s.phase[i] == kBidding) f(i);
    });
  }
  __device__ bool next_round(const State& s) const {
    bool any = false;
    for (int32_t i = thread_; i < s.persons; i += threads_) any = rejoins<CudaGroup>(s, i) || any;
    return __syncthreads_or(any) != 0;
  }

  __device__ Best scan(const int32_t* row, const int32_t* price, int32_t stride) const {
    Best best = lane_scan<CudaGroup>(row, price, stride, lane());
    for (int step = kWarp / 2; step > 0; step /= 2) best = combine<CudaGroup>(best, shuffled(best, step));
    return best;
  }
  __device__ int32_t first_equal(const int32_t* row, const int32_t* price, int32_t stride, int32_t sum,
                                 int32_t from) const {
    const uint32_t own = lane_first_equal<CudaGroup>(row, price, stride, sum, from, lane());
    const int32_t at = from + static_cast<int32_t>(__reduce_min_sync(kAll, own));
    return at < stride ? at : at - stride;
  }
  __device__ Nearest start(const int32_t* row, const int32_t* price, int32_t person, int32_t* distance,
                           int32_t* predecessor, int32_t stride) const {
    return nearest_lane(lane_start<CudaGroup>(row, price, person, distance, predecessor, stride, lane()));
  }
  __device__ Nearest start_dummy(const int32_t* row, const int32_t* price, int32_t* distance, int32_t* predecessor,
                                 int32_t stride, bool& nobodys) const {
    bool own = false;
    const Nearest nearest = lane_start_dummy<CudaGroup>(row, price, distance, predecessor, stride, lane(), own);
    nobodys = __any_sync(kAll, own) != 0;
    return nearest_lane(nearest);
  }
  __device__ Nearest relax(const int32_t* row, const int32_t* price, int32_t shift, int32_t person, int32_t* distance,
                           int32_t* predecessor, int32_t stride) const {
    return nearest_lane(lane_relax<CudaGroup>(row, price, shift, person, distance, predecessor, stride, lane()));
  }
  __device__ void mark_scanned(int32_t* distance, int32_t k) const { distance[k] = kScanned; }
  __device__ void lower(int32_t* price, const int32_t* distance, int32_t amount, int32_t stride) const {
    for (int32_t k = lane(); k < stride; k += kWarp) price[k] -= distance[k] == kScanned ? 0 : amount;
  }
  __device__ void halve_and_sum(int32_t* costs, int32_t rows, int32_t stride, int32_t shift, int32_t* sum) const {
    elements(stride, [&](int32_t k) { sum[k] = lane_halve_and_sum<CudaGroup>(costs + k, rows, stride, shift); });
  }
  __device__ void best_offers(const int32_t* costs, const int32_t* sum, int32_t rows, int32_t stride,
                              int32_t* offer) const {
    elements(stride, [&](int32_t k) { offer[k] = lane_best_offer<CudaGroup>(costs + k, sum, rows, stride); });
  }
  __device__ int32_t count_up_to(const int32_t* values, int32_t n, int32_t limit) const {
    return count(n, [&](int32_t k) { return values[k] <= limit; });
  }

  // Minima and maxima of several warps are combined as integers that are ordered like the costs.
  __device__ double ranges(const Costs& c, double* least, double* greatest) const {
    int64_t* low = reinterpret_cast<int64_t*>(least);
    int64_t* high = reinterpret_cast<int64_t*>(greatest);
    elements(c.persons, [&](int32_t i) {
      low[i] = INT64_MAX;
      high[i] = INT64_MIN;
    });
    __syncthreads();
    each_pair(c, [&](int32_t i, auto&& costs) {
      int64_t own_low = INT64_MAX, own_high = INT64_MIN;
      costs([&](int32_t, double cost) {
        if (!is_finite<CudaGroup>(cost)) return;
        const int64_t key = ordered(cost);
        own_low = key < own_low ? key : own_low;
        own_high = key > own_high ? key : own_high;
      });
      if (own_low == INT64_MAX) return;
      atomicMin(reinterpret_cast<long long*>(low + i), static_cast<long long>(own_low));
      atomicMax(reinterpret_cast<long long*>(high + i), static_cast<long long>(own_high));
    });
    __syncthreads();
    elements(c.persons, [&](int32_t i) {
      const bool any = low[i] != INT64_MAX;
      least[i] = any ? unordered(low[i]) + 0.0 : 0.0;
      greatest[i] = any ? unordered(high[i]) : 0.0;
    });
    __syncthreads();
    double range = 0;
    for (int32_t i = lane(); i < c.persons; i += kWarp) {
      range = greatest[i] - least[i] > range ? greatest[i] - least[i] : range;
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const double other = __shfl_xor_sync(kAll, range, step);
      range = other > range ? other : range;
    }
    return range;
  }

  __device__ void quantize(const Costs& c, const double* offsets, double scale, int32_t* costs, int32_t stride) const {
    each_pair(c, [&](int32_t i, auto&& pairs) {
      int32_t* row = costs + static_cast<int64_t>(i) * stride;
      pairs([&](int32_t k, double cost) { row[k] = fixed_point<CudaGroup>(cost, offsets[i], scale); });
    });
    pad(c, costs, stride);
  }

  __device__ void quantize_reduced(const Costs& c, const double* offsets, const double* price, double limit,
                                   double scale, int32_t* costs, int32_t stride) const {
    each_pair(c, [&](int32_t i, auto&& pairs) {
      int32_t* row = costs + static_cast<int64_t>(i) * stride;
      pairs([&](int32_t k, double cost) {
        row[k] = fixed_point_left<CudaGroup>(cost, price[k], offsets[i], scale, limit * scale);
      });
    });
    pad(c, costs, stride);
  }

  __device__ void least_sums(const Costs& c, const double* price, double* sum) const {
    for (int32_t i = thread_ / kWarp; i < c.persons; i += threads_ / kWarp) {
      double least = __builtin_huge_val();
      for (int32_t k = lane(); k < c.objects; k += kWarp) {
        const double cost = cost_at<CudaGroup>(c, i, k) + price[k];
        if (is_finite<CudaGroup>(cost) && cost < least) least = cost;
      }
      for (int step = kWarp / 2; step > 0; step /= 2) {
        const double other = __shfl_xor_sync(kAll, least, step);
        least = other < least ? other : least;
      }
      if (lane() == 0) sum[i] = least + 0.0;
    }
  }

  __device__ double exact_scale(const Costs& c) const {
    bool large = false;
    for (int32_t i = thread_ / kWarp; i < c.persons; i += threads_ / kWarp) {
      for (int32_t k = lane(); k < c.objects; k += kWarp) {
        const double cost = magnitude_of<CudaGroup>(cost_at<CudaGroup>(c, i, k));
        large = large || (is_finite<CudaGroup>(cost) && cost > 0x1p1000);
      }
    }
    return __syncthreads_or(large) != 0 ? 0x1p-24 : 1.0;
  }

 private:
  // Calls f(i, costs) once for each person and share of the objects; costs(g) calls g(k, cost) for the share's objects.
  // Lanes run along the side that is contiguous in memory.
  template <class F>
  __device__ void each_pair(const Costs& c, F f) const {
    const int32_t warp = thread_ / kWarp, warps = threads_ / kWarp;
    if (c.object_stride == 1) {
      for (int32_t i = warp; i < c.persons; i += warps) {
        f(i, [&](auto&& g) {
          for (int32_t k = lane(); k < c.objects; k += kWarp) g(k, cost_at<CudaGroup>(c, i, k));
        });
      }
      return;
    }
    const int32_t tiles = (c.persons + kWarp - 1) / kWarp;
    const int32_t shares = warps > tiles ? warps / tiles : 1;
    for (int32_t task = warp; task < tiles * shares; task += warps) {
      const int32_t i = task / shares * kWarp + lane(), share = task % shares;
      if (i >= c.persons) continue;
      f(i, [&](auto&& g) {
        for (int32_t k = share; k < c.objects; k += shares) g(k, cost_at<CudaGroup>(c, i, k));
      });
    }
  }

  __device__ void pad(const Costs& c, int32_t* costs, int32_t stride) const {
    for (int32_t i = thread_; i < c.persons; i += threads_) {
      for (int32_t k = c.objects; k < stride; ++k) costs[static_cast<int64_t>(i) * stride + k] = kPadding;
    }
  }

  __device__ static int64_t ordered(double cost) {
    const int64_t word = __double_as_longlong(cost);
    return word < 0 ? word ^ INT64_MAX : word;
  }
  __device__ static double unordered(int64_t key) { return __longlong_as_double(key < 0 ? key ^ INT64_MAX : key); }

  // One instruction finds the least distance, another the lowest index among the lanes that hold it.
  __device__ static Nearest nearest_lane(const Nearest& own) {
    __syncwarp();  // what the lanes wrote is seen by all from here on
    const unsigned least = __reduce_min_sync(kAll, static_cast<unsigned>(own.distance));
    const unsigned index = static_cast<unsigned>(own.distance) == least ? static_cast<unsigned>(own.index) : kAll;
    return {static_cast<int32_t>(least), static_cast<int32_t>(__reduce_min_sync(kAll, index))};
  }

  int32_t thread_, threads_;
};

__device__ inline int64_t offset_of(int64_t index, const AssignLaunch& launch, const int64_t* strides) {
  int64_t at = 0;
  for (int d = launch.dims - 1; d >= 0; --d) {
    at += index % launch.leading[d] * strides[d];
    index /= launch.leading[d];
  }
  return at;
}

// How much memory a block takes, and whether the costs of the largest problem fit into its shared memory.
inline AssignPlan plan_for(const AssignProblem& largest, int64_t shared_limit) {
  ProblemMemory memory{};
  memory.resize(largest.queries, largest.targets, 1);
  Carver state(nullptr), costs(nullptr), exact(nullptr);
  memory.state.lay_out(state);
  memory.duals.lay_out(state, memory.state);
  memory.lay_out_costs(costs);
  memory.duals.exact.lay_out(exact, memory.state);
  const bool in_shared = state.used() + costs.used() <= shared_limit;
  return {state.used() + (in_shared ? costs.used() : 0), exact.used() + (in_shared ? 0 : costs.used()), in_shared,
          state.used() <= shared_limit};
}

// Problem i of the batch, by one block with this shared memory.
__device__ inline void solve_block(const AssignLaunch& launch, int64_t i, char* shared) {
  CudaGroup group;
  AssignProblem problem = launch.largest;
  const int32_t targets = problem.targets;
  if (launch.counts != nullptr) {
    const int64_t count = launch.counts[offset_of(i, launch, launch.count_strides)];
    problem.targets = static_cast<int32_t>(count < 0 ? 0 : count > targets ? targets : count);
  }
  problem.cost =
      static_cast<const char*>(problem.cost) + offset_of(i, launch, launch.cost_strides) * element_size(problem.dtype);

  ProblemMemory memory{};
  memory.resize(problem.queries, problem.targets, 1);
  Carver fast(shared), slow(launch.scratch + i * launch.scratch_bytes);
  memory.state.lay_out(fast);
  memory.duals.lay_out(fast, memory.state);
  memory.duals.exact.lay_out(slow, memory.state);
  memory.lay_out_costs(launch.costs_in_shared ? fast : slow);

  AssignResult result = launch.result;
  result.query_of_target += i * targets;
  if (result.query_duals != nullptr) result.query_duals += i * problem.queries;
  if (result.target_duals != nullptr) result.target_duals += i * targets;
  const int32_t broken = assign_and_write(group, problem, memory, result);
  for (int32_t m = problem.targets + static_cast<int32_t>(threadIdx.x); m < targets; m += blockDim.x) {
    result.query_of_target[m] = kNobody;
    if (result.target_duals != nullptr) result.target_duals[m] = 0;
  }
  if (threadIdx.x == 0) launch.broken[i] = broken;
}

}  // namespace matcher
}  // namespace fastmask
