// The race checker: every load and store of a kernel, as the compiler's -fsanitize=thread reports it to the functions
// at the end of this file (libtsan is not linked), is held against the earlier ones of the same launch. Two accesses of
// different threads, one of them a plain write, must be ordered (race_order.h). It sees shared and global memory; reads
// of shared memory that nobody wrote, and accesses outside of it, are reported too; bytes of global memory are
// counted.
#include "race.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <cstdio>
#include <cstring>

#include "race_order.h"

namespace emulation::race {
namespace {

enum class Kind : uint8_t { kNone, kRead, kWrite, kAtomic };
const char* name_of(Kind kind) { return kind == Kind::kRead ? "read" : (kind == Kind::kWrite ? "write" : "atomic"); }

// One earlier access of a word. `site`: an offset into this library, or an index into `places` with the top bit set.
struct Stamp {
  Moment moment;
  uint32_t site = 0;
  uint8_t bytes = 0;  // which of the four
  Kind kind = Kind::kNone;
};

// Four bytes of memory. Writers of two 16-bit values each have a slot; of readers any two threads are enough, because a
// writer differs from one of them.
struct Word {
  Stamp writes[2], reads[3];
  uint8_t initialised = 0, counted_read = 0, counted_written = 0, next_write = 0, next_read = 0;
};

constexpr uintptr_t kPageBytes = 4096, kWordBytes = 4, kWords = kPageBytes / kWordBytes;
struct Page {
  uint64_t launch = 0;
  Word words[kWords];
};

struct Range {
  uintptr_t begin = 0, end = 0;
  bool contains(uintptr_t address) const { return address >= begin && address < end; }
};

struct Checker {
  Ordering order;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  uintptr_t last_number = 0;
  Page* last_page = nullptr;
  uint64_t launch = 0;
  Range image, host_stack;
  uintptr_t image_base = 0;
  std::vector<Where> places;
  std::map<std::pair<const char*, int>, uint32_t> place_numbers;
  Traffic traffic;
};
Checker& checker() {
  static Checker c;
  return c;
}

constexpr uint32_t kIsPlace = 1u << 31;

uint32_t site_of(Where where) {
  Checker& c = checker();
  const auto [found, added] = c.place_numbers.try_emplace({where.file, where.line}, uint32_t(c.places.size()));
  if (added) c.places.push_back(where);
  return found->second | kIsPlace;
}

// The line of a return address, with the lines that it was inlined into.
std::string source_lines(uint32_t offset) {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(checker().image_base + offset), &info) == 0) return "an unknown place";
  char command[1024], line[512];
  std::snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%x 2>/dev/null", info.dli_fname, offset);
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    for (int lines = 0; std::fgets(line, sizeof line, pipe) != nullptr;) {
      line[std::strcspn(line, " \n")] = '\0';
      if (std::strncmp(line, "emulator.cuh", 12) == 0 || lines == 3) continue;
      text += (lines++ == 0 ? "" : " in ") + std::string(line);
    }
    pclose(pipe);
  }
  if (text.empty() || text[0] == '?') {
    std::snprintf(line, sizeof line, "offset 0x%x of the library", offset);
    text = line;
  }
  return text;
}

std::string place_of(uint32_t site) {
  if ((site & kIsPlace) == 0) return " at " + source_lines(site);
  return at_place(checker().places[site & ~kIsPlace]);
}

Page& page_of(uintptr_t address) {
  Checker& c = checker();
  const uintptr_t number = address / kPageBytes;
  if (number == c.last_number && c.last_page != nullptr) return *c.last_page;
  std::unique_ptr<Page>& page = c.pages[number];
  if (page == nullptr) page = std::make_unique<Page>();
  if (page->launch != c.launch) {
    std::fill(page->words, page->words + kWords, Word{});
    page->launch = c.launch;
  }
  c.last_number = number;
  c.last_page = page.get();
  return *page;
}
Word& word_of(uintptr_t address) { return page_of(address).words[address % kPageBytes / kWordBytes]; }

