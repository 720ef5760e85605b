#include "fiber.h"

#include <sys/mman.h>

#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {
constexpr size_t kPageBytes = 4096;
}

StackPool::StackPool() {
  for (size_t stacks = kMostStacks; stacks >= 1024; stacks /= 2) {
    bytes_ = stacks * kStackBytes;
    void* mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped != MAP_FAILED) {
      begin_ = static_cast<char*>(mapped);
      return;
    }
  }
  throw std::bad_alloc();
}

char* StackPool::take() {
  if (!free_.empty()) {  // the one used last: its memory is in the cache
    char* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  if ((used_ + 1) * kStackBytes > bytes_) throw std::bad_alloc();
  char* stack = begin_ + used_ * kStackBytes;
  if (used_++ < kMostGuards) mprotect(stack, kPageBytes, PROT_NONE);
  return stack;
}

#ifndef EMULATION_UCONTEXT
// Keeps what the calling convention of x86-64 wants kept, on the stack that is left. The word of alignment that the
// two kinds of entry differ by is in prepare().
extern "C" __attribute__((naked, noinline)) void emulation_swap(void** /*rdi: from*/, void* /*rsi: to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

void prepare(Fiber& fiber, char* stack, void (*entry)()) {
  fiber.stack = stack;
  fiber.bounds_low = stack;
  fiber.bounds_bytes = StackPool::kStackBytes;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack + kPageBytes, StackPool::kStackBytes - kPageBytes);  // frames left for good
#endif
#ifdef EMULATION_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = StackPool::kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  constexpr int kSavedRegisters = 6;
  // Stacks whose tops are a multiple of 4096 apart would share their cache sets.
  const size_t stagger = (reinterpret_cast<uintptr_t>(stack) / StackPool::kStackBytes) % 16 * 192;
  void** top = reinterpret_cast<void**>(stack + StackPool::kStackBytes - stagger);
  *--top = nullptr;  // entry's return address; the stack is then as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

void change_over(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bounds_low, to.bounds_bytes);
#endif
#ifdef EMULATION_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  emulation_swap(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void entered([[maybe_unused]] Fiber& first) {
#ifdef __SANITIZE_ADDRESS__
  const void* low;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &low, &bytes);
  if (first.bounds_low == nullptr) first.bounds_low = low, first.bounds_bytes = bytes;
#endif
}

}  // namespace emulation
