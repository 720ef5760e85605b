// Runs a launch: which blocks are alive, which thread goes on, and what becomes of a fault.
#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <tuple>

#include "engine.h"
#include "race.h"

namespace emulation {

BuiltIns built_ins;
Thread* current = nullptr;
Launch* running = nullptr;

Settings& settings() {
  static Settings s;
  return s;
}
std::vector<LaunchRecord>& launch_log() {
  static std::vector<LaunchRecord> log;
  return log;
}
StackPool& stacks() {
  static StackPool pool;
  return pool;
}

namespace {

constexpr int kTurnsInAWarp = 8;        // in the random order, a warp is left after this many changes on average
constexpr int kYieldOneIn = 4;          // in the random order, at an atomic, a fence or a load past the L1 cache
constexpr uint64_t kIdleTurns = 20000;  // and 64 for each thread alive: then whoever spins does so forever

void thread_entry();

void collect_left_stack() {
  if (running->left_stack != nullptr) stacks().give_back(std::exchange(running->left_stack, nullptr));
}

// The lane of the warp that goes on; there is one.
unsigned pick_lane(uint32_t ready, unsigned after) {
  switch (running->order) {
    case Order::kForward: {
      const uint32_t behind = after >= kLanes - 1 ? 0 : ready & ~0u << (after + 1);
      return unsigned(__builtin_ctz(behind ? behind : ready));
    }
    case Order::kReverse: {
      const uint32_t before = after == 0 ? 0 : ready & ~0u >> (kLanes - after);
      return 31u - unsigned(__builtin_clz(before ? before : ready));
    }
    default: {
      const uint32_t behind = ready & ~0u << running->random.below(kLanes);
      return unsigned(__builtin_ctz(behind ? behind : ready));
    }
  }
}

Thread& thread_of(Warp& warp, unsigned lane, Block& block) { return block.threads[warp.first_thread + lane]; }

// Makes `thread` the current one; its fiber has then to be gone on with.
void enter(Thread& thread) {
  if (current == nullptr || current->block != thread.block) built_ins.block_index = thread.block->index;
  current = &thread;
  built_ins.thread_index = thread.index;
  if (!thread.started) {
    thread.started = true;
    if (thread.fiber.stack == nullptr) prepare(thread.fiber, stacks().take(), thread_entry);
  }
}

// Who goes on when a thread of `warp` cannot: another one of the warp, or null for the scheduler.
Thread* next_in_warp(const Thread& thread) {
  if (thread.warp->ready == 0) return nullptr;
  if (running->order == Order::kRandom && running->random.below(kTurnsInAWarp) == 0) return nullptr;
  return &thread_of(*thread.warp, pick_lane(thread.warp->ready, thread.lane), *thread.block);
}

[[noreturn]] void leave_for_good(Thread& thread, Thread* next) {
  running->left_stack = std::exchange(thread.fiber.stack, nullptr);
  if (next != nullptr) enter(*next);
  change_over(thread.fiber, next != nullptr ? next->fiber : running->scheduler, true);
  __builtin_unreachable();
}

void finish(Thread& thread) {
  if (running->shape.overlaps && !thread.waited)
    fault("the thread leaves without wait_for_previous, in a launch that may overlap the one ahead of it");
  if (!thread.copies.empty())
    fault("the thread exits with cp.async copies that were not waited for", thread.copies[0].where);
  thread.warp->alive &= ~(1u << thread.lane);
  thread.warp->ready &= ~(1u << thread.lane);
  --thread.block->alive;
  progress();
  left_kernel(thread);
}

// A fiber runs one thread, and then those of its warp that have not started: a kernel without barriers needs one stack.
void thread_entry() {
  entered(running->scheduler);
  collect_left_stack();
  for (;;) {
    running->kernel.run(running->kernel.callable);
    Thread& done = *current;
    finish(done);
    Thread* next = next_in_warp(done);
    if (next == nullptr || next->started) leave_for_good(done, next);
    next->fiber.stack = std::exchange(done.fiber.stack, nullptr);
    next->fiber.bounds_low = done.fiber.bounds_low;
    next->fiber.bounds_bytes = done.fiber.bounds_bytes;
    enter(*next);
  }
}

uint3 index_of(unsigned linear, const dim3& size) {
  return {linear % size.x, linear / size.x % size.y, linear / (size.x * size.y)};
}

// Blocks are kept for later launches: most have the same number of threads.
std::vector<std::unique_ptr<Block>>& idle_blocks() {
  static std::vector<std::unique_ptr<Block>> idle;
  return idle;
}

Block* start_block(unsigned linear, std::shared_ptr<Cluster> cluster) {
  if (idle_blocks().empty()) idle_blocks().push_back(std::make_unique<Block>());
  Block* block = idle_blocks().back().release();
  idle_blocks().pop_back();
  const LaunchShape& shape = running->shape;
  const unsigned count = running->threads_per_block;
  current = nullptr;  // it may be a thread of this very object, in its last block
  block->linear = linear;
  block->index = index_of(linear, shape.grid);
  block->rank = unsigned(cluster->blocks.size());
  block->alive = count;
  block->cluster = std::move(cluster);
  block->barrier = {};
  block->threads.resize(count);
  block->warps.resize((count + kLanes - 1) / kLanes);
  for (unsigned w = 0; w < block->warps.size(); ++w) {
    Warp& warp = block->warps[w];
    warp.first_thread = w * kLanes;
    warp.lanes = std::min(kLanes, count - warp.first_thread);
    warp.alive = warp.ready = ~0u >> (kLanes - warp.lanes);
    warp.yielded = warp.at_barrier = warp.at_cluster_barrier = 0;
    warp.whole.mask = ~0u;
    warp.whole.arrived = 0;
    warp.partial.clear();
  }
  uint3 index{0, 0, 0};
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    thread.index = index;
    thread.linear = i;
    thread.lane = i % kLanes;
    thread.warp = &block->warps[i / kLanes];
    thread.block = block;
    thread.started = thread.waited = false;
    thread.waits_in = nullptr;
    thread.committed_groups = 0;
    thread.copies.clear();
    if (++index.x == shape.block.x) {
      index.x = 0;
      if (++index.y == shape.block.y) index.y = 0, ++index.z;
    }
  }
  block->shared_bytes = shape.shared_bytes;
  block->shared = take_shared_memory(shape.shared_bytes);
  race::block_begins(*block);
  progress();
  return block;
}

void check_guards(const Block& block) {
  std::string what;
  if (running->fault.empty() && !guards_intact(block.shared, block.shared_bytes, &what)) {
    const uint3& i = block.index;
    running->fault = what + " by block (" + std::to_string(i.x) + "," + std::to_string(i.y) + "," +
                     std::to_string(i.z) + "), or by a block of its cluster";
  }
}

// Everything of the cluster goes back to its pool.
void end_cluster(Cluster& cluster) {
  std::vector<Block*> blocks = std::move(cluster.blocks);
  for (Block* block : blocks) {
    check_guards(*block);
    for (Thread& thread : block->threads)
      if (thread.fiber.stack != nullptr) stacks().give_back(std::exchange(thread.fiber.stack, nullptr));
    give_back_shared_memory(block->shared, block->shared_bytes);
    block->cluster.reset();
    idle_blocks().emplace_back(block);
  }
}

// One turn of a block: each of its warps runs until all of its threads wait. Whether anything ran.
bool turn(Block& block) {
  Launch& launch = *running;
  const unsigned warps = unsigned(block.warps.size());
  const unsigned first = launch.order == Order::kRandom ? launch.random.below(warps) : 0;
  const bool downwards =
      launch.order == Order::kReverse || (launch.order == Order::kRandom && launch.random.next() % 2);
  bool ran = false;
  for (unsigned i = 0; i < warps; ++i) {
    Warp& warp = block.warps[(first + (downwards ? warps - 1 - i : i)) % warps];
    warp.ready |= std::exchange(warp.yielded, 0);
    while (warp.ready != 0) {
      ran = true;
      const unsigned after = launch.order == Order::kForward ? kLanes - 1 : 0;
      Thread& thread = thread_of(warp, pick_lane(warp.ready, after), block);
      enter(thread);
      change_over(launch.scheduler, thread.fiber);
      collect_left_stack();
      if (!launch.fault.empty()) return true;
      if (launch.order == Order::kRandom && launch.random.next() % 2 == 0) break;
    }
  }
  return ran;
}

// What the threads that are alive wait in: "12 threads in __syncthreads at file:line, first block (...) thread (...)".
std::string who_waits() {
  using Key = std::tuple<std::string, const char*, int>;
  std::map<Key, std::pair<unsigned, const Thread*>> places;
  for (const Block* block : running->live)
    for (const Thread& thread : block->threads) {
      if ((thread.warp->alive >> thread.lane & 1) == 0 || thread.waits_in == nullptr) continue;
      auto& [count, first] = places[{thread.waits_in, thread.waits_at.file, thread.waits_at.line}];
      if (count++ == 0) first = &thread;
    }
  std::string text;
  for (const auto& [key, place] : places) {
    const auto& [count, first] = place;
    text += (text.empty() ? "" : "; ") + std::to_string(count) + " threads in " + std::get<0>(key) +
            at_place(first->waits_at) + ", first " + thread_name(*first);
  }
  return text;
}

// Keeps as many clusters alive as the launch may have at a time, until all blocks have run.
void run_blocks(unsigned clusters, unsigned most_alive) {
  Launch& launch = *running;
  std::vector<unsigned> order(clusters);
  std::iota(order.begin(), order.end(), 0u);
  if (launch.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (launch.order == Order::kRandom)
    for (unsigned i = clusters; i > 1; --i) std::swap(order[i - 1], order[launch.random.below(i)]);

  unsigned next = 0;
  const unsigned blocks_alive = most_alive * launch.shape.cluster;
  while (launch.fault.empty()) {
    while (next < clusters && launch.live.size() + launch.shape.cluster <= blocks_alive) {
      auto cluster = std::make_shared<Cluster>();
      for (unsigned rank = 0; rank < launch.shape.cluster; ++rank)
        cluster->blocks.push_back(start_block(order[next] * launch.shape.cluster + rank, cluster));
      if (launch.order == Order::kReverse) {
        launch.live.insert(launch.live.end(), cluster->blocks.rbegin(), cluster->blocks.rend());
      } else {
        launch.live.insert(launch.live.end(), cluster->blocks.begin(), cluster->blocks.end());
      }
      cluster->unfinished = launch.shape.cluster;
      ++next;
    }
    if (launch.live.empty()) return;
    if (launch.order == Order::kRandom)
      std::swap(launch.live.front(), launch.live[launch.random.below(unsigned(launch.live.size()))]);
    bool ran = false;
    for (size_t i = 0; i < launch.live.size() && launch.fault.empty();) {
      Block& block = *launch.live[i];
      ran |= turn(block);
      if (!launch.fault.empty()) return;
      if (block.alive != 0) {
        ++i;
        continue;
      }
      const std::shared_ptr<Cluster> cluster = block.cluster;
      launch.live.erase(launch.live.begin() + ptrdiff_t(i));
      poison_shared_memory(block.shared, block.shared_bytes);
      if (--cluster->unfinished == 0) end_cluster(*cluster);
    }
    if (!launch.fault.empty()) return;
    const uint64_t threads = uint64_t(launch.live.size()) * launch.threads_per_block;
    if (!ran && !launch.live.empty())
      launch.fault = "deadlock, no thread can go on: " + who_waits();
    else if (launch.idle_turns > kIdleTurns + 64 * threads)
      launch.fault = "deadlock, threads spin on what nobody changes: " + who_waits();
    if (!launch.fault.empty() && next < clusters && !launch.shape.cooperative)
      launch.fault += "; blocks of the grid have not started, which only a cooperative launch may wait for";
  }
}

}  // namespace

void progress() { running->idle_turns = 0; }

void pause() {
  Thread& self = *current;
  Thread* next = next_in_warp(self);
  if (next != nullptr) enter(*next);
  change_over(self.fiber, next != nullptr ? next->fiber : running->scheduler);
  collect_left_stack();
}

void wait_in(const char* what, Where where) {
  current->waits_in = what;
  current->waits_at = where;
  current->warp->ready &= ~(1u << current->lane);
  pause();
  current->waits_in = nullptr;
}

void yield_turn(bool idle) {
  running->idle_turns += idle;
  const uint32_t self = 1u << current->lane;
  current->warp->ready &= ~self;
  current->warp->yielded |= self;
  pause();
}

void maybe_yield() {
  if (running->order == Order::kRandom && running->random.below(kYieldOneIn) == 0) yield_turn(false);
}

std::string at_place(Where where) {
  if (where.file == nullptr) return "";
  const std::string path = where.file;
  return " at " + path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line);
}

