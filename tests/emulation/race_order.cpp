#include "race_order.h"

namespace emulation::race {

void Ordering::begin(unsigned blocks, unsigned threads_per_block, unsigned cluster) {
  time_ = 1;
  threads_ = threads_per_block;
  cluster_ = cluster;
  block_times_.assign(blocks, 0);
  cluster_times_.assign(blocks / cluster, 0);
  lane_times_.clear();
  fences_.clear();
  released_.clear();
  taken_.clear();
  known_.clear();
}

void Ordering::cluster_synchronised(const Cluster& cluster) {
  cluster_times_[cluster.blocks.front()->linear / cluster_] = ++time_;
}

void Ordering::warp_synchronised(const Warp& warp, const Block& block, uint32_t mask) {
  std::vector<uint32_t>& seen = lane_times_[key(block.linear, warp.first_thread)];
  seen.resize(kLanes * kLanes);
  ++time_;
  for (unsigned a = 0; a < kLanes; ++a)
    for (unsigned b = 0; b < kLanes; ++b)
      if ((mask >> a & mask >> b & 1) != 0) seen[a * kLanes + b] = time_;
}

void Ordering::fence(const Thread& thread) {
  Fences& fences = fences_[key(thread.block->linear, thread.linear)];
  fences.times.push_back(++time_);
  fences.block_time = block_times_[thread.block->linear];
  fences.cluster_time = cluster_times_[thread.block->linear / cluster_];
}

void Ordering::release(const Thread& thread, const unsigned* at) {
  const uint32_t block = thread.block->linear;
  std::vector<Released>& list = released_[at];
  Released own{block, thread.linear, 0, 0, 0, block_times_[block]};
  const auto found = fences_.find(key(block, thread.linear));
  if (found != fences_.end()) {
    own.thread_time = found->second.times.back();
    own.block_time = found->second.block_time;
    own.cluster_time = found->second.cluster_time;
  }
  list.push_back(own);
  if (found == fences_.end()) return;
  for (const auto& [cluster, known] : known_[block])  // and what it knows of others
    for (const Known& each : known)
      if (usable(each, thread)) list.push_back(each.what);
}

void Ordering::acquire(const Thread& thread, const unsigned* at) {
  const auto found = released_.find(at);
  if (found == released_.end()) return;
  size_t& taken = taken_[{at, key(thread.block->linear, thread.linear)}];
  for (; taken < found->second.size(); ++taken) learn(thread, found->second[taken]);
}

void Ordering::learn(const Thread& thread, const Released& released) {
  const uint32_t block = thread.block->linear;
  if (released.block == block && released.thread == thread.linear) return;
  std::vector<Known>& list = known_[block][released.block / cluster_];
  // Of what this thread has learned before from the same one: it may be as good, because it came another way; and what
  // the whole block can use already is only superseded once the block can use something newer.
  Known* for_all = nullptr;
  for (size_t i = list.size(); i-- > 0;) {
    Known& old = list[i];
    if (old.what.block != released.block || old.what.thread != released.thread || old.acquirer != thread.linear)
      continue;
    if (released.thread_time <= old.what.thread_time && released.block_time <= old.what.block_time &&
        released.cluster_time <= old.what.cluster_time && released.barrier_time <= old.what.barrier_time)
      return;
    if (old.since >= block_times_[block]) continue;
    if (for_all == nullptr) {
      for_all = &old;
    } else {
      list.erase(list.begin() + ptrdiff_t(i));
      break;  // there was one such at most
    }
  }
  list.push_back({released, thread.linear, time_});
}

bool Ordering::usable(const Known& known, const Thread& thread) const {
  return known.acquirer == thread.linear || known.since < block_times_[thread.block->linear] ||
         known.since < cluster_times_[thread.block->linear / cluster_];
}

bool Ordering::covers(const Released& released, const Moment& before) const {
  if (before.time < released.cluster_time) return true;
  if (before.block != released.block) return false;
  if (before.time < released.block_time) return true;
  if (before.thread == released.thread && before.time < released.thread_time) return true;
  const auto found = fences_.find(key(before.block, before.thread));
  if (found == fences_.end()) return false;
  for (const uint32_t fence : found->second.times)
    if (before.time < fence && fence < released.barrier_time) return true;
  return false;
}

bool Ordering::ordered(const Moment& before, const Thread& thread) const {
  const uint32_t block = thread.block->linear;
  if (before.block == block) {
    if (before.thread == thread.linear || before.time < block_times_[block]) return true;
    if (before.thread / kLanes == thread.linear / kLanes) {
      const auto found = lane_times_.find(key(block, thread.warp->first_thread));
      if (found != lane_times_.end() && before.time < found->second[thread.lane * kLanes + before.thread % kLanes])
        return true;
    }
  }
  if (before.block / cluster_ == block / cluster_ && before.time < cluster_times_[block / cluster_]) return true;
  const auto by_block = known_.find(block);
  if (by_block == known_.end()) return false;
  const auto found = by_block->second.find(before.block / cluster_);
  if (found == by_block->second.end()) return false;
  for (const Known& known : found->second)
    if (usable(known, thread) && covers(known.what, before)) return true;
  return false;
}

}  // namespace emulation::race
