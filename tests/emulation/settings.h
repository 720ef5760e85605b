// What a test chooses before a launch, and what it can ask afterwards.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "vector_types.h"

namespace emulation {

// In which order the threads of a warp, the warps of a block and the blocks of a grid run. A warp runs on until all of
// its threads wait, so that in kForward and kReverse the warps drift as far apart as the barriers let them. kRandom
// also changes over at atomics, fences and loads past the L1 cache.
enum class Order { kForward, kReverse, kRandom };

struct Settings {
  Order order = Order::kForward;
  uint64_t seed = 1;            // of kRandom
  bool late_copies = false;     // cp.async lands when it is waited for; else at once
  unsigned most_residents = 4;  // blocks of an ordinary launch that are alive together
};
Settings& settings();

// Bytes that a launch moves from and to global memory, counted in the race flavour.
struct Traffic {
  int64_t unique_read = 0, unique_written = 0;  // each byte once
  int64_t read = 0, written = 0;                // by every access
  int64_t read_by_16 = 0, written_by_16 = 0;    // the part of it that went by accesses of 16 bytes
};

struct LaunchRecord {
  dim3 grid, block;
  int64_t shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;
  Traffic traffic;
};
// Every launch that was run, until a test clears the list.
std::vector<LaunchRecord>& launch_log();

}  // namespace emulation