std::string thread_text(const Moment& moment) {
  return "block " + std::to_string(moment.block) + " thread " + std::to_string(moment.thread);
}

std::string memory_text(uintptr_t address) {
  if (!in_shared_memory(address)) {
    char text[64];
    std::snprintf(text, sizeof text, "global memory at 0x%zx", size_t(address));
    return text;
  }
  for (const Block* block : current->block->cluster->blocks) {
    const auto begin = reinterpret_cast<uintptr_t>(block->shared);
    if (address >= begin && address < begin + block->shared_bytes)
      return "shared memory, byte " + std::to_string(address - begin);
  }
  return "shared memory";
}

// The block of the cluster whose shared memory holds all of the access; reported where there is none.
void check_shared_bounds(uintptr_t address, size_t bytes, Kind kind, uint32_t site) {
  for (const Block* block : current->block->cluster->blocks) {
    const auto begin = reinterpret_cast<uintptr_t>(block->shared);
    if (address < begin || address + bytes > begin + block->shared_bytes) continue;
    if (block->alive == 0)
      fault(std::string(name_of(kind)) + " of the shared memory of a block that has exited" + place_of(site));
    return;
  }
  const int64_t offset = int64_t(address) - int64_t(reinterpret_cast<uintptr_t>(current->block->shared));
  fault("out of bounds: " + std::string(name_of(kind)) + " of " + std::to_string(bytes) + " bytes at byte " +
        std::to_string(offset) + " of " + std::to_string(current->block->shared_bytes) + " bytes of shared memory" +
        place_of(site));
}

void report_race(uintptr_t address, const Stamp& before, Kind kind, uint32_t site) {
  const bool same_block = before.moment.block == current->block->linear;
  fault(std::string("race ") + (same_block ? "inside a block" : "between blocks") + " on " + memory_text(address) +
        ": " + name_of(kind) + place_of(site) + " is not ordered after the " + name_of(before.kind) +
        place_of(before.site) + " by " + thread_text(before.moment));
}

void check_against(const Stamp& before, uintptr_t address, uint8_t mask, Kind kind, uint32_t site) {
  if (before.kind == Kind::kNone || (before.bytes & mask) == 0) return;
  if (before.kind == Kind::kAtomic && kind == Kind::kAtomic) return;
  if (!checker().order.ordered(before.moment, *current)) report_race(address, before, kind, site);
}

void remember(Stamp* slots, int count, uint8_t& next, const Stamp& stamp) {
  Stamp* slot = nullptr;
  for (int i = 0; i < count && slot == nullptr; ++i) {
    Stamp& old = slots[i];
    const bool same =
        old.kind == stamp.kind && old.moment.block == stamp.moment.block && old.moment.thread == stamp.moment.thread;
    if (same && old.moment.time == stamp.moment.time) {
      old.bytes |= stamp.bytes;
      return;
    }
    if (old.kind == Kind::kNone || (same && (old.bytes & ~stamp.bytes) == 0)) slot = &old;
  }
  if (slot == nullptr) slot = &slots[next++ % count];
  *slot = stamp;
}

enum class Landing { kNone, kIssued, kLanded };  // of a copy: written when issued, initialised when landed

