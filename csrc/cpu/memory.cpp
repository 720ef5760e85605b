#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <map>
#include <mutex>

namespace effkernels::cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kSmallestChunk = size_t(32) << 20;
constexpr size_t kAlignment = 64;

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

}  // namespace

void* Pool::allocate(size_t bytes) {
  if (bytes > kMostBytes) throw OutOfMemory("a result", bytes);
  bytes = round_up(bytes, kAlignment);
  std::lock_guard<std::mutex> lock(mutex_);
  auto range = free_.begin();
  while (range != free_.end() && range->second < bytes) ++range;
  if (range == free_.end()) range = map_chunk(bytes);
  char* const data = range->first;
  const size_t rest = range->second - bytes;
  free_.erase(range);
  if (rest) free_.emplace(data + bytes, rest);
  used_.emplace(data, bytes);
  chunk_of(data)->second.used += bytes;
  in_use_ += bytes;
  if (in_use_ > peak_) peak_ = in_use_;
  return data;
}

void Pool::release(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto block = used_.find(static_cast<char*>(pointer));
  char* begin = block->first;
  size_t bytes = block->second;
  used_.erase(block);
  const auto chunk = chunk_of(begin);
  chunk->second.used -= bytes;
  in_use_ -= bytes;
  // Join the free neighbours of the same chunk.
  auto next = free_.lower_bound(begin);
  if (next != free_.end() && next->first == begin + bytes && next->first < chunk->first + chunk->second.size) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto previous = std::prev(next);
    if (previous->first >= chunk->first && previous->first + previous->second == begin) {
      begin = previous->first, bytes += previous->second;
      free_.erase(previous);
    }
  }
  free_.emplace(begin, bytes);
  if (chunk->second.used == 0 && mapped_ > limit_) unmap(chunk);
}

void Pool::set_limit(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes;
  for (auto chunk = chunks_.begin(); chunk != chunks_.end() && mapped_ > limit_;) {
    const auto next = std::next(chunk);
    if (chunk->second.used == 0) unmap(chunk);
    chunk = next;
  }
}

size_t Pool::mapped() {
  std::lock_guard<std::mutex> lock(mutex_);
  return mapped_;
}

Pool::Chunks::iterator Pool::chunk_of(char* data) { return std::prev(chunks_.upper_bound(data)); }

std::map<char*, size_t>::iterator Pool::map_chunk(size_t bytes) {
  const size_t size = round_up(bytes < kSmallestChunk ? kSmallestChunk : bytes, kHugePage);
  void* mapping = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw OutOfMemory("a result", bytes);
  char* const start = static_cast<char*>(mapping);
  char* const base = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(start), kHugePage));
  if (base != start) munmap(start, size_t(base - start));
  if (start + kHugePage != base) munmap(base + size, size_t(start + kHugePage - base));
#ifdef MADV_HUGEPAGE
  madvise(base, size, MADV_HUGEPAGE);  // a wish: without it the pages are small
#endif
  chunks_.emplace(base, Chunk{size, 0});
  mapped_ += size;
  return free_.emplace(base, size).first;
}

void Pool::unmap(Chunks::iterator chunk) {
  free_.erase(chunk->first);
  munmap(chunk->first, chunk->second.size);
  mapped_ -= chunk->second.size;
  chunks_.erase(chunk);
}

size_t Pool::peak() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return peak_;
}

bool Pool::owns(const void* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  char* const place = static_cast<char*>(const_cast<void*>(data));
  const auto after = chunks_.upper_bound(place);
  if (after == chunks_.begin()) return false;
  const auto chunk = std::prev(after);
  return place < chunk->first + chunk->second.size;
}

Pool::~Pool() {
  for (const auto& [base, chunk] : chunks_) munmap(base, chunk.size);
}

// A fork waits until no other thread is in the pool.
Pool& pool() {
  static Pool* const instance = [] {
    static Pool* const made = new Pool;
    pthread_atfork([] { made->mutex().lock(); }, [] { made->mutex().unlock(); }, [] { made->mutex().unlock(); });
    return made;
  }();
  return *instance;
}

}  // namespace effkernels::cpu