std::string thread_name(const Thread& thread) {
  const auto triple = [](const uint3& v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
  };
  return "block " + triple(thread.block->index) + " thread " + triple(thread.index);
}

void fault(const std::string& what, Where where) {
  if (running->fault.empty()) running->fault = what + at_place(where) + ", by " + thread_name(*current);
  leave_for_good(*current, nullptr);
}

cudaError_t launch_erased(const LaunchShape& shape, void (*run)(const void*), const void* callable) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Limits& limits = current_limits();
  const cudaError_t refused =
      check_launch(limits, shape.grid, shape.block, shape.shared_bytes, shape.cluster, shape.cooperative);
  if (refused != cudaSuccess) return remember(refused);

  const Settings& chosen = settings();
  const unsigned blocks = shape.grid.x * shape.grid.y * shape.grid.z;
  Launch launch{shape,
                {run, callable},
                chosen.order,
                chosen.late_copies,
                Random(chosen.seed),
                blocks,
                shape.block.x * shape.block.y * shape.block.z};
  running = &launch;
  built_ins.block_size = shape.block;
  built_ins.grid_size = shape.grid;
  race::launch_begins();

  const unsigned clusters = blocks / shape.cluster;
  run_blocks(clusters, shape.cooperative ? clusters : std::max(1u, chosen.most_residents / shape.cluster));

  while (!launch.live.empty()) {  // after a fault
    const std::shared_ptr<Cluster> cluster = launch.live.front()->cluster;
    launch.live.erase(std::remove_if(launch.live.begin(), launch.live.end(),
                                     [&](const Block* block) { return block->cluster == cluster; }),
                      launch.live.end());
    end_cluster(*cluster);
  }
  LaunchRecord record{shape.grid, shape.block, int64_t(shape.shared_bytes), shape.cluster, shape.cooperative, {}};
  race::launch_ends(&record.traffic);
  running = nullptr;
  current = nullptr;
  launch_log().push_back(record);
  if (!launch.fault.empty()) throw std::runtime_error("emulated kernel: " + launch.fault);
  return cudaSuccess;
}

}  // namespace emulation