void touch(uintptr_t address, size_t bytes, Kind kind, uint32_t site, Landing landing = Landing::kNone) {
  Checker& c = checker();
  const bool shared = in_shared_memory(address);
  if (shared) check_shared_bounds(address, bytes, kind, site);
  if (!shared && running->shape.overlaps && !current->waited)
    fault(std::string(name_of(kind)) + " of " + memory_text(address) + place_of(site) + " before wait_for_previous");
  const Moment moment{current->block->linear, c.order.now(), uint16_t(current->linear)};
  for (uintptr_t at = address & ~(kWordBytes - 1); at < address + bytes; at += kWordBytes) {
    Word& word = word_of(at);
    uint8_t mask = 0xf;
    if (at < address) mask &= uint8_t(0xf << (address - at));
    if (at + kWordBytes > address + bytes) mask &= uint8_t(0xf >> (at + kWordBytes - address - bytes));
    if (shared && kind != Kind::kWrite && (word.initialised & mask) != mask)
      fault("uninitialised " + memory_text(at) + ", " + name_of(kind) + place_of(site));
    for (const Stamp& before : word.writes) check_against(before, at, mask, kind, site);
    if (kind != Kind::kRead)
      for (const Stamp& before : word.reads) check_against(before, at, mask, kind, site);
    const Stamp stamp{moment, site, mask, kind};
    if (kind == Kind::kRead) {
      remember(word.reads, 3, word.next_read, stamp);
    } else {
      remember(word.writes, 2, word.next_write, stamp);
      if (landing != Landing::kIssued) word.initialised |= mask;
    }
    if (shared || kind == Kind::kAtomic) continue;
    uint8_t& counted = kind == Kind::kRead ? word.counted_read : word.counted_written;
    const int fresh = __builtin_popcount(mask & ~unsigned(counted));
    (kind == Kind::kRead ? c.traffic.unique_read : c.traffic.unique_written) += fresh;
    counted |= mask;
  }
  if (shared || kind == Kind::kAtomic) return;
  constexpr size_t kWide = 16;
  (kind == Kind::kRead ? c.traffic.read : c.traffic.written) += int64_t(bytes);
  if (bytes == kWide) (kind == Kind::kRead ? c.traffic.read_by_16 : c.traffic.written_by_16) += int64_t(bytes);
}

// A load or store of compiled code. Not of interest: the stacks, which hold what a thread has for itself and the
// arguments of the kernel, and the variables of this library.
void compiled_access(const void* pointer, size_t bytes, Kind kind, const void* return_address) {
  if (current == nullptr) return;
  const Checker& c = checker();
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (stacks().contains(address) || c.host_stack.contains(address) || c.image.contains(address)) return;
  touch(address, bytes, kind, uint32_t(reinterpret_cast<uintptr_t>(return_address) - 1 - c.image_base));
}

int find_image(dl_phdr_info* info, size_t, void* out) {
  const auto inside = reinterpret_cast<uintptr_t>(&find_image);
  Range range{~uintptr_t(0), 0};
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    range.begin = std::min<uintptr_t>(range.begin, info->dlpi_addr + header.p_vaddr);
    range.end = std::max<uintptr_t>(range.end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
  }
  if (!range.contains(inside)) return 0;
  auto* c = static_cast<Checker*>(out);
  c->image = range;
  c->image_base = info->dlpi_addr;
  return 1;
}

Range stack_of_this_thread() {
  static thread_local Range known;
  if (known.end == 0) {
    pthread_attr_t attributes;
    void* begin = nullptr;
    size_t bytes = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
    known = {reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes};
  }
  return known;
}

}  // namespace

void launch_begins() {
  Checker& c = checker();
  if (c.image.end == 0) dl_iterate_phdr(find_image, &c);
  c.host_stack = stack_of_this_thread();
  ++c.launch;
  c.last_page = nullptr;
  c.traffic = {};
  c.order.begin(running->blocks, running->threads_per_block, running->shape.cluster);
}

void launch_ends(Traffic* traffic) {
  *traffic = checker().traffic;
  constexpr size_t kMostPages = 16384;  // of shadow memory, before it is given back
  if (checker().pages.size() > kMostPages) checker().pages.clear();
}

void block_begins(const Block& block) {
  const auto begin = reinterpret_cast<uintptr_t>(block.shared);
  for (uintptr_t at = begin; at < begin + block.shared_bytes; at += kWordBytes) word_of(at) = Word{};
}

void block_synchronised(const Block& block) { checker().order.block_synchronised(block); }
void cluster_synchronised(const Cluster& cluster) { checker().order.cluster_synchronised(cluster); }
void warp_synchronised(const Warp& warp, uint32_t mask) {
  checker().order.warp_synchronised(warp, *current->block, mask);
}
void fence() { checker().order.fence(*current); }
void release(const unsigned* at) { checker().order.release(*current, at); }
void acquire(const unsigned* at) { checker().order.acquire(*current, at); }

