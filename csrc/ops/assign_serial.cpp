#include "ops/assign_serial.h"

#include <vector>

#include "matcher/problem.h"
#include "matcher/serial_group.h"

namespace fastmask {

int32_t assign_problem_serial(const AssignProblem& problem, const AssignResult& result, uint32_t seed) {
  using namespace matcher;
  // As the kernel: an odd stride, so that neither rows nor columns meet in the banks of shared memory.
  ProblemMemory memory = size_of<SerialGroup>(problem, 1);
  Carver<SerialGroup> size(nullptr);
  carve_all(size, memory);
  std::vector<char> bytes(size.used() + 64, static_cast<char>(0xff));
  Carver<SerialGroup> carver(bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64);
  carve_all(carver, memory);
  SerialGroup group(seed);
  return assign_and_write(group, problem, memory, result);
}

}  // namespace fastmask
