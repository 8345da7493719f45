// Draws the uncertain points of a pair with bounds of their keys that leave out too many candidates, the usual number,
// and none; all must be the same. Prints how many bounds gave other points.
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/uncertain_points.cpp"

int main() {
  using namespace fastmask;
  using namespace fastmask::FASTMASK_SIMD;
  const int64_t h = 24, w = 31;
  const PointCounts counts{3000, 9001, 2250};
  std::mt19937 random_bits(0);
  std::vector<float> logits(h * w);
  for (float& x : logits) x = static_cast<float>(static_cast<int32_t>(random_bits())) * 0x1p-30f;
  const Plane plane{{logits.data(), Dtype::kFloat32, 0}, h, w, w};
  UncertainPointsWorkspace work{};
  Carver counter(nullptr);
  work.lay_out(counter, h, w, counts);
  std::vector<char> memory(counter.used() + 64);
  Carver carver(memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64);
  work.lay_out(carver, h, w, counts);

  const int64_t surpluses[] = {kProbe, kSurplus, 0, -100, -kProbe};
  std::vector<std::vector<Point>> points;
  int others = 0, narrow = 0;
  for (const int64_t surplus : surpluses) {
    int32_t bound;
    load_bordered(plane, work.map);
    const Candidates kept = draw_candidates(plane, 7, 3, counts, work, surplus, bound);
    narrow += count_below(kept.keys, kept.count, bound) < counts.uncertain;
    points.emplace_back(counts.uncertain);
    write_uncertain(plane, 7, 3, counts, work, surplus, points.back().data());
    others += memcmp(points.back().data(), points[0].data(), sizeof(Point) * counts.uncertain) != 0;
  }
  printf("%d other points, %d bounds too low\n", others, narrow);
}
