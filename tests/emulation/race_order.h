// Decides which accesses of a launch are ordered: barriers, fences and atomics as the memory model of CUDA takes them.
#pragma once
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include "engine.h"

namespace emulation::race {

// Which thread of the launch, and when. Time counts what orders: every barrier and every fence takes the next number,
// an access the number that is current.
struct Moment {
  uint32_t block = 0, time = 0;
  uint16_t thread = 0;
};

class Ordering {
 public:
  void begin(unsigned blocks, unsigned threads_per_block, unsigned cluster);
  uint32_t now() const { return time_; }
  void block_synchronised(const Block& block) { block_times_[block.linear] = ++time_; }
  void cluster_synchronised(const Cluster& cluster);
  void warp_synchronised(const Warp& warp, const Block& block, uint32_t mask);
  void fence(const Thread& thread);
  void release(const Thread& thread, const unsigned* at);
  void acquire(const Thread& thread, const unsigned* at);

  // Whether what happened at `before` happens before what `thread` does now.
  bool ordered(const Moment& before, const Thread& thread) const;

 private:
  // What a release makes visible: accesses of its own thread before `thread_time`; of its block before `block_time`
  // and of its cluster before `cluster_time`, the barriers that its fence came after; and of the other threads of its
  // block what is before a fence of their own that is before `barrier_time`, the barrier before the release.
  struct Released {
    uint32_t block, thread, thread_time, block_time, cluster_time, barrier_time;
  };
  // A release as a block knows it: by the thread that acquired it, and by the others from the next barrier on.
  struct Known {
    Released what;
    uint32_t acquirer, since;
  };
  struct Fences {
    std::vector<uint32_t> times;
    uint32_t block_time = 0, cluster_time = 0;  // the barriers before the last one
  };

  uint64_t key(uint32_t block, uint32_t thread) const { return uint64_t(block) * threads_ + thread; }
  bool usable(const Known& known, const Thread& thread) const;
  bool covers(const Released& released, const Moment& before) const;
  void learn(const Thread& thread, const Released& released);

  uint32_t time_ = 1, threads_ = 1, cluster_ = 1;
  std::vector<uint32_t> block_times_, cluster_times_;
  std::unordered_map<uint64_t, std::vector<uint32_t>> lane_times_;  // by block and warp: [a][b] what a has seen of b
  std::unordered_map<uint64_t, Fences> fences_;                     // by thread
  std::unordered_map<const unsigned*, std::vector<Released>> released_;
  std::map<std::pair<const unsigned*, uint64_t>, size_t> taken_;  // how many of them a thread has learned
  std::unordered_map<uint32_t, std::unordered_map<uint32_t, std::vector<Known>>> known_;  // by block: of which cluster
};

}  // namespace emulation::race
