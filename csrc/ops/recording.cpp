#include "recording.h"

#include <map>
#include <mutex>
#include <utility>

namespace effkernels::ops {
namespace {

struct Piece {
  std::shared_ptr<cpu::Pool> memory;  // of results; ranges are used again within the recording
  std::shared_ptr<cpu::Pool> kept;    // of what every replay reads: nothing else may ever have lain there
  std::vector<std::function<void(const cpu::Parallel&)>> kernels;
  Keep keep;
};

struct Pieces {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<const Piece>> by_number;
  int64_t last = 0;
};

Pieces& pieces() {
  static Pieces* const all = new Pieces;  // never destroyed: engines may outlive every static object
  return *all;
}

thread_local Piece piece;  // in the making

std::shared_ptr<const Piece> find(int64_t number) {
  Pieces& all = pieces();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto place = all.by_number.find(number);
  STD_TORCH_CHECK(place != all.by_number.end(), "piece=", number,
                  " of a recording is not there; allowed: a number that cpu_record told and nobody freed");
  return place->second;
}

}  // namespace

std::shared_ptr<cpu::Pool>& recording_memory() { return piece.memory; }

void refuse_copy(const char* name) {
  STD_TORCH_CHECK(!is_recording(), name,
                  " would be copied into another layout, which cannot be recorded; allowed: channels_last images and "
                  "contiguous matrices");
}

void record(std::function<void(const cpu::Parallel&)> kernel, const Keep& keep) {
  piece.kernels.push_back(std::move(kernel));
  for (const Tensor& t : keep)
    if (!piece.memory->owns(t.const_data_ptr())) piece.keep.push_back(t);
}

void* keep_memory(size_t bytes) { return piece.kept->allocate(bytes); }

void begin_recording() {
  STD_TORCH_CHECK(!is_recording(), "cpu_record: this thread records already");
  piece.memory = std::make_shared<cpu::Pool>();
  piece.kept = std::make_shared<cpu::Pool>();
}

int64_t cut_recording() {
  STD_TORCH_CHECK(is_recording(), "cpu_record: this thread does not record");
  if (piece.kernels.empty()) return 0;
  auto done = std::make_shared<Piece>();
  done->memory = piece.memory;
  done->kept = piece.kept;
  std::swap(done->kernels, piece.kernels);
  std::swap(done->keep, piece.keep);
  Pieces& all = pieces();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.by_number[++all.last] = std::move(done);
  return all.last;
}

void end_recording() { piece = Piece{}; }

void replay_recording(int64_t number, const cpu::Parallel& threads) {
  const std::shared_ptr<const Piece> found = find(number);
  for (const auto& kernel : found->kernels) kernel(threads);
}

std::vector<int64_t> recorded_bytes(int64_t number) {
  const std::shared_ptr<const Piece> found = find(number);
  return {int64_t(found->memory->peak()), int64_t(found->kept->peak())};
}

void free_recording(int64_t number) {
  Pieces& all = pieces();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.by_number.erase(number);
}

}  // namespace effkernels::ops
