// Scratch memory, a piece for each thread. Compiled for the baseline processor, once.
#include <pthread.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_set>

#include "kernels.h"
#include "memory.h"

namespace effkernels::cpu {
namespace {

constexpr size_t kMostKept = size_t(16) << 20;  // bytes that a thread keeps between kernels

struct Scratch;

// Those of all threads, so that one thread may free what the others do not use. Never destroyed: threads may outlive
// every static object.
struct All {
  std::mutex mutex;
  std::unordered_set<Scratch*> pieces;
};
All& all() {
  static All* const instance = [] {
    static All* const made = new All;
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); }, [] { made->mutex.unlock(); });
    return made;
  }();
  return *instance;
}

struct Scratch {
  std::mutex mutex;  // held while a kernel uses the memory
  bool in_use = false;
  void* data = nullptr;
  size_t bytes = 0;

  Scratch() {
    const std::lock_guard<std::mutex> lock(all().mutex);
    all().pieces.insert(this);
  }
  ~Scratch() {
    const std::lock_guard<std::mutex> lock(all().mutex);
    all().pieces.erase(this);
    std::free(data);
  }
  void clear() {
    std::free(data);
    data = nullptr, bytes = 0;
  }
};

thread_local Scratch mine;

}  // namespace

void* scratch(size_t bytes) {
  if (!mine.in_use) mine.mutex.lock(), mine.in_use = true;
  if (bytes > mine.bytes) {
    if (bytes > kMostBytes) throw OutOfMemory("scratch memory", bytes);
    const size_t size = (bytes + 4095) / 4096 * 4096;
    mine.clear();
    mine.data = std::aligned_alloc(64, size);
    if (!mine.data) throw OutOfMemory("scratch memory", bytes);
    mine.bytes = size;
    std::memset(mine.data, 0, size);  // rows that a tile computes but never writes out hold numbers, not garbage
  }
  return mine.data;
}

void release_scratch() {
  if (!mine.in_use) return;
  if (mine.bytes > kMostKept) mine.clear();
  mine.in_use = false;
  mine.mutex.unlock();
}

void free_scratch() {
  const std::lock_guard<std::mutex> lock(all().mutex);
  for (Scratch* piece : all().pieces) {
    if (!piece->mutex.try_lock()) continue;
    piece->clear();
    piece->mutex.unlock();
  }
}

}  // namespace effkernels::cpu
