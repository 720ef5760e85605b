// Memory for the results of the CPU operators.
//
// malloc hands large blocks back to the system at once, so that every call pays for fresh pages again: 4 KiB at a time,
// a fault and a clearing each. For the 1.6 MB of B0's first depthwise layer that was 0.24 ms of work and 0.8 ms of
// page faults (one thread, virtual machine). This pool keeps what it mapped, in huge pages where the system has them,
// and hands it out first fit, lowest address first, so that it stays about as large as what was alive at once.
#pragma once
#include <cstddef>
#include <map>
#include <mutex>
#include <new>
#include <string>

namespace effkernels::cpu {

constexpr size_t kMostBytes = size_t(1) << 62;  // of one allocation: rounding it up does not wrap

// Says what did not fit.
class OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(const char* of, size_t bytes)
      : what_("effkernels: no memory for " + std::to_string(bytes) + " bytes of " + of) {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

// Ranges of mapped memory, from any thread.
class Pool {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool();  // nothing of it may be in use

  void* allocate(size_t bytes);  // 64-byte aligned; throws OutOfMemory
  void release(void* data);
  void set_limit(size_t bytes);  // what may stay mapped while nobody uses it; starts at 1 GiB
  size_t mapped();               // bytes mapped now, in use or not
  size_t peak();                 // the most bytes that were in use at once
  bool owns(const void* data);   // whether it is in the mapped memory
  std::mutex& mutex() { return mutex_; }

 private:
  struct Chunk {
    size_t size, used;
  };
  using Chunks = std::map<char*, Chunk>;

  Chunks::iterator chunk_of(char* data);
  std::map<char*, size_t>::iterator map_chunk(size_t bytes);
  void unmap(Chunks::iterator chunk);

  std::mutex mutex_;
  std::map<char*, size_t> free_, used_;  // by address
  Chunks chunks_;
  size_t mapped_ = 0, limit_ = size_t(1) << 30, in_use_ = 0, peak_ = 0;
};

constexpr size_t kSmallestPooled = 64 * 1024;  // bytes; malloc serves smaller ones well

// That of the results of all operators. Never destroyed: tensors may outlive every static object.
Pool& pool();

}  // namespace effkernels::cpu
