// The dynamic shared memory of the blocks that are alive: as many bytes as the launch asks for, filled with NaN, and
// guarded on both sides.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "engine.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace emulation {
namespace {

constexpr size_t kGuardBytes = 4096;
constexpr size_t kSlotBytes = 256 * 1024 + 2 * kGuardBytes;  // more than a block of any GPU can have
constexpr size_t kMostSlots = 1 << 16;
constexpr uint16_t kGuard = 0xfffe;  // a NaN of every type, and not the NaN that the memory itself starts with

char* arena() {
  static char* const begin = [] {
    void* mapped = mmap(nullptr, kMostSlots * kSlotBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(mapped);
  }();
  return begin;
}

std::vector<char*>& free_slots() {
  static std::vector<char*> slots;
  return slots;
}

uint16_t guard_at(const char* at) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  return address % 2 == 0 ? kGuard & 0xff : kGuard >> 8;
}

void fill_guard(char* from, char* to) {
  for (; from < to; ++from) *from = static_cast<char>(guard_at(from));
}

// Only the nearest bytes are refilled and looked at for each block: an overrun starts there or strides far.
constexpr size_t kCheckedBytes = 256;

}  // namespace

char* take_shared_memory(size_t bytes) {
  static size_t used = 0;
  if (free_slots().empty()) {
    if (used == kMostSlots) throw std::bad_alloc();
    free_slots().push_back(arena() + used++ * kSlotBytes);
  }
  char* begin = free_slots().back() + kGuardBytes;
  free_slots().pop_back();
  std::memset(begin, 0xff, bytes);
  fill_guard(begin - kCheckedBytes, begin);
  fill_guard(begin + bytes, begin + bytes + kCheckedBytes);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(begin - kGuardBytes, kGuardBytes);
  __asan_unpoison_memory_region(begin, bytes);
  __asan_poison_memory_region(begin + bytes, kSlotBytes - kGuardBytes - bytes);
#endif
  return begin;
}

void poison_shared_memory(char* begin, size_t bytes) {
  std::memset(begin, 0xff, bytes);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(begin, bytes);
#endif
}

__attribute__((no_sanitize_address)) bool guards_intact(const char* begin, size_t bytes, std::string* what) {
  for (size_t i = 1; i <= kCheckedBytes; ++i)
    if (static_cast<unsigned char>(*(begin - i)) != guard_at(begin - i)) {
      *what = "out of bounds: shared memory was written " + std::to_string(i) + " bytes before its begin";
      return false;
    }
  for (size_t i = 0; i < kCheckedBytes; ++i)
    if (static_cast<unsigned char>(begin[bytes + i]) != guard_at(begin + bytes + i)) {
      *what = "out of bounds: shared memory was written " + std::to_string(i) + " bytes after its " +
              std::to_string(bytes) + " bytes";
      return false;
    }
  return true;
}

void give_back_shared_memory(char* begin, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(begin - kGuardBytes, kSlotBytes);
#endif
  (void)bytes;
  free_slots().push_back(begin - kGuardBytes);
}

bool in_shared_memory(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(arena()) < kMostSlots * kSlotBytes;
}

}  // namespace emulation
