// Fibers: a stack and a place to go on, changed over to by hand. All of them run on the thread that launches.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#if !defined(__x86_64__) || defined(EFFKERNELS_EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulation {

class StackPool {
 public:
  static constexpr size_t kStackBytes = 256 * 1024;  // of address space: memory is taken as it is touched

  StackPool();
  char* take();  // the lowest address of a stack
  void give_back(char* stack) { free_.push_back(stack); }
  bool contains(uintptr_t address) const { return address - uintptr_t(begin_) < bytes_; }

 private:
  // A guard page costs two of the 65530 mappings that Linux allows a process; the stacks beyond go without.
  static constexpr size_t kMostStacks = size_t(1) << 18, kMostGuards = 8192;
  char* begin_ = nullptr;
  size_t bytes_ = 0, used_ = 0;
  std::vector<char*> free_;
};

struct Fiber {
#ifdef EMULATION_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;
  const void* bounds_low = nullptr;  // of the stack, for AddressSanitizer
  size_t bounds_bytes = 0;
  void* fake_stack = nullptr;
};

// Gives the fiber a stack on which `entry` starts when it is changed over to. `entry` never returns.
void prepare(Fiber& fiber, char* stack, void (*entry)());
// Goes on with `to`. Comes back when somebody goes on with `from`, which is never where `from` is left for good.
void change_over(Fiber& from, Fiber& to, bool for_good = false);
// The first thing that `entry` calls; `first` is the fiber of the thread itself.
void entered(Fiber& first);

}  // namespace emulation
