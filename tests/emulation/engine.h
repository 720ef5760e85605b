// What the parts of the emulator share: the threads, warps, blocks and clusters of the launch that runs.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator.cuh"
#include "fiber.h"
#include "settings.h"

namespace emulation {

struct Block;
struct Warp;
constexpr unsigned kLanes = 32;

// A copy of cp.async that has not landed.
struct PendingCopy {
  char* to;
  const char* from;
  int valid;
  unsigned group;
  Where where;
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  unsigned linear = 0, lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  bool started = false;
  bool waited = false;             // for the launch ahead
  const char* waits_in = nullptr;  // the barrier or collective, for the report of a deadlock
  Where waits_at{};
  unsigned committed_groups = 0;
  std::vector<PendingCopy> copies;
};

// One collective of a warp in flight. Two buffers in turn: a lane can still read the results of one collective while
// others already arrive at the next.
struct Collective {
  static constexpr size_t kSlotBytes = 64;
  uint32_t mask = 0, arrived = 0;
  unsigned turn = 0;
  const char* name = "";
  Where where{};
  void (*compute)(char* slots) = nullptr;  // run by the last lane to arrive
  alignas(64) char slots[2][kLanes][kSlotBytes];
};

struct Warp {
  uint32_t alive = 0;    // lanes that have not left the kernel
  uint32_t ready = 0;    // lanes that can run
  uint32_t yielded = 0;  // lanes that can run after everybody else had a turn
  uint32_t at_barrier = 0, at_cluster_barrier = 0;
  unsigned first_thread = 0, lanes = 0;
  Collective whole;
  std::vector<std::unique_ptr<Collective>> partial;  // for masks that are not all ones
};

struct Barrier {
  unsigned arrived = 0;
  Where where{};
};

// Blocks that share their shared memory; a block of an ordinary launch is a cluster of its own.
struct Cluster {
  std::vector<Block*> blocks;
  unsigned unfinished = 0;  // blocks
  Barrier barrier;
};

struct Block {
  unsigned linear = 0, rank = 0, alive = 0;
  uint3 index{};
  std::shared_ptr<Cluster> cluster;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
};

// A callable without its type.
struct Kernel {
  void (*run)(const void*);
  const void* callable;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}
  uint32_t next() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 32);
  }
  uint32_t below(uint32_t limit) { return static_cast<uint32_t>(uint64_t(next()) * limit >> 32); }

 private:
  uint64_t state_;
};

struct Launch {
  LaunchShape shape;
  Kernel kernel;
  Order order;
  bool late_copies;
  Random random;
  unsigned blocks, threads_per_block;
  std::vector<Block*> live{};
  std::string fault{};
  Fiber scheduler{};           // of the thread that launched
  char* left_stack = nullptr;  // of the fiber that was just left for good
  uint64_t idle_turns = 0;     // of threads that only looked whether they may go on, since something happened
};

extern Thread* current;  // the thread that runs; null outside of a kernel
extern Launch* running;
StackPool& stacks();

// scheduler.cpp
void pause();                // the current thread has left warp.ready, and comes back when it is set again
void yield_turn(bool idle);  // everybody else first; `idle`: the thread only looks whether it may go on
void maybe_yield();          // in the random order, now and then
void progress();             // something happened that a waiting thread may have waited for
void wait_in(const char* what, Where where);
[[noreturn]] void fault(const std::string& what, Where where = {nullptr, 0});
std::string at_place(Where where);         // " at file:line", or nothing
std::string thread_name(const Thread& t);  // "block (0,0,0) thread (3,0,0)"

// barriers.cpp: an exited thread holds nobody up
void left_kernel(Thread& thread);

// shared_memory.cpp
char* take_shared_memory(size_t bytes);
// The memory is filled with NaN again, for blocks of the cluster that still read it.
void poison_shared_memory(char* begin, size_t bytes);
// Returns whether nobody wrote next to it.
bool guards_intact(const char* begin, size_t bytes, std::string* what);
void give_back_shared_memory(char* begin, size_t bytes);
// Whether an address is in the shared memory of any block, guards included.
bool in_shared_memory(uintptr_t address);

}  // namespace emulation
