#include "recording.h"

#include <map>
#include <mutex>
#include <utility>

namespace effkernels::ops {

using Kernels = std::vector<std::function<void(const cpu::Parallel&)>>;

struct Recording {
  std::shared_ptr<cpu::Pool> memory = std::make_shared<cpu::Pool>();  // of results; ranges are used again within it
  cpu::Pool kept;                                                     // what replays read: never used again
  Kernels kernels;                                                    // of the piece in the making
  std::vector<Kernels> pieces;
  Keep keep;
};

namespace {

// Recordings by the address that their tensors have, so that no other tensor is taken for one.
struct Recordings {
  std::mutex mutex;
  std::map<const void*, std::shared_ptr<Recording>> by_address;
};

Recordings& recordings() {
  static Recordings* const all = new Recordings;  // never destroyed: engines may outlive every static object
  return *all;
}

thread_local Recording* current = nullptr;

std::shared_ptr<Recording> find(const Tensor& recording) {
  Recordings& all = recordings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.by_address.find(recording.const_data_ptr());
  STD_TORCH_CHECK(found != all.by_address.end(), "recording is no recording; allowed: a tensor of cpu_recording");
  return found->second;
}

void forget(void* address, void*) {
  Recordings& all = recordings();
  std::shared_ptr<Recording> last;  // destroyed after the lock: it frees tensors
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.by_address.find(address);
  last = std::move(found->second);
  all.by_address.erase(found);
}

}  // namespace

RecordingScope::RecordingScope(const Tensor& recording) : recording_(find(recording)) {
  STD_TORCH_CHECK(current == nullptr, "an operator inside of a recorded one cannot be recorded");
  current = recording_.get();
}

RecordingScope::~RecordingScope() { current = nullptr; }

std::shared_ptr<cpu::Pool> recording_memory() { return current ? current->memory : nullptr; }

bool is_recording() { return current != nullptr; }

void refuse_copy(const char* name) {
  STD_TORCH_CHECK(!is_recording(), name,
                  " would be copied into another layout, which cannot be recorded; allowed: channels_last images and "
                  "contiguous matrices");
}

void record(std::function<void(const cpu::Parallel&)> kernel, const Keep& keep) {
  current->kernels.push_back(std::move(kernel));
  for (const Tensor& t : keep)
    if (!current->memory->owns(t.const_data_ptr())) current->keep.push_back(t);
}

void* keep_memory(size_t bytes) { return current->kept.allocate(bytes); }

Tensor new_recording() {
  auto made = std::make_shared<Recording>();
  void* const address = made.get();
  Recordings& all = recordings();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.by_address[address] = std::move(made);
  }
  const int64_t one = 1;
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error =
      torch_from_blob(address, 1, &one, &one, 0, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), -1, &handle,
                      aoti_torch_layout_strided(), nullptr, 0, forget, nullptr);
  if (error != AOTI_TORCH_SUCCESS) forget(address, nullptr);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

int64_t cut_recording(const Tensor& recording) {
  const std::shared_ptr<Recording> found = find(recording);
  if (found->kernels.empty()) return 0;
  found->pieces.push_back(std::exchange(found->kernels, {}));
  return int64_t(found->pieces.size());
}

void replay_recording(const Tensor& recording, int64_t piece, const cpu::Parallel& threads) {
  const std::shared_ptr<Recording> found = find(recording);
  STD_TORCH_CHECK(piece >= 1 && piece <= int64_t(found->pieces.size()), "piece=", piece,
                  " of a recording is not there; allowed: 1 to ", found->pieces.size());
  for (const auto& kernel : found->pieces[size_t(piece - 1)]) kernel(threads);
}

std::vector<int64_t> recorded_bytes(const Tensor& recording) {
  const std::shared_ptr<Recording> found = find(recording);
  return {int64_t(found->memory->peak()), int64_t(found->kept.peak())};
}

}  // namespace effkernels::ops
