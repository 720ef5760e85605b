// Where threads meet: the barriers of a block and of a cluster, the collectives of a warp, atomics and fences.
#include <cstring>
#include <string>

#include "emulated_ptx.cuh"
#include "engine.h"
#include "race.h"

namespace emulation {
namespace {

constexpr char kSyncWarp[] = "__syncwarp";

void release_block(Block& block) {
  block.barrier.arrived = 0;
  for (Warp& warp : block.warps) warp.ready |= std::exchange(warp.at_barrier, 0);
  race::block_synchronised(block);
  progress();
}

void release_cluster(Cluster& cluster) {
  cluster.barrier.arrived = 0;
  for (Block* block : cluster.blocks)
    for (Warp& warp : block->warps) warp.ready |= std::exchange(warp.at_cluster_barrier, 0);
  race::cluster_synchronised(cluster);
  progress();
}

unsigned alive_in(const Cluster& cluster) {
  unsigned alive = 0;
  for (const Block* block : cluster.blocks) alive += block->alive;
  return alive;
}

bool all_arrived(const Collective& collective, const Warp& warp) {
  return collective.arrived != 0 && (collective.arrived & warp.alive) == (collective.mask & warp.alive);
}

// `last`: the lane that completes it and goes on at once.
void complete(Collective& collective, Warp& warp, uint32_t last) {
  if (collective.name == kSyncWarp) race::warp_synchronised(warp, collective.mask);
  if (collective.compute != nullptr) collective.compute(&collective.slots[collective.turn][0][0]);
  warp.ready |= collective.arrived & warp.alive & ~last;
  collective.arrived = 0;
  collective.turn ^= 1;
  progress();
}

Collective& collective_for(Warp& warp, uint32_t mask) {
  if (mask == ~0u) return warp.whole;
  for (auto& each : warp.partial)
    if (each->mask == mask) return *each;
  warp.partial.push_back(std::make_unique<Collective>());
  warp.partial.back()->mask = mask;
  return *warp.partial.back();
}

}  // namespace

void left_kernel(Thread& thread) {
  Block& block = *thread.block;
  Warp& warp = *thread.warp;
  if (block.barrier.arrived != 0 && block.barrier.arrived == block.alive) release_block(block);
  Cluster& cluster = *block.cluster;
  if (cluster.barrier.arrived != 0 && cluster.barrier.arrived == alive_in(cluster)) release_cluster(cluster);
  if (warp.whole.arrived != 0 && warp.whole.compute != nullptr)
    fault(std::string("a lane leaves the kernel while others wait for it in ") + warp.whole.name +
          at_place(warp.whole.where));
  if (all_arrived(warp.whole, warp)) complete(warp.whole, warp, 0);
  for (auto& each : warp.partial)
    if (all_arrived(*each, warp)) complete(*each, warp, 0);
}

void block_barrier(Where where) {
  Block& block = *current->block;
  Barrier& barrier = block.barrier;
  if (barrier.arrived == 0) {
    barrier.where = where;
  } else if (barrier.where.line != where.line || std::strcmp(barrier.where.file, where.file) != 0) {
    fault("divergent barrier: threads of the block already wait in __syncthreads" + at_place(barrier.where) +
              ", and this one arrives",
          where);
  }
  if (++barrier.arrived == block.alive) {
    release_block(block);
  } else {
    current->warp->at_barrier |= 1u << current->lane;
    wait_in("__syncthreads", where);
  }
}

unsigned lane() { return current->lane; }

const char* warp_meet(uint32_t mask, const void* lane_value, size_t bytes, const char* name, Where where) {
  return warp_compute(mask, lane_value, bytes, nullptr, name, where);
}

const char* warp_compute(uint32_t mask, const void* lane_value, size_t bytes, void (*compute)(char* slots),
                         const char* name, Where where) {
  Warp& warp = *current->warp;
  const uint32_t self = 1u << current->lane;
  if ((mask & self) == 0) fault(std::string(name) + ": the lane is not in the mask that it gives", where);
  if (compute != nullptr && warp.alive != ~0u)
    fault(std::string(name) + " needs all 32 lanes, and some have left the kernel or never were", where);
  Collective& collective = collective_for(warp, mask);
  char* slots = &collective.slots[collective.turn][0][0];
  if (collective.arrived == 0) {
    collective.name = name;
    collective.where = where;
    collective.compute = compute;
    if ((mask & ~warp.alive) != 0) std::memset(slots, 0xff, kLanes * Collective::kSlotBytes);  // NaN
  } else if (std::strcmp(collective.name, name) != 0) {
    fault(std::string("divergent warp: lanes already wait in ") + collective.name + at_place(collective.where) +
              ", and this one arrives in " + name,
          where);
  }
  std::memcpy(slots + current->lane * Collective::kSlotBytes, lane_value, bytes);
  collective.arrived |= self;
  if (all_arrived(collective, warp)) {
    complete(collective, warp, self);
  } else {
    wait_in(name, where);
  }
  return slots;
}

void warp_barrier(uint32_t mask, Where where) {
  const char nothing = 0;
  warp_meet(mask, &nothing, 1, kSyncWarp, where);  // the one collective of a warp that orders memory
}

void shuffle(uint32_t mask, void* value, size_t bytes, unsigned from, bool inside, const char* name, Where where) {
  const char* slots = warp_meet(mask, value, bytes, name, where);
  if (!inside) return;
  if ((mask >> from & 1) == 0)
    fault(std::string(name) + " reads lane " + std::to_string(from) + ", which is not in the mask", where);
  std::memcpy(value, slots + from * Collective::kSlotBytes, bytes);
}

uint32_t ballot(uint32_t mask, bool predicate, const char* name, Where where) {
  const uint32_t alive = current->warp->alive;
  const char* slots = warp_meet(mask, &predicate, 1, name, where);
  uint32_t result = 0;
  for (unsigned i = 0; i < kLanes; ++i)
    if ((mask & alive) >> i & 1 && slots[i * Collective::kSlotBytes] == 1) result |= 1u << i;
  return result;
}

unsigned atomic_update(unsigned* to, Update update, unsigned value, unsigned compare, Where where) {
  maybe_yield();
  check_aligned(to, sizeof *to, "an atomic", where);
  race::note_atomic(to, where);
  const unsigned before = *to;
  unsigned after = before;
  switch (update) {
    case Update::kAdd:
      after = before + value;
      break;
    case Update::kIncrement:
      after = before >= value ? 0 : before + 1;
      break;
    case Update::kExchange:
      after = value;
      break;
    case Update::kCompareAndSwap:
      if (before == compare) after = value;
      break;
    case Update::kMaxUnsigned:
      after = std::max(before, value);
      break;
    case Update::kMaxSigned:
      after = unsigned(std::max(int(before), int(value)));
      break;
  }
  *to = after;
  if (after != before) progress();
  race::acquire(to);
  race::release(to);
  maybe_yield();
  return before;
}

void thread_fence() {
  race::fence();
  maybe_yield();
}

void nanosleep(Where where) {
  current->waits_in = "__nanosleep";
  current->waits_at = where;
  yield_turn(true);
  current->waits_in = nullptr;
}

void load_past_l1() { maybe_yield(); }

void check_aligned(const void* pointer, size_t bytes, const char* name, Where where) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % bytes != 0)
    fault(std::string("misaligned address: ") + name + " of " + std::to_string(bytes) +
              " bytes at an address that is " + std::to_string(address % bytes) + " modulo " + std::to_string(bytes),
          where);
}

