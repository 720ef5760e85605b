#include "recording.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <mutex>
#include <sstream>
#include <utility>

namespace effkernels::ops {

struct RecordedKernel {
  std::string layer;
  std::function<void(const cpu::Parallel&)> run;
};
using Kernels = std::vector<RecordedKernel>;

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

const Kernels& piece_of(const Recording& recording, int64_t piece) {
  STD_TORCH_CHECK(piece >= 1 && piece <= int64_t(recording.pieces.size()), "piece=", piece,
                  " of a recording is not there; allowed: 1 to ", recording.pieces.size());
  return recording.pieces[size_t(piece - 1)];
}

const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kFloat16 ? "float16" : "bfloat16";
}

template <class... Sizes>
std::string line_of(const char* kernel, const Sizes&... sizes) {
  std::ostringstream line;
  line << kernel;
  (void(line << ' ' << sizes.first << '=' << sizes.second), ...);
  return line.str();
}

template <class Value>
std::pair<const char*, Value> size(const char* name, Value value) {
  return {name, value};
}

}  // namespace

std::string layer_of(const DepthwiseParams& p) {
  return line_of("depthwise", size("dtype", name_of(p.dtype)), size("batch", p.batch), size("channels", p.channels),
                 size("height", p.height), size("width", p.width), size("out_height", p.out_height),
                 size("out_width", p.out_width), size("kernel_h", p.kernel_h), size("kernel_w", p.kernel_w));
}

std::string layer_of(const SqueezeExciteParams& p) {
  return line_of("squeeze_excite", size("dtype", name_of(p.gate_dtype)), size("batch", p.batch),
                 size("channels", p.channels), size("reduced", p.reduced));
}

std::string layer_of(const ScaleParams& p) {
  return line_of("scale", size("dtype", name_of(p.dtype)), size("batch", p.batch), size("pixels", p.pixels),
                 size("channels", p.channels));
}

std::string layer_of(const PointwiseParams& p) {
  return line_of(p.pools ? "pointwise_pool" : "pointwise", size("dtype", name_of(p.dtype)), size("batch", p.batch),
                 size("pixels", p.pixels), size("in_channels", p.in_channels), size("out_channels", p.out_channels),
                 size("residual", p.residual != nullptr));
}

std::string layer_of(const cpu::ExpandDepthwiseParams& p) {
  return line_of("expand_depthwise", size("in_channels", p.expand.in_channels)) +
         layer_of(p.depthwise).substr(std::string("depthwise").size());
}

std::string layer_of(const ConvParams& p) {
  return line_of("conv", size("dtype", name_of(p.dtype)), size("batch", p.batch), size("in_channels", p.in_channels),
                 size("out_channels", p.out_channels), size("height", p.height), size("width", p.width),
                 size("out_height", p.out_height), size("out_width", p.out_width), size("kernel_h", p.kernel_h),
                 size("kernel_w", p.kernel_w));
}

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

void record(std::string layer, std::function<void(const cpu::Parallel&)> kernel, const Keep& keep) {
  current->kernels.push_back({std::move(layer), std::move(kernel)});
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
  for (const RecordedKernel& kernel : piece_of(*found, piece)) kernel.run(threads);
}

std::string recorded_layers(const Tensor& recording, int64_t piece) {
  const std::shared_ptr<Recording> found = find(recording);
  std::string lines;
  for (const RecordedKernel& kernel : piece_of(*found, piece)) lines += kernel.layer + "\n";
  return lines;
}

std::vector<int64_t> time_recording(const Tensor& recording, int64_t piece, int64_t rounds,
                                    const cpu::Parallel& threads) {
  using Clock = std::chrono::steady_clock;
  STD_TORCH_CHECK(rounds >= 1, "rounds=", rounds, " of cpu_recording_times; allowed: 1 or more");
  const std::shared_ptr<Recording> found = find(recording);
  const Kernels& kernels = piece_of(*found, piece);
  std::vector<int64_t> shortest(kernels.size(), std::numeric_limits<int64_t>::max());
  for (int64_t round = 0; round < rounds; round++)
    for (size_t i = 0; i < kernels.size(); i++) {
      const Clock::time_point begin = Clock::now();
      kernels[i].run(threads);
      const int64_t time = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
      shortest[i] = std::min(shortest[i], time);
    }
  return shortest;
}

std::vector<int64_t> recorded_bytes(const Tensor& recording) {
  const std::shared_ptr<Recording> found = find(recording);
  return {int64_t(found->memory->peak()), int64_t(found->kept.peak())};
}

}  // namespace effkernels::ops
