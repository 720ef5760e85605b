#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../cpu/memory.h"
#include "../sizes.h"
#include "check.h"
#include "recording.h"

namespace effkernels::ops {

using torch::headeronly::ScalarType;

namespace {

Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  const bool cuda = like.is_cuda();
  const int32_t device_type = cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  int64_t elements = 1;
  for (int64_t i = 0; i < dim; i++) elements = product({elements, sizes[i]});
  STD_TORCH_CHECK(elements <= kMostElements, "a tensor of shape ",
                  shape_of_sizes(std::vector<int64_t>(sizes, sizes + dim)),
                  " is needed; allowed: sizes whose product is at most 2^54");
  const size_t bytes = size_t(elements) * (dtype == ScalarType::Float ? 4 : 2);
  if (cuda || (bytes < cpu::kSmallestPooled && !is_recording())) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, int32_t(dtype), device_type,
                                                           cuda ? like.get_device_index() : 0, &handle));
  } else {
    // Memory of a recording stays as long as a tensor uses it.
    auto* const owner = is_recording() ? new std::shared_ptr<cpu::Pool>(recording_memory()) : nullptr;
    const auto release = [](void* pointer, void* context) {
      auto* const recording = static_cast<std::shared_ptr<cpu::Pool>*>(context);
      (recording ? **recording : cpu::pool()).release(pointer);
      delete recording;
    };
    void* data = (owner ? **owner : cpu::pool()).allocate(bytes ? bytes : 1);
    const AOTITorchError error = torch_from_blob(data, dim, sizes, strides, 0, int32_t(dtype), device_type, -1, &handle,
                                                 aoti_torch_layout_strided(), nullptr, 0, release, owner);
    if (error != AOTI_TORCH_SUCCESS) release(data, owner);
    STABLE_TORCH_ERROR_CODE_CHECK(error);
  }
  return Tensor(handle);
}

}  // namespace

Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t sizes[] = {n, c, h, w}, strides[] = {c * h * w, 1, w * c, c};
  return empty_strided(like, sizes, strides, 4, like.scalar_type());
}

Tensor empty_nhwc(const Tensor& like, int64_t n, int64_t h, int64_t w, int64_t c) {
  const int64_t sizes[] = {n, h, w, c}, strides[] = {h * w * c, w * c, c, 1};
  return empty_strided(like, sizes, strides, 4, like.scalar_type());
}

Tensor empty_matrix(const Tensor& like, int64_t n, int64_t c, ScalarType dtype) {
  const int64_t sizes[] = {n, c}, strides[] = {c, 1};
  return empty_strided(like, sizes, strides, 2, dtype);
}

Tensor to_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor to_channels_last(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  const bool channels_adjacent = c == 1 || x.stride(1) == 1;
  const bool positive = (h == 1 || x.stride(2) > 0) && (w == 1 || x.stride(3) > 0);
  if (channels_adjacent && positive) return x;
  refuse_copy("the input");
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor to_rows(const Tensor& x, int64_t& stride_p) {
  Tensor rows = to_channels_last(x);
  const int64_t h = rows.size(2), w = rows.size(3);
  stride_p = w > 1 ? rows.stride(3) : h > 1 ? rows.stride(2) : rows.size(1);
  if (h > 1 && w > 1 && rows.stride(2) != w * rows.stride(3)) {
    refuse_copy("the input");
    rows = torch::stable::contiguous(rows, torch::headeronly::MemoryFormat::ChannelsLast);
    stride_p = rows.size(1);
  }
  return rows;
}

}  // namespace effkernels::ops