float perturbed(float exact, float input, float bound) {
  if (!std::isfinite(exact) || exact == 0.f) return exact;
  uint32_t hash = __float_as_uint(input) * 0x9e3779b1u;
  hash = (hash ^ hash >> 15) * 0x85ebca77u;
  hash ^= hash >> 13;
  const float share = static_cast<float>(int32_t(hash)) * 0x1p-31f;  // in [-1, 1]
  return exact * (1.f + share * bound);
}

}  // namespace emulation

namespace effkernels::cuda {

using namespace emulation;

void wait_for_previous() { current->waited = true; }

unsigned load_acquire(const unsigned* from, Where where) {
  current->waits_in = "a loop over load_acquire";
  current->waits_at = where;
  yield_turn(true);
  current->waits_in = nullptr;
  check_aligned(from, sizeof *from, "load_acquire", where);
  race::note_atomic(from, where);
  race::acquire(from);
  return *from;
}

void add_release(unsigned* to, unsigned value, Where where) {
  maybe_yield();
  check_aligned(to, sizeof *to, "add_release", where);
  race::note_atomic(to, where);
  *to += value;
  if (value != 0) progress();
  race::fence();  // a release covers what came before it
  race::release(to);
}

void cluster_sync(Where where) {
  if (current_limits().largest_cluster == 1) fault("cluster_sync on a device without clusters", where);
  Cluster& cluster = *current->block->cluster;
  Barrier& barrier = cluster.barrier;
  if (barrier.arrived == 0) {
    barrier.where = where;
  } else if (barrier.where.line != where.line || std::strcmp(barrier.where.file, where.file) != 0) {
    fault("divergent barrier: threads of the cluster already wait in cluster_sync" + at_place(barrier.where) +
              ", and this one arrives",
          where);
  }
  if (++barrier.arrived == alive_in(cluster)) {
    release_cluster(cluster);
  } else {
    current->warp->at_cluster_barrier |= 1u << current->lane;
    wait_in("cluster_sync", where);
  }
}

unsigned cluster_rank() { return current->block->rank; }

void* cluster_map_bytes(const void* pointer, unsigned rank, Where where) {
  const Block& block = *current->block;
  const Cluster& cluster = *block.cluster;
  const ptrdiff_t offset = static_cast<const char*>(pointer) - block.shared;
  if (offset < 0 || offset > ptrdiff_t(block.shared_bytes))
    fault("cluster_map: the pointer is not into the block's shared memory", where);
  if (rank >= cluster.blocks.size())
    fault("cluster_map: rank " + std::to_string(rank) + " in a cluster of " + std::to_string(cluster.blocks.size()),
          where);
  if (cluster.blocks[rank]->alive == 0) fault("cluster_map: block " + std::to_string(rank) + " has exited", where);
  return cluster.blocks[rank]->shared + offset;
}

}  // namespace effkernels::cuda
