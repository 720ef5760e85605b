// cp.async: a copy lands at once, or as late as the waits of its thread allow. A kernel must be right either way.
#include <cstring>
#include <string>

#include "engine.h"
#include "race.h"
#include "shared_address.h"

namespace effkernels::cuda {
namespace {

using namespace emulation;

constexpr int kCopyBytes = 16;

void land(const PendingCopy& copy) {
  char bytes[kCopyBytes] = {};
  std::memcpy(bytes, copy.from, size_t(copy.valid));
  std::memcpy(copy.to, bytes, kCopyBytes);
  race::note_copy(copy, true);
}

}  // namespace

SharedAddress shared_address(const void* pointer, Where where) {
  const Block& block = *current->block;
  const ptrdiff_t offset = static_cast<const char*>(pointer) - block.shared;
  if (offset < -ptrdiff_t(kSharedBase) || offset > (1 << 20))
    fault("shared_address: the pointer is not into the block's shared memory", where);
  return SharedAddress(kSharedBase + offset);
}

char* checked_shared(SharedAddress address, unsigned bytes, const char* name, Where where) {
  const Block& block = *current->block;
  const int64_t offset = int64_t(address) - kSharedBase;
  if (offset < 0 || offset + bytes > int64_t(block.shared_bytes))
    fault(std::string("out of bounds: ") + name + " of " + std::to_string(bytes) + " bytes at byte " +
              std::to_string(offset) + " of " + std::to_string(block.shared_bytes) + " bytes of shared memory",
          where);
  if (offset % bytes != 0)
    fault(std::string("misaligned address: ") + name + " of " + std::to_string(bytes) + " bytes at byte " +
              std::to_string(offset) + " of shared memory",
          where);
  return block.shared + offset;
}

void cp_async_16(SharedAddress to, const void* from, int valid, Where where) {
  if (valid < 0 || valid > kCopyBytes)
    fault("cp.async: " + std::to_string(valid) + " valid bytes of " + std::to_string(kCopyBytes), where);
  char* target = checked_shared(to, kCopyBytes, "cp.async", where);
  check_aligned(from, kCopyBytes, "cp.async", where);
  const PendingCopy copy{target, static_cast<const char*>(from), valid, current->committed_groups, where};
  race::note_copy(copy, false);
  current->copies.push_back(copy);
  if (!running->late_copies) land(copy);
}

void cp_async_commit() { ++current->committed_groups; }

void cp_async_wait_all_but(unsigned pending) {
  std::vector<PendingCopy>& copies = current->copies;
  size_t landed = 0;
  for (; landed < copies.size() && copies[landed].group + pending < current->committed_groups; ++landed)
    if (running->late_copies) land(copies[landed]);
  copies.erase(copies.begin(), copies.begin() + ptrdiff_t(landed));
}

}  // namespace effkernels::cuda

namespace emulation {
char* shared_begin() { return current->block->shared; }
}  // namespace emulation