void note_atomic(const unsigned* at, Where where) {
  touch(reinterpret_cast<uintptr_t>(at), sizeof *at, Kind::kAtomic, site_of(where));
}
void note_read(const char* from, unsigned bytes, Where where) {
  touch(reinterpret_cast<uintptr_t>(from), bytes, Kind::kRead, site_of(where));
}
void note_copy(const PendingCopy& copy, bool landed) {
  constexpr size_t kCopyBytes = 16;
  const uint32_t site = site_of(copy.where);
  if (!landed && copy.valid > 0) touch(reinterpret_cast<uintptr_t>(copy.from), size_t(copy.valid), Kind::kRead, site);
  touch(reinterpret_cast<uintptr_t>(copy.to), kCopyBytes, Kind::kWrite, site,
        landed ? Landing::kLanded : Landing::kIssued);
}

}  // namespace emulation::race

// ------------------------------------------------------------------------------------ what the compiler's checks call
#define HOOK extern "C" __attribute__((used, visibility("hidden")))
#define ACCESS(kind, pointer, bytes) \
  emulation::race::compiled_access(pointer, bytes, emulation::race::Kind::kind, __builtin_return_address(0))

HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
HOOK void __tsan_read_range(void* pointer, size_t bytes) { ACCESS(kRead, pointer, bytes); }
HOOK void __tsan_write_range(void* pointer, size_t bytes) { ACCESS(kWrite, pointer, bytes); }
HOOK void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

#define ACCESSES_OF(bytes)                                                                 \
  HOOK void __tsan_read##bytes(void* pointer) { ACCESS(kRead, pointer, bytes); }           \
  HOOK void __tsan_write##bytes(void* pointer) { ACCESS(kWrite, pointer, bytes); }         \
  HOOK void __tsan_unaligned_read##bytes(void* pointer) { ACCESS(kRead, pointer, bytes); } \
  HOOK void __tsan_unaligned_write##bytes(void* pointer) { ACCESS(kWrite, pointer, bytes); }
ACCESSES_OF(1)
ACCESSES_OF(2)
ACCESSES_OF(4)
ACCESSES_OF(8)
ACCESSES_OF(16)

// std::atomic, which only the host code uses (kernels have CUDA's atomics).
#define ATOMICS_OF(bits, T)                                                                                          \
  HOOK T __tsan_atomic##bits##_load(const volatile T* from, int) { return __atomic_load_n(from, __ATOMIC_SEQ_CST); } \
  HOOK void __tsan_atomic##bits##_store(volatile T* to, T value, int) {                                              \
    __atomic_store_n(to, value, __ATOMIC_SEQ_CST);                                                                   \
  }                                                                                                                  \
  HOOK T __tsan_atomic##bits##_exchange(volatile T* to, T value, int) {                                              \
    return __atomic_exchange_n(to, value, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                                  \
  HOOK T __tsan_atomic##bits##_fetch_add(volatile T* to, T value, int) {                                             \
    return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                                  \
  HOOK T __tsan_atomic##bits##_fetch_sub(volatile T* to, T value, int) {                                             \
    return __atomic_fetch_sub(to, value, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                                  \
  HOOK T __tsan_atomic##bits##_fetch_or(volatile T* to, T value, int) {                                              \
    return __atomic_fetch_or(to, value, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                                  \
  HOOK T __tsan_atomic##bits##_fetch_and(volatile T* to, T value, int) {                                             \
    return __atomic_fetch_and(to, value, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                                  \
  HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile T* to, T* expected, T value, int, int) {           \
    return __atomic_compare_exchange_n(to, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
  }                                                                                                                  \
  HOOK int __tsan_atomic##bits##_compare_exchange_weak(volatile T* to, T* expected, T value, int, int) {             \
    return __atomic_compare_exchange_n(to, expected, value, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);               \
  }
ATOMICS_OF(8, uint8_t)
ATOMICS_OF(16, uint16_t)
ATOMICS_OF(32, uint32_t)
ATOMICS_OF(64, uint64_t)
